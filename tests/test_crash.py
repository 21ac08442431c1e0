"""A run that is killed anywhere: the state stays true, and one crash run finishes the job."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from support.checks import assert_clean
from support.faults import Fault, after_forward, delay, stall
from support.files import IN_PARTS, LARGE_BYTES, MIB, small_files, some_bytes
from support.job import Job, kill, with_state
from support.kills import kill_in_walk, killed_in_parts, killing_call
from support.script import journal_of, wait_until
from support.systems import needs_proc, needs_signals

ROUNDS, LONG_ROUNDS = 4, 60
# Of the bucket that is deleted or made anew, with two kills in each.
BUCKET_ROUNDS, LONG_BUCKET_ROUNDS = 2, 100
SMALL_FILES = 100
# In walk, merge and save.
OWN_ROUNDS, LONG_OWN_ROUNDS = 3, 140
# HeadBucket, the small files, and the start, parts and end of one multipart upload.
REQUESTS = 1 + SMALL_FILES + 1 + 3 + 1


@pytest.fixture
def job(moto_job: Job) -> Job:
    """A job on moto, which lists open multipart uploads and their parts as S3 does."""
    return moto_job


# --- Killed at random ------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rounds = {"seed": ROUNDS, "bucket_seed": BUCKET_ROUNDS, "own_seed": OWN_ROUNDS}
    if metafunc.config.getoption("--long"):
        rounds = {"seed": LONG_ROUNDS, "bucket_seed": LONG_BUCKET_ROUNDS}
        rounds["own_seed"] = LONG_OWN_ROUNDS
    for name, count in rounds.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(count))


def test_one_crash_run_finishes_what_was_killed_anywhere(rclone_job: Job, seed: int) -> None:
    job = rclone_job
    rng = random.Random(seed)
    # So many files are sent by several processes if they are sent by boto3, and by one if not.
    client = ("--preferred-transfer-client", ("crt", "classic")[seed % 2])
    job.write({**small_files(SMALL_FILES, seed), "d3/large": some_bytes(LARGE_BYTES, seed)})
    job.proxy.limit_bandwidth(rng.uniform(15, 30) * MIB)
    process = job.start(*IN_PARTS, *client)
    kill_at_random(job, process, rng, rng.randrange(1, REQUESTS))
    assert job.state_path.exists() or not job.requests("PutObject")
    if job.state_path.exists():
        job.check_state_is_true()
    job.proxy.bandwidth = None
    crashrun = "1" if job.state_path.exists() else "0"
    assert_clean(job.run("--crashrun", crashrun, *IN_PARTS, *client))
    job.check_all_is_there()
    assert [upload for upload in job.open_uploads() if upload[2]] == []
    job.check_no_leftovers()
    for key in job.in_folder():  # or the server would hold those of all rounds
        job.delete(key)


def kill_at_random(
    job: Job, process: subprocess.Popen[str], rng: random.Random, count: int
) -> None:
    """Kill the run at its n-th request, or after a random time before and about the first one."""
    if rng.random() < 0.2:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 1))
    else:
        wait_until(
            lambda: len(job.proxy.requests) >= count or process.poll() is not None,
            60,
            f"request {count}",
        )
    kill(process)


# Functions of `os` that walk, merge and save call, and how often at most (in the folder, if
# Python's own imports call them, too).
OWN_CALLS = {"scandir": 8, "stat": 100, "fchmod": 3, "fsync": 8, "replace": 3, "unlink": 3}


@needs_signals
def test_what_was_killed_in_walk_merge_or_save_is_finished_by_one_run(
    rclone_job: Job, tmp_path: Path, own_seed: int
) -> None:
    job, rng = rclone_job, random.Random(own_seed)
    job.write(small_files(60, own_seed))
    options: tuple[str, ...] = ()
    if rng.random() < 0.7:  # a later night, on which some files are new, changed or gone
        assert_clean(job.run())
        job.write(small_files(20, own_seed + 1) | {"a/new": b"new", "d9/new": b"new"})
        for key in rng.sample(sorted(job.in_folder()), 5):
            job.path(key).unlink()
            job.delete(key)  # so that folder and bucket can be compared
        options = rng.choice([(), ("--skip-unchanged",)])
    before = saved_bytes(job)
    name = rng.choice(list(OWN_CALLS))
    is_here = f"os.fspath(args[0]).startswith({str(job.folder)!r})"
    env = killing_call(
        tmp_path / "killer",
        name,
        count=rng.randrange(1, OWN_CALLS[name] + 1),
        before=rng.random() < 0.5,
        condition=is_here if name in ("scandir", "stat") else "True",
    )
    assert job.start(*options, env=env).wait(60) in (-signal.SIGKILL, 0)
    entries, bucket = job.entries() if job.state_path.exists() else [], job.in_bucket()
    for entry in entries:
        if entry["uploadedSuccess"] and entry["filename"] in job.in_folder():
            assert bucket[entry["filename"]] == entry["etag"]
    # A run that was killed before it wrote anything is none.
    has_begun = saved_bytes(job) != before
    assert_clean(job.run(*(("--crashrun", "1") if has_begun else options)))
    job.check_all_is_there()
    job.check_no_leftovers()
    for key in job.in_folder():  # or the server would hold those of all rounds
        job.delete(key)


def saved_bytes(job: Job) -> list[bytes]:
    """What is in the state and in its journal."""
    paths = job.state_path, journal_of(job.state_path)
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def remove_bucket(job: Job) -> None:
    """Delete the bucket, with what killed runs had under way."""

    def is_removed() -> bool:
        try:
            job.server.remove_bucket(job.bucket)
        except ClientError:  # something has come in meanwhile
            return False
        return True

    wait_until(is_removed, 20, "the end of the bucket")


def unproven(job: Job) -> set[str]:
    """What the state calls uploaded, and the bucket lacks or has otherwise."""
    uploaded, there = job.uploaded() if job.state_path.exists() else set(), dict[str, str]()
    with contextlib.suppress(ClientError):  # no bucket
        there = job.in_bucket()
    return {key for key in uploaded if there.get(key) != job.in_folder()[key]}


def test_a_bucket_that_goes_between_kills_is_not_said_to_hold_anything(
    job: Job, bucket_seed: int
) -> None:
    rng = random.Random(bucket_seed)
    other = replace(with_state(job, "other.json"), folder=job.folder.with_name("other"))
    other.write(small_files(3, -1 - bucket_seed))
    assert_clean(other.run("--prefix", "other/"))
    job.write(small_files(12, bucket_seed))
    lost = set[str]()  # what the state may be wrong about, until a run has looked at the bucket
    for _ in range(2):
        event = rng.choice(["nothing", "deleted", "made anew", "made anew"])
        if event != "nothing":
            remove_bucket(job)
            lost = unproven(job)
        if event == "made anew":
            assert other.crash_run("--prefix", "other/").returncode == 0
        again = rng.choice([(), ("--skip-unchanged",), *[("--crashrun", "1")] * 4])
        since = job.seen()
        process = job.start(*(again if job.state_path.exists() else ()))
        kill_at_random(job, process, rng, since + rng.randrange(1, 24))
        has_acted = job.requests("CreateBucket", "PutObject", since=since)
        assert unproven(job) <= (set() if has_acted or process.returncode == 0 else lost)
        lost = unproven(job)
    crash_run = ("--crashrun", "1") if job.state_path.exists() else ()
    assert job.run(*crash_run).returncode == 0
    assert other.crash_run("--prefix", "other/").returncode == 0
    job.check_state_is_true()
    assert job.uploaded() == set(job.in_folder())
    assert {key.removeprefix("other/") for key in other.uploaded()} == set(other.in_folder())
    assert set(job.in_bucket()) == job.uploaded() | other.uploaded()


def test_nothing_goes_on_when_the_run_is_killed(job: Job) -> None:
    job.write(small_files(150))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    process = job.start("--preferred-transfer-client", "classic")
    job.wait_for("PutObject", 20)
    process.kill()
    process.communicate(timeout=30)  # all processes that can write to its output are gone
    assert len(job.requests("PutObject")) < 150
    job.check_state_is_true()


# --- Killed at a chosen place ----------------------------------------------------------------


@needs_signals
@pytest.mark.parametrize(
    ("name", "count", "before"),
    [
        ("fsync", 1, True),
        pytest.param("replace", 1, True, marks=pytest.mark.long),
        ("replace", 1, False),
        ("replace", 2, True),
        pytest.param("fsync", 3, True, marks=pytest.mark.long),
        ("replace", 3, False),
    ],
)
@pytest.mark.few(2)
def test_a_kill_while_the_state_is_saved(
    job: Job, tmp_path: Path, name: str, count: int, before: bool
) -> None:
    job.write({**small_files(20), "large": some_bytes(LARGE_BYTES)})
    env = killing_call(tmp_path / "killer", name, count=count, before=before)
    assert job.start(*IN_PARTS, env=env).wait(60) == -signal.SIGKILL
    has_state = job.state_path.exists()
    assert has_state == (count > 1 or not before)
    if has_state:
        job.check_state_is_true()
    assert_clean(job.run(*IN_PARTS, "--crashrun", str(int(has_state))))
    job.check_all_is_there()
    job.check_no_leftovers()
    assert [upload for upload in job.open_uploads() if upload[2]] == []


@needs_signals
@needs_proc
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.few(1)
def test_a_kill_while_the_journal_is_flushed(job: Job, tmp_path: Path, before: bool) -> None:
    job.write({**small_files(20), "large": some_bytes(LARGE_BYTES)})
    file = "f'/proc/self/fd/{args[0]}'"
    is_journal = f"os.readlink({file}).endswith('.journal')"
    # One that has what a part waits for: before that no part is sent.
    has_upload = f"({is_journal} and 'upload_id' in open({file}).read())"
    env = killing_call(tmp_path / "killer", "fsync", before=before, condition=has_upload)
    assert job.start(*IN_PARTS, env=env).wait(60) == -signal.SIGKILL
    assert job.requests("UploadPart") == []
    job.check_state_is_true()
    if not before:
        assert job.entry("large")["upload_id"] == job.open_uploads()[0][1]
    assert_clean(job.crash_run(*IN_PARTS))
    job.check_all_is_there()
    job.check_no_leftovers()
    assert [upload for upload in job.open_uploads() if upload[2]] == []


@pytest.mark.parametrize("way", ["crt", pytest.param("classic", marks=pytest.mark.long)])
def test_a_kill_in_the_middle_of_small_files_costs_the_last_second(
    rclone_job: Job, way: str
) -> None:
    job, files = rclone_job, small_files(300)
    client = ("--preferred-transfer-client", way)
    job.write(files)
    job.proxy.add_fault(Fault(stall(600), operation="PutObject", after=150))
    # In real time no save of the whole comes within ten seconds.
    process = job.start(*client, "--max-concurrency", "16", real_time=True)
    job.wait_for("PutObject", 150, answered=True)
    wait_until(lambda: len(job.uploaded()) == 150, 8, "what was answered, in state and journal")
    kill(process)
    assert {entry["uploadedSuccess"] for entry in json.loads(job.state_path.read_text())} == {0}
    job.check_state_is_true()
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run(*client))
    assert len(job.sent(since)) == 150
    job.check_all_is_there()
    job.check_no_leftovers()


@needs_signals
def test_a_kill_during_the_walk_leads_the_crash_run_to_every_file(job: Job, tmp_path: Path) -> None:
    job.write(small_files(70))
    kill_in_walk(job, tmp_path / "killer", "d4", "--prefix", "daily/")
    assert job.requests("PutObject") == []
    (entry,) = job.entries()
    assert (entry["filepath"], entry["uploadedSuccess"]) == (str(job.folder), 0)
    assert_clean(job.crash_run("--prefix", "daily/"))
    there = {f"daily/{key}": digest for key, digest in job.in_folder().items()}
    assert job.in_bucket() == there
    assert job.state() == dict.fromkeys(there, 1)


@needs_signals
def test_a_kill_during_the_walk_of_a_second_run_forgets_no_upload(job: Job, tmp_path: Path) -> None:
    upload_id = killed_in_parts(job, kept=[1, 3])
    job.write({"sub/f": b"f"})
    kill_in_walk(job, tmp_path / "killer", "sub", *IN_PARTS)
    assert {entry.get("upload_id") for entry in job.entries()} >= {upload_id}
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


@needs_signals
@pytest.mark.parametrize("crashrun", ["1", "0"], ids=["crash-run", "normal-run"])
@pytest.mark.few(1)
def test_a_kill_after_complete_costs_no_part(job: Job, crashrun: str) -> None:
    processes: list[subprocess.Popen[str]] = []
    job.write({"large": some_bytes(LARGE_BYTES)})

    def kill_it() -> None:
        processes[0].kill()

    killing = Fault(after_forward(kill_it), operation="CompleteMultipartUpload", times=1)
    job.proxy.add_fault(killing)
    processes.append(job.start(*IN_PARTS))
    assert processes[0].wait(60) == -signal.SIGKILL
    assert job.uploaded() == set()
    assert set(job.in_bucket()) == {"large"}
    assert_clean(job.run(*IN_PARTS, "--crashrun", crashrun))
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()
    assert "upload_id" not in job.entry("large")
