"""The commands and their options together: incremental runs, --verify, dry runs, crash runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import NewJob
from support.checks import (
    assert_clean,
    assert_failed,
    assert_lost,
    assert_replaced,
    assert_stopped,
    lines_with,
)
from support.faults import Fault, answer, delay, drop, replace_in_answer, set_headers
from support.files import (
    IN_MEMORY_BYTES,
    IN_PARTS,
    LARGE_BYTES,
    MIB,
    PART_BYTES,
    digests,
    make_files,
    md5,
    odd_names,
    relative_paths,
    small_files,
    some_bytes,
)
from support.inside import clock, recorded, recorder, run_first
from support.job import NOBODY, Job, kill
from support.kills import killing_call
from support.proxy import Action, Exchange, Request
from support.script import Completed, finish, prelude, wait_until
from support.servers import S3Server
from support.systems import needs_permissions, needs_replace_of_open_files, needs_signals

SKIP = "--skip-unchanged"


def sent_by(job: Job, *arguments: str) -> list[str]:
    """Run with --skip-unchanged, which has to end well; return the keys that it sent."""
    since = job.seen()
    assert_clean(job.run(SKIP, *arguments))
    return job.sent(since)


def unchanged(completed: Completed) -> int:
    """The number of unchanged files in the summary."""
    match = re.search(r"; ([\d,]+) unchanged, 0 failed", completed.stdout)
    assert match, completed.stdout
    return int(match[1].replace(",", ""))


def change_state(job: Job, key: str, *dropped: str) -> None:
    """Take fields out of one entry of the state file."""
    entries = job.entries()
    for entry in entries:
        if entry["filename"] == key:
            for name in dropped:
                del entry[name]
    job.state_path.write_text(json.dumps(entries), encoding="utf-8")


def in_the_state(job: Job, *names: str) -> dict[str, list[object]]:
    """What the entries of the state have under these names, by key."""
    return {entry["filename"]: [entry.get(name) for name in names] for entry in job.entries()}


VERIFY = "--verify"

KMS = ("--sse", "aws:kms")


def verify(job: Job, *arguments: str | Path) -> Completed:
    """Run with --verify, which may only look."""
    since = job.seen()
    completed = job.run(VERIFY, *arguments)
    assert {request.method for request in job.proxy.requests[since:]} <= {"HEAD", "GET"}
    return completed


def assert_right(job: Job, files: int) -> None:
    """Check that --verify finds nothing wrong, says how much is right, and changes nothing."""
    state, objects = job.state_path.read_bytes(), job.objects()
    completed = verify(job)
    assert_clean(completed)
    assert re.search(rf"\b{files:,} files? right, .*; 0 wrong, 0 not yet sent", completed.stdout)
    assert job.state_path.read_bytes() == state
    assert job.objects() == objects


def assert_wrong(job: Job, completed: Completed, **said: str) -> None:
    """Check that exactly these keys were named as wrong, and the way out; now the state is 0."""
    assert completed.returncode == 1, completed
    lines = [line for line in completed.stdout.splitlines() if line.startswith("wrong: ")]
    assert len(lines) == len(said), completed.stdout
    for key, words in said.items():
        (line,) = lines_with(completed.stdout, f"wrong: s3://{job.bucket}/{key} ")
        assert str(job.folder / key) in line
        assert words in line
        assert words in job.errors()[key]
    (sentence,) = completed.stderr.splitlines()
    assert "; send them with --crashrun 1" in sentence  # nothing is to be fixed first
    assert {key for key, uploaded in job.state().items() if not uploaded} == set(said)


def write_three_fields(job: Job, *keys: str) -> bytes:
    """Write a state with the original three fields of each entry; return its bytes."""
    entries = [job.pending_entry(key, uploadedSuccess=1) for key in keys]
    job.state_path.write_text(json.dumps(entries), encoding="utf-8")
    return job.state_path.read_bytes()


# --- --skip-unchanged: nothing has changed ---------------------------------------------------


def test_an_unchanged_folder_sends_nothing(job: Job) -> None:
    files = job.back_up("a.dat", "sub/b.dat", "sub/deep/c.dat")
    before, since = job.entries(), job.seen()
    completed = job.run(SKIP)
    assert_clean(completed)
    assert job.sent(since) == []
    assert len(job.requests("ListObjectsV2")) == 1
    assert unchanged(completed) == 3
    assert "sent 0 files" in completed.stdout
    assert job.entries() == before
    for entry in before:
        content = files[entry["filename"]]
        assert entry["uploadedSuccess"] == 1
        assert entry["etag"] == md5(content)
    assert job.in_bucket() == digests(files)


@pytest.mark.few(1)
def test_a_multipart_object_that_is_unchanged_is_not_sent(each_job: Job, tmp_path: Path) -> None:
    job = each_job
    job.write({"parts.dat": some_bytes(LARGE_BYTES), "small.dat": b"small", "empty": b""})
    assert_clean(job.run(*IN_PARTS, env=run_first(tmp_path / "later", clock())))
    before = job.entries()
    if job.server.name == "moto":
        assert re.fullmatch("[0-9a-f]{32}-3", job.entry("parts.dat")["etag"])
    assert sent_by(job, *IN_PARTS) == []
    assert job.entries() == before


@pytest.mark.few(1)
def test_odd_names_are_known_again(each_job: Job) -> None:
    job = each_job
    names = odd_names(job.server.name)
    names += [f"folder {name}/{name}" for name in names]
    job.back_up(*names)
    completed = job.run(SKIP)
    assert_clean(completed)
    assert unchanged(completed) == len(names)
    assert job.sent() == []


def test_the_listing_is_of_the_prefix_alone(job: Job) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job.run("--prefix", "host1/"))
    assert sent_by(job, "--prefix", "host1/") == []
    (listing,) = (r for r in job.proxy.requests if r.operation == "ListObjectsV2")
    assert listing.query["prefix"].startswith("host1/")


# --- --skip-unchanged: something has changed in the folder -----------------------------------


def longer(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"some more bytes than before")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def older(path: Path) -> None:
    os.utime(path, (0, 0))


def test_a_file_with_another_size_or_time_is_sent(job: Job) -> None:
    changes = {"longer": longer, "older": older, "touched": touched}
    job.back_up(*changes, "as it was")
    for key, change in changes.items():
        change(job.path(key))
    assert sent_by(job) == sorted(changes)
    job.check_all_is_there()
    assert sent_by(job) == []


def test_a_new_file_is_sent(job: Job) -> None:
    files = job.back_up("a.dat", "c.dat")
    files |= job.make("b.dat")
    assert sent_by(job) == ["b.dat"]
    assert job.in_bucket() == digests(files)
    assert job.state() == dict.fromkeys(files, 1)


def test_a_file_that_failed_before_is_sent(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.refuse("b.dat")
    assert job.run().returncode == 1
    assert job.state() == {"a.dat": 1, "b.dat": 0}
    job.proxy.clear_faults()
    assert sent_by(job) == ["b.dat"]
    assert job.in_bucket() == digests(files)
    assert job.state() == dict.fromkeys(files, 1)


def test_a_file_that_failed_is_sent_even_if_the_bucket_has_such_an_object(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    state = job.state_path.read_text(encoding="utf-8")
    changed = re.sub(r'(b\.dat", "uploadedSuccess": )1', r"\g<1>0", state)
    assert changed != state
    job.state_path.write_text(changed, encoding="utf-8")
    assert sent_by(job) == ["b.dat"]
    assert job.state() == dict.fromkeys(files, 1)


def test_an_entry_that_lacks_what_is_compared_is_sent(job: Job) -> None:
    lacking = {"no-etag": "etag", "no-size": "size", "no-time": "mtime_ns"}
    job.back_up(*lacking, "whole")
    for key, field in lacking.items():
        change_state(job, key, field)
    assert sent_by(job) == sorted(lacking)
    assert sent_by(job) == []


def test_a_state_with_the_original_three_fields_has_all_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    job.state_path.write_text(
        json.dumps([job.pending_entry(key, uploadedSuccess=1) for key in files])
    )
    assert sent_by(job) == ["a.dat", "b.dat"]
    assert sent_by(job) == []


def test_another_prefix_has_all_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    assert sent_by(job, "--prefix", "daily/") == ["daily/a.dat", "daily/b.dat"]
    assert job.objects() == {**files, **{f"daily/{key}": files[key] for key in files}}
    assert sent_by(job, "--prefix", "daily/") == []


def test_nothing_is_ever_deleted_from_the_bucket(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    (job.folder / "b.dat").unlink()
    assert sent_by(job) == []
    assert job.in_bucket() == digests(files)
    assert job.state() == {"a.dat": 1}
    assert {r.method for r in job.proxy.requests} <= {"HEAD", "GET", "PUT"}


# --- What is gone ----------------------------------------------------------------------------


def gone(completed: Completed) -> int:
    """The number of files in the summary that are gone."""
    match = re.search(r" failed(?:, ([\d,]+) gone since the last run)?; state: ", completed.stdout)
    assert match, completed.stdout
    return int((match[1] or "0").replace(",", ""))


@pytest.mark.parametrize("skip", [(), (SKIP,)], ids=["plain", "skip"])
def test_what_is_gone_is_counted_once_and_stays_in_the_bucket(
    job: Job, skip: tuple[str, ...]
) -> None:
    files = job.back_up("a.dat", "b.dat", "old", "sub/c.dat", "sub/deep/d.dat")
    shutil.rmtree(job.path("sub"))
    job.path("old").rename(job.path("new"))
    completed = job.run(*skip)
    assert_clean(completed)
    assert gone(completed) == 3
    assert job.state() == dict.fromkeys(("a.dat", "b.dat", "new"), 1)
    job.check_holds({**files, "new": files["old"]})
    completed = job.run(*skip)
    assert_clean(completed)
    assert gone(completed) == 0
    assert "gone" not in completed.stdout


def test_what_is_gone_is_named_with_verbose(job: Job) -> None:
    job.back_up("a.dat", "b\x1b[31m.dat", "c.dat")
    job.path("b\x1b[31m.dat").unlink()
    job.path("c.dat").unlink()
    completed = job.run(SKIP, "--verbose")
    assert completed.returncode == 0
    assert gone(completed) == 2
    named = lines_with(completed.stderr, "gone: ")
    shown = str(job.path("b\\x1b[31m.dat"))
    assert sorted(named) == sorted([f"gone: {shown}", f"gone: {job.path('c.dat')}"])


def test_only_what_was_uploaded_and_is_not_there_is_gone(job: Job, tmp_path: Path) -> None:
    keys = ("a.dat", "broken", "cache/x", "excluded.tmp", "folder", "gone", "never-sent")
    job.back_up(*keys)
    entries = job.entries()
    for entry in entries:
        entry["uploadedSuccess"] = int(entry["filename"] != "never-sent")
    job.write_state(*entries)
    for key in ("broken", "folder", "gone", "never-sent"):
        job.path(key).unlink()
    job.path("broken").symlink_to("missing")
    job.path("folder").mkdir()
    completed = job.run(SKIP, "--exclude", "*.tmp", "--exclude", "cache/*", "--verbose")
    assert_failed(completed, [job.path("broken")])
    assert re.search(r"1 failed, 1 gone since the last run; state: ", completed.stdout)
    assert lines_with(completed.stderr, "gone: ") == [f"gone: {job.path('gone')}"]


def test_a_crash_run_takes_nothing_for_gone(job: Job) -> None:
    job.back_up("a.dat", "b.dat", "c.dat")
    job.write_state(
        job.uploaded_entry("a.dat"), job.uploaded_entry("b.dat"), job.pending_entry("c.dat")
    )
    for key in ("b.dat", "c.dat"):
        job.path(key).unlink()
    completed = job.crash_run("--verbose")
    assert_failed(completed, [job.path("c.dat")])
    assert "gone" not in completed.stdout + completed.stderr
    # What helps is not to look at its permissions.
    assert (
        completed.stderr.count(
            "; restore it; if it was renamed or deleted, run without --crashrun\n"
        )
        == 1
    )
    assert job.state() == {"a.dat": 1, "b.dat": 1, "c.dat": 0}


def test_what_is_gone_of_another_job_is_not_counted(job: Job, tmp_path: Path) -> None:
    job.back_up("a.dat", "b.dat")
    job.path("b.dat").unlink()
    make_files(tmp_path / "elsewhere", {"a.dat": b"a"})
    completed = job.run("--backupfolder", tmp_path / "elsewhere")
    assert_replaced(completed, "another folder")
    assert gone(completed) == 0


# --- --skip-unchanged: what size and time do not show ----------------------------------------


def rewritten(path: Path) -> None:
    """Write other bytes in place, as many, and put the time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def changed_mode(path: Path) -> None:
    path.chmod(path.stat().st_mode ^ 0o040)


@needs_permissions
def test_a_file_rewritten_with_its_old_time_is_sent(job: Job) -> None:
    job.back_up("a.dat", "b.dat", "sub/c.dat")
    rewritten(job.path("b.dat"))
    rewritten(job.path("sub/c.dat"))
    completed = job.run(SKIP, "--dryrun")
    assert listed(job, completed.stdout) == ["b.dat", "sub/c.dat"]
    assert unchanged(completed) == 1
    assert sent_by(job) == ["b.dat", "sub/c.dat"]
    job.check_all_is_there()
    assert sent_by(job) == []


@needs_permissions
def test_a_large_file_rewritten_with_its_old_time_is_sent(moto_job: Job, tmp_path: Path) -> None:
    job = moto_job
    job.write({"parts": some_bytes(LARGE_BYTES), "small": b"small"})
    assert_clean(job.run(*IN_PARTS, env=run_first(tmp_path / "later", clock())))
    rewritten(job.path("parts"))
    assert sent_by(job, *IN_PARTS) == ["parts"]
    job.check_all_is_there()


ONE_TRY = (("FILE_TRIES = 3", "1"),)


@needs_permissions
@pytest.mark.parametrize(
    ("size", "limit"),
    [(20, ()), (MIB, ("--max-bandwidth", "20MB/s")), (IN_MEMORY_BYTES + 1, ())],
    ids=["memory", "pieces", "streamed"],
)
def test_a_file_that_is_compared_and_differs_is_sent_at_the_first_try(
    job: Job, size: int, limit: tuple[str, ...]
) -> None:
    job.write({"a.dat": some_bytes(size)})
    job.put("a.dat", some_bytes(size))
    job.write_state(job.uploaded_entry("a.dat"))
    rewritten(job.path("a.dat"))
    completed = job.run(SKIP, *limit, constants=ONE_TRY)
    assert_clean(completed)
    assert job.sent() == ["a.dat"]
    job.check_all_is_there()


@needs_permissions
@pytest.mark.few(1)
def test_what_had_its_mode_changed_is_read_and_not_sent(each_job: Job, tmp_path: Path) -> None:
    job, record = each_job, tmp_path / "record"
    later = run_first(tmp_path / "later", clock(), recorder(job.folder, record))
    job.write({"parts": some_bytes(LARGE_BYTES), "empty": b""} | small_files(20))
    # A part size that later runs do not ask for.
    job.write({"other-parts": some_bytes(LARGE_BYTES, seed=1)})
    size = ("--multipart-threshold", "5MiB", "--multipart-chunksize", "6MiB")
    assert_clean(job.run(*size, env=later))
    for path in job.folder.rglob("*.dat"):
        changed_mode(path)
    for key in ("parts", "other-parts", "empty"):
        changed_mode(job.path(key))
    recorded(job.folder, record)
    completed = job.run(SKIP, *IN_PARTS, env=later)
    assert_clean(completed)
    assert unchanged(completed) == 23
    assert recorded(job.folder, record) == sorted(job.in_folder())
    now = {key: [job.path(key).stat().st_ctime_ns] for key in job.in_folder()}
    assert in_the_state(job, "ctime_ns") == now
    # What is known now need not be read again.
    since = job.seen()
    completed = job.run(SKIP, *IN_PARTS, env=later)
    assert_clean(completed)
    assert unchanged(completed) == 23
    assert recorded(job.folder, record) == []
    assert job.sent(since) == []
    job.check_all_is_there()


# The run gets a signal when it has opened so many of the files.
SIGNAL_AT_OPEN = """
import os, signal
real, calls = os.open, 0
def counted(path, *args, **keywords):
    global calls
    calls += os.fspath(path).startswith({folder!r})
    if calls == 40:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(path, *args, **keywords)
os.open = counted
"""


@needs_signals
@pytest.mark.parametrize("again", [("--crashrun", "1"), (SKIP,)], ids=" ".join)
@pytest.mark.few(1)
def test_what_a_signal_kept_from_being_read_is_read_and_not_sent(
    job: Job, again: tuple[str, ...]
) -> None:
    files = job.back_up(*(f"{number:03}" for number in range(200)))
    for key in files:
        changed_mode(job.path(key))
    rewritten(job.path("150"))
    flags = prelude(SIGNAL_AT_OPEN.format(folder=f"{job.folder}/"))
    assert job.run(SKIP, python_flags=flags).returncode == 143
    assert 0 < len(job.uploaded()) < 200
    since = job.seen()
    assert_clean(job.run(*again))
    assert job.sent(since) == ["150"]
    job.check_all_is_there()


# At the first try to read a file there is no descriptor left.
NO_DESCRIPTOR_AT_FIRST = """
import errno, os
real, tried = os.open, set()
def first_fails(path, *args, **keywords):
    if os.fspath(path).startswith({folder!r}) and path not in tried:
        tried.add(path)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(path, *args, **keywords)
os.open = first_fails
"""


@needs_permissions
def test_what_could_not_be_opened_at_first_is_compared_and_not_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    for key in files:
        changed_mode(job.path(key))
    rewritten(job.path("b.dat"))
    since = job.seen()
    flags = prelude(NO_DESCRIPTOR_AT_FIRST.format(folder=f"{job.folder}/"))
    completed = job.run(SKIP, python_flags=flags)
    assert_clean(completed)
    assert unchanged(completed) == 1
    assert job.sent(since) == ["b.dat"]
    job.check_all_is_there()


@needs_permissions
def test_under_kms_what_had_its_mode_changed_is_sent(moto_job: Job) -> None:
    job = moto_job
    with_foreign_etags(job)
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    entries = [
        {**entry, "ctime_ns": job.path(entry["filename"]).stat().st_ctime_ns}
        for entry in job.entries()
    ]
    assert [entry["sse"] for entry in entries] == ["aws:kms"] * 2
    job.write_state(*entries)
    changed_mode(job.path("b.dat"))
    assert sent_by(job) == ["b.dat"]
    assert in_the_state(job, "sse") == {"a.dat": ["aws:kms"], "b.dat": ["aws:kms"]}


@needs_permissions
@pytest.mark.few(1)
def test_a_file_that_was_young_when_it_was_read_is_looked_at_again(
    small_job: Job, tmp_path: Path
) -> None:
    job, record = small_job, tmp_path / "record"
    job.make("a.dat", "b.dat")
    now = run_first(tmp_path / "now", clock(0), recorder(job.folder, record))
    later = run_first(tmp_path / "later", clock(), recorder(job.folder, record))
    # So that they are young however long the run takes to begin.
    before = run_first(tmp_path / "before", clock(-2))
    assert_clean(job.run(env=before))
    assert in_the_state(job, "ctime_ns") == {"a.dat": [0], "b.dat": [0]}
    rewritten(job.path("b.dat"))
    completed = job.run(SKIP, env=later)
    assert_clean(completed)
    assert unchanged(completed) == 1
    assert recorded(job.folder, record) == ["a.dat", "b.dat"]
    job.check_all_is_there()
    times = {key: [job.path(key).stat().st_ctime_ns] for key in ("a.dat", "b.dat")}
    assert in_the_state(job, "ctime_ns") == times
    completed = job.run(SKIP, env=now)
    assert_clean(completed)
    assert unchanged(completed) == 2
    assert recorded(job.folder, record) == []


@needs_permissions
def test_a_file_whose_times_lie_in_the_future_is_looked_at_again(job: Job, tmp_path: Path) -> None:
    job.back_up("a.dat", "b.dat")
    touched(job.path("a.dat"))
    assert_clean(job.run(SKIP, env=run_first(tmp_path / "an hour ago", clock(-3600))))
    assert job.sent() == ["a.dat"]
    assert job.entry("a.dat")["ctime_ns"] == 0
    rewritten(job.path("a.dat"))
    assert sent_by(job) == ["a.dat"]
    job.check_all_is_there()


def test_a_state_of_an_earlier_version_is_accepted(job: Job, tmp_path: Path) -> None:
    record = tmp_path / "record"
    job.back_up("a.dat", "b.dat", "c.dat")
    for key in ("a.dat", "b.dat"):
        change_state(job, key, "ctime_ns")
    env = run_first(tmp_path / "watched", recorder(job.folder, record))
    completed = job.run(SKIP, env=env)
    assert_clean(completed)
    assert unchanged(completed) == 3
    assert recorded(job.folder, record) == []
    assert job.sent() == []


# --- --skip-unchanged: something has changed in the bucket -----------------------------------


def test_an_object_that_is_not_as_recorded_is_sent_again(each_job: Job) -> None:
    job = each_job
    job.back_up("a.dat", "changed", "missing", "shorter")
    damage(job)
    since = job.seen()
    # Cron must mail it, too.
    assert_lost(job.run(SKIP, "--quiet"), "3 files")
    assert job.sent(since) == ["changed", "missing", "shorter"]
    job.check_all_is_there()


def test_a_bucket_that_is_gone_has_all_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    job.server.remove_bucket(job.bucket)
    since = job.seen()
    completed = job.run(SKIP, "--quiet")
    # Cron must mail it: the new bucket has no versions, locks or policies.
    said = f"s3FileTransfer: the bucket {job.bucket} was gone: all files are sent again\n"
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", said)
    assert job.sent(since) == ["a.dat", "b.dat"]
    assert job.in_bucket() == digests(files)


def test_a_state_of_another_bucket_proves_nothing_here(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    other = replace(job, bucket=f"{job.bucket[:50]}-other")
    other.create_bucket()
    since = other.seen()
    assert_replaced(other.run(SKIP), f"bucket {job.bucket}")
    assert other.sent(since) == ["a.dat", "b.dat"]
    other.check_all_is_there()
    assert {entry["bucket"] for entry in job.entries()} == {other.bucket}
    job.server.remove_bucket(other.bucket)


# --- --skip-unchanged: the listing -----------------------------------------------------------


def test_a_listing_that_is_refused_is_said_and_all_is_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    since = job.seen()
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListObjectsV2"))
    completed = job.run(SKIP)
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert "cannot list the bucket" in said
    assert "AccessDenied" in said
    assert job.sent(since) == ["a.dat", "b.dat"]
    assert unchanged(completed) == 0
    assert job.state() == dict.fromkeys(files, 1)


def in_pages_of_two(change: Callable[[bytes], bytes] = bytes) -> Action:
    """Ask a server that checks no signature for pages of two, and change what they say."""

    def act(exchange: Exchange) -> None:
        exchange.ask_more("&max-keys=2")
        replace_in_answer(change)(exchange)

    return act


def test_a_listing_of_several_pages_is_read_to_its_end(moto_job: Job) -> None:
    job = moto_job
    job.back_up(*"abcde")
    job.proxy.add_fault(Fault(in_pages_of_two(), operation="ListObjectsV2"))
    completed = job.run(SKIP)
    assert_clean(completed)
    assert unchanged(completed) == 5
    assert len(job.requests("ListObjectsV2")) == 3
    assert_right(job, files=5)
    job.delete("a")
    job.put("e", b"other")
    assert_wrong(job, verify(job), a="not in the bucket", e="bytes")


LISTINGS = ("ListObjectsV2", "ListObjects")


def without_token(page: bytes) -> bytes:
    """A page as the first version of the request has it, whatever was asked for."""
    page = re.sub(rb"<KeyCount>.*?</KeyCount>", b"", page)
    return re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", page)


def test_a_server_that_knows_only_the_first_version_of_the_listing_is_read_to_its_end(
    moto_job: Job,
) -> None:
    job = moto_job
    job.back_up(*"abc&+eü ")
    job.proxy.add_fault(Fault(in_pages_of_two(without_token), operation=LISTINGS))
    completed = job.run(SKIP)
    assert_clean(completed)
    assert unchanged(completed) == 8
    assert job.sent() == []
    assert len(job.requests(*LISTINGS)) == 4
    assert_right(job, files=8)


def assert_nothing_is_sent_again(job: Job, *arguments: str) -> None:
    """Check that a run which cannot list stops, and that the next one sends nothing either."""
    state, since = job.entries(), job.seen()
    assert_stopped(job.run(SKIP, *arguments), "cannot list the bucket")
    assert job.entries() == state
    job.proxy.clear_faults()
    assert_clean(job.run(SKIP, *arguments))
    assert job.sent(since) == []
    assert job.entries() == state


def test_a_listing_that_goes_in_circles_has_nothing_sent_again(moto_job: Job) -> None:
    job = moto_job
    job.back_up(*"abc")
    pages: list[bytes] = []

    def first_page(page: bytes) -> bytes:
        pages.append(without_token(page))
        return pages[0]

    job.proxy.add_fault(Fault(in_pages_of_two(first_page), operation=LISTINGS))
    assert_nothing_is_sent_again(job)
    assert len(pages) <= 5  # in order, then from the start


@pytest.mark.parametrize("verifies", [False, True], ids=["skip", "verify"])
def test_pages_that_come_to_no_end_say_nothing_of_the_bucket(
    rclone_job: Job, verifies: bool
) -> None:
    job = rclone_job  # moto answers a token that it has not given with 500
    job.back_up(*"abc")
    token = b"<NextContinuationToken>more</NextContinuationToken>"
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated>%b</ListBucketResult>" % token
    job.proxy.add_fault(Fault(replace_in_answer(lambda _: page), operation=LISTINGS))
    if verifies:
        assert_refused(job, words=("does not end",))
    else:
        assert_nothing_is_sent_again(job)


NO_LISTINGS = {
    "page": lambda _: b"<html><body>Welcome</body></html>",
    "empty": lambda _: b"",
    "cut": lambda page: page[: len(page) // 2],
}


def test_what_is_no_listing_is_asked_for_again(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    for change in NO_LISTINGS.values():
        job.proxy.add_fault(Fault(replace_in_answer(change), operation=LISTINGS, times=1))
    assert sent_by(job) == []
    assert len(job.requests(*LISTINGS)) == 4


@pytest.mark.parametrize(
    "kind", ["page", *(pytest.param(name, marks=pytest.mark.long) for name in ("empty", "cut"))]
)
@pytest.mark.parametrize("verifies", [False, True], ids=["skip", "verify"])
@pytest.mark.few(1)
def test_an_answer_that_is_no_listing_says_nothing_of_the_bucket(
    job: Job, kind: str, verifies: bool
) -> None:
    job.back_up("a.dat", "b.dat")
    job.proxy.add_fault(Fault(replace_in_answer(NO_LISTINGS[kind]), operation=LISTINGS))
    if verifies:
        assert_refused(job, words=("cannot list the bucket",))
    else:
        assert_nothing_is_sent_again(job)


@pytest.mark.parametrize("action", [answer(503, "SlowDown"), drop()], ids=["busy", "away"])
@pytest.mark.few(1)
def test_a_server_that_is_away_while_it_lists_has_nothing_sent_again(
    job: Job, action: Action
) -> None:
    files = job.back_up("a.dat", "b.dat")
    job.proxy.add_fault(Fault(action, operation="ListObjectsV2"))
    since = job.seen()
    assert_stopped(job.run(SKIP), "cannot list the bucket")
    assert job.sent(since) == []
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    assert job.sent(since) == []
    assert job.state() == dict.fromkeys(files, 1)


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken")],
)
def test_wrong_credentials_of_one_night_have_nothing_sent_again(
    job: Job, status: int, code: str
) -> None:
    files = job.back_up("a.dat", "b.dat")
    for operation in ("ListObjectsV2", "PutObject"):
        job.proxy.add_fault(Fault(answer(status, code), operation=operation))
    since = job.seen()
    assert_stopped(job.run(SKIP), code)
    job.proxy.clear_faults()
    assert_clean(job.run(SKIP))
    assert job.sent(since) == []
    assert job.state() == dict.fromkeys(files, 1)


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (501, "NotImplemented")])
def test_a_listing_at_which_the_server_always_fails_has_nothing_sent_again(
    job: Job, status: int, code: str
) -> None:
    job.back_up("a.dat", "b.dat")
    job.proxy.add_fault(Fault(answer(status, code), operation=LISTINGS))
    assert_nothing_is_sent_again(job)


# --- --skip-unchanged: after a night on which nothing could be sent --------------------------


def back_up_all_ways(job: Job, tmp_path: Path) -> None:
    """Send small files and a large one, of which the state then knows all."""
    job.write(small_files(40) | {"large": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(*IN_PARTS, env=run_first(tmp_path / "later", clock())))


def denied(job: Job, env: Mapping[str, str]) -> None:
    """A night on which a policy refuses everything."""
    job.proxy.add_fault(Fault(answer(403, "AccessDenied")))
    assert job.run(SKIP, *IN_PARTS, env=env).returncode == 2


def expired(job: Job, env: Mapping[str, str]) -> None:
    """A night without a listing, on which the session token expires in the middle of the run."""
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation=LISTINGS))
    job.proxy.add_fault(Fault(answer(400, "ExpiredToken"), operation="UploadPart"))
    since = job.seen()

    def expire(exchange: Exchange) -> None:
        wait_until(lambda: job.requests("UploadPart", since=since), 30, "the large file")
        answer(400, "ExpiredToken")(exchange)

    job.proxy.add_fault(Fault(expire, operation="PutObject", after=10))
    assert job.run(SKIP, *IN_PARTS, env=env).returncode == 2
    assert job.entry("large")["upload_id"]


def killed(job: Job, env: Mapping[str, str]) -> None:
    """A night on which all was to be sent, and the run is killed when some of it is."""
    job.proxy.add_fault(Fault(delay(600), operation="UploadPart"))
    job.proxy.add_fault(Fault(delay(600), operation="PutObject", after=10))
    since = job.seen()
    process = job.start(*IN_PARTS, env=env)

    def is_under_way() -> bool:
        puts = job.requests("PutObject", "UploadPart", since=since)
        return len(puts) > 12 and sum(put.status == 200 for put in puts) >= 10

    wait_until(is_under_way, 60, "puts")
    kill(process)


@pytest.mark.parametrize(
    ("night", "again"),
    [
        (denied, (SKIP,)),
        (denied, ("--crashrun", "1")),
        (expired, (SKIP,)),
        pytest.param(expired, ("--crashrun", "1"), marks=pytest.mark.long),
        pytest.param(killed, (SKIP,), marks=needs_signals),
        pytest.param(killed, ("--crashrun", "1"), marks=[needs_signals, pytest.mark.long]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.__name__,
)
@pytest.mark.few(2)
def test_a_night_on_which_nothing_could_be_sent_forgets_nothing(
    moto_job: Job,
    tmp_path: Path,
    night: Callable[[Job, dict[str, str]], None],
    again: tuple[str, ...],
) -> None:
    job, record = moto_job, tmp_path / "record"
    back_up_all_ways(job, tmp_path)
    before = {entry["filename"]: entry for entry in job.entries()}
    job.path("d0/0000.dat").write_bytes(b"changed")
    env = run_first(tmp_path / "later", clock())
    for _ in range(2):
        night(job, env)
        job.proxy.clear_faults()
    left = {key for key, uploaded in job.state().items() if not uploaded}
    assert "large" in left
    changed = {"d0/0000.dat"}
    since = job.seen()
    env = run_first(tmp_path / "watched", recorder(job.folder, record))
    assert_clean(job.run(*again, *IN_PARTS, env=env))
    # A killed night may have sent it, and even known of it. What that night's process began and the
    # proxy still held is recorded now, without an answer.
    begun = job.requests("PutObject", "CreateMultipartUpload", since=since)
    assert {request.key for request in begun if request.status} <= changed
    assert set(recorded(job.folder, record)) <= {"d0/0000.dat"}  # nothing else is even read
    job.check_all_is_there()
    known_again = {entry["filename"]: entry for entry in job.entries()}
    for key in left - changed:
        assert known_again[key] == before[key]
    # A kill may come before the id of an upload is known here: then it has no parts.
    assert [upload for upload in job.open_uploads() if upload[2]] == []


@needs_permissions
def test_a_file_of_which_the_bucket_had_another_state_is_sent_after_such_a_night(
    moto_job: Job, tmp_path: Path
) -> None:
    job = moto_job
    back_up_all_ways(job, tmp_path)
    denied(job, run_first(tmp_path / "later", clock()))
    job.proxy.clear_faults()
    rewritten(job.path("d1/0001.dat"))
    rewritten(job.path("large"))
    changed_mode(job.path("d2/0002.dat"))
    job.put("d3/0003.dat", b"of somebody else")
    job.delete("d4/0004.dat")
    since = job.seen()
    assert_clean(job.run(SKIP, *IN_PARTS))
    assert job.sent(since) == ["d1/0001.dat", "d3/0003.dat", "d4/0004.dat", "large"]
    job.check_all_is_there()


@needs_permissions
def test_what_cannot_be_looked_at_after_such_a_night_is_not_forgotten(job: Job) -> None:
    job.back_up("a.dat", "b.dat", "sub/c.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied")))
    assert job.run(SKIP, user=NOBODY).returncode == 2
    job.proxy.clear_faults()
    since = job.seen()
    job.path("sub").chmod(0)
    job.path("b.dat").chmod(0)
    assert job.run(SKIP, user=NOBODY).returncode == 1
    assert job.uploaded() == {"a.dat", "b.dat"} - {"b.dat"}
    job.path("sub").chmod(0o755)
    job.path("b.dat").chmod(0o644)
    assert_clean(job.run(SKIP, user=NOBODY))
    assert job.sent(since) == []
    job.check_all_is_there()


@pytest.mark.parametrize("again", [(SKIP,), ("--crashrun", "1")], ids=" ".join)
def test_what_version_1_1_left_to_be_compared_is_read_and_not_sent(
    job: Job, again: tuple[str, ...]
) -> None:
    job.back_up("a.dat", "b.dat", "c.dat")
    job.write_state(
        *({**entry, "uploadedSuccess": 0, "ctime_ns": 0} for entry in job.entries()[:2]),
        job.uploaded_entry("c.dat"),
    )
    job.path("b.dat").write_bytes(b"BYTES of b.dat")
    entry = job.entry("b.dat")
    os.utime(job.path("b.dat"), ns=(entry["mtime_ns"], entry["mtime_ns"]))
    assert_clean(job.run(*again))
    assert job.sent() == ["b.dat"]
    job.check_all_is_there()


def test_a_run_that_replaces_all_for_another_class_is_finished_by_a_crash_run(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat", "c.dat")
    stop = Fault(answer(400, "ExpiredToken"), operation="PutObject", after=1)
    job.proxy.add_fault(stop)
    options = ("--storage-class", "STANDARD_IA", "--max-concurrency", "1")
    assert job.run(*options).returncode == 2
    job.proxy.clear_faults()
    assert len(job.uploaded()) == 1
    assert_clean(job.crash_run(*options))
    puts = {
        r.key
        for r in job.requests("PutObject")
        if r.status == 200 and r.headers["x-amz-storage-class"]
    }
    assert puts == set(files)


def test_a_listing_that_is_throttled_once_is_asked_for_again(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    fault = Fault(answer(503, "SlowDown"), operation="ListObjectsV2", times=1)
    job.proxy.add_fault(fault)
    assert sent_by(job) == []
    assert fault.hits == 1
    assert len(job.requests("ListObjectsV2")) == 2


@needs_signals
@pytest.mark.parametrize("dryrun", [(), ("--dryrun",)], ids=["run", "dryrun"])
def test_a_signal_during_the_listing_ends_the_run_and_forgets_nothing(
    job: Job, dryrun: tuple[str, ...]
) -> None:
    files = job.back_up("a.dat", "b.dat")
    before = job.entries()
    job.proxy.add_fault(Fault(delay(600), operation="ListObjectsV2", times=1))
    process = job.start(SKIP, *dryrun)
    wait_until(lambda: len(job.requests("ListObjectsV2")), 30, "the listing")
    process.send_signal(signal.SIGTERM)
    completed = finish(process, timeout=10)
    assert completed.returncode == 143
    assert len(completed.stderr.splitlines()) == 1
    if dryrun:
        assert job.entries() == before
    assert job.state().items() >= dict.fromkeys(files, 1).items()
    assert sent_by(job) == []
    assert job.entries() == before


# --- --skip-unchanged: the state file --------------------------------------------------------


def test_without_a_state_all_is_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    job.state_path.unlink()
    assert sent_by(job) == ["a.dat", "b.dat"]
    assert job.state() == dict.fromkeys(files, 1)
    assert sent_by(job) == []


def test_a_first_run_needs_no_listing(job: Job) -> None:
    job.make("a.dat")
    assert sent_by(job) == ["a.dat"]
    assert job.requests("ListObjectsV2") == []


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
@pytest.mark.few(2)
def test_a_kill_during_the_walk_forgets_no_upload(
    job: Job, tmp_path: Path, arguments: tuple[str, ...], sent: list[str]
) -> None:
    files = job.back_up("a.dat", "sub/b.dat")
    uploaded = job.entries()
    files |= job.make("new.dat")
    since = job.seen()
    killed_in_the_walk(job, tmp_path)
    assert job.sent(since) == []
    folder, *kept = job.entries()
    assert (folder["filepath"], folder["uploadedSuccess"]) == (str(job.folder), 0)
    assert kept == uploaded
    since = job.seen()
    assert_clean(job.run(*arguments))
    assert job.sent(since) == sent
    assert job.in_bucket() == digests(files)
    assert job.state() == dict.fromkeys(files, 1)


@needs_signals
@pytest.mark.parametrize("skip", [(), (SKIP,)], ids=["plain", "skip"])
@pytest.mark.few(1)
def test_a_kill_during_the_walk_of_a_run_for_another_bucket_leaves_a_state_for_that_one(
    job: Job, tmp_path: Path, skip: tuple[str, ...]
) -> None:
    files = job.back_up("a.dat", "sub/b.dat")
    to_other = ("--bucketname", f"{job.bucket[:50]}-other")
    killed_in_the_walk(job, tmp_path, *to_other)
    since = job.seen()
    assert_clean(job.run("--crashrun", "1", *skip, *to_other))
    assert job.sent(since) == ["a.dat", "sub/b.dat"]
    assert job.server.objects(to_other[1]) == files
    assert job.state() == dict.fromkeys(files, 1)
    job.server.remove_bucket(to_other[1])


@needs_signals
def test_a_kill_during_the_walk_of_a_run_for_another_folder_leaves_a_state_for_that_one(
    job: Job, tmp_path: Path
) -> None:
    job.back_up("a.dat")
    other = tmp_path / "elsewhere"
    make_files(other, {"b.dat": b"b", "sub/c.dat": b"c"})
    killed_in_the_walk(job, tmp_path, "--backupfolder", str(other))
    assert_clean(job.crash_run("--backupfolder", other))
    assert job.state() == {"b.dat": 1, "sub/c.dat": 1}
    assert job.objects()["sub/c.dat"] == b"c"


def test_a_kill_while_files_are_sent_has_only_the_others_sent(job: Job) -> None:
    job.back_up(*(f"{n:02}" for n in range(40)))
    for number in range(20):
        touched(job.folder / f"{number:02}")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject", after=5))
    since = job.seen()
    process = job.start(SKIP, "--max-concurrency", "4")
    wait_until(lambda: len(job.sent(since)) >= 9, 30, "all that may be under way")
    process.kill()
    process.communicate()
    job.proxy.clear_faults()
    # No unchanged file is sent; of the touched ones the state may lag behind by the last moments.
    confirmed = {key for key, uploaded in job.state().items() if uploaded}
    assert {f"{n:02}" for n in range(20, 40)} <= confirmed
    since = job.seen()
    assert_clean(job.crash_run())
    assert set(job.sent(since)) == {f"{n:02}" for n in range(40)} - confirmed
    assert set(job.state().values()) == {1}


# --- --skip-unchanged with --dryrun and --crashrun 1 -----------------------------------------


def listed(job: Job, stdout: str) -> list[str]:
    """The keys that a dry run lists."""
    urls = (
        line.partition(f" s3://{job.bucket}/")[2] for line in lines_with(stdout, "would upload")
    )
    return [url.rpartition(" (")[0] for url in urls]


def methods_since(job: Job, since: int) -> set[str]:
    return {request.method for request in job.proxy.requests[since:]}


def test_dry_run_lists_only_what_would_be_sent(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat", "c.dat")
    touched(job.folder / "b.dat")
    job.make("new.dat")
    state, since = job.state_path.read_bytes(), job.seen()
    completed = job.run(SKIP, "--dryrun")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert listed(job, completed.stdout) == ["b.dat", "new.dat"]
    assert unchanged(completed) == 2
    assert methods_since(job, since) == {"HEAD", "GET"}
    assert job.state_path.read_bytes() == state
    assert job.in_bucket() == digests(files)


def test_dry_run_without_the_bucket_lists_all_and_creates_nothing(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    state = job.state_path.read_bytes()
    job.server.remove_bucket(job.bucket)
    completed = job.run(SKIP, "--dryrun")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert listed(job, completed.stdout) == ["a.dat", "b.dat"]
    assert job.bucket not in {b["Name"] for b in job.server.client().list_buckets()["Buckets"]}
    assert job.state_path.read_bytes() == state


def test_a_crash_run_sends_what_is_missing_and_nothing_else(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.refuse("b.dat")
    assert job.run().returncode == 1
    job.proxy.clear_faults()
    touched(job.folder / "a.dat")
    job.make("new.dat")  # of which the state knows nothing
    assert sent_by(job, "--crashrun", "1") == ["b.dat"]
    assert job.in_bucket() == digests(files)
    assert job.state() == dict.fromkeys(files, 1)
    assert sent_by(job, "--crashrun", "1") == []


# --- --verify: all is right ------------------------------------------------------------------


@pytest.mark.few(1)
def test_a_backup_is_right(each_job: Job) -> None:
    job = each_job
    names = odd_names(job.server.name)
    job.make(*names, *(f"folder {name}/{name}" for name in names))
    job.write({"empty": b"", "parts": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(*IN_PARTS))
    assert_right(job, files=2 * len(names) + 2)
    assert len(job.requests("ListObjectsV2")) == 1
    assert job.requests("GetObject", "HeadObject") == []


def test_what_changed_in_the_folder_does_not_matter(job: Job) -> None:
    job.back_up("a.dat", "b.dat", "c.dat")
    (job.folder / "a.dat").unlink()
    (job.folder / "b.dat").write_bytes(b"changed since")
    job.make("new.dat")
    assert_right(job, files=3)


def test_the_prefix_is_in_the_state(job: Job) -> None:
    job.make("a.dat")
    assert_clean(job.run("--prefix", "daily/"))
    job.put("a.dat", b"of somebody else")
    assert_right(job, files=1)


@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_verify_of_an_empty_list_is_refused(job: Job, where: str) -> None:
    job.folder.mkdir()
    job.state_path.write_text("[]\n")
    words = f"the state file {job.state_path} lists nothing; run without --verify"
    assert_stopped(job.run("--verify", where), words)
    assert job.proxy.requests == []


def test_encrypted_objects_are_right(moto_job: Job) -> None:
    job = moto_job
    job.write({"small": b"small", "parts": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(*IN_PARTS, *KMS))
    head = job.server.client().head_object(Bucket=job.bucket, Key="small")
    assert head["ServerSideEncryption"] == "aws:kms"
    assert_right(job, files=2)


FOREIGN_ETAG = "0123456789abcdef0123456789abcdef"


def with_foreign_etags(job: Job) -> None:
    """Have the server give ETags of 32 digits that are no MD5, as S3 does under SSE-KMS."""
    headers = {"x-amz-server-side-encryption": "aws:kms", "ETag": f'"{FOREIGN_ETAG}"'}
    for operation in ("PutObject", "HeadObject"):
        job.proxy.add_fault(Fault(set_headers(headers), operation=operation))
    etags = re.compile(rb"<ETag>[^<]*</ETag>")
    other = f"<ETag>&quot;{FOREIGN_ETAG}&quot;</ETag>".encode()
    change = replace_in_answer(lambda body: etags.sub(other, body))
    job.proxy.add_fault(Fault(change, operation="ListObjectsV2"))


def test_an_etag_that_is_no_md5_is_compared_with_the_recorded_one(moto_job: Job) -> None:
    job = moto_job
    with_foreign_etags(job)
    job.make("a.dat")
    assert_clean(job.run(*KMS))
    (entry,) = job.entries()
    assert entry["etag"] == FOREIGN_ETAG
    assert_right(job, files=1)


def test_an_etag_that_is_no_md5_is_not_compared_with_the_local_bytes(moto_job: Job) -> None:
    job = moto_job
    files = job.back_up("a.dat")
    write_three_fields(job, *files)
    with_foreign_etags(job)
    assert_right(job, files=1)
    assert len(job.requests("HeadObject")) == 1


# --- --verify: something is wrong ------------------------------------------------------------


def damage(job: Job) -> None:
    """Make the bucket another than the state says, in each of the ways there are."""
    job.delete("missing")
    job.put("shorter", b"other size")
    job.put("changed", b"BYTES of changed")


def test_an_object_that_is_not_as_recorded_is_named_and_repaired(job: Job) -> None:
    job.back_up("a.dat", "changed", "missing", "shorter", "z.dat")
    others = [job.entry("a.dat"), job.entry("z.dat")]
    damage(job)
    completed = verify(job)
    assert_wrong(job, completed, changed="ETag", missing="not in the bucket", shorter="10 bytes")
    assert re.search(r"\b2 files right, .*; 3 wrong, 0 not yet sent", completed.stdout)
    assert [entry for entry in job.entries() if entry["uploadedSuccess"]] == others

    since = job.seen()
    assert_clean(job.crash_run())
    assert job.sent(since) == ["changed", "missing", "shorter"]
    job.check_all_is_there()
    assert_right(job, files=5)


@pytest.mark.few(1)
def test_a_multipart_object_that_was_replaced_is_named(each_job: Job) -> None:
    job = each_job
    size = LARGE_BYTES
    job.write({"parts": os.urandom(size), "small": b"small"})
    assert_clean(job.run(*IN_PARTS))
    job.put("parts", b"x" * size)
    assert_wrong(job, verify(job), parts="ETag")
    assert_clean(job.crash_run(*IN_PARTS))
    assert_right(job, files=2)


def test_each_of_many_is_named_and_the_others_stay_right(job: Job) -> None:
    files = job.back_up(*(f"{n:02}" for n in range(30)))
    gone = [f"{n:02}" for n in range(0, 30, 3)]
    for key in gone:
        job.delete(key)
    assert_wrong(job, verify(job), **dict.fromkeys(gone, "not in the bucket"))
    assert_clean(job.crash_run())
    assert job.in_bucket() == digests(files)


def test_what_is_missing_already_is_counted_and_named_once_more_by_nobody(job: Job) -> None:
    job.make("a.dat", "b.dat")
    job.refuse("b.dat")
    assert_failed(job.run(), [job.folder / "b.dat"])
    job.proxy.clear_faults()
    state = job.state_path.read_bytes()
    completed = verify(job)
    assert completed.returncode == 1
    assert "--crashrun 1" in completed.stderr
    assert re.search(r"; 0 wrong, 1 not yet sent", completed.stdout)
    assert lines_with(completed.stdout, "wrong: ") == []
    assert job.state_path.read_bytes() == state


def test_wrong_and_missing_files_are_counted_apart(job: Job) -> None:
    files = job.make("a.dat", "b.dat", "c.dat")
    job.refuse("b.dat")
    assert_failed(job.run(), [job.folder / "b.dat"])
    job.proxy.clear_faults()
    job.delete("c.dat")
    completed = verify(job)
    assert completed.returncode == 1
    assert re.search(r"\b1 files? right, .*; 1 wrong, 1 not yet sent", completed.stdout)
    assert len(lines_with(completed.stdout, "wrong: ")) == 1
    assert job.state() == {"a.dat": 1, "b.dat": 0, "c.dat": 0}
    assert_clean(job.crash_run())
    assert job.in_bucket() == digests(files)


def test_quiet_still_lists_what_is_wrong(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.delete("b.dat")
    completed = verify(job, "--quiet")
    assert_wrong(job, completed, **{"b.dat": "not in the bucket"})
    assert len(completed.stdout.splitlines()) == 1


def test_quiet_says_nothing_when_all_is_right(job: Job) -> None:
    job.back_up("a.dat")
    assert verify(job, "--quiet") == Completed(0, "", "")


def test_control_characters_of_a_listing_do_not_reach_the_terminal(job: Job) -> None:
    job.back_up("a.dat")
    etag = "<ETag>\u009b31m</ETag>".encode()
    change = replace_in_answer(lambda body: re.sub(rb"<ETag>[^<]*</ETag>", etag, body))
    job.proxy.add_fault(Fault(change, operation="ListObjectsV2"))
    completed = verify(job)
    assert completed.returncode == 1
    assert "\u009b" not in completed.stdout + completed.stderr
    assert "\u009b" not in job.state_path.read_text(encoding="utf-8")


# --- --verify without a recorded ETag --------------------------------------------------------


def test_objects_that_hold_the_local_bytes_are_right(job: Job) -> None:
    files = job.back_up("a.dat", "sub/b.dat")
    write_three_fields(job, *files)
    assert_right(job, files=2)


def test_objects_that_do_not_hold_the_local_bytes_are_wrong(job: Job) -> None:
    files = job.back_up("a.dat", "changed", "missing", "shorter")
    write_three_fields(job, *files)
    damage(job)
    said = {"changed": "other bytes", "missing": "not in the bucket", "shorter": "10 bytes"}
    assert_wrong(job, verify(job), **said)
    assert_clean(job.crash_run())
    job.check_all_is_there()


def test_an_object_whose_file_is_gone_cannot_be_compared(job: Job) -> None:
    files = job.back_up("a.dat", "b.dat")
    write_three_fields(job, *files)
    (job.folder / "b.dat").unlink()
    completed = verify(job)
    assert completed.returncode == 1
    (line,) = lines_with(completed.stdout, "b.dat")
    assert line.startswith("unproven: ")
    assert "cannot be compared" in line
    # A crash run could do nothing about it.
    (said,) = completed.stderr.splitlines()
    assert "could not be compared" in said
    assert job.state() == dict.fromkeys(files, 1)
    assert lines_with(completed.stdout, "/a.dat") == []
    assert job.in_bucket() == digests(files)


def test_the_bytes_of_what_cannot_be_compared_are_not_right(job: Job) -> None:
    job.back_up("right.dat", "unproven.dat")
    change_state(job, "unproven.dat", "etag")
    job.path("unproven.dat").unlink()
    completed = verify(job)
    assert completed.returncode == 1
    assert "1 file right, 18 B; 0 wrong, 1 unproven" in completed.stdout


def test_of_a_multipart_object_the_size_is_compared(moto_job: Job) -> None:
    job = moto_job
    size = LARGE_BYTES
    job.write({"parts": os.urandom(size)})
    assert_clean(job.run(*IN_PARTS))
    write_three_fields(job, "parts")
    # Of the bytes a multipart ETag says nothing to who does not know the size of the parts.
    (job.folder / "parts").write_bytes(os.urandom(size))
    assert_right(job, files=1)
    (job.folder / "parts").write_bytes(os.urandom(size + 1))
    assert_wrong(job, verify(job), parts=f"{size:,} bytes")


# --- --verify cannot be done -----------------------------------------------------------------


def assert_refused(job: Job, *arguments: str | Path, words: tuple[str, ...]) -> None:
    """Check that --verify stops with these words and changes nothing."""
    state = job.state_path.read_bytes()
    completed = verify(job, *arguments)
    assert_stopped(completed, *words)
    assert completed.stdout == ""
    assert job.state_path.read_bytes() == state


def test_a_listing_that_is_refused_stops_it(job: Job) -> None:
    job.back_up("a.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListObjectsV2"))
    assert_refused(job, words=("cannot list", job.bucket, "AccessDenied"))


def test_a_second_page_that_is_refused_stops_it(moto_job: Job) -> None:
    job = moto_job
    job.back_up(*"abc")
    job.proxy.add_fault(Fault(in_pages_of_two(), operation="ListObjectsV2", times=1))
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListObjectsV2"))
    assert_refused(job, words=("cannot list", "AccessDenied"))


def test_a_listing_that_breaks_off_is_not_the_whole(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.proxy.add_fault(Fault(replace_in_answer(break_off), operation="ListObjectsV2"))
    assert_refused(job, words=("cannot list",))


def break_off(page: bytes) -> bytes:
    """A listing that says that it goes on, and not where."""
    page = re.sub(rb"<Contents>.*</Contents>", b"", page, flags=re.DOTALL)
    return page.replace(b"<IsTruncated>false<", b"<IsTruncated>true<")


def test_verify_asks_again_for_a_listing_that_is_throttled(job: Job) -> None:
    job.back_up("a.dat")
    fault = Fault(answer(503, "SlowDown"), operation="ListObjectsV2", times=1)
    job.proxy.add_fault(fault)
    assert_right(job, files=1)
    assert fault.hits == 1


def test_a_missing_bucket_is_said_and_not_created(job: Job) -> None:
    job.back_up("a.dat")
    job.server.remove_bucket(job.bucket)
    assert_refused(job, words=(job.bucket, "no bucket"))
    assert job.bucket not in {b["Name"] for b in job.server.client().list_buckets()["Buckets"]}


@needs_signals
def test_a_signal_while_verify_lists_changes_nothing(job: Job) -> None:
    job.back_up("a.dat")
    state = job.state_path.read_bytes()
    job.proxy.add_fault(Fault(delay(600), operation="ListObjectsV2"))
    process = job.start(VERIFY)
    wait_until(lambda: len(job.requests("ListObjectsV2")), 30, "the listing")
    process.send_signal(signal.SIGTERM)
    completed = finish(process, timeout=10)
    assert (completed.returncode, completed.stdout) == (143, "")
    assert len(completed.stderr.splitlines()) == 1
    assert job.state_path.read_bytes() == state


def test_verify_without_a_state_is_refused(job: Job) -> None:
    job.make("a.dat")
    assert_stopped(verify(job), "--verify", "state file")
    assert job.proxy.requests == []
    assert not job.state_path.exists()


@pytest.mark.parametrize("what", ["bucket", "folder", "shard"])
def test_verify_of_another_job_is_refused(job: Job, tmp_path: Path, what: str) -> None:
    job.back_up("a.dat")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    others: dict[str, tuple[list[str], str]] = {
        "bucket": (["--bucketname", "another-bucket"], job.bucket),
        "folder": (["--backupfolder", str(elsewhere)], str(job.folder)),
        "shard": (["--shard", "1/2"], "shard"),
    }
    arguments, word = others[what]
    since = job.seen()
    assert_refused(job, *arguments, words=("state file", word))
    assert job.seen() == since


def test_another_run_keeps_verify_out(job: Job) -> None:
    job.back_up("a.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    puts = len(job.requests("PutObject"))
    process = job.start()
    wait_until(lambda: len(job.requests("PutObject")) > puts, 60, "the other run's upload")
    assert_refused(job, words=(f"process {process.pid}",))


# --- --verify folder -------------------------------------------------------------------------

NO_BOTO3 = "import sys; sys.modules['boto3'] = sys.modules['botocore'] = None"


def verify_folder(job: Job, folder: Path, *arguments: str, **options: Any) -> Completed:
    """Run with --verify folder, which may only read files: it asks nobody and writes nothing."""
    beside = job.state_path.parent

    def found() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in beside.iterdir() if path.is_file()}

    before, files, since = found(), relative_paths(folder), job.seen()
    completed = job.run(VERIFY, "folder", "--backupfolder", folder, *arguments, **options)
    assert job.seen() == since
    assert found() == before
    assert relative_paths(folder) == files
    return completed


def folder_summary(job: Job, folder: Path, what: str) -> str:
    return f"verified in {folder}: {what}; state: {job.state_path}\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Where a restored copy is."""
    return tmp_path / "restored copy"


def copied(job: Job, copy: Path) -> Path:
    shutil.copytree(job.folder, copy)
    return copy


def test_a_copy_that_is_right(job: Job, copy: Path) -> None:
    files = job.back_up("a.dat", "sub/b.dat", "ü")
    size = sum(map(len, files.values()))
    completed = verify_folder(job, copied(job, copy), python_flags=prelude(NO_BOTO3), server=None)
    assert_clean(completed)
    right = f"3 files right, {size} B; 0 wrong, 0 not yet sent"
    assert completed.stdout == folder_summary(job, copy, right)
    # The folder itself is a copy too.
    assert_clean(verify_folder(job, job.folder))


def test_what_is_added_to_a_copy_is_no_error(job: Job, copy: Path) -> None:
    job.back_up("a.dat")
    make_files(copied(job, copy), {"added": b"x", "sub/added": b"y"})
    completed = verify_folder(job, copy)
    assert_clean(completed)
    assert "1 file right, 14 B; 0 wrong" in completed.stdout


@pytest.mark.few(1)
def test_what_is_missing_or_different_in_a_copy_is_named(each_job: Job, copy: Path) -> None:
    job = each_job
    job.write({"parts": some_bytes(LARGE_BYTES)})
    job.make("a.dat", "flipped", "missing", "shorter", "sub/missing")
    assert_clean(job.run(*IN_PARTS))
    copied(job, copy)
    for name, at in (("flipped", 3), ("parts", LARGE_BYTES // 2)):
        data = bytearray((copy / name).read_bytes())
        data[at] ^= 1
        (copy / name).write_bytes(data)
    for name in ("missing", "sub/missing"):
        (copy / name).unlink()
    (copy / "shorter").write_bytes(b"other")
    completed = verify_folder(job, copy)
    assert completed.returncode == 1
    *lines, summary = completed.stdout.splitlines(keepends=True)
    etags = {name: job.entry(name)["etag"] for name in ("flipped", "parts")}
    flipped = md5((copy / "flipped").read_bytes())
    is_whole = "-" not in etags["parts"]
    parts = md5((copy / "parts").read_bytes()) if is_whole else multipart_etag(copy / "parts")
    assert sorted(lines) == sorted(
        [
            f"different: {copy}/flipped (of flipped): it has other bytes: its ETag would be "
            f"{flipped} and not {etags['flipped']}\n",
            f"different: {copy}/parts (of parts): it has other bytes: its ETag would be "
            f"{parts} and not {etags['parts']}\n",
            f"different: {copy}/shorter (of shorter): it has 5 bytes and not 16\n",
            f"missing: {copy}/missing (of missing)\n",
            f"missing: {copy}/sub/missing (of sub/missing)\n",
        ]
    )
    right = "1 file right, 14 B; 5 wrong, 0 not yet sent"
    assert summary == folder_summary(job, copy, right)
    (sentence,) = completed.stderr.splitlines()
    assert sentence.startswith("s3FileTransfer: ")


def multipart_etag(path: Path) -> str:
    """The ETag that S3 gives to a file in parts of 5 MiB."""
    data = path.read_bytes()
    parts = [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
    return f"{md5(b''.join(bytes.fromhex(md5(part)) for part in parts))}-{len(parts)}"


def test_a_copy_of_what_has_a_prefix(job: Job, copy: Path) -> None:
    job.make("a.dat", "sub/b.dat")
    assert_clean(job.run("--prefix", "daily/"))
    copied(job, copy)
    assert_clean(verify_folder(job, copy, "--prefix", "daily/"))
    # Restored with the prefix in its paths, as `rclone copy` of the whole bucket does.
    (copy.parent / "whole").mkdir()
    copy.rename(copy.parent / "whole" / "daily")
    assert_clean(verify_folder(job, copy.parent / "whole"))
    completed = verify_folder(job, copy.parent / "whole", "--prefix", "daily/")
    assert completed.returncode == 1
    (said,) = completed.stderr.splitlines()
    assert "check --backupfolder and --prefix" in said


def test_what_was_not_sent_is_counted_in_a_copy(job: Job, copy: Path) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.uploaded_entry("a.dat"), job.pending_entry("b.dat"))
    completed = verify_folder(job, copied(job, copy))
    assert completed.returncode == 1
    assert completed.stdout == folder_summary(
        job, copy, "1 file right, 14 B; 0 wrong, 1 not yet sent"
    )
    assert len(completed.stderr.splitlines()) == 1


def test_a_copy_of_what_was_never_sent_has_no_wrong_prefix(job: Job, copy: Path) -> None:
    job.make("b.dat")
    job.write_state(job.pending_entry("b.dat"))
    completed = verify_folder(job, copied(job, copy), "--prefix", "daily/")
    assert completed.returncode == 1
    assert completed.stdout == folder_summary(
        job, copy, "0 files right, 0 B; 0 wrong, 1 not yet sent"
    )
    assert "send them with --crashrun 1" in completed.stderr


def test_what_can_be_compared_by_size_alone_is_counted_in_a_copy(job: Job, copy: Path) -> None:
    job.back_up("a.dat", "kms", "foreign", "no-etag")
    etag = "0123456789abcdef" * 2
    kms = {**job.uploaded_entry("kms"), "etag": etag, "sse": "aws:kms"}
    foreign = {**job.uploaded_entry("foreign"), "etag": f"{etag}-2"}
    bare = {**job.uploaded_entry("no-etag")}
    del bare["etag"]
    job.write_state(job.uploaded_entry("a.dat"), kms, foreign, bare)
    copied(job, copy)
    completed = verify_folder(job, copy)
    assert_clean(completed)
    assert "4 files right (3 of them by size alone), " in completed.stdout
    (copy / "kms").write_bytes(b"other")
    completed = verify_folder(job, copy)
    assert completed.returncode == 1
    assert f"different: {copy}/kms (of kms): it has 5 bytes and not 12\n" in completed.stdout
    assert "3 files right (2 of them by size alone), " in completed.stdout


def test_of_a_state_that_has_neither_size_nor_etag_nothing_is_right_in_a_copy(
    job: Job, copy: Path
) -> None:
    job.back_up("a.dat")
    write_three_fields(job, "a.dat")
    copied(job, copy)
    completed = verify_folder(job, copy)
    assert completed.returncode == 1
    (line,) = lines_with(completed.stdout, "unproven: ")
    assert line.endswith("a.dat): the state has neither its size nor its ETag")


@needs_permissions
def test_of_an_etag_that_is_made_of_no_md5s_the_size_is_compared_in_a_copy(
    job: Job, copy: Path
) -> None:
    job.back_up("a.dat", "b.dat")
    other = job.entry("b.dat") | {"etag": "caesar7"}
    job.write_state(job.entry("a.dat"), other)
    copied(job, copy)
    completed = verify_folder(job, copy)
    assert_clean(completed)
    assert "2 files right (1 of them by size alone), 28 B; 0 wrong" in completed.stdout


# When the state has been looked through, and is opened once more to compare the files, a run has
# saved another one.
SAVED_MEANWHILE = """\
import os
real, opened = os.open, 0
def counted(path, *args, **keywords):
    global opened
    if path == {state!r}:
        opened += 1
        if opened == 2:
            os.replace({other!r}, path)
    return real(path, *args, **keywords)
os.open = counted
"""


@needs_replace_of_open_files
@pytest.mark.parametrize("left", [["a.dat"], ["b.dat", "c.dat"]], ids=" ".join)
def test_a_copy_is_not_compared_with_a_state_that_a_run_replaces_meanwhile(
    job: Job, copy: Path, left: list[str]
) -> None:
    job.back_up("a.dat", "b.dat", "c.dat")
    other = job.state_path.with_name("other")
    for path, keys in ((other, left), (job.state_path, ["a.dat", "b.dat", "c.dat"])):
        lines = ",\n".join(json.dumps(job.uploaded_entry(key)) for key in keys)
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    flags = prelude(SAVED_MEANWHILE.format(state=str(job.state_path), other=str(other)))
    folder = copied(job, copy)
    completed = job.run(VERIFY, "folder", "--backupfolder", folder, python_flags=flags)
    assert set(job.state()) == set(left)
    assert_stopped(completed, "another program has changed the state file", "run again")


def test_a_file_of_a_copy_that_cannot_be_read_is_unproven(job: Job, copy: Path) -> None:
    job.back_up("a.dat", "b.dat")
    copied(job, copy)
    (copy / "b.dat").chmod(0)
    job.state_path.chmod(0o644)
    completed = verify_folder(job, copy, user=NOBODY)
    assert completed.returncode == 1
    start = f"unproven: {copy}/b.dat (of b.dat): cannot read it: permission denied"
    (line,) = lines_with(completed.stdout, "unproven: ")
    assert line.startswith(start)
    assert "1 file right, 14 B; 0 wrong, 1 unproven, 0 not yet sent" in completed.stdout


@pytest.mark.parametrize("key", ["../secret", "sub/../../secret", "a\0b"])
def test_a_key_that_leads_out_of_a_copy_is_unproven(
    job: Job, copy: Path, tmp_path: Path, key: str
) -> None:
    job.back_up("a.dat")
    (copied(job, copy) / "sub").mkdir()
    (tmp_path / "secret").write_bytes(bytes(job.path("a.dat").stat().st_size))
    job.write_state(job.entry("a.dat") | {"filename": key})
    completed = verify_folder(job, copy)
    assert completed.returncode == 1
    assert "unproven: " in completed.stdout
    assert "its key is not a path below the folder" in completed.stdout
    assert "ETag" not in completed.stdout


def test_verify_folder_reads_the_journal(job: Job, copy: Path) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.uploaded_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(job.uploaded_entry("b.dat"))
    assert_clean(verify_folder(job, copied(job, copy)))


def test_verify_folder_without_a_state_is_refused(job: Job, copy: Path) -> None:
    job.make("a.dat")
    assert_stopped(verify_folder(job, copied(job, copy)), "--verify", "state file")


def test_verify_folder_takes_no_lock(job: Job, copy: Path) -> None:
    job.back_up("a.dat")
    copied(job, copy)
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    puts = len(job.requests("PutObject"))
    process = job.start()
    wait_until(lambda: len(job.requests("PutObject")) > puts, 60, "the other run's upload")
    completed = job.run(VERIFY, "folder", "--backupfolder", copy)
    assert "1 not yet sent" in completed.stdout
    assert process.poll() is None


def test_verify_folder_with_quiet_says_only_what_is_wrong(job: Job, copy: Path) -> None:
    job.back_up("a.dat", "b.dat")
    copied(job, copy)
    assert verify_folder(job, copy, "--quiet") == Completed(0, "", "")
    (copy / "a.dat").unlink()
    completed = verify_folder(job, copy, "--quiet")
    assert completed.returncode == 1
    assert completed.stdout == f"missing: {copy}/a.dat (of a.dat)\n"


def test_verify_bucket_is_verify(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.delete("b.dat")
    completed = verify(job, "bucket")
    assert_wrong(job, completed, **{"b.dat": "not in the bucket"})


def test_control_characters_of_a_name_do_not_reach_the_terminal(job: Job, copy: Path) -> None:
    job.back_up("a\x1b[31m.dat")
    copy.mkdir()
    completed = verify_folder(job, copy)
    assert completed.returncode == 1
    assert "missing: " in completed.stdout
    assert "\x1b" not in completed.stdout + completed.stderr


OBJECT = ("--storage-class", "STANDARD_IA", "--sse", "AES256")
WHERE = ("--prefix", "daily/", "--exclude", "*.tmp", "--exclude", "cache/*")
TREE = ["a.dat", "b.tmp", "cache/c.dat", "cache/deep/d.dat", "sub/e.dat", "sub/f.tmp"]
SENT = ["daily/a.dat", "daily/sub/e.dat"]


def local(job: Job, *keys: str, prefix: str = "daily/") -> dict[str, bytes]:
    """What the bucket should hold under these keys."""
    return {key: (job.folder / key.removeprefix(prefix)).read_bytes() for key in keys}


def started(job: Job, key: str, *, since: int = 0) -> Request:
    """The one request that says how the object of a key is to be kept."""
    begun = job.requests("PutObject", "CreateMultipartUpload", since=since)
    (request,) = (request for request in begun if request.key == key)
    return request


def assert_kept_as_asked(job: Job, key: str, *, since: int = 0) -> None:
    """Check that an object was sent with the options of OBJECT, and has them where it can."""
    headers = started(job, key, since=since).headers
    assert headers["x-amz-storage-class"] == "STANDARD_IA"
    assert headers["x-amz-server-side-encryption"] == "AES256"
    if job.server.name == "moto":  # rclone knows neither
        head = job.head(key)
        assert (head["StorageClass"], head["ServerSideEncryption"]) == ("STANDARD_IA", "AES256")


@pytest.fixture
def small_job(new_job: NewJob, server: S3Server, each_client: tuple[str, ...]) -> Job:
    """A job by each of the clients that send small files."""
    return new_job(server, *each_client)


# --- Options together: a normal run ----------------------------------------------------------


@pytest.mark.few(1)
def test_exclude_prefix_storage_class_and_sse(small_job: Job) -> None:
    job = small_job
    job.make(*TREE)
    job.write({"parts": some_bytes(LARGE_BYTES), "parts.tmp": some_bytes(LARGE_BYTES)})
    sent = sorted([*SENT, "daily/parts"])
    assert_clean(job.run(*WHERE, *OBJECT, *IN_PARTS))
    assert job.objects() == local(job, *sent)
    assert job.state() == dict.fromkeys(sent, 1)
    for key in sent:
        assert_kept_as_asked(job, key)


def test_a_dry_run_of_them_lists_what_the_run_sends(job: Job) -> None:
    job.make(*TREE)
    completed = job.run(*WHERE, *OBJECT, "--dryrun")
    assert (completed.returncode, completed.stderr) == (0, "")
    listed = lines_with(completed.stdout, "would upload")
    urls = [re.findall(r" -> s3://([^ ]+) \(", line) for line in listed]
    assert urls == [[f"{job.bucket}/{key}"] for key in SENT]
    assert job.proxy.requests == []
    assert list(job.state_path.parent.iterdir()) == []
    assert_clean(job.run(*WHERE, *OBJECT))
    assert sorted(job.puts()) == SENT


def test_skip_unchanged_with_them(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job.run(*WHERE, *OBJECT))
    since = job.seen()
    job.make("new.dat", "new.tmp")
    completed = job.run(*WHERE, *OBJECT, "--skip-unchanged")
    assert_clean(completed)
    assert re.search(r"\b2 unchanged", completed.stdout)
    assert [r.key for r in job.proxy.requests[since:] if r.method == "PUT"] == ["daily/new.dat"]
    assert_kept_as_asked(job, "daily/new.dat")
    assert_clean(job.run(*WHERE, "--verify"))


def test_skip_unchanged_sends_what_was_excluded_before(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job.run("--exclude", "*.tmp"))
    since = job.seen()
    assert_clean(job.run("--skip-unchanged"))
    assert job.sent(since) == ["b.tmp", "sub/f.tmp"]
    assert job.objects() == local(job, *TREE)


def test_a_file_excluded_now_leaves_the_state_and_stays_in_the_bucket(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job.run())
    since = job.seen()
    assert_clean(job.run("--skip-unchanged", "--exclude", "*.tmp"))
    assert job.puts(since) == []
    assert job.objects() == local(job, *TREE)
    assert sorted(job.state()) == [name for name in TREE if not name.endswith(".tmp")]


# --- Options together: a crash run -----------------------------------------------------------


@pytest.mark.few(1)
def test_storage_class_and_sse_apply_to_what_a_crash_run_sends(small_job: Job) -> None:
    job = small_job
    job.make(*TREE)
    job.write({"parts": some_bytes(LARGE_BYTES)})
    missing = ["daily/parts", "daily/sub/e.dat"]
    job.refuse(*missing)
    completed = job.run(*WHERE, *OBJECT, *IN_PARTS)
    assert_failed(completed, [job.folder / "parts", job.folder / "sub/e.dat"])
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run(*WHERE, *OBJECT, *IN_PARTS))
    for key in missing:
        assert_kept_as_asked(job, key, since=since)
    uploads = {r.key for r in job.proxy.requests[since:] if r.method in ("PUT", "POST")}
    assert uploads == set(missing)
    assert job.objects() == local(job, "daily/a.dat", *missing)
    assert job.state() == dict.fromkeys(job.objects(), 1)


def test_a_crash_run_sends_with_its_own_storage_class_and_sse(job: Job) -> None:
    job.make("a.dat", "b.dat")
    job.refuse("b.dat")
    assert_failed(job.run(), [job.folder / "b.dat"])
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run(*OBJECT))
    assert_kept_as_asked(job, "b.dat", since=since)
    assert "x-amz-storage-class" not in started(job, "a.dat").headers


@needs_permissions
def test_exclude_and_prefix_hold_in_a_folder_that_a_crash_run_walks(job: Job) -> None:
    job.make(*TREE)
    (job.folder / "sub").chmod(0)
    assert_failed(job.run(*WHERE, *OBJECT, user=NOBODY), [job.folder / "sub"])
    (job.folder / "sub").chmod(0o755)
    since = job.seen()
    assert_clean(job.crash_run(*WHERE, *OBJECT, user=NOBODY))
    assert_kept_as_asked(job, "daily/sub/e.dat", since=since)
    assert job.objects() == local(job, *SENT)
    assert job.state() == dict.fromkeys(SENT, 1)


def test_a_dry_run_of_a_crash_run_lists_nothing_that_the_bucket_has(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.make("c.dat")
    # As a run with --skip-unchanged leaves it that is killed during its walk.
    folder = job.pending_entry("", filepath=str(job.folder), bucket=job.bucket)
    job.write_state(folder, *job.entries())
    completed = job.crash_run("--dryrun")
    assert completed.returncode == 0
    assert re.findall("would upload: .*/(.*) ->", completed.stdout) == ["c.dat"]
    assert_clean(job.crash_run())
    assert job.sent() == ["c.dat"]


def test_a_dry_run_of_a_crash_run_lists_what_it_would_send(job: Job) -> None:
    job.make("a.dat", "b.dat", "c.dat", "d.tmp")
    missing = ["daily/b.dat", "daily/c.dat", "daily/d.tmp"]
    job.refuse(*missing)
    assert job.run("--prefix", "daily/").returncode == 1
    job.proxy.clear_faults()
    (job.folder / "c.dat").unlink()
    state, since = job.state_path.read_bytes(), job.seen()
    options = ("--prefix", "daily/", "--exclude", "*.tmp", *OBJECT)
    completed = job.crash_run(*options, "--dryrun")
    assert_failed(completed, [job.folder / "c.dat"])
    (listed,) = lines_with(completed.stdout, "would upload")
    assert f"{job.folder / 'b.dat'} -> s3://{job.bucket}/daily/b.dat (" in listed
    asked = {request.operation for request in job.proxy.requests[since:]}
    assert asked <= {"HeadBucket", "ListObjectsV2"}
    assert job.state_path.read_bytes() == state
    assert_failed(job.crash_run(*options), [job.folder / "c.dat"])
    assert job.puts()[-1] == "daily/b.dat"


@pytest.mark.parametrize("gone", ["object", "bucket"])
def test_a_dry_run_of_a_crash_run_lists_what_the_bucket_has_lost(job: Job, gone: str) -> None:
    job.back_up("a.dat", "b.dat")
    state = job.state_path.read_bytes()
    if gone == "object":
        job.delete("b.dat")
    else:
        job.server.remove_bucket(job.bucket)
    completed = job.crash_run("--dryrun")
    assert completed.returncode == 0
    sent = re.findall("would upload: .*/(.*) ->", completed.stdout)
    assert sent == (["b.dat"] if gone == "object" else ["a.dat", "b.dat"])
    assert job.state_path.read_bytes() == state
    assert job.crash_run().returncode == 0
    assert job.sent() == sent
    job.check_all_is_there()


def test_what_verify_found_is_repaired_with_storage_class_and_sse(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job.run(*WHERE, *OBJECT))
    job.delete("daily/sub/e.dat")
    assert job.run(*WHERE, "--verify").returncode == 1
    since = job.seen()
    assert_clean(job.crash_run(*WHERE, *OBJECT))
    assert_kept_as_asked(job, "daily/sub/e.dat", since=since)
    assert_clean(job.run(*WHERE, "--verify"))
    assert job.objects() == local(job, *SENT)
