"""The bucket: found, created where it is missing, in the region where it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import NewJob
from support.aws import signing_region
from support.checks import assert_clean, assert_replaced, assert_stopped
from support.faults import Fault, answer, call
from support.files import IN_PARTS, LARGE_BYTES, make_files, some_bytes
from support.job import NOBODY, Job, with_state
from support.proxy import Action, Exchange, error_answer, pass_on
from support.script import finish, prelude
from support.servers import S3Server
from support.systems import needs_permissions


@pytest.fixture
def job(new_job: NewJob, server: S3Server) -> Job:
    """A job without its bucket."""
    return new_job(server, has_bucket=False)


@pytest.fixture
def moto_job(new_job: NewJob, moto_server: S3Server) -> Job:
    """The same on moto, which knows regions."""
    return new_job(moto_server, has_bucket=False)


def location(job: Job) -> str:
    """The region that the bucket was created in."""
    answer: Any = job.server.client().get_bucket_location(Bucket=job.bucket)
    return str(answer.get("LocationConstraint") or "us-east-1")


def signing_regions(job: Job, operation: str) -> set[str]:
    """The regions that requests of an operation were signed for."""
    return {signing_region(request) for request in job.requests(operation)}


# --- Creating it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "env", "region"),
    [
        ([], {}, "eu-west-1"),
        (["--region", "us-east-1"], {}, "us-east-1"),
        ([], {"AWS_DEFAULT_REGION": "us-west-2"}, "eu-west-1"),
        ([], {"AWS_DEFAULT_REGION": "us-east-1"}, "eu-west-1"),
        (["--region", "eu-central-1"], {"AWS_DEFAULT_REGION": "us-west-2"}, "eu-central-1"),
    ],
)
def test_a_missing_bucket_is_created(
    moto_job: Job, arguments: list[str], env: dict[str, str], region: str
) -> None:
    moto_job.make("a.dat")
    assert_clean(moto_job.run(*arguments, env=env))
    assert location(moto_job) == region
    moto_job.check_all_is_there()
    (creation,) = moto_job.requests("CreateBucket")
    # In us-east-1 S3 wants no location to be named.
    assert (creation.body_bytes == 0) == (region == "us-east-1")


def test_an_existing_bucket_is_used(job: Job) -> None:
    job.make("a.dat")
    job.create_bucket()
    job.put("older", b"kept")
    assert_clean(job.run())
    assert job.requests("CreateBucket") == []
    assert job.objects() == {"a.dat": b"bytes of a.dat", "older": b"kept"}


def test_a_crash_run_creates_a_missing_bucket(job: Job) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat"))
    assert_clean(job.crash_run())
    job.check_all_is_there()


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
        answer.set_header("x-amz-bucket-region", "ap-south-1")
        exchange.reply(answer)

    return act


@pytest.mark.parametrize("status", [301, 400])
def test_the_region_in_a_refusal_to_look_is_used(moto_job: Job, status: int) -> None:
    moto_job.make("a.dat")
    moto_job.create_bucket()
    moto_job.proxy.add_fault(Fault(refuse_with_region(status), operation="HeadBucket"))
    assert_clean(moto_job.run())
    assert signing_regions(moto_job, "PutObject") == {"ap-south-1"}


@pytest.mark.parametrize("name", ["With-Capitals", "under_score", "two..dots", "ends-", "1.2.3.4"])
def test_a_bad_name_is_not_created(moto_job: Job, name: str) -> None:
    moto_job.make("a.dat")
    moto_job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), operation="HeadBucket"))
    assert_stopped(moto_job.run("--bucketname", name), name, "63")
    assert moto_job.requests("CreateBucket") == []
    assert not moto_job.state_path.exists()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (409, "BucketAlreadyExists", ["another account", "--bucketname"]),
        (403, "AccessDenied", ["create", "AccessDenied"]),
    ],
)
def test_a_bucket_that_cannot_be_created_stops_the_run(
    job: Job, status: int, code: str, words: list[str]
) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(status, code), operation="CreateBucket"))
    completed = job.run()
    assert_stopped(completed, job.bucket, *words)
    assert completed.stdout == ""  # without a plan there is nothing to sum up
    assert not job.state_path.exists()


def test_a_bucket_that_was_created_meanwhile_is_used(job: Job) -> None:
    job.make("a.dat")
    job.create_bucket()
    job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), operation="HeadBucket", times=1))
    job.proxy.add_fault(Fault(answer(409, "BucketAlreadyOwnedByYou"), operation="CreateBucket"))
    assert_clean(job.run())
    job.check_all_is_there()


def test_runs_that_create_the_bucket_at_the_same_time_all_use_it(job: Job) -> None:
    job.make(*(f"{number:02}" for number in range(12)))
    # Each is told that there is no bucket before any has created it.
    arrived = job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), method="HEAD", times=3))
    names = [f"{number}/3" for number in (1, 2, 3)]
    running = [
        job.start("--shard", name, "--statefile", job.state_path.with_name(f"{number}.json"))
        for number, name in enumerate(names)
    ]
    for process in running:
        assert_clean(finish(process))
    assert arrived.hits == 3
    assert job.in_bucket() == job.in_folder()


# --- Made anew -------------------------------------------------------------------------------


@pytest.fixture
def lost(job: Job) -> Job:
    """A job whose bucket is gone, with all that it sent there."""
    job.create_bucket()
    job.back_up(*(f"{number}" for number in range(7)))
    job.server.remove_bucket(job.bucket)
    return job


def test_a_run_that_creates_the_bucket_and_stops_leaves_no_lie(lost: Job) -> None:
    away = lost.folder.with_name("away")
    shutil.move(lost.folder, away)
    lost.folder.mkdir()
    assert lost.run().returncode == 2
    assert lost.objects() == {}
    lost.folder.rmdir()
    shutil.move(away, lost.folder)
    assert_clean(lost.crash_run())
    lost.check_all_is_there()


@pytest.mark.parametrize("again", [(), ("--crashrun", "1"), ("--skip-unchanged",)], ids=" ".join)
def test_what_the_bucket_held_is_taken_back_before_it_is_created(
    lost: Job, again: tuple[str, ...]
) -> None:
    files, seen = lost.in_folder(), list[object]()
    look = call(lambda _: seen.append(json.loads(lost.state_path.read_text())))
    lost.proxy.add_fault(Fault(look, operation="CreateBucket"))
    assert lost.run(*again).returncode == 0
    (entries,) = seen
    assert isinstance(entries, list)
    said = {entry["filename"]: entry["uploadedSuccess"] for entry in entries}
    assert said == dict.fromkeys(files, 0)
    lost.check_all_is_there()


CANNOT_SAVE = """
import os
def replace(*args):
    raise OSError(28, "No space left on device")
os.replace = replace
"""


def test_a_run_for_another_folder_takes_back_what_the_bucket_held(
    new_job: NewJob, server: S3Server, tmp_path: Path
) -> None:
    job = new_job(server, has_bucket=False)
    job.make("a.dat")
    job.write_state(job.uploaded_entry("a.dat"))
    make_files(tmp_path / "other", {"b.dat": b"b"})
    completed = job.run("--backupfolder", tmp_path / "other")
    assert completed.returncode == 2
    assert "of another folder" in completed.stderr
    assert job.requests("CreateBucket") == []
    assert job.state() == {"a.dat": 0}


def test_no_bucket_is_created_where_the_state_cannot_say_so(lost: Job) -> None:
    assert_stopped(lost.crash_run(python_flags=prelude(CANNOT_SAVE)), "cannot save", "make room")
    assert lost.requests("CreateBucket") == []


def neighbour(job: Job) -> Job:
    """Another job that shares the bucket, with a folder of its own."""
    return replace(with_state(job, "neighbour.json"), folder=job.folder.with_name("neighbour"))


def test_a_bucket_that_another_job_made_anew_is_not_believed_full(job: Job) -> None:
    job.create_bucket()
    other = neighbour(job)
    job.back_up("a.dat", "sub/b.dat")
    other.back_up("c.dat")
    job.server.remove_bucket(job.bucket)
    assert other.crash_run().returncode == 0
    assert set(job.in_bucket()) == {"c.dat"}
    completed = job.crash_run()
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert f"the bucket {job.bucket} has lost or replaced objects" in said
    assert "2 files to send again" in said
    job.check_state_is_true()
    assert job.state() == {"a.dat": 1, "sub/b.dat": 1}


@pytest.mark.parametrize("missing", ["0", "3", "6"], ids=["first", "middle", "last"])
def test_where_one_object_is_missing_all_are_compared(lost: Job, missing: str) -> None:
    job = lost
    job.create_bucket()
    for key in set(job.in_folder()) - {missing, "5"}:
        job.put(key, job.path(key).read_bytes())
    job.put("5", b"of another")
    completed = job.crash_run()
    assert completed.returncode == 0
    assert "2 files to send again" in completed.stderr
    assert job.sent() == sorted({missing, "5"})
    job.check_all_is_there()


def test_what_is_there_is_looked_up_with_three_requests(job: Job) -> None:
    job.create_bucket()
    job.back_up(*(f"{number:03}" for number in range(100)))
    assert_clean(job.crash_run())
    asked = [request.query["prefix"] for request in job.requests("ListObjectsV2")]
    assert asked == ["000", "050", "099"]


def test_where_listing_is_refused_the_bucket_is_believed_and_that_is_said(lost: Job) -> None:
    lost.create_bucket()
    lost.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="ListObjectsV2"))
    before = lost.entries()
    completed = lost.crash_run()
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert said.startswith("notice: the bucket cannot be listed")
    assert lost.sent() == []
    assert lost.entries() == before


def test_where_listing_is_refused_once_something_is_missing_nothing_is_believed(lost: Job) -> None:
    lost.create_bucket()
    denied = answer(403, "AccessDenied")
    lost.proxy.add_fault(Fault(denied, operation="ListObjectsV2", after=1))
    completed = lost.crash_run()
    assert completed.returncode == 0
    assert "7 files to send again" in completed.stderr
    lost.check_all_is_there()


def test_where_listing_fails_otherwise_nothing_is_believed(lost: Job) -> None:
    lost.create_bucket()
    lost.proxy.add_fault(Fault(answer(400, "InvalidToken"), operation="ListObjectsV2"))
    before = lost.state_path.read_bytes()
    assert_stopped(lost.crash_run(), "cannot list the bucket", "InvalidToken")
    assert lost.state_path.read_bytes() == before


@needs_permissions
def test_what_lies_below_an_unreadable_folder_is_looked_up_before_it_is_kept(job: Job) -> None:
    job.create_bucket()
    job.back_up("a.dat", "sub/b.dat")
    job.state_path.unlink()
    assert_clean(job.run(user=NOBODY))
    job.server.remove_bucket(job.bucket)
    job.create_bucket()  # as another job would
    job.path("sub").chmod(0)
    completed = job.run(user=NOBODY)
    job.path("sub").chmod(0o755)
    assert completed.returncode == 1
    assert "1 file to send again" in completed.stderr
    assert job.uploaded() == {"a.dat"}
    job.check_state_is_true()
    assert_clean(job.crash_run(user=NOBODY))
    job.check_all_is_there()


# --- Of which server -------------------------------------------------------------------------


@pytest.fixture
def two_jobs(new_job: NewJob, rclone_server: S3Server, moto_server: S3Server) -> tuple[Job, Job]:
    """The same job on two servers, each with a bucket of that name; one state."""
    return new_job(rclone_server), new_job(moto_server)


@pytest.mark.parametrize("again", [("--crashrun", "1"), ("--verify",)], ids=" ".join)
def test_a_bucket_of_another_server_is_another_one(
    two_jobs: tuple[Job, Job], again: tuple[str, ...]
) -> None:
    job, other = two_jobs
    job.make("a.dat")
    assert_clean(job.run())
    before = job.state_path.read_bytes()
    words = (f"the state file is of endpoint {job.endpoint_name}", "--statefile")
    assert_stopped(other.run(*again), *words)
    assert other.sent() == []
    assert job.state_path.read_bytes() == before


def test_a_job_on_another_server_may_be_replaced_once_it_is_done(two_jobs: tuple[Job, Job]) -> None:
    job, other = two_jobs
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    assert_replaced(other.run("--skip-unchanged"), f"endpoint {job.endpoint_name}")
    other.check_all_is_there()
    other.refuse("b.dat")
    assert other.run().returncode == 1
    words = (f"not yet uploaded, of endpoint {other.endpoint_name}", "--crashrun 1", "--statefile")
    assert_stopped(job.run(), *words)


def test_a_state_that_names_no_server_is_accepted(job: Job) -> None:
    job.create_bucket()
    job.back_up("a.dat")
    (entry,) = job.entries()
    del entry["endpoint"]
    job.write_state(entry)
    assert_clean(job.crash_run())
    assert_clean(job.run("--verify"))
    assert job.sent() == []


@pytest.mark.parametrize("where", ["environment", "option", "profile"])
def test_the_state_has_the_server_and_no_password(job: Job, tmp_path: Path, where: str) -> None:
    job.make("a.dat")
    url = job.endpoint.endpoint_url.replace("//", "//someone:secret@")
    config = tmp_path / "config"
    config.write_text(f"[default]\nendpoint_url = {url}\n")
    env, options = {"AWS_ENDPOINT_URL": url}, list[str]()
    if where == "option":
        options = ["--endpoint-url", url]
    elif where == "profile":
        env = {"AWS_ENDPOINT_URL": "", "AWS_CONFIG_FILE": str(config)}
    assert_clean(job.run(*options, env=env))
    assert job.entry("a.dat")["endpoint"] == job.endpoint_name
    assert "secret" not in job.state_path.read_text()


# --- Servers with regions of their own -------------------------------------------------------

LOCATION_CODES = ["InvalidLocationConstraint", "IllegalLocationConstraintException"]
LOCATION_CODES += ["InvalidRegion", "AuthorizationHeaderMalformed"]


def refuse_location(code: str) -> Action:
    """Refuse to create a bucket in a region that is named, or signed for, as not the server's."""

    def act(exchange: Exchange) -> None:
        if signing_region(exchange.request) == "eu-west-1" and exchange.content_length:
            exchange.discard_body()
            exchange.reply(error_answer(400, code, ""))
        else:
            pass_on(exchange)

    return act


@pytest.mark.parametrize("code", LOCATION_CODES)
def test_a_server_with_other_regions_is_asked_again_without_one(moto_job: Job, code: str) -> None:
    moto_job.make("a.dat")
    moto_job.proxy.add_fault(Fault(refuse_location(code), operation="CreateBucket"))
    # Its own region is that of the user's configuration.
    assert_clean(moto_job.run(env={"AWS_DEFAULT_REGION": "us-east-1"}))
    assert [r.status for r in moto_job.requests("CreateBucket")] == [400, 200]
    moto_job.check_all_is_there()


def test_a_region_that_was_asked_for_and_is_refused_stops_the_run(moto_job: Job) -> None:
    moto_job.make("a.dat")
    refusal = Fault(refuse_location("InvalidLocationConstraint"), operation="CreateBucket")
    moto_job.proxy.add_fault(refusal)
    assert_stopped(moto_job.run("--region", "eu-west-1"), "create", "InvalidLocationConstraint")
    assert refusal.hits == 1


# --- Credentials that may not do all ---------------------------------------------------------


def test_400_without_a_region_means_a_bad_credential(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(400, "Bad Request"), operation="HeadBucket"))
    assert_stopped(job.run(), "credentials", "token")
    assert not job.state_path.exists()


def test_a_write_only_credential_that_may_not_look_is_enough(job: Job) -> None:
    job.write({"a.dat": b"a", "large": some_bytes(LARGE_BYTES)})
    job.create_bucket()
    for method in ("HEAD", "GET"):
        job.proxy.add_fault(Fault(answer(403, "AccessDenied"), method=method))
    assert_clean(job.run(*IN_PARTS))
    assert job.requests("CreateBucket") == []
    job.check_all_is_there()


# --- --expected-bucket-owner -----------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.few(2)
def test_the_expected_owner_is_named_in_every_request_that_takes_it(
    job: Job, each_client: tuple[str, ...], exists: bool
) -> None:
    job.write({"a.dat": b"a", "large": some_bytes(LARGE_BYTES)})
    if exists:
        job.create_bucket()
    assert_clean(job.run("--expected-bucket-owner", "123456789012", *IN_PARTS, *each_client))
    seen = {request.operation for request in job.proxy.requests}
    assert seen >= {"HeadBucket", "PutObject", "UploadPart", "CompleteMultipartUpload"}
    assert ("CreateBucket" in seen) is not exists
    without = {
        request.operation
        for request in job.proxy.requests
        if request.headers["x-amz-expected-bucket-owner"] != "123456789012"
    }
    assert without <= {"CreateBucket"}
