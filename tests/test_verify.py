"""--verify: what the state calls uploaded is compared with what the bucket holds."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_proxy import Fault, answer, delay
from jobs import MIB, Job, assert_clean, assert_failed, assert_stopped, lines_with
from proxied_job import replace_in_answer, set_headers
from script_runner import Completed, finish, make_files, wait_until
from servers import S3Server
from systems import needs_signals
from test_backup import ODD_NAMES, PARTS

pytest_plugins = ["job_fixtures"]

VERIFY = "--verify"
KMS = ("--sse", "aws:kms")


@pytest.fixture
def job(new_job: Callable[[S3Server], Job], s3: S3Server) -> Job:
    """A job on each of the servers, seen through the proxy from its first run."""
    job = new_job(s3)
    job.proxy  # noqa: B018
    return job


@pytest.fixture
def moto_job(new_job: Callable[[S3Server], Job], moto_s3: S3Server) -> Job:
    """A job on moto, seen through the proxy from its first run."""
    job = new_job(moto_s3)
    job.proxy  # noqa: B018
    return job


def backed_up(job: Job, *names: str) -> dict[str, bytes]:
    """Make files and send them with a normal run; return them by key."""
    files = job.make(*names)
    assert_clean(job())
    return files


def verify(job: Job, *arguments: str | Path) -> Completed:
    """Run with --verify, which may only look."""
    before = len(job.proxy.requests)
    completed = job(VERIFY, *arguments)
    assert {request.method for request in job.proxy.requests[before:]} <= {"HEAD", "GET"}
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
    assert "--crashrun 1" in sentence
    assert {key for key, uploaded in job.state().items() if not uploaded} == set(said)


def write_three_fields(job: Job, *keys: str) -> bytes:
    """Write a state with the original three fields of each entry; return its bytes."""
    entries = [job.pending_entry(key, uploadedSuccess=1) for key in keys]
    job.state_path.write_text(json.dumps(entries), encoding="utf-8")
    return job.state_path.read_bytes()


# --- All is right ----------------------------------------------------------------------------


def test_a_backup_is_right(job: Job) -> None:
    # moto's server finds no object with a line feed in its key.
    names = [name for name in ODD_NAMES if job.server.name != "moto" or "\n" not in name]
    job.make(*names, *(f"folder {name}/{name}" for name in names))
    make_files(job.folder, {"empty": b"", "parts": os.urandom(11 * MIB)})
    assert_clean(job(*PARTS))
    assert_right(job, files=2 * len(names) + 2)
    assert job.proxy.count("ListObjectsV2") == 1
    assert job.proxy.count("GetObject") == job.proxy.count("HeadObject") == 0


def test_what_changed_in_the_folder_does_not_matter(job: Job) -> None:
    backed_up(job, "a.dat", "b.dat", "c.dat")
    (job.folder / "a.dat").unlink()
    (job.folder / "b.dat").write_bytes(b"changed since")
    job.make("new.dat")
    assert_right(job, files=3)


def test_the_prefix_is_in_the_state(job: Job) -> None:
    job.make("a.dat")
    assert_clean(job("--prefix", "daily/"))
    job.server.client().put_object(Bucket=job.bucket, Key="a.dat", Body=b"of somebody else")
    assert_right(job, files=1)


def test_a_run_that_had_nothing_to_send_is_right(job: Job) -> None:
    job.folder.mkdir()
    job.create_bucket()
    job.state_path.write_text("[]\n")
    assert_right(job, files=0)
    assert job.proxy.count("ListObjectsV2") == 0


@pytest.mark.parametrize("options", [KMS, ("--sse", "AES256")], ids=["kms", "aes"])
def test_encrypted_objects_are_right(moto_job: Job, options: tuple[str, ...]) -> None:
    make_files(moto_job.folder, {"small": b"small", "parts": os.urandom(11 * MIB)})
    assert_clean(moto_job(*PARTS, *options))
    head = moto_job.server.client().head_object(Bucket=moto_job.bucket, Key="small")
    assert head["ServerSideEncryption"] == options[1]
    assert_right(moto_job, files=2)


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
    with_foreign_etags(moto_job)
    moto_job.make("a.dat")
    assert_clean(moto_job(*KMS))
    (entry,) = moto_job.entries()
    assert entry["etag"] == FOREIGN_ETAG
    assert_right(moto_job, files=1)


def test_an_etag_that_is_no_md5_is_not_compared_with_the_local_bytes(moto_job: Job) -> None:
    files = backed_up(moto_job, "a.dat")
    write_three_fields(moto_job, *files)
    with_foreign_etags(moto_job)
    assert_right(moto_job, files=1)
    assert moto_job.proxy.count("HeadObject") == 1


# --- Something is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "not in the bucket"), (b"other size", "10 bytes"), (b"BYTES of b.dat", "ETag")],
    ids=["missing", "size", "bytes"],
)
def test_an_object_that_is_not_as_recorded_is_named_and_repaired(
    job: Job, found: bytes | None, words: str
) -> None:
    files = backed_up(job, "a.dat", "b.dat", "c.dat")
    others = [entry for entry in job.entries() if entry["filename"] != "b.dat"]
    client = job.server.client()
    if found is None:
        client.delete_object(Bucket=job.bucket, Key="b.dat")
    else:
        client.put_object(Bucket=job.bucket, Key="b.dat", Body=found)
    completed = verify(job)
    assert_wrong(job, completed, **{"b.dat": words})
    assert re.search(r"\b2 files right, .*; 1 wrong, 0 not yet sent", completed.stdout)
    assert [entry for entry in job.entries() if entry["uploadedSuccess"]] == others

    before = len(job.puts())
    assert_clean(job.crash_run())
    assert job.puts()[before:] == ["b.dat"]
    assert job.objects() == files
    assert_right(job, files=3)


def test_a_multipart_object_that_was_replaced_is_named(job: Job) -> None:
    size = 11 * MIB
    make_files(job.folder, {"parts": os.urandom(size), "small": b"small"})
    assert_clean(job(*PARTS))
    job.server.client().put_object(Bucket=job.bucket, Key="parts", Body=b"x" * size)
    assert_wrong(job, verify(job), parts="ETag")
    assert_clean(job.crash_run(*PARTS))
    assert_right(job, files=2)


def test_each_of_many_is_named_and_the_others_stay_right(job: Job) -> None:
    files = backed_up(job, *(f"{n:02}" for n in range(30)))
    gone = [f"{n:02}" for n in range(0, 30, 3)]
    for key in gone:
        job.server.client().delete_object(Bucket=job.bucket, Key=key)
    assert_wrong(job, verify(job), **dict.fromkeys(gone, "not in the bucket"))
    assert_clean(job.crash_run())
    assert job.objects() == files


def test_the_listing_is_read_to_its_end(moto_job: Job) -> None:
    make_files(moto_job.folder, {f"{n:04}": b"%d" % n for n in range(1001)})
    assert_clean(moto_job())
    assert_right(moto_job, files=1001)
    moto_job.server.client().delete_object(Bucket=moto_job.bucket, Key="0000")
    moto_job.server.client().put_object(Bucket=moto_job.bucket, Key="1000", Body=b"other")
    assert_wrong(moto_job, verify(moto_job), **{"0000": "not in the bucket", "1000": "bytes"})


def test_what_is_missing_already_is_counted_and_named_once_more_by_nobody(job: Job) -> None:
    job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(answer(400, "EntityTooLarge"), operation="PutObject", key="b.dat"))
    assert_failed(job(), [job.folder / "b.dat"])
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
    job.proxy.add_fault(Fault(answer(400, "EntityTooLarge"), operation="PutObject", key="b.dat"))
    assert_failed(job(), [job.folder / "b.dat"])
    job.proxy.clear_faults()
    job.server.client().delete_object(Bucket=job.bucket, Key="c.dat")
    completed = verify(job)
    assert completed.returncode == 1
    assert re.search(r"\b1 files? right, .*; 1 wrong, 1 not yet sent", completed.stdout)
    assert len(lines_with(completed.stdout, "wrong: ")) == 1
    assert job.state() == {"a.dat": 1, "b.dat": 0, "c.dat": 0}
    assert_clean(job.crash_run())
    assert job.objects() == files


def test_quiet_still_lists_what_is_wrong(job: Job) -> None:
    backed_up(job, "a.dat", "b.dat")
    job.server.client().delete_object(Bucket=job.bucket, Key="b.dat")
    completed = verify(job, "--quiet")
    assert_wrong(job, completed, **{"b.dat": "not in the bucket"})
    assert len(completed.stdout.splitlines()) == 1


def test_quiet_says_nothing_when_all_is_right(job: Job) -> None:
    backed_up(job, "a.dat")
    assert verify(job, "--quiet") == Completed(0, "", "")


def test_control_characters_of_the_server_do_not_reach_the_terminal(job: Job) -> None:
    backed_up(job, "a.dat")
    etag = "<ETag>\u009b31m</ETag>".encode()
    change = replace_in_answer(lambda body: re.sub(rb"<ETag>[^<]*</ETag>", etag, body))
    job.proxy.add_fault(Fault(change, operation="ListObjectsV2"))
    completed = verify(job)
    assert completed.returncode == 1
    assert "\u009b" not in completed.stdout + completed.stderr
    assert "\u009b" not in job.state_path.read_text(encoding="utf-8")


# --- Without a recorded ETag -----------------------------------------------------------------


def test_objects_that_hold_the_local_bytes_are_right(job: Job) -> None:
    files = backed_up(job, "a.dat", "sub/b.dat")
    write_three_fields(job, *files)
    assert_right(job, files=2)


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "not in the bucket"), (b"other size", "10 bytes"), (b"BYTES of b.dat", "other bytes")],
    ids=["missing", "size", "bytes"],
)
def test_objects_that_do_not_hold_the_local_bytes_are_wrong(
    job: Job, found: bytes | None, words: str
) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    write_three_fields(job, *files)
    client = job.server.client()
    if found is None:
        client.delete_object(Bucket=job.bucket, Key="b.dat")
    else:
        client.put_object(Bucket=job.bucket, Key="b.dat", Body=found)
    assert_wrong(job, verify(job), **{"b.dat": words})
    assert_clean(job.crash_run())
    assert job.objects() == files


def test_an_object_whose_file_is_gone_cannot_be_compared(job: Job) -> None:
    files = backed_up(job, "a.dat", "b.dat")
    write_three_fields(job, *files)
    (job.folder / "b.dat").unlink()
    completed = verify(job)
    assert completed.returncode == 1
    (line,) = lines_with(completed.stdout, "b.dat")
    assert line.startswith("unproven: ")
    assert "cannot be compared" in line
    assert job.state() == dict.fromkeys(files, 1)
    assert lines_with(completed.stdout, "/a.dat") == []
    assert job.objects() == files


def test_of_a_multipart_object_the_size_is_compared(moto_job: Job) -> None:
    size = 11 * MIB
    make_files(moto_job.folder, {"parts": os.urandom(size)})
    assert_clean(moto_job(*PARTS))
    write_three_fields(moto_job, "parts")
    # Of the bytes a multipart ETag says nothing to who does not know the size of the parts.
    (moto_job.folder / "parts").write_bytes(os.urandom(size))
    assert_right(moto_job, files=1)
    (moto_job.folder / "parts").write_bytes(os.urandom(size + 1))
    assert_wrong(moto_job, verify(moto_job), parts=f"{size:,} bytes")


# --- It cannot be done -----------------------------------------------------------------------


def assert_refused(job: Job, *arguments: str | Path, words: tuple[str, ...]) -> None:
    """Check that --verify stops with these words and changes nothing."""
    state = job.state_path.read_bytes()
    completed = verify(job, *arguments)
    assert_stopped(completed, *words)
    assert completed.stdout == ""
    assert job.state_path.read_bytes() == state


def test_a_listing_that_is_refused_stops_it(job: Job) -> None:
    backed_up(job, "a.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListObjectsV2"))
    assert_refused(job, words=("cannot list", job.bucket, "AccessDenied"))


def test_a_second_page_that_is_refused_stops_it(moto_job: Job) -> None:
    make_files(moto_job.folder, {f"{n:04}": b"%d" % n for n in range(1001)})
    assert_clean(moto_job())
    fault = Fault(answer(403, "AccessDenied"), operation="ListObjectsV2", after=1)
    moto_job.proxy.add_fault(fault)
    assert_refused(moto_job, words=("cannot list", "AccessDenied"))
    assert fault.hits == 1


def test_a_listing_that_breaks_off_is_not_the_whole(job: Job) -> None:
    backed_up(job, "a.dat", "b.dat")
    job.proxy.add_fault(Fault(replace_in_answer(break_off), operation="ListObjectsV2"))
    assert_refused(job, words=("cannot list",))


def break_off(page: bytes) -> bytes:
    """A listing that says that it goes on, and not where."""
    page = re.sub(rb"<Contents>.*</Contents>", b"", page, flags=re.DOTALL)
    return page.replace(b"<IsTruncated>false<", b"<IsTruncated>true<")


def test_a_listing_that_is_throttled_once_is_asked_for_again(job: Job) -> None:
    backed_up(job, "a.dat")
    fault = Fault(answer(503, "SlowDown"), operation="ListObjectsV2", times=1)
    job.proxy.add_fault(fault)
    assert_right(job, files=1)
    assert fault.hits == 1


def test_a_missing_bucket_is_said_and_not_created(job: Job) -> None:
    backed_up(job, "a.dat")
    job.server.remove_bucket(job.bucket)
    assert_refused(job, words=(job.bucket, "no bucket"))
    assert job.bucket not in {b["Name"] for b in job.server.client().list_buckets()["Buckets"]}


@needs_signals
def test_a_signal_during_the_listing_changes_nothing(job: Job) -> None:
    backed_up(job, "a.dat")
    state = job.state_path.read_bytes()
    job.proxy.add_fault(Fault(delay(600), operation="ListObjectsV2"))
    process = job.start(VERIFY)
    wait_until(lambda: job.proxy.count("ListObjectsV2"), 30, "the listing")
    process.send_signal(signal.SIGTERM)
    completed = finish(process, timeout=10)
    assert (completed.returncode, completed.stdout) == (143, "")
    assert len(completed.stderr.splitlines()) == 1
    assert job.state_path.read_bytes() == state


def test_without_a_state_it_is_refused(job: Job) -> None:
    job.make("a.dat")
    assert_stopped(verify(job), "--verify", "state file")
    assert job.proxy.requests == []
    assert not job.state_path.exists()


def test_a_damaged_state_is_refused(job: Job) -> None:
    job.make("a.dat")
    job.state_path.write_bytes(b"[\n{")
    assert_refused(job, words=(str(job.state_path), "damaged"))
    assert job.proxy.requests == []


@pytest.mark.parametrize("what", ["bucket", "folder", "shard"])
def test_a_state_of_another_job_is_refused(job: Job, tmp_path: Path, what: str) -> None:
    backed_up(job, "a.dat")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    others: dict[str, tuple[list[str], str]] = {
        "bucket": (["--bucketname", "another-bucket"], job.bucket),
        "folder": (["--backupfolder", str(elsewhere)], str(job.folder)),
        "shard": (["--shard", "1/2"], "shard"),
    }
    arguments, word = others[what]
    before = len(job.proxy.requests)
    assert_refused(job, *arguments, words=("state file", word))
    assert len(job.proxy.requests) == before


@pytest.mark.parametrize("other", [("--crashrun", "1"), ("--dryrun",), ("--skip-unchanged",)])
def test_options_that_make_no_sense_with_it(job: Job, other: tuple[str, ...]) -> None:
    backed_up(job, "a.dat")
    state, before = job.state_path.read_bytes(), len(job.proxy.requests)
    completed = job(VERIFY, *other)
    assert (completed.returncode, completed.stdout) == (2, "")
    sentence = completed.stderr.splitlines()[-1]
    assert re.match(r"s3FileTransfer\.py: error: .*--verify", sentence)
    assert len(job.proxy.requests) == before
    assert job.state_path.read_bytes() == state


def test_another_run_keeps_it_out(job: Job) -> None:
    backed_up(job, "a.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    puts = job.proxy.count("PutObject")
    process = job.start()
    wait_until(lambda: job.proxy.count("PutObject") > puts, 60, "the other run's upload")
    assert_refused(job, words=(f"process {process.pid}",))
