"""--skip-unchanged: what is sent again, what is not, and that nothing is forgotten."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import Fault, answer, delay
from jobs import MIB, Job, assert_clean, assert_stopped, lines_with
from proxied_job import replace_in_answer
from script_runner import Completed, finish, make_files, wait_until
from servers import S3Server
from systems import needs_signals
from test_backup import ODD_NAMES, PARTS
from test_crash import killing_call

pytest_plugins = ["job_fixtures"]

SKIP = "--skip-unchanged"


@pytest.fixture
def job(new_job: Callable[[S3Server], Job], s3: S3Server) -> Job:
    """A job on each of the servers, seen through the proxy from its first run."""
    job = new_job(s3)
    job.proxy  # noqa: B018
    return job


def sent_since(job: Job, before: int) -> list[str]:
    """The keys of the uploads that began after so many requests."""
    uploads = ("PutObject", "CreateMultipartUpload")
    return sorted(r.key for r in job.proxy.requests[before:] if r.operation in uploads)


def sent_by(job: Job, *arguments: str) -> list[str]:
    """Run with --skip-unchanged, which has to end well; return the keys that it sent."""
    before = len(job.proxy.requests)
    assert_clean(job(SKIP, *arguments))
    return sent_since(job, before)


def unchanged(completed: Completed) -> int:
    """The number of unchanged files in the summary."""
    match = re.search(r"; ([\d,]+) unchanged, 0 failed", completed.stdout)
    assert match, completed.stdout
    return int(match[1].replace(",", ""))


def backed_up(job: Job, *names: str) -> dict[str, bytes]:
    """Make files and send them with a normal run; return them by key."""
    files = job.make(*names)
    assert_clean(job())
    return files


def change_state(job: Job, key: str, *dropped: str) -> None:
    """Take fields out of one entry of the state file."""
    entries = job.entries()
    for entry in entries:
        if entry["filename"] == key:
            for name in dropped:
                del entry[name]
    job.state_path.write_text(json.dumps(entries), encoding="utf-8")


# --- Nothing has changed ---------------------------------------------------------------------


def test_an_unchanged_folder_sends_nothing(job: Job) -> None:
    files = backed_up(job, "a.dat", "sub/b.dat", "sub/deep/c.dat")
    before, requests = job.entries(), len(job.proxy.requests)
    completed = job(SKIP)
    assert_clean(completed)
    assert sent_since(job, requests) == []
    assert job.proxy.count("ListObjectsV2") == 1
    assert unchanged(completed) == 3
    assert "sent 0 files" in completed.stdout
    assert job.entries() == before
    for entry in before:
        content = files[entry["filename"]]
        assert entry["uploadedSuccess"] == 1
        assert entry["etag"] == hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert job.objects() == files


def test_one_listing_for_a_thousand_keys(moto_job: Job) -> None:
    job = moto_job
    make_files(job.folder, {f"{n % 10}/{n:04}": b"%d" % n for n in range(1500)})
    assert_clean(job())
    job.proxy  # noqa: B018
    completed = job(SKIP)
    assert_clean(completed)
    assert unchanged(completed) == 1500
    assert job.proxy.count("ListObjectsV2") == 2
    assert sent_since(job, 0) == []
    assert set(job.state().values()) == {1}
    assert len(job.state()) == 1500


def test_an_empty_file_that_is_unchanged_is_not_sent(job: Job) -> None:
    make_files(job.folder, {"empty": b""})
    assert_clean(job())
    assert sent_by(job) == []


def test_a_multipart_object_that_is_unchanged_is_not_sent(job: Job) -> None:
    make_files(job.folder, {"parts.dat": os.urandom(11 * MIB), "small.dat": b"small"})
    assert_clean(job(*PARTS))
    before = job.entries()
    assert sent_by(job, *PARTS) == []
    assert job.entries() == before


def test_the_etag_of_a_multipart_object_is_compared_as_s3_makes_it(moto_job: Job) -> None:
    job = moto_job
    job.proxy  # noqa: B018
    make_files(job.folder, {"parts.dat": os.urandom(11 * MIB)})
    assert_clean(job(*PARTS))
    (entry,) = job.entries()
    assert re.fullmatch("[0-9a-f]{32}-3", entry["etag"])
    assert sent_by(job, *PARTS) == []


def test_odd_names_are_known_again(job: Job) -> None:
    # moto's server finds no object with a line feed in its key.
    names = [name for name in ODD_NAMES if job.server.name != "moto" or "\n" not in name]
    names += [f"folder {name}/{name}" for name in names]
    backed_up(job, *names)
    completed = job(SKIP)
    assert_clean(completed)
    assert unchanged(completed) == len(names)
    assert sent_since(job, 0) == sorted(names)  # by the first run, once


def test_the_listing_is_of_the_prefix_alone(job: Job) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job("--prefix", "host1/"))
    assert sent_by(job, "--prefix", "host1/") == []
    (listing,) = (r for r in job.proxy.requests if r.operation == "ListObjectsV2")
    assert listing.query["prefix"].startswith("host1/")


# --- Something has changed in the folder -----------------------------------------------------


def longer(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"some more bytes than before")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def older(path: Path) -> None:
    os.utime(path, (0, 0))


@pytest.mark.parametrize("change", [longer, touched, older])
def test_a_file_with_another_size_or_time_is_sent(job: Job, change: Callable[[Path], None]) -> None:
    backed_up(job, "a.dat", "b.dat", "c.dat")
    change(job.folder / "b.dat")
    assert sent_by(job) == ["b.dat"]
    local = {name: (job.folder / name).read_bytes() for name in ("a.dat", "b.dat", "c.dat")}
    assert job.objects() == local
    assert job.state() == dict.fromkeys(local, 1)
    assert sent_by(job) == []


def test_a_new_file_is_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "c.dat")
    files |= job.make("b.dat")
    assert sent_by(job) == ["b.dat"]
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


def test_a_file_that_failed_before_is_sent(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(answer(400, "EntityTooLarge"), operation="PutObject", key="b.dat"))
    assert job().returncode == 1
    assert job.state() == {"a.dat": 1, "b.dat": 0}
    job.proxy.clear_faults()
    assert sent_by(job) == ["b.dat"]
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


def test_a_file_that_failed_is_sent_even_if_the_bucket_has_such_an_object(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    state = job.state_path.read_text(encoding="utf-8")
    changed = re.sub(r'(b\.dat", "uploadedSuccess": )1', r"\g<1>0", state)
    assert changed != state
    job.state_path.write_text(changed, encoding="utf-8")
    assert sent_by(job) == ["b.dat"]
    assert job.state() == dict.fromkeys(files, 1)


@pytest.mark.parametrize("dropped", ["etag", "size", "mtime_ns"])
def test_an_entry_that_lacks_what_is_compared_is_sent(job: Job, dropped: str) -> None:
    backed_up(job, "a.dat", "b.dat")
    change_state(job, "b.dat", dropped)
    assert sent_by(job) == ["b.dat"]
    assert sent_by(job) == []


def test_a_state_with_the_original_three_fields_has_all_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    job.state_path.write_text(
        json.dumps([job.pending_entry(key, uploadedSuccess=1) for key in files])
    )
    assert sent_by(job) == ["a.dat", "b.dat"]
    assert sent_by(job) == []


def test_another_prefix_has_all_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    assert sent_by(job, "--prefix", "daily/") == ["daily/a.dat", "daily/b.dat"]
    assert job.objects() == {**files, **{f"daily/{key}": files[key] for key in files}}
    assert sent_by(job, "--prefix", "daily/") == []


def test_nothing_is_ever_deleted_from_the_bucket(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    (job.folder / "b.dat").unlink()
    assert sent_by(job) == []
    assert job.objects() == files
    assert job.state() == {"a.dat": 1}
    assert {r.method for r in job.proxy.requests} <= {"HEAD", "GET", "PUT"}


# --- Something has changed in the bucket -----------------------------------------------------


@pytest.mark.parametrize(
    "found", [None, b"other size", b"BYTES of b.dat"], ids=["missing", "size", "bytes"]
)
def test_an_object_that_is_not_as_recorded_is_sent_again(job: Job, found: bytes | None) -> None:
    files = backed_up(job, "a.dat", "b.dat", "c.dat")
    client = job.server.client()
    if found is None:
        client.delete_object(Bucket=job.bucket, Key="b.dat")
    else:
        client.put_object(Bucket=job.bucket, Key="b.dat", Body=found)
    assert sent_by(job) == ["b.dat"]
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


def test_a_bucket_that_is_gone_has_all_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    job.server.remove_bucket(job.bucket)
    assert sent_by(job) == ["a.dat", "b.dat"]
    assert job.objects() == files


def test_a_state_of_another_bucket_proves_nothing_here(job: Job, tmp_path: Path) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    other = f"{job.bucket[:50]}-other"
    replace(job, bucket=other).create_bucket()
    before = len(job.proxy.requests)
    assert_clean(job(SKIP, "--bucketname", other))
    assert sent_since(job, before) == ["a.dat", "b.dat"]
    assert job.server.objects(other) == files
    assert {entry["bucket"] for entry in job.entries()} == {other}
    job.server.remove_bucket(other)


# --- The listing -----------------------------------------------------------------------------


def test_a_listing_that_is_refused_is_said_and_all_is_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    before = len(job.proxy.requests)
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListObjectsV2"))
    completed = job(SKIP)
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert "cannot list the bucket" in said
    assert "AccessDenied" in said
    assert sent_since(job, before) == ["a.dat", "b.dat"]
    assert unchanged(completed) == 0
    assert job.state() == dict.fromkeys(files, 1)


def test_a_listing_that_breaks_off_is_said_and_the_rest_is_sent(moto_job: Job) -> None:
    job = moto_job
    make_files(job.folder, {f"{n:04}": b"%d" % n for n in range(1002)})
    assert_clean(job())
    token = re.compile(rb"<NextContinuationToken>.*</NextContinuationToken>")
    change = replace_in_answer(lambda page: token.sub(b"", page))
    job.proxy.add_fault(Fault(change, operation="ListObjectsV2"))
    completed = job(SKIP)
    assert completed.returncode == 0
    assert "cannot list the bucket" in completed.stderr
    assert sent_since(job, 0) == ["1000", "1001"]
    assert set(job.state().values()) == {1}


def test_a_listing_that_goes_in_circles_is_said_and_the_rest_is_sent(moto_job: Job) -> None:
    job = moto_job
    make_files(job.folder, {f"{n:04}": b"%d" % n for n in range(1002)})
    assert_clean(job())
    pages: list[bytes] = []

    def first_page(page: bytes) -> bytes:
        pages.append(page)
        return pages[0]

    job.proxy.add_fault(Fault(replace_in_answer(first_page), operation="ListObjectsV2"))
    completed = job(SKIP, timeout=60)
    assert completed.returncode == 0
    assert "cannot list the bucket" in completed.stderr
    assert len(pages) == 2
    assert sent_since(job, 0) == ["1000", "1001"]


def test_a_listing_that_is_throttled_once_is_asked_for_again(job: Job) -> None:
    backed_up(job, "a.dat", "b.dat")
    fault = Fault(answer(503, "SlowDown"), operation="ListObjectsV2", times=1)
    job.proxy.add_fault(fault)
    assert sent_by(job) == []
    assert fault.hits == 1
    assert job.proxy.count("ListObjectsV2") == 2


@needs_signals
@pytest.mark.parametrize("dryrun", [(), ("--dryrun",)], ids=["run", "dryrun"])
def test_a_signal_during_the_listing_ends_the_run_and_forgets_nothing(
    job: Job, dryrun: tuple[str, ...]
) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    before = job.entries()
    job.proxy.add_fault(Fault(delay(600), operation="ListObjectsV2", times=1))
    process = job.start(SKIP, *dryrun)
    wait_until(lambda: job.proxy.count("ListObjectsV2"), 30, "the listing")
    process.send_signal(signal.SIGTERM)
    completed = finish(process, timeout=10)
    assert completed.returncode == 143
    assert len(completed.stderr.splitlines()) == 1
    if dryrun:
        assert job.entries() == before
    assert job.state().items() >= dict.fromkeys(files, 1).items()
    assert sent_by(job) == []
    assert job.entries() == before


# --- The state file --------------------------------------------------------------------------


def test_without_a_state_all_is_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    job.state_path.unlink()
    assert sent_by(job) == ["a.dat", "b.dat"]
    assert job.state() == dict.fromkeys(files, 1)
    assert sent_by(job) == []


def test_a_first_run_needs_no_listing(job: Job) -> None:
    job.make("a.dat")
    job.create_bucket()
    assert sent_by(job) == ["a.dat"]
    assert job.proxy.count("ListObjectsV2") == 0


def test_a_damaged_state_is_refused(job: Job) -> None:
    job.make("a.dat")
    job.state_path.write_bytes(b"[\n{")
    assert_stopped(job(SKIP), str(job.state_path), "damaged")
    assert job.proxy.requests == []
    assert job.state_path.read_bytes() == b"[\n{"


def killed_in_the_walk(job: Job, tmp_path: Path, *arguments: str) -> None:
    """Kill a --skip-unchanged run when it comes to the folder `sub`."""
    walked = "os.path.basename(os.fspath(args[0])) == 'sub'"
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    assert job.start(SKIP, *arguments, env=env).wait(60) == -9


@needs_signals
@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ((), ["a.dat", "new.dat", "sub/b.dat"]),
        (("--crashrun", "1"), ["new.dat"]),
        ((SKIP,), ["new.dat"]),
        ((SKIP, "--crashrun", "1"), ["new.dat"]),
    ],
    ids=["normal", "crash", "skip", "crash-skip"],
)
def test_a_kill_during_the_walk_forgets_no_upload(
    job: Job, tmp_path: Path, arguments: tuple[str, ...], sent: list[str]
) -> None:
    files = backed_up(job, "a.dat", "sub/b.dat")
    uploaded = job.entries()
    files |= job.make("new.dat")
    before = len(job.proxy.requests)
    killed_in_the_walk(job, tmp_path)
    assert sent_since(job, before) == []
    folder, *kept = job.entries()
    assert (folder["filepath"], folder["uploadedSuccess"]) == (str(job.folder), 0)
    assert kept == uploaded
    before = len(job.proxy.requests)
    assert_clean(job(*arguments))
    assert sent_since(job, before) == sent
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


@needs_signals
def test_kills_during_the_walks_of_several_runs_forget_no_upload(job: Job, tmp_path: Path) -> None:
    files = backed_up(job, "a.dat", "sub/b.dat")
    for number in range(3):
        place = tmp_path / str(number)
        place.mkdir()
        killed_in_the_walk(job, place)
    assert sent_by(job) == []
    assert job.state() == dict.fromkeys(files, 1)


@needs_signals
@pytest.mark.parametrize("skip", [(), (SKIP,)], ids=["plain", "skip"])
def test_a_kill_during_the_walk_of_a_run_for_another_bucket_leaves_a_state_for_that_one(
    job: Job, tmp_path: Path, skip: tuple[str, ...]
) -> None:
    files = backed_up(job, "a.dat", "sub/b.dat")
    to_other = ("--bucketname", f"{job.bucket[:50]}-other")
    killed_in_the_walk(job, tmp_path, *to_other)
    before = len(job.proxy.requests)
    assert_clean(job("--crashrun", "1", *skip, *to_other))
    assert sent_since(job, before) == ["a.dat", "sub/b.dat"]
    assert job.server.objects(to_other[1]) == files
    assert job.state() == dict.fromkeys(files, 1)
    job.server.remove_bucket(to_other[1])


@needs_signals
def test_a_kill_during_the_walk_of_a_run_for_another_folder_leaves_a_state_for_that_one(
    job: Job, tmp_path: Path
) -> None:
    backed_up(job, "a.dat")
    other = tmp_path / "elsewhere"
    make_files(other, {"b.dat": b"b", "sub/c.dat": b"c"})
    killed_in_the_walk(job, tmp_path, "--backupfolder", str(other))
    assert_clean(job.crash_run("--backupfolder", other))
    assert job.state() == {"b.dat": 1, "sub/c.dat": 1}
    assert job.objects()["sub/c.dat"] == b"c"


def test_a_kill_while_files_are_sent_has_only_the_others_sent(job: Job) -> None:
    backed_up(job, *(f"{n:02}" for n in range(40)))
    for number in range(20):
        touched(job.folder / f"{number:02}")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject", after=5))
    first = len(job.proxy.requests)
    process = job.start(SKIP, "--max-concurrency", "4")
    wait_until(lambda: len(sent_since(job, first)) >= 9, 30, "all that may be under way")
    process.kill()
    process.communicate()
    job.proxy.clear_faults()
    # No unchanged file is sent; of the touched ones the state may lag behind by the last moments.
    confirmed = {key for key, uploaded in job.state().items() if uploaded}
    assert {f"{n:02}" for n in range(20, 40)} <= confirmed
    before = len(job.proxy.requests)
    assert_clean(job.crash_run())
    assert set(sent_since(job, before)) == {f"{n:02}" for n in range(40)} - confirmed
    assert set(job.state().values()) == {1}


# --- With --dryrun and --crashrun 1 ----------------------------------------------------------


def listed(job: Job, stdout: str) -> list[str]:
    """The keys that a dry run lists."""
    urls = (
        line.partition(f" s3://{job.bucket}/")[2] for line in lines_with(stdout, "would upload")
    )
    return [url.rpartition(" (")[0] for url in urls]


def methods_since(job: Job, before: int) -> Iterable[str]:
    return {request.method for request in job.proxy.requests[before:]}


def test_dry_run_lists_only_what_would_be_sent(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat", "c.dat")
    touched(job.folder / "b.dat")
    job.make("new.dat")
    state, before = job.state_path.read_bytes(), len(job.proxy.requests)
    completed = job(SKIP, "--dryrun")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert listed(job, completed.stdout) == ["b.dat", "new.dat"]
    assert unchanged(completed) == 2
    assert methods_since(job, before) == {"HEAD", "GET"}
    assert job.state_path.read_bytes() == state
    assert job.objects() == files


def test_dry_run_without_the_bucket_lists_all_and_creates_nothing(job: Job) -> None:
    backed_up(job, "a.dat", "b.dat")
    state = job.state_path.read_bytes()
    job.server.remove_bucket(job.bucket)
    completed = job(SKIP, "--dryrun")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert listed(job, completed.stdout) == ["a.dat", "b.dat"]
    assert job.bucket not in {b["Name"] for b in job.server.client().list_buckets()["Buckets"]}
    assert job.state_path.read_bytes() == state


def test_a_crash_run_sends_what_is_missing_and_nothing_else(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(answer(400, "EntityTooLarge"), operation="PutObject", key="b.dat"))
    assert job().returncode == 1
    job.proxy.clear_faults()
    touched(job.folder / "a.dat")
    job.make("new.dat")  # of which the state knows nothing
    assert sent_by(job, "--crashrun", "1") == ["b.dat"]
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)
    assert sent_by(job, "--crashrun", "1") == []
