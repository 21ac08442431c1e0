"""AWS, as far as one gets without it: its names, regions and checksums, held against its rules."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import trustme
from conftest import NewJob
from support.aws import AwsRules, Upload, signing_region
from support.checks import assert_clean, assert_stopped
from support.faults import (
    Fault,
    after_forward,
    answer,
    drop_after_forward,
    flip_byte,
    replace_in_answer,
    set_headers,
    stall,
)
from support.files import IN_MEMORY_BYTES, IN_PARTS, LARGE_BYTES, PART_BYTES, some_bytes
from support.job import Job, kill
from support.proxy import Action, FaultProxy
from support.servers import S3Server
from support.systems import needs_signals


@dataclass
class Aws:
    """A job whose server is AWS, and what AWS says of it."""

    job: Job
    rules: AwsRules

    def create_bucket(self, region: Literal["ap-south-1", "eu-west-1"]) -> None:
        """Create the bucket before the run does."""
        replace(self.job.server, region=region).client().create_bucket(
            Bucket=self.job.bucket, CreateBucketConfiguration={"LocationConstraint": region}
        )
        self.rules.regions[self.job.bucket] = region

    def hosts(self, *operations: str) -> set[str]:
        """The hosts that requests came to, with BUCKET for the bucket's name."""
        requests = self.job.requests(*operations) if operations else self.job.proxy.requests
        return {request.host.replace(self.job.bucket, "BUCKET") for request in requests}


@pytest.fixture
def aws(
    new_job: NewJob,
    moto_server: S3Server,
    proxies: contextlib.ExitStack,
    ca: trustme.CA,
    ca_path: Path,
) -> Iterator[Aws]:
    """AWS, without the bucket; a request that S3 would refuse fails the test."""
    rules = AwsRules()
    upstream = FaultProxy(moto_server.endpoint_url, ca=ca, ask=rules.ask)
    proxy = proxies.enter_context(upstream)
    job = new_job(moto_server, has_bucket=False)
    endpoint = replace(moto_server, https_proxy=proxy.url, ca_bundle=ca_path)
    yield Aws(replace(job, proxy=proxy, endpoint=endpoint), rules)
    assert rules.complaints == []


FILES = {
    "empty": b"",
    "sub/small.txt": b"small",
    "sp ace+%&ü/日本": b"odd",
    "streamed": some_bytes(IN_MEMORY_BYTES + 1),
    "parts": some_bytes(LARGE_BYTES),
}


def test_all_of_a_folder_arrives_with_the_checksums_that_s3_wants(aws: Aws) -> None:
    job = aws.job
    job.write(FILES)
    assert_clean(job.run(*IN_PARTS, "--multipart-threshold", str(LARGE_BYTES)))
    job.check_all_is_there()
    assert aws.rules.regions == {job.bucket: "eu-west-1"}
    assert aws.hosts("PutObject", "UploadPart") == {"BUCKET.s3.eu-west-1.amazonaws.com"}
    assert job.sent_parts() == [1, 2, 3]
    (upload,) = aws.rules.uploads.values()
    assert upload.has_crc32
    # Of a single put Content-MD5 is the proof, and S3 is asked for no second one.
    for put in job.requests("PutObject"):
        assert [name for name in put.headers if "checksum" in name.lower()] == []


def test_aws_is_one_server_in_all_regions(aws: Aws) -> None:
    job = aws.job
    aws.create_bucket("ap-south-1")
    job.make("a.dat")
    assert_clean(job.run())
    assert job.entry("a.dat")["endpoint"] == "amazonaws.com"
    assert_clean(job.crash_run("--region", "us-east-1"))
    assert job.sent() == ["a.dat"]


def test_a_bucket_with_a_dot_is_named_in_the_path(aws: Aws) -> None:
    job = aws.job
    job.bucket = f"{job.bucket[:40]}.with.dots"
    job.make("a.dat")
    assert_clean(job.run())
    job.check_all_is_there()
    assert aws.hosts("PutObject") == {"s3.eu-west-1.amazonaws.com"}


def test_a_multi_region_access_point_is_written_to(aws: Aws) -> None:
    job = aws.job
    job.bucket = "alias.mrap.accesspoint"  # so moto reads the host
    job.create_bucket()
    job.write(FILES)
    arn = "arn:aws:s3::123456789012:accesspoint/alias.mrap"
    # Not in a fork: whether botocore has the AWS Common Runtime is settled when it is imported.
    assert_clean(job.run("--bucketname", arn, *IN_PARTS, python_flags=["-s"]))
    job.check_all_is_there()
    assert aws.hosts() == {"BUCKET.s3-global.amazonaws.com"}
    for request in job.proxy.requests:
        assert str(request.headers["Authorization"]).startswith("AWS4-ECDSA-P256-SHA256 ")
        assert request.headers["x-amz-region-set"] == "*"


@pytest.mark.parametrize("region", ["us-east-1", "ap-south-1"])
def test_a_bucket_is_created_where_region_says(aws: Aws, region: str) -> None:
    job = aws.job
    job.make("a.dat")
    assert_clean(job.run("--region", region))
    assert aws.rules.regions == {job.bucket: region}
    assert {signing_region(request) for request in job.requests("PutObject")} == {region}
    job.check_all_is_there()


def test_a_bucket_in_another_region_is_found_there(aws: Aws) -> None:
    job = aws.job
    aws.create_bucket("ap-south-1")
    job.write({"a.dat": b"a", "parts": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(*IN_PARTS))
    assert job.requests("CreateBucket") == []
    assert aws.hosts("PutObject", "UploadPart") == {"BUCKET.s3.ap-south-1.amazonaws.com"}
    refused = [request for request in job.proxy.requests if request.status == 301]
    assert {request.operation for request in refused} == {"HeadBucket"}
    job.check_all_is_there()


def test_a_body_damaged_on_the_way_is_refused_and_sent_again(aws: Aws) -> None:
    job = aws.job
    job.write({"small": b"some bytes", "parts": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(flip_byte(), operation="PutObject", key="small", times=1))
    job.proxy.add_fault(Fault(flip_byte(), operation="UploadPart", part_number=2, times=1))
    assert_clean(job.run(*IN_PARTS))
    assert sorted(job.puts()) == ["small", "small"]
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()
    assert [complaint.split(": ")[-1][:9] for complaint in aws.rules.complaints] == [
        "BadDigest"
    ] * 2
    aws.rules.complaints.clear()


# --- The proof of what was sent in parts -----------------------------------------------------


def changed(pattern: bytes, replacement: bytes) -> Action:
    """What S3 answers, with something else in its body, which has to be there."""

    def change(body: bytes) -> bytes:
        changed, count = re.subn(pattern, replacement, body)
        assert count, body
        return changed

    return replace_in_answer(change)


WRONG_CRC32 = changed(rb"<ChecksumCRC32>.*?-3<", b"<ChecksumCRC32>AAAAAA==-3<")


@pytest.fixture
def kms(aws: Aws) -> Aws:
    """AWS with a bucket whose own encryption is by KMS: no ETag is the MD5 of anything."""
    aws.rules.is_kms = True
    aws.job.write({"small": b"small", "parts": some_bytes(LARGE_BYTES)})
    return aws


def test_under_kms_the_crc32_of_the_whole_is_the_proof(kms: Aws) -> None:
    job = kms.job
    assert_clean(job.run(*IN_PARTS))
    assert job.requests("HeadObject") == []
    assert job.requests("CompleteMultipartUpload") != []
    job.check_all_is_there()
    assert {entry.get("sse") for entry in job.entries()} == {"aws:kms"}


def test_under_kms_a_wrong_crc32_of_the_whole_is_a_failure(kms: Aws) -> None:
    job = kms.job
    job.proxy.add_fault(Fault(WRONG_CRC32, operation="CompleteMultipartUpload"))
    job.check_failed(job.run(*IN_PARTS), "parts", said="CRC32")


def test_under_kms_without_a_crc32_in_the_answer_the_object_is_looked_at(kms: Aws) -> None:
    job = kms.job
    without = changed(rb"<Checksum.*</ChecksumType>", b"")
    job.proxy.add_fault(Fault(without, operation="CompleteMultipartUpload"))
    assert_clean(job.run(*IN_PARTS))
    (head,) = job.requests("HeadObject")
    assert head.headers["x-amz-checksum-mode"] == "ENABLED"
    job.check_all_is_there()


def test_under_kms_an_object_with_a_wrong_crc32_is_a_failure(kms: Aws) -> None:
    job = kms.job
    without = changed(rb"<Checksum.*</ChecksumType>", b"")
    job.proxy.add_fault(Fault(without, operation="CompleteMultipartUpload"))
    wrong = set_headers({"x-amz-checksum-crc32": "AAAAAA==-3"})
    job.proxy.add_fault(Fault(wrong, operation="HeadObject"))
    job.check_failed(job.run(*IN_PARTS), "parts", said="CRC32")


# --- A multipart upload that was cut off -----------------------------------------------------


def cut_off(aws: Aws, *kept: int) -> str:
    """Kill a run when S3 has just these parts of its file of five; return the upload's id."""
    job = aws.job
    job.write({"parts": some_bytes(4 * PART_BYTES + 1)})
    job.proxy.add_fault(
        Fault(stall(600), operation="UploadPart", part_number=lambda n: n not in kept)
    )
    process = job.start(*IN_PARTS)
    job.wait_for("UploadPart", len(kept), answered=True)
    kill(process)
    job.proxy.clear_faults()
    ((_, upload_id, parts),) = job.open_uploads()
    assert parts == len(kept)
    return upload_id


def test_only_missing_parts_are_sent_and_all_are_listed_with_their_crc32(aws: Aws) -> None:
    job = aws.job
    cut_off(aws, 1, 3, 4)
    since = job.seen()
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.sent_parts(since) == [2, 5]
    assert len(job.requests("CreateMultipartUpload")) == 1
    job.check_all_is_there()


@pytest.mark.parametrize("is_kms", [False, True], ids=["plain", "kms"])
@pytest.mark.few(1)
def test_a_part_whose_crc32_is_another_is_sent_again(aws: Aws, is_kms: bool) -> None:
    job = aws.job
    aws.rules.is_kms = is_kms
    upload_id = cut_off(aws, 1, 2)
    body = some_bytes(PART_BYTES, seed=1)
    job.server.client().upload_part(
        Bucket=job.bucket, Key="parts", UploadId=upload_id, PartNumber=2, Body=body
    )
    aws.rules.uploads[upload_id].crc32s[2] = zlib.crc32(body).to_bytes(4, "big")
    since = job.seen()
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.sent_parts(since) == [2, 3, 4, 5]
    job.check_all_is_there()


def test_an_upload_that_was_begun_without_checksums_goes_on_without(aws: Aws) -> None:
    job = aws.job
    aws.create_bucket("eu-west-1")
    job.write({"parts": some_bytes(LARGE_BYTES)})
    client, bucket = job.server.client(), job.bucket
    upload_id = client.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    part = some_bytes(LARGE_BYTES)[:PART_BYTES]
    client.upload_part(Bucket=bucket, Key="parts", UploadId=upload_id, PartNumber=1, Body=part)
    aws.rules.uploads[upload_id] = Upload(has_crc32=False)
    aws.rules.uploads[upload_id].crc32s[1] = zlib.crc32(part).to_bytes(4, "big")
    status = job.path("parts").stat()
    job.write_state(
        job.pending_entry(
            "parts",
            bucket=job.bucket,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            upload_id=upload_id,
            part_size=PART_BYTES,
        )
    )
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.sent_parts() == [2, 3]
    job.check_all_is_there()


@pytest.mark.parametrize("is_kms", [False, True], ids=["plain", "kms"])
@pytest.mark.few(1)
def test_a_lost_answer_to_complete_costs_no_part(aws: Aws, is_kms: bool) -> None:
    job = aws.job
    aws.rules.is_kms = is_kms
    job.write({"parts": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(drop_after_forward(), operation="CompleteMultipartUpload", times=1))
    assert_clean(job.run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()


@needs_signals
@pytest.mark.parametrize("is_kms", [False, True], ids=["plain", "kms"])
@pytest.mark.few(1)
def test_a_kill_after_complete_costs_no_part_there(aws: Aws, is_kms: bool) -> None:
    job = aws.job
    aws.rules.is_kms = is_kms
    job.write({"parts": some_bytes(LARGE_BYTES)})
    processes: list[subprocess.Popen[str]] = []

    def kill_it() -> None:
        processes[0].kill()

    killing = Fault(after_forward(kill_it), operation="CompleteMultipartUpload", times=1)
    job.proxy.add_fault(killing)
    processes.append(job.start(*IN_PARTS))
    assert processes[0].wait(60) == -signal.SIGKILL
    assert job.uploaded() == set()
    since = job.seen()
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.sent_parts(since) == []
    assert {head.headers["x-amz-checksum-mode"] for head in job.requests("HeadObject")} == {
        "ENABLED"
    }
    job.check_all_is_there()
    assert job.entry("parts").get("sse") == ("aws:kms" if is_kms else None)


def test_a_region_that_aws_refuses_stops_the_run(aws: Aws) -> None:
    job = aws.job
    job.make("a.dat")
    refusal = Fault(answer(400, "IllegalLocationConstraintException"), operation="CreateBucket")
    job.proxy.add_fault(refusal)
    assert_stopped(job.run(), "create", "IllegalLocationConstraintException", "--region")
    assert refusal.hits == 1
