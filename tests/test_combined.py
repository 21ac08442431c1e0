"""Options with each other and with --crashrun 1, over both ways of sending."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Proxied
from fault_proxy import Fault, Request, answer
from jobs import MIB, NOBODY, Job, assert_clean, assert_failed, lines_with
from proxied_job import IN_PARTS, ProxiedJob, Start, replace_in_answer
from script_runner import make_files
from servers import S3Server
from systems import needs_permissions
from test_backup import PARTS
from test_crash import killed_in_parts
from test_workers import is_by_crt

pytest_plugins = ["job_fixtures"]

OBJECT = ("--storage-class", "STANDARD_IA", "--sse", "AES256")
WHERE = ("--prefix", "daily/", "--exclude", "*.tmp", "--exclude", "cache/*")
TREE = ["a.dat", "b.tmp", "cache/c.dat", "cache/deep/d.dat", "sub/e.dat", "sub/f.tmp"]
SENT = ["daily/a.dat", "daily/sub/e.dat"]


@pytest.fixture(params=["classic", "crt"])
def client(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The option for each way of sending small files."""
    return ("--preferred-transfer-client", request.param)


@pytest.fixture(params=["rclone", "moto"])
def job(
    new_job: Callable[[S3Server], Job], request: pytest.FixtureRequest, client: tuple[str, ...]
) -> Job:
    """A job on each of the servers and by each of the clients, seen through the proxy."""
    job = new_job(request.getfixturevalue(f"{request.param}_s3"))
    job.proxy  # noqa: B018
    run, start = job._run, job._start
    job._run = lambda *args, **options: run(*client, *args, **options)
    job._start = lambda *args, **options: start(*client, *args, **options)
    return job


@pytest.fixture
def parts_job(
    proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start, moto_s3: S3Server
) -> ProxiedJob:
    """A job on moto, which lists parts, storage classes and encryptions as S3 does."""
    return ProxiedJob(moto_s3, proxied, bucket=bucket_name, folder=backup_folder, start=start)


def local(job: Job, *keys: str, prefix: str = "daily/") -> dict[str, bytes]:
    """What the bucket should hold under these keys."""
    return {key: (job.folder / key.removeprefix(prefix)).read_bytes() for key in keys}


def started(job: Job, key: str, *, after: int = 0) -> Request:
    """The one request that says how the object of a key is to be kept."""
    uploads = ("PutObject", "CreateMultipartUpload")
    (request,) = (r for r in job.proxy.requests[after:] if r.operation in uploads and r.key == key)
    return request


def assert_kept_as_asked(job: Job, key: str, *, after: int = 0) -> None:
    """Check that an object was sent with the options of OBJECT, and has them where it can."""
    headers = started(job, key, after=after).headers
    assert headers["x-amz-storage-class"] == "STANDARD_IA"
    assert headers["x-amz-server-side-encryption"] == "AES256"
    if job.server.name == "moto":  # rclone knows neither
        head: Any = job.server.client().head_object(Bucket=job.bucket, Key=key)
        assert (head["StorageClass"], head["ServerSideEncryption"]) == ("STANDARD_IA", "AES256")


def fail(job: Job, *keys: str) -> None:
    """Have the server refuse these keys until the faults are cleared."""
    for key in keys:
        for operation in ("PutObject", "CreateMultipartUpload"):
            job.proxy.add_fault(Fault(answer(400, "EntityTooLarge"), operation=operation, key=key))


# --- A normal run ----------------------------------------------------------------------------


def test_exclude_prefix_storage_class_and_sse(job: Job, client: tuple[str, ...]) -> None:
    job.make(*TREE)
    make_files(job.folder, {"parts": os.urandom(11 * MIB), "parts.tmp": os.urandom(11 * MIB)})
    sent = sorted([*SENT, "daily/parts"])
    assert_clean(job(*WHERE, *OBJECT, *PARTS))
    assert job.objects() == local(job, *sent)
    assert job.state() == dict.fromkeys(sent, 1)
    for key in sent:
        assert_kept_as_asked(job, key)
    for key in SENT:
        assert is_by_crt(started(job, key)) == (client[1] == "crt")


def test_a_dry_run_of_them_lists_what_the_run_sends(job: Job) -> None:
    job.make(*TREE)
    completed = job(*WHERE, *OBJECT, "--dryrun")
    assert (completed.returncode, completed.stderr) == (0, "")
    listed = lines_with(completed.stdout, "would upload")
    urls = [re.findall(r" -> s3://([^ ]+) \(", line) for line in listed]
    assert urls == [[f"{job.bucket}/{key}"] for key in SENT]
    assert job.proxy.requests == []
    assert list(job.state_path.parent.iterdir()) == []
    assert_clean(job(*WHERE, *OBJECT))
    assert sorted(job.puts()) == SENT


def test_skip_unchanged_with_them(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job(*WHERE, *OBJECT))
    before = len(job.proxy.requests)
    job.make("new.dat", "new.tmp")
    completed = job(*WHERE, *OBJECT, "--skip-unchanged")
    assert_clean(completed)
    assert re.search(r"\b2 unchanged", completed.stdout)
    assert [r.key for r in job.proxy.requests[before:] if r.method == "PUT"] == ["daily/new.dat"]
    assert_kept_as_asked(job, "daily/new.dat")
    assert_clean(job(*WHERE, "--verify"))


def test_skip_unchanged_sends_what_was_excluded_before(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job("--exclude", "*.tmp"))
    before = len(job.puts())
    assert_clean(job("--skip-unchanged"))
    assert sorted(job.puts()[before:]) == ["b.tmp", "sub/f.tmp"]
    assert job.objects() == local(job, *TREE)


def test_a_file_excluded_now_leaves_the_state_and_stays_in_the_bucket(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job())
    before = len(job.puts())
    assert_clean(job("--skip-unchanged", "--exclude", "*.tmp"))
    assert job.puts()[before:] == []
    assert job.objects() == local(job, *TREE)
    assert sorted(job.state()) == [name for name in TREE if not name.endswith(".tmp")]


# --- A crash run -----------------------------------------------------------------------------


def test_storage_class_and_sse_apply_to_what_a_crash_run_sends(
    job: Job, client: tuple[str, ...]
) -> None:
    job.make(*TREE)
    make_files(job.folder, {"parts": os.urandom(11 * MIB)})
    missing = ["daily/parts", "daily/sub/e.dat"]
    fail(job, *missing)
    completed = job(*WHERE, *OBJECT, *PARTS)
    assert_failed(completed, [job.folder / "parts", job.folder / "sub/e.dat"])
    job.proxy.clear_faults()
    before = len(job.proxy.requests)
    assert_clean(job.crash_run(*WHERE, *OBJECT, *PARTS))
    for key in missing:
        assert_kept_as_asked(job, key, after=before)
    uploads = {r.key for r in job.proxy.requests[before:] if r.method in ("PUT", "POST")}
    assert uploads == set(missing)
    assert is_by_crt(started(job, missing[1], after=before)) == (client[1] == "crt")
    assert job.objects() == local(job, "daily/a.dat", *missing)
    assert job.state() == dict.fromkeys(job.objects(), 1)


def test_a_crash_run_sends_with_its_own_storage_class_and_sse(job: Job) -> None:
    job.make("a.dat", "b.dat")
    fail(job, "b.dat")
    assert_failed(job(), [job.folder / "b.dat"])
    job.proxy.clear_faults()
    before = len(job.proxy.requests)
    assert_clean(job.crash_run(*OBJECT))
    assert_kept_as_asked(job, "b.dat", after=before)
    assert "x-amz-storage-class" not in started(job, "a.dat").headers


def test_a_crash_run_keeps_the_keys_whatever_prefix_it_gets(job: Job) -> None:
    job.make(*TREE)
    fail(job, "daily/a.dat")
    assert_failed(job(*WHERE), [job.folder / "a.dat"])
    job.proxy.clear_faults()
    assert_clean(job.crash_run("--prefix", "weekly/"))
    assert job.objects() == local(job, *SENT)
    assert job.state() == dict.fromkeys(SENT, 1)


def test_a_crash_run_leaves_out_what_is_excluded_now(job: Job) -> None:
    job.make("a.dat", "b.dat", "c.tmp")
    fail(job, "a.dat", "c.tmp")
    assert_failed(job(), [job.folder / "a.dat", job.folder / "c.tmp"])
    job.proxy.clear_faults()
    before = len(job.puts())
    assert job.crash_run("--exclude", "*.tmp").returncode == 0
    assert job.puts()[before:] == ["a.dat"]
    assert job.objects() == local(job, "a.dat", "b.dat")


@needs_permissions
def test_exclude_and_prefix_hold_in_a_folder_that_a_crash_run_walks(
    new_job: Callable[[S3Server], Job], s3: S3Server
) -> None:
    job = new_job(s3)
    job.make(*TREE)
    job.proxy  # noqa: B018
    (job.folder / "sub").chmod(0)
    assert_failed(job(*WHERE, *OBJECT, user=NOBODY), [job.folder / "sub"])
    (job.folder / "sub").chmod(0o755)
    before = len(job.proxy.requests)
    assert_clean(job.crash_run(*WHERE, *OBJECT, user=NOBODY))
    assert_kept_as_asked(job, "daily/sub/e.dat", after=before)
    assert job.objects() == local(job, *SENT)
    assert job.state() == dict.fromkeys(SENT, 1)


def test_a_dry_run_of_a_crash_run_lists_what_it_would_send(job: Job) -> None:
    job.make("a.dat", "b.dat", "c.dat", "d.tmp")
    missing = ["daily/b.dat", "daily/c.dat", "daily/d.tmp"]
    fail(job, *missing)
    assert job("--prefix", "daily/").returncode == 1
    job.proxy.clear_faults()
    (job.folder / "c.dat").unlink()
    state, before = job.state_path.read_bytes(), len(job.proxy.requests)
    options = ("--prefix", "daily/", "--exclude", "*.tmp", *OBJECT)
    completed = job.crash_run(*options, "--dryrun")
    assert_failed(completed, [job.folder / "c.dat"])
    (listed,) = lines_with(completed.stdout, "would upload")
    assert f"{job.folder / 'b.dat'} -> s3://{job.bucket}/daily/b.dat (" in listed
    assert len(job.proxy.requests) == before
    assert job.state_path.read_bytes() == state
    assert_failed(job.crash_run(*options), [job.folder / "c.dat"])
    assert job.puts()[-1] == "daily/b.dat"


def test_what_verify_found_is_repaired_with_storage_class_and_sse(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job(*WHERE, *OBJECT))
    job.server.client().delete_object(Bucket=job.bucket, Key="daily/sub/e.dat")
    assert job(*WHERE, "--verify").returncode == 1
    before = len(job.proxy.requests)
    assert_clean(job.crash_run(*WHERE, *OBJECT))
    assert_kept_as_asked(job, "daily/sub/e.dat", after=before)
    assert_clean(job(*WHERE, "--verify"))
    assert job.objects() == local(job, *SENT)


# --- A multipart upload that was cut off -----------------------------------------------------


def kept_as(job: ProxiedJob) -> tuple[str | None, str | None]:
    """The storage class and the encryption of the object `large`."""
    head: Any = job.client.head_object(Bucket=job.bucket, Key="large")
    return head.get("StorageClass"), head.get("ServerSideEncryption")


@pytest.mark.parametrize(
    "again", [("--crashrun", "1"), (), ("--skip-unchanged",)], ids=["crash", "normal", "skip"]
)
def test_a_resumed_upload_has_the_storage_class_and_sse_it_began_with(
    parts_job: ProxiedJob, client: tuple[str, ...], again: tuple[str, ...]
) -> None:
    job = parts_job
    # moto lists the parts of every upload as STANDARD.
    listed = replace_in_answer(lambda page: page.replace(b">STANDARD<", b">STANDARD_IA<"))
    killed_in_parts(job, *OBJECT, *client, kept=[1, 3])
    job.proxy.add_fault(Fault(listed, operation="ListParts"))
    completed = job.run(*IN_PARTS, *OBJECT, *client, *again)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert job.sent_parts() == [1, 2, 2, 3]
    assert kept_as(job) == ("STANDARD_IA", "AES256")
    job.check_all_is_there()
    assert job.server.open_uploads(job.bucket) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--storage-class", "STANDARD_IA"), ("STANDARD_IA", None)),
        (("--sse", "AES256"), (None, "AES256")),
        (("--sse", "aws:kms"), (None, "aws:kms")),
        (OBJECT, ("STANDARD_IA", "AES256")),
    ],
    ids=["class", "aes", "kms", "both"],
)
def test_storage_class_and_sse_that_only_the_crash_run_asks_for_apply_to_the_whole(
    parts_job: ProxiedJob, options: tuple[str, ...], expected: tuple[str | None, str | None]
) -> None:
    job = parts_job
    killed_in_parts(job, kept=[1, 3])
    completed = job.crash_run(*IN_PARTS, *options)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert kept_as(job) == expected
    job.check_all_is_there()
    assert job.server.open_uploads(job.bucket) == []


def test_a_resumed_upload_goes_on_below_a_bandwidth_limit(parts_job: ProxiedJob) -> None:
    job = parts_job
    killed_in_parts(job, kept=[1, 3])
    completed = job.crash_run(*IN_PARTS, "--max-bandwidth", "50MB/s")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


def test_a_resumed_upload_of_a_shard_goes_on(parts_job: ProxiedJob) -> None:
    job = parts_job
    shard = ("--shard", "1/1")
    killed_in_parts(job, *shard, kept=[1, 3])
    completed = job.crash_run(*IN_PARTS, *shard)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


def test_verify_keeps_an_upload_that_is_to_be_resumed(parts_job: ProxiedJob) -> None:
    job = parts_job
    job.make({"small": b"small"})
    upload_id = killed_in_parts(job, kept=[1, 3])
    job.run(*IN_PARTS, "--verify")
    assert job.entries()["large"]["upload_id"] == upload_id
    completed = job.crash_run(*IN_PARTS)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()
