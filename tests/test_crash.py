"""A run that is killed anywhere: the state stays true, and one crash run finishes the job."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Proxied
from fault_proxy import Exchange, Fault, RateLimit, answer, call, delay, pass_on, stall
from proxied_job import (
    IN_PARTS,
    LARGE_BYTES,
    MIB,
    PART_BYTES,
    ProxiedJob,
    Start,
    after_forward,
    kill,
    md5,
    small_files,
    some_bytes,
)
from script_runner import wait_until
from servers import S3Server
from systems import needs_signals

ROUNDS = 40
SMALL_FILES = 200
# HeadBucket, the small files, and the start, parts and end of one multipart upload.
REQUESTS = 1 + SMALL_FILES + 1 + 3 + 1


@pytest.fixture
def job(
    proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start, moto_s3: S3Server
) -> ProxiedJob:
    """A job on moto, which lists open multipart uploads and their parts as S3 does."""
    return ProxiedJob(moto_s3, proxied, bucket=bucket_name, folder=backup_folder, start=start)


# --- Killed at random ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_one_crash_run_finishes_what_was_killed_anywhere(job: ProxiedJob, seed: int) -> None:
    rng = random.Random(seed)
    job.make({**small_files(SMALL_FILES, seed), "d3/large": some_bytes(LARGE_BYTES, seed)})
    job.proxy.bandwidth = RateLimit(rng.uniform(5, 15) * MIB, job.proxy.closing)
    process = job.start(*IN_PARTS)
    kill_at_random(job, process, rng)
    assert job.state_path.exists() or not job.requests("PutObject")
    if job.state_path.exists():
        job.check_state_is_true()
    job.proxy.bandwidth = None
    crashrun = "1" if job.state_path.exists() else "0"
    completed = job.run("--crashrun", crashrun, *IN_PARTS)
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()
    assert [upload for upload in job.server.open_uploads(job.bucket) if upload[2]] == []
    assert not job.state_path.with_name("stateFile.json.tmp").exists()
    job.server.remove_bucket(job.bucket)  # or the server's memory would hold all rounds


def kill_at_random(job: ProxiedJob, process: subprocess.Popen[str], rng: random.Random) -> None:
    """Kill the run at a random request, or after a random time before and about the first one."""
    if rng.random() < 0.25:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 1.5))
    else:
        count = rng.randrange(1, REQUESTS)
        wait_until(
            lambda: len(job.proxy.requests) >= count or process.poll() is not None,
            60,
            f"request {count}",
        )
    kill(process)


# --- Killed at a chosen place ----------------------------------------------------------------

KILLER = """\
import os, signal

real = os.{name}
calls = 0

def killing(*args, **keywords):
    global calls
    if not {condition}:
        return real(*args, **keywords)
    calls += 1
    if calls == {count} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **keywords)
    if calls == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

os.{name} = killing
"""


def killing_call(
    folder: Path, name: str, *, count: int, before: bool = True, condition: str = "True"
) -> dict[str, str]:
    """The environment in which a run is killed at its n-th call of that function of `os`.

    `condition` is an expression that says of `args` whether a call counts.
    """
    folder.mkdir()
    code = KILLER.format(name=name, condition=condition, count=count, before=before)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def walks(name: str, job: ProxiedJob) -> str:
    """A condition for `killing_call`: the walk is at that folder, and the state says so."""
    # A first look at the folder, for the number of worker processes, comes before.
    state = f"open({str(job.state_path)!r}).read()"
    begun = f"""'"filepath": "{job.folder}", "uploadedSuccess": 0' in {state}"""
    is_there = f"os.path.basename(os.fspath(args[0])) == {name!r}"
    return f"({is_there} and os.path.exists({str(job.state_path)!r}) and {begun})"


def test_nothing_goes_on_when_the_run_is_killed(job: ProxiedJob) -> None:
    job.make(small_files(400))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    process = job.start()
    job.wait_for("PutObject", 40)
    process.kill()
    process.communicate(timeout=10)  # all processes that can write to its output are gone
    assert job.proxy.count("PutObject") < 400
    job.check_state_is_true()


@needs_signals
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_while_the_state_is_saved(
    job: ProxiedJob, tmp_path: Path, name: str, count: int, before: bool
) -> None:
    job.make({**small_files(30), "large": some_bytes(LARGE_BYTES)})
    env = killing_call(tmp_path / "killer", name, count=count, before=before)
    process = job.start(*IN_PARTS, env=env)
    assert process.wait(60) == -9
    if job.state_path.exists():
        job.check_state_is_true()
        assert job.crash_run(*IN_PARTS).returncode == 0
    else:
        assert count == 1
        assert job.run(*IN_PARTS).returncode == 0
    job.check_all_is_there()
    assert not job.state_path.with_name("stateFile.json.tmp").exists()
    assert [upload for upload in job.server.open_uploads(job.bucket) if upload[2]] == []


@needs_signals
def test_a_kill_during_the_walk_leads_the_crash_run_to_every_file(
    job: ProxiedJob, tmp_path: Path
) -> None:
    job.make(small_files(70))
    walked = walks("d4", job)
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    assert job.start(env=env).wait(60) == -9
    assert job.requests("PutObject") == []
    (entry,) = job.entries().values()
    assert (entry["filepath"], entry["uploadedSuccess"]) == (str(job.folder), 0)
    assert job.crash_run().returncode == 0
    job.check_all_is_there()


@needs_signals
def test_a_kill_during_the_walk_keeps_the_prefix(job: ProxiedJob, tmp_path: Path) -> None:
    job.make({"a/f": b"f", "b/g": b"g"})
    walked = walks("b", job)
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    assert job.start("--prefix", "daily/", env=env).wait(60) == -9
    assert job.crash_run("--prefix", "daily/").returncode == 0
    assert set(job.in_bucket()) == {"daily/a/f", "daily/b/g"}


@needs_signals
def test_a_kill_during_the_walk_of_a_second_run_forgets_no_upload(
    job: ProxiedJob, tmp_path: Path
) -> None:
    upload_id = killed_in_parts(job, kept=[1, 3])
    walked = walks("sub", job)
    job.make({"sub/f": b"f"})
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    assert job.start(*IN_PARTS, env=env).wait(60) == -9
    assert {e.get("upload_id") for e in job.entries().values()} >= {upload_id}
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


# --- Multipart uploads are gone on with ------------------------------------------------------


def killed_in_parts(job: ProxiedJob, *args: str, kept: list[int], size: int = LARGE_BYTES) -> str:
    """Kill a run when the server has just these parts of `large`; return its upload's id."""
    count = -(-size // PART_BYTES)
    job.make({"large": some_bytes(size)})
    for number in set(range(1, count + 1)) - set(kept):
        job.proxy.add_fault(Fault(stall(600), part_number=number))
    process = job.start(*IN_PARTS, *args)
    job.wait_for("UploadPart", count)
    job.wait_for("UploadPart", len(kept), answered=True)
    kill(process)
    job.proxy.clear_faults()
    entry = job.entries()["large"]
    upload = ("large", entry["upload_id"], len(kept))
    assert job.server.open_uploads(job.bucket) == [upload]
    assert entry["uploadedSuccess"] == 0
    return str(entry["upload_id"])


def parts_sent_by(job: ProxiedJob, run: Callable[[], object]) -> list[int]:
    """The numbers of the parts that are sent while a function runs."""
    before = len(job.requests("UploadPart"))
    run()
    return sorted(r.part_number or 0 for r in job.requests("UploadPart")[before:])


def check_finished_by(job: ProxiedJob, *args: str, parts: list[int]) -> None:
    """Run again: it must send these parts, and leave nothing open."""

    def run() -> None:
        completed = job.run(*IN_PARTS, *args)
        assert (completed.returncode, completed.stderr) == (0, "")

    assert parts_sent_by(job, run) == parts
    job.check_all_is_there()
    assert job.server.open_uploads(job.bucket) == []
    assert "upload_id" not in job.entries()["large"]


AGAIN = [pytest.param("1", id="crash-run"), pytest.param("0", id="normal-run")]


@pytest.mark.parametrize("crashrun", AGAIN)
@pytest.mark.parametrize("kept", [[], [1], [2, 4], [1, 2, 3, 4]], ids=str)
def test_only_missing_parts_are_sent(job: ProxiedJob, crashrun: str, kept: list[int]) -> None:
    killed_in_parts(job, kept=kept, size=4 * PART_BYTES + 1)
    missing = sorted({1, 2, 3, 4, 5} - set(kept))
    check_finished_by(job, "--crashrun", crashrun, parts=missing)
    assert job.proxy.count("CreateMultipartUpload") == 1


def test_the_upload_goes_on_at_a_server_whose_etag_is_the_md5_of_the_whole(
    proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start, rclone_s3: S3Server
) -> None:
    job = ProxiedJob(rclone_s3, proxied, bucket=bucket_name, folder=backup_folder, start=start)
    killed_in_parts(job, kept=[1, 3])
    check_finished_by(job, "--crashrun", "1", parts=[2])


def test_parts_are_listed_page_by_page(job: ProxiedJob) -> None:
    # A page holds 1,000 parts, which would be 5 GB here: the proxy asks for pages of two.
    killed_in_parts(job, kept=[1, 2, 3, 4], size=4 * PART_BYTES + 1)
    job.proxy.add_fault(Fault(in_pages_of_two, operation="ListParts"))
    check_finished_by(job, "--crashrun", "1", parts=[5])
    assert job.proxy.count("ListParts") == 2


def in_pages_of_two(exchange: Exchange) -> None:
    """Ask the server for two parts a page; moto checks no signature."""
    exchange._connection.path += "&max-parts=2"
    pass_on(exchange)


@pytest.mark.parametrize("damaged", [b"x" * PART_BYTES, b"x" * (PART_BYTES + 1)], ids=len)
def test_a_part_damaged_on_the_server_is_sent_again(job: ProxiedJob, damaged: bytes) -> None:
    upload_id = killed_in_parts(job, kept=[1, 2])
    job.client.upload_part(
        Bucket=job.bucket, Key="large", UploadId=upload_id, PartNumber=2, Body=damaged
    )
    check_finished_by(job, "--crashrun", "1", parts=[2, 3])


@pytest.mark.parametrize("crashrun", AGAIN)
def test_a_file_changed_since_is_sent_afresh(job: ProxiedJob, crashrun: str) -> None:
    upload_id = killed_in_parts(job, kept=[1, 2])
    job.make({"large": some_bytes(LARGE_BYTES + 1, seed=1)})
    check_finished_by(job, "--crashrun", crashrun, parts=[1, 2, 3])
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id


def test_a_file_that_is_small_now_is_sent_in_one_part(job: ProxiedJob) -> None:
    killed_in_parts(job, kept=[1, 2])
    job.make({"large": b"small now"})
    check_finished_by(job, "--crashrun", "1", parts=[])


def test_an_upload_that_somebody_aborted_is_started_afresh(job: ProxiedJob) -> None:
    upload_id = killed_in_parts(job, kept=[1, 2])
    job.client.abort_multipart_upload(Bucket=job.bucket, Key="large", UploadId=upload_id)
    check_finished_by(job, "--crashrun", "1", parts=[1, 2, 3])


def test_an_upload_whose_parts_may_not_be_listed_is_started_afresh(job: ProxiedJob) -> None:
    upload_id = killed_in_parts(job, kept=[1, 2])
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListParts"))
    check_finished_by(job, "--crashrun", "1", parts=[1, 2, 3])
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id


def test_another_part_size_on_the_command_line_does_not_spoil_the_parts(job: ProxiedJob) -> None:
    killed_in_parts(job, kept=[1, 2])
    check_finished_by(job, "--crashrun", "1", "--multipart-chunksize", "6MiB", parts=[3])


def test_another_storage_class_of_the_crash_run_applies(job: ProxiedJob) -> None:
    killed_in_parts(job, kept=[1, 2])
    options = ("--crashrun", "1", "--storage-class", "STANDARD_IA")
    assert job.run(*IN_PARTS, *options).returncode == 0
    head = job.client.head_object(Bucket=job.bucket, Key="large")
    assert head["StorageClass"] == "STANDARD_IA"
    job.check_all_is_there()
    assert job.server.open_uploads(job.bucket) == []


@needs_signals
@pytest.mark.parametrize("crashrun", AGAIN)
def test_a_kill_after_complete_costs_no_part(job: ProxiedJob, crashrun: str) -> None:
    processes: list[subprocess.Popen[str]] = []

    def kill_it() -> None:
        processes[0].kill()

    job.make({"large": some_bytes(LARGE_BYTES)})
    fault = Fault(after_forward(kill_it), operation="CompleteMultipartUpload", times=1)
    job.proxy.add_fault(fault)
    processes.append(job.start(*IN_PARTS))
    assert processes[0].wait(60) == -9
    assert job.uploaded() == set()
    assert set(job.in_bucket()) == {"large"}
    check_finished_by(job, "--crashrun", crashrun, parts=[])


def test_the_upload_id_is_on_disk_before_the_first_part_is_sent(job: ProxiedJob) -> None:
    seen: list[tuple[str, str]] = []
    job.make({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(
        Fault(
            call(
                lambda request: seen.append(
                    (request.query["uploadId"], job.entries()["large"]["upload_id"])
                )
            ),
            operation="UploadPart",
        )
    )
    assert job.run(*IN_PARTS).returncode == 0
    assert len(seen) == 3
    assert all(sent == on_disk for sent, on_disk in seen)


def test_a_normal_run_aborts_the_upload_of_a_file_that_is_gone(job: ProxiedJob) -> None:
    job.make({"f": b"f"})
    upload_id = killed_in_parts(job, kept=[1, 2])
    job.path("large").unlink()
    assert job.run(*IN_PARTS).returncode == 0
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id
    assert job.server.open_uploads(job.bucket) == []
    job.check_all_is_there()


def test_a_file_that_is_gone_stays_missing_in_a_crash_run(job: ProxiedJob) -> None:
    job.make({"f": b"f"})
    killed_in_parts(job, kept=[1, 2])
    job.path("large").unlink()
    job.check_failed(job.crash_run(*IN_PARTS), "large", said="no such file")


@pytest.mark.parametrize("crashrun", AGAIN)
def test_uploads_that_no_state_recorded_are_never_touched(job: ProxiedJob, crashrun: str) -> None:
    foreign = {}
    for key in ("large", "elsewhere"):
        upload_id = job.client.create_multipart_upload(Bucket=job.bucket, Key=key)["UploadId"]
        job.client.upload_part(
            Bucket=job.bucket, Key=key, UploadId=upload_id, PartNumber=1, Body=b"x"
        )
        foreign[upload_id] = key
    job.make({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(stall(600), part_number=2))
    process = job.start(*IN_PARTS)
    job.wait_for("UploadPart", 2, answered=True)
    kill(process)
    job.proxy.clear_faults()
    assert job.run(*IN_PARTS, "--crashrun", crashrun).returncode == 0
    left = {upload_id: key for key, upload_id, _ in job.server.open_uploads(job.bucket)}
    assert left == foreign
    assert md5(some_bytes(LARGE_BYTES)) == job.in_bucket()["large"]
