"""The bucket: used, created or refused, and the errors that stop a run."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checks import assert_clean, assert_failed, assert_stopped, lines_with
from support.faults import Fault, answer
from support.files import MIB
from support.job import Job
from support.proxy import Action, Answer, Exchange
from support.script import Completed
from support.servers import S3Server

GIVEN_UP_SECONDS = 20


def location(job: Job) -> str:
    """The region that the bucket was created in."""
    answer: Any = job.server.client().get_bucket_location(Bucket=job.bucket)
    return str(answer.get("LocationConstraint") or "us-east-1")


def signing_regions(job: Job, operation: str) -> set[str]:
    """The regions that requests of an operation were signed for."""
    scopes = (r.headers["Authorization"] for r in job.proxy.requests if r.operation == operation)
    return {scope.split("/")[2] for scope in scopes}


def environment_without(server: S3Server, *names: str) -> dict[str, str]:
    """The variables of a server but for some."""
    return {name: v for name, v in server.environment().items() if name not in names}


# --- Creating it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "env", "region"),
    [
        ([], {}, "eu-west-1"),
        (["--region", "us-east-1"], {}, "us-east-1"),
        (["--region", "eu-central-1"], {}, "eu-central-1"),
        ([], {"AWS_DEFAULT_REGION": "us-west-2"}, "eu-west-1"),
        ([], {"AWS_DEFAULT_REGION": "us-east-1"}, "eu-west-1"),
        (["--region", "eu-central-1"], {"AWS_DEFAULT_REGION": "us-west-2"}, "eu-central-1"),
    ],
)
def test_missing_bucket_is_created(
    moto_job: Job, arguments: list[str], env: dict[str, str], region: str
) -> None:
    files = moto_job.make("a.dat")
    assert_clean(moto_job.run(*arguments, env=env))
    assert location(moto_job) == region
    assert moto_job.objects() == files


def test_location_is_not_named_in_us_east_1(moto_job: Job) -> None:
    moto_job.make("a.dat")
    assert_clean(moto_job.run("--region", "us-east-1"))
    (creation,) = (r for r in moto_job.proxy.requests if r.operation == "CreateBucket")
    assert creation.body_bytes == 0


def test_existing_bucket_is_used(job: Job) -> None:
    files = job.make("a.dat")
    job.create_bucket()
    job.server.client().put_object(Bucket=job.bucket, Key="older", Body=b"kept")
    assert_clean(job.run())
    assert job.proxy.count("CreateBucket") == 0
    assert job.objects() == {**files, "older": b"kept"}


def test_requests_go_to_the_region_of_the_bucket(moto_job: Job) -> None:
    moto_job.make("a.dat")
    replace(moto_job.server, region="ap-south-1").client().create_bucket(
        Bucket=moto_job.bucket, CreateBucketConfiguration={"LocationConstraint": "ap-south-1"}
    )
    assert_clean(moto_job.run())
    assert signing_regions(moto_job, "PutObject") == {"ap-south-1"}


def refuse_with_region(status: int) -> Action:
    """Answer as S3 does to a request that was signed for another region than the bucket's."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        answer.status = status
        answer.set_headers({"x-amz-bucket-region": "ap-south-1"})
        exchange.reply(answer)

    return act


@pytest.mark.parametrize("status", [301, 400])
def test_region_in_the_refusal_of_head_bucket_is_used(moto_job: Job, status: int) -> None:
    moto_job.make("a.dat")
    moto_job.create_bucket()
    moto_job.proxy.add_fault(Fault(refuse_with_region(status), operation="HeadBucket"))
    assert_clean(moto_job.run())
    assert signing_regions(moto_job, "PutObject") == {"ap-south-1"}


def test_400_without_a_region_means_a_bad_credential(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(400, "Bad Request"), operation="HeadBucket"))
    assert_stopped(job.run(), "credentials", "token")
    assert not job.state_path.exists()


@pytest.mark.parametrize("name", ["With-Capitals", "under_score", "two..dots", "ends-", "1.2.3.4"])
def test_bad_name_is_not_created(moto_job: Job, name: str) -> None:
    moto_job.make("a.dat")
    moto_job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), operation="HeadBucket"))
    assert_stopped(moto_job.run("--bucketname", name), name, "63")
    assert moto_job.proxy.count("CreateBucket") == 0
    assert not moto_job.state_path.exists()


def test_name_that_is_taken(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(409, "BucketAlreadyExists"), operation="CreateBucket"))
    assert_stopped(job.run(), job.bucket, "another account", "--bucketname")
    assert not job.state_path.exists()


def test_bucket_that_was_created_meanwhile_is_used(job: Job) -> None:
    files = job.make("a.dat")
    job.create_bucket()
    job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), operation="HeadBucket", times=1))
    job.proxy.add_fault(Fault(answer(409, "BucketAlreadyOwnedByYou"), operation="CreateBucket"))
    assert_clean(job.run())
    assert job.objects() == files


def test_credential_that_may_not_create(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="CreateBucket"))
    assert_stopped(job.run(), job.bucket, "create", "AccessDenied")
    assert not job.state_path.exists()


# --- Credentials -----------------------------------------------------------------------------


def test_write_only_credential_that_may_not_look(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.create_bucket()
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), method="HEAD"))
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), method="GET"))
    assert_clean(job.run())
    assert job.objects() == files
    assert job.proxy.count("CreateBucket") == 0


def many_files(job: Job) -> dict[str, bytes]:
    return job.make(*(f"{number:03}" for number in range(60)))


def test_bucket_of_someone_else(job: Job) -> None:
    files = many_files(job)
    job.proxy.add_fault(Fault(answer(403, "AccessDenied")))
    completed = job.run("--max-concurrency", "8")
    assert_stopped(completed, "AccessDenied", "s3:PutObject")
    assert lines_with(completed.stderr, "failed: ") == []
    assert job.state() == dict.fromkeys(files, 0)
    assert len(job.puts()) < len(files)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"secret_key": "entirely-wrong"}, "SignatureDoesNotMatch"),
        ({"access_key": "unknown"}, "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials(rclone_job: Job, changes: dict[str, Any], code: str) -> None:
    files = many_files(rclone_job)
    rclone_job.create_bucket()
    server = replace(rclone_job.server, **changes)
    completed = rclone_job.run(server=server)
    assert_stopped(completed, code, "check the credentials")
    assert lines_with(completed.stderr, "failed: ") == []
    assert rclone_job.state() == dict.fromkeys(files, 0)
    assert rclone_job.objects() == {}
    assert server.secret_key not in completed.stdout + completed.stderr


def test_no_credentials(job: Job) -> None:
    job.make("a.dat")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    completed = job.run(server=None, env=environment_without(job.endpoint, *keys))
    assert_stopped(completed, "credentials")
    assert job.proxy.requests == []
    assert not job.state_path.exists()


def test_half_of_the_credentials(job: Job) -> None:
    job.make("a.dat")
    env = environment_without(job.server, "AWS_SECRET_ACCESS_KEY")
    assert_stopped(job.run(server=None, env=env), "credentials")
    assert not job.state_path.exists()


def test_unknown_profile(job: Job) -> None:
    job.make("a.dat")
    assert_stopped(job.run("--profile", "no-such"), "no-such", "profile")
    assert job.proxy.requests == []
    assert not job.state_path.exists()


def test_profile_is_used(rclone_job: Job, tmp_path: Path) -> None:
    files = rclone_job.make("a.dat")
    server = rclone_job.server
    (tmp_path / "credentials").write_text(
        f"[backup]\naws_access_key_id={server.access_key}\n"
        f"aws_secret_access_key={server.secret_key}\n"
    )
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE")
    env = environment_without(server, *names)
    env["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "credentials")
    assert_clean(rclone_job.run("--profile", "backup", server=None, env=env))
    assert rclone_job.objects() == files


# --- The endpoint ----------------------------------------------------------------------------


def test_endpoint_url_is_used(job: Job, closed_port: int) -> None:
    files = job.make("a.dat")
    elsewhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port}"}
    assert_clean(job.run("--endpoint-url", job.server.endpoint_url, env=elsewhere))
    assert job.objects() == files


@pytest.mark.parametrize(
    "url",
    [
        "not a url",
        "localhost:9000",
        "127.0.0.1",
        "http://",
        "http://[::1",
        "http://a b",
        "http://127.0.0.1:99999",
        "ftp://127.0.0.1:1",
        "",
    ],
)
def test_bad_endpoint_url(job: Job, url: str) -> None:
    job.make("a.dat")
    # Without an endpoint in the environment, an empty one must not mean AWS.
    env = environment_without(job.server, "AWS_ENDPOINT_URL") | NO_WAY_OUT
    assert_stopped(job.run("--endpoint-url", url, server=None, env=env), "endpoint")
    assert not job.state_path.exists()


# Should a request of a test go to AWS after all, it gets as far as this port.
NO_WAY_OUT = {"HTTPS_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}


def assert_given_up(job: Job, run: Callable[[], Completed]) -> None:
    started = time.monotonic()
    assert_stopped(run(), "endpoint")
    assert time.monotonic() - started < GIVEN_UP_SECONDS
    assert not job.state_path.exists()


def test_closed_port_is_given_up(job: Job, closed_port: int) -> None:
    job.make("a.dat")
    url = f"http://127.0.0.1:{closed_port}"
    assert_given_up(job, lambda: job.run("--endpoint-url", url))


def test_name_that_does_not_resolve_is_given_up(job: Job) -> None:
    job.make("a.dat")
    assert_given_up(job, lambda: job.run("--endpoint-url", "http://s3.invalid:9000"))


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield listening.getsockname()[1]


def test_server_that_says_nothing_is_given_up(job: Job, silent_port: int) -> None:
    job.make("a.dat")
    url = f"http://127.0.0.1:{silent_port}"
    assert_given_up(job, lambda: job.run("--endpoint-url", url))


def test_server_that_only_fails_is_given_up(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(503, "SlowDown")))
    started = time.monotonic()
    assert_stopped(job.run(), "503")
    assert time.monotonic() - started < GIVEN_UP_SECONDS


def say_yes(exchange: Exchange) -> None:
    """Answer 200 and nothing more, as a web server may that is no S3 server."""
    exchange.discard_body()
    exchange.reply(Answer(200, "OK", [("Content-Length", "0")], [], 0))


def test_answer_without_an_etag_proves_nothing(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(say_yes))
    assert_failed(job.run(), [job.folder / "a.dat"])
    assert job.state() == {"a.dat": 0}
    assert "ETag" in job.errors()["a.dat"]


# --- Errors in the middle of a run -----------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "NoSuchBucket", ["NoSuchBucket"]),
        (400, "ExpiredToken", ["expired", "token"]),
        (403, "RequestTimeTooSkewed", ["clock"]),
        (403, "AllAccessDisabled", ["AllAccessDisabled"]),
    ],
)
def test_what_every_upload_would_meet_stops_the_run(
    job: Job, status: int, code: str, words: list[str]
) -> None:
    files = many_files(job)
    job.proxy.add_fault(Fault(answer(status, code), operation="PutObject", after=5))
    completed = job.run("--max-concurrency", "4")
    assert_stopped(completed, *words)
    assert lines_with(completed.stderr, "failed: ") == []
    assert completed.stdout.count("\n") == 1  # the summary
    sent = {r.key for r in job.proxy.requests if r.operation == "PutObject" and r.status == 200}
    assert len(sent) == 5
    assert job.state() == {key: int(key in sent) for key in files}
    assert len(job.puts()) < 20

    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    assert job.objects() == files


@pytest.mark.parametrize("code", ["AccessDenied", "403"])
def test_access_denied_on_one_key_fails_that_key(job: Job, code: str) -> None:
    files = job.make("a.dat", "denied.dat", "z.dat")
    denied = "denied.dat"
    job.proxy.add_fault(Fault(answer(403, code), operation="PutObject", key=denied))
    assert_failed(job.run("--max-concurrency", "1"), [job.folder / denied])
    assert job.state() == {key: int(key != denied) for key in files}
    assert code in job.errors()[denied]


# --- --expected-bucket-owner -----------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_expected_bucket_owner_is_sent(job: Job, exists: bool) -> None:
    job.make("a.dat")
    (job.folder / "large").write_bytes(bytes(6 * MIB))
    if exists:
        job.create_bucket()
    sizes = ("--multipart-threshold", "6MiB", "--multipart-chunksize", "5MiB")
    assert_clean(job.run("--expected-bucket-owner", "123456789012", *sizes))
    seen = {r.operation for r in job.proxy.requests}
    assert seen >= {"HeadBucket", "PutObject", "UploadPart", "CompleteMultipartUpload"}
    assert ("CreateBucket" in seen) is not exists
    without = {
        request.operation
        for request in job.proxy.requests
        if request.headers["x-amz-expected-bucket-owner"] != "123456789012"
    }
    assert without <= {"CreateBucket"}


# --- What describes an object ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.dat", "large"])
def test_storage_class_and_encryption_are_sent(moto_job: Job, name: str) -> None:
    moto_job.make("a.dat")
    (moto_job.folder / "large").write_bytes(bytes(6 * MIB))
    sizes = ("--multipart-threshold", "6MiB", "--multipart-chunksize", "5MiB")
    sse = ("--sse", "aws:kms", "--sse-kms-key-id", "backup-key")
    assert_clean(moto_job.run("--storage-class", "STANDARD_IA", *sse, *sizes))
    head = moto_job.server.client().head_object(Bucket=moto_job.bucket, Key=name)
    assert head["StorageClass"] == "STANDARD_IA"
    assert head["ServerSideEncryption"] == "aws:kms"
    assert re.search("backup-key$", head["SSEKMSKeyId"])
