"""How one file is sent, in one part or in several, and what is taken as proof."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Proxied
from fault_proxy import (
    Action,
    Answer,
    Exchange,
    Fault,
    Request,
    answer,
    call,
    drop_after_forward,
    flip_byte,
    set_header,
    slow,
    wrong_etag,
)
from proxied_job import (
    IN_PARTS,
    LARGE_BYTES,
    MIB,
    PART_BYTES,
    ProxiedJob,
    Start,
    cut_before_etag,
    md5,
    replace_in_answer,
    set_headers,
    some_bytes,
)
from script_runner import wait_until
from servers import S3Server
from systems import needs_fifos

BODY = b"some bytes of a file"
FOREIGN_ETAG = '"0123456789abcdef0123456789abcdef"'
IN_MEMORY_BYTES = 8 * MIB
CHANGED = "changed while it was sent"
Make = Callable[[S3Server], ProxiedJob]


@pytest.fixture
def make_job(proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start) -> Make:
    return lambda server: ProxiedJob(
        server, proxied, bucket=bucket_name, folder=backup_folder, start=start
    )


@pytest.fixture
def job(make_job: Make, s3: S3Server) -> ProxiedJob:
    """A job on each of the servers."""
    return make_job(s3)


@pytest.fixture(params=["rclone-classic", "moto-classic", "rclone-crt"])
def small_job(
    proxied: Proxied,
    bucket_name: str,
    backup_folder: Path,
    start: Start,
    request: pytest.FixtureRequest,
) -> ProxiedJob:
    """A job of small files, on the servers and by each of the clients that send them."""
    name, client = request.param.split("-")
    return ProxiedJob(
        request.getfixturevalue(f"{name}_s3"),
        proxied,
        bucket=bucket_name,
        folder=backup_folder,
        start=start,
        options=("--preferred-transfer-client", client),
    )


@pytest.fixture
def moto_job(make_job: Make, moto_s3: S3Server) -> ProxiedJob:
    """A job on moto, which gives the ETags that S3 gives."""
    return make_job(moto_s3)


def base64_md5(body: bytes) -> str:
    return base64.b64encode(bytes.fromhex(md5(body))).decode()


def multipart_etag(body: bytes) -> str:
    """The ETag that S3 gives to an object made of parts of 5 MiB."""
    parts = [body[start : start + PART_BYTES] for start in range(0, len(body), PART_BYTES)]
    return f"{md5(b''.join(bytes.fromhex(md5(part)) for part in parts))}-{len(parts)}"


# --- In one part -----------------------------------------------------------------------------

SIZES = [0, 1, IN_MEMORY_BYTES - 1, IN_MEMORY_BYTES, IN_MEMORY_BYTES + 1]


@pytest.mark.parametrize("size", SIZES)
def test_a_small_file_is_sent_with_its_md5(small_job: ProxiedJob, size: int) -> None:
    body = some_bytes(size)
    small_job.make({"f": body})
    assert small_job.run().returncode == 0
    (put,) = small_job.requests("PutObject")
    assert put.headers["Content-MD5"] == base64_md5(body)
    small_job.check_all_is_there()
    assert small_job.entries()["f"]["etag"] == md5(body)
    assert small_job.entries()["f"]["size"] == size


@pytest.mark.parametrize("size", [0, len(BODY), IN_MEMORY_BYTES])
def test_a_small_put_does_not_wait_for_leave_to_send(small_job: ProxiedJob, size: int) -> None:
    small_job.make({"f": bytes(size)})
    assert small_job.run().returncode == 0
    (put,) = small_job.requests("PutObject")
    assert "Expect" not in put.headers


@pytest.mark.parametrize("size", [len(BODY), IN_MEMORY_BYTES + 1])
def test_no_other_checksum_is_sent(small_job: ProxiedJob, size: int) -> None:
    small_job.make({"f": bytes(size)})
    assert small_job.run().returncode == 0
    (put,) = small_job.requests("PutObject")
    names = [name.lower() for name in put.headers]
    assert [n for n in names if n.startswith("x-amz-checksum") or "trailer" in n] == []
    assert "x-amz-sdk-checksum-algorithm" not in names
    assert "aws-chunked" not in put.headers.get("Content-Encoding", "")


@pytest.mark.parametrize("size", [len(BODY), IN_MEMORY_BYTES + 1])
def test_a_wrong_etag_is_tried_three_times(small_job: ProxiedJob, size: int) -> None:
    small_job.make({"f": bytes(size), "good": b"good"})
    small_job.proxy.add_fault(Fault(wrong_etag(), operation="PutObject", key="f"))
    small_job.check_failed(small_job.run(), "f", said="ETag")
    assert small_job.proxy.count("PutObject", "f") == 3


@pytest.mark.parametrize("size", [len(BODY), IN_MEMORY_BYTES + 1])
@pytest.mark.parametrize(
    "action",
    [
        pytest.param(wrong_etag(), id="wrong-etag"),
        pytest.param(set_header("ETag", ""), id="no-etag"),
        pytest.param(flip_byte(), id="flipped-byte"),
        pytest.param(cut_before_etag(), id="cut-answer"),
        pytest.param(drop_after_forward(), id="lost-answer"),
        pytest.param(answer(400, "BadDigest"), id="refused"),
    ],
)
def test_a_fault_once_is_mended_by_sending_again(
    small_job: ProxiedJob, size: int, action: Action
) -> None:
    small_job.make({"f": some_bytes(size)})
    small_job.proxy.add_fault(Fault(action, operation="PutObject", times=1))
    assert small_job.run().returncode == 0
    assert small_job.proxy.count("PutObject") == 2
    small_job.check_all_is_there()


def test_an_answer_without_an_etag_is_no_proof(small_job: ProxiedJob) -> None:
    small_job.make({"f": BODY, "good": b"good"})
    small_job.proxy.add_fault(Fault(set_header("ETag", ""), operation="PutObject", key="f"))
    small_job.check_failed(small_job.run(), "f", said="ETag is missing")
    assert small_job.proxy.count("PutObject", "f") == 3


@pytest.mark.parametrize("size", [len(BODY), IN_MEMORY_BYTES + 1])
def test_a_body_damaged_on_the_way_fails(small_job: ProxiedJob, size: int) -> None:
    small_job.make({"f": some_bytes(size), "good": b"good"})
    small_job.proxy.add_fault(Fault(flip_byte(), operation="PutObject", key="f"))
    small_job.check_failed(small_job.run(), "f", said="damage")
    assert small_job.proxy.count("PutObject", "f") == 3


def test_a_body_damaged_on_the_way_is_refused_by_the_server(
    make_job: Make, rclone_s3: S3Server
) -> None:
    job = make_job(rclone_s3)
    job.make({"f": BODY})
    job.proxy.add_fault(Fault(flip_byte(), operation="PutObject"))
    job.check_failed(job.run(), "f", said="BadDigest")
    assert [put.status for put in job.requests("PutObject")] == [400, 400, 400]
    assert job.in_bucket() == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption": "aws:kms:dsse"},
        {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
    ids=lambda headers: next(iter(headers.values())),
)
def test_an_etag_that_is_no_md5_is_not_compared(
    moto_job: ProxiedJob, headers: dict[str, str]
) -> None:
    moto_job.make({"f": BODY})
    moto_job.proxy.add_fault(Fault(set_headers({**headers, "ETag": FOREIGN_ETAG})))
    assert moto_job.run().returncode == 0
    moto_job.check_all_is_there()
    assert moto_job.proxy.count("PutObject") == 1


def test_an_etag_under_the_servers_own_keys_is_compared(moto_job: ProxiedJob) -> None:
    moto_job.make({"f": BODY})
    headers = {"x-amz-server-side-encryption": "AES256", "ETag": FOREIGN_ETAG}
    moto_job.proxy.add_fault(Fault(set_headers(headers), operation="PutObject"))
    moto_job.check_failed(moto_job.run(), "f", said="ETag")


def test_options_of_the_object_reach_the_server(moto_job: ProxiedJob) -> None:
    moto_job.make({"f": BODY, "large": some_bytes(LARGE_BYTES)})
    options = ("--storage-class", "STANDARD_IA", "--sse", "aws:kms", "--sse-kms-key-id", "alias/k")
    assert moto_job.run(*IN_PARTS, *options).returncode == 0
    for operation in ("PutObject", "CreateMultipartUpload"):
        (request,) = moto_job.requests(operation)
        assert request.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert request.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/k"
    for key in ("f", "large"):
        head = moto_job.client.head_object(Bucket=moto_job.bucket, Key=key)
        assert head["StorageClass"] == "STANDARD_IA"
        assert head["ServerSideEncryption"] == "aws:kms"


# --- One part or several ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "operation"), [(99_999, "PutObject"), (100_000, "CreateMultipartUpload")]
)
def test_the_threshold_is_the_first_size_in_parts(
    job: ProxiedJob, size: int, operation: str
) -> None:
    job.make({"f": some_bytes(size)})
    assert job.run("--multipart-threshold", "100KB").returncode == 0
    started = {r.operation for r in job.proxy.requests} & {"PutObject", "CreateMultipartUpload"}
    assert started == {operation}
    job.check_all_is_there()


# --- Files that change -----------------------------------------------------------------------

# Read into memory, streamed, and sent in parts.
WAYS = [pytest.param(20, id="memory"), IN_MEMORY_BYTES + MIB, pytest.param(None, id="parts")]


def changing_job(
    job: ProxiedJob, size: int | None, change: Callable[[Path], object], times: int | None = None
) -> tuple[ProxiedJob, tuple[str, ...]]:
    """A job whose file `f` changes when its bytes are under way; and the options it needs."""
    job.make({"f": some_bytes(size or LARGE_BYTES), "good": b"good"})
    job.proxy.add_fault(
        Fault(
            call(lambda _: change(job.path("f"))),
            operation=("PutObject", "UploadPart"),
            part_number=None if size else 2,
            key="f",
            times=times,
        )
    )
    return job, () if size else IN_PARTS


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"one more line\n")


def rewrite(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("size", WAYS)
def test_a_growing_file_is_sent_as_long_as_it_was(job: ProxiedJob, size: int | None) -> None:
    job, options = changing_job(job, size, append)
    at_first = job.in_folder()
    assert job.run(*options).returncode == 0
    assert job.in_folder() != at_first
    assert job.in_bucket() == at_first
    assert job.entries()["f"]["size"] == size or LARGE_BYTES


def test_a_file_that_grows_in_the_middle_of_its_body_is_sent_as_long_as_it_was(
    job: ProxiedJob,
) -> None:
    size = IN_MEMORY_BYTES + MIB
    job.make({"f": some_bytes(size)})
    at_first = job.in_folder()
    job.proxy.add_fault(Fault(slow(6 * MIB), operation="PutObject"))
    process = job.start()
    job.wait_for("PutObject", 1)
    while process.poll() is None and not job.requests("PutObject")[0].status:
        append(job.path("f"))
    assert process.wait(30) == 0
    assert job.in_bucket() == at_first


@pytest.mark.parametrize("size", WAYS)
def test_a_file_rewritten_once_is_sent_again(job: ProxiedJob, size: int | None) -> None:
    job, options = changing_job(job, size, rewrite, times=1)
    assert job.run(*options).returncode == 0
    job.check_all_is_there()


@pytest.mark.parametrize("size", WAYS)
def test_a_file_rewritten_all_the_time_is_given_up(job: ProxiedJob, size: int | None) -> None:
    job, options = changing_job(job, size, rewrite)
    job.check_failed(job.run(*options), "f", said=CHANGED)
    assert job.server.open_uploads(job.bucket) == []


def test_a_file_rewritten_all_the_time_is_tried_three_times(job: ProxiedJob) -> None:
    job, _ = changing_job(job, 20, rewrite)
    assert job.run().returncode == 1
    assert job.proxy.count("PutObject", "f") == 3


@pytest.mark.parametrize("size", WAYS)
def test_a_file_that_shrinks_once_is_sent_again(job: ProxiedJob, size: int | None) -> None:
    job, options = changing_job(job, size, shrink, times=1)
    assert job.run(*options, timeout=40).returncode == 0
    job.check_all_is_there()


@pytest.mark.parametrize("size", WAYS)
def test_a_file_that_shrinks_all_the_time_is_given_up(job: ProxiedJob, size: int | None) -> None:
    job, options = changing_job(job, size, shrink)
    job.check_failed(job.run(*options, timeout=40), "f", said=CHANGED)


@needs_fifos
def test_a_file_replaced_by_a_fifo_is_not_opened(job: ProxiedJob) -> None:
    def replace(_: Request) -> None:
        job.path("b").unlink()
        os.mkfifo(job.path("b"))

    job.make({"a": b"a", "b": b"b", "c": b"c"})
    job.proxy.add_fault(Fault(call(replace), operation="PutObject", key="a"))
    job.check_failed(job.run("--max-concurrency", "1"), "b", said="no longer a regular file")
    assert set(job.in_bucket()) == {"a", "c"}


# --- In parts --------------------------------------------------------------------------------


def in_parts(job: ProxiedJob, *faults: Fault) -> ProxiedJob:
    """The job with a file of three parts, and these faults."""
    job.make({"large": some_bytes(LARGE_BYTES)})
    for fault in faults:
        job.proxy.add_fault(fault)
    return job


@pytest.mark.parametrize("size", [PART_BYTES, 2 * PART_BYTES - 1, 2 * PART_BYTES, LARGE_BYTES])
def test_a_file_in_parts_arrives_whole(job: ProxiedJob, size: int) -> None:
    job.make({"large": some_bytes(size)})
    assert job.run(*IN_PARTS).returncode == 0
    job.check_all_is_there()
    assert job.sent_parts() == list(range(1, -(-size // PART_BYTES) + 1))
    assert job.server.open_uploads(job.bucket) == []


def test_each_part_is_sent_with_its_md5(job: ProxiedJob) -> None:
    body = some_bytes(LARGE_BYTES)
    assert in_parts(job).run(*IN_PARTS).returncode == 0
    sent = {part.part_number: part.headers["Content-MD5"] for part in job.requests("UploadPart")}
    assert sent == {
        1: base64_md5(body[:PART_BYTES]),
        2: base64_md5(body[PART_BYTES : 2 * PART_BYTES]),
        3: base64_md5(body[2 * PART_BYTES :]),
    }


def test_parts_carry_no_other_checksum_to_a_server_that_is_not_aws(job: ProxiedJob) -> None:
    assert in_parts(job).run(*IN_PARTS).returncode == 0
    names = {name.lower() for request in job.proxy.requests for name in request.headers}
    assert [name for name in names if "checksum" in name or "trailer" in name] == []


def test_the_state_has_the_etag_of_the_whole(moto_job: ProxiedJob) -> None:
    assert in_parts(moto_job).run(*IN_PARTS).returncode == 0
    entry = moto_job.entries()["large"]
    assert entry["etag"] == multipart_etag(some_bytes(LARGE_BYTES))
    assert "upload_id" not in entry


def test_a_wrong_etag_of_the_whole_is_a_failure(job: ProxiedJob) -> None:
    in_parts(job, Fault(wrong_etag(), operation="CompleteMultipartUpload"))
    job.check_failed(job.run(*IN_PARTS), "large", said="ETag")


def test_a_wrong_etag_of_the_whole_once_is_mended_by_sending_again(job: ProxiedJob) -> None:
    in_parts(job, Fault(wrong_etag(), operation="CompleteMultipartUpload", times=1))
    assert job.run(*IN_PARTS).returncode == 0
    job.check_all_is_there()


def without_etag() -> Fault:
    """The answer that Ceph gives to CompleteMultipartUpload."""
    empty: Callable[[bytes], bytes] = lambda body: re.sub(  # noqa: E731
        b"<ETag>.*?</ETag>", b"<ETag></ETag>", body, flags=re.DOTALL
    )
    return Fault(replace_in_answer(empty), operation="CompleteMultipartUpload")


def test_without_an_etag_of_the_whole_the_object_is_looked_at(job: ProxiedJob) -> None:
    in_parts(job, without_etag())
    assert job.run(*IN_PARTS).returncode == 0
    assert job.proxy.count("HeadObject") == 1
    job.check_all_is_there()


def test_an_object_with_a_wrong_etag_is_a_failure(job: ProxiedJob) -> None:
    in_parts(job, without_etag(), Fault(wrong_etag(), operation="HeadObject"))
    job.check_failed(job.run(*IN_PARTS), "large", said="ETag")


def test_an_object_of_another_size_is_a_failure(job: ProxiedJob) -> None:
    other_size = set_header("Content-Length", str(LARGE_BYTES - 1))
    in_parts(job, without_etag(), Fault(other_size, operation="HeadObject"))
    assert job.run(*IN_PARTS).returncode == 1
    assert job.uploaded() == set()


@pytest.mark.parametrize("code", ["AccessDenied", "MethodNotAllowed"])
def test_an_object_that_may_not_be_looked_at_stands(job: ProxiedJob, code: str) -> None:
    in_parts(job, without_etag(), Fault(answer(403, code), operation="HeadObject"))
    assert job.run(*IN_PARTS).returncode == 0
    job.check_all_is_there()


def test_an_etag_that_is_the_md5_of_the_whole_file_is_proof(moto_job: ProxiedJob) -> None:
    right = set_header("ETag", f'"{md5(some_bytes(LARGE_BYTES))}"')
    in_parts(moto_job, without_etag(), Fault(right, operation="HeadObject"))
    assert moto_job.run(*IN_PARTS).returncode == 0
    moto_job.check_all_is_there()


def test_an_etag_that_is_the_md5_of_other_bytes_is_a_failure(moto_job: ProxiedJob) -> None:
    other = set_header("ETag", FOREIGN_ETAG)
    in_parts(moto_job, without_etag(), Fault(other, operation="HeadObject"))
    moto_job.check_failed(moto_job.run(*IN_PARTS), "large", said="ETag")


@pytest.mark.parametrize("encryption", ["aws:kms", "aws:kms:dsse"])
def test_an_etag_of_parts_under_kms_is_not_compared(moto_job: ProxiedJob, encryption: str) -> None:
    headers = {"x-amz-server-side-encryption": encryption}
    in_parts(
        moto_job,
        Fault(
            set_headers({**headers, "ETag": FOREIGN_ETAG.replace('f"', 'f-3"')}),
            operation="HeadObject",
        ),
        Fault(kms_answer(encryption), operation="CompleteMultipartUpload"),
        Fault(set_headers(headers), operation=("CreateMultipartUpload", "UploadPart")),
    )
    assert moto_job.run(*IN_PARTS).returncode == 0
    assert moto_job.proxy.count("CompleteMultipartUpload") == 1
    moto_job.check_all_is_there()


def kms_answer(encryption: str) -> Action:
    """Have Complete say that KMS encrypted the object, with an ETag that is no MD5."""

    def act(exchange: Any) -> None:
        said = exchange.forward()
        etag = b"<ETag>0123456789abcdef0123456789abcdef-3</ETag>"
        body = re.sub(b"<ETag>.*?</ETag>", etag, b"".join(said.body), flags=re.DOTALL)
        assert etag in body
        said.set_body(body)
        said.set_header("x-amz-server-side-encryption", encryption)
        exchange.reply(said)

    return act


def test_a_lost_answer_to_complete_costs_no_part(job: ProxiedJob) -> None:
    in_parts(job, Fault(drop_after_forward(), operation="CompleteMultipartUpload", times=1))
    assert job.run(*IN_PARTS).returncode == 0
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(answer(503, "SlowDown"), id="SlowDown"),
        pytest.param(answer(400, "RequestTimeout"), id="RequestTimeout"),
        pytest.param(wrong_etag(), id="wrong-etag"),
        pytest.param(flip_byte(), id="flipped-byte"),
        pytest.param(drop_after_forward(), id="lost-answer"),
    ],
)
def test_a_part_that_fails_once_is_sent_again_alone(job: ProxiedJob, action: Action) -> None:
    in_parts(job, Fault(action, part_number=2, times=1))
    assert job.run(*IN_PARTS).returncode == 0
    assert job.sent_parts() == [1, 2, 2, 3]
    assert job.proxy.count("CreateMultipartUpload") == 1
    job.check_all_is_there()


def change_first_part_once_sent(job: ProxiedJob) -> None:
    """Change the file's first bytes when this try has sent them."""
    tries = job.proxy.count("CreateMultipartUpload")

    def is_sent() -> bool:
        first = [r for r in job.requests("UploadPart") if r.part_number == 1 and r.status == 200]
        return len(first) == tries

    wait_until(is_sent, 30, "the first part")
    with job.path("large").open("r+b") as file:
        file.write(b"changed %d" % tries)


def test_a_file_changed_between_parts_is_never_completed(job: ProxiedJob) -> None:
    in_parts(job, Fault(call(lambda _: change_first_part_once_sent(job)), part_number=3))
    job.check_failed(job.run(*IN_PARTS), "large", said=CHANGED)
    assert job.proxy.count("CompleteMultipartUpload") == 0
    assert job.proxy.count("CreateMultipartUpload") == 3
    assert job.proxy.count("AbortMultipartUpload") == 3
    assert job.server.open_uploads(job.bucket) == []
    assert "upload_id" not in job.entries()["large"]


def test_an_upload_that_fails_for_good_can_be_gone_on_with(job: ProxiedJob) -> None:
    in_parts(job, Fault(answer(400, "InvalidRequest"), part_number=2))
    job.check_failed(job.run(*IN_PARTS), "large", said="InvalidRequest")
    (upload,) = job.server.open_uploads(job.bucket)
    assert upload == ("large", job.entries()["large"]["upload_id"], 2)
    job.proxy.clear_faults()
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


def test_a_complete_that_is_a_lie_is_a_failure_that_keeps_the_parts(job: ProxiedJob) -> None:
    def lie(exchange: Exchange) -> None:
        exchange.discard_body()
        exchange.reply(Answer(200, "OK", [("Content-Length", "0")], (), 0))

    job.make({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(lie, operation="CompleteMultipartUpload"))
    completed = job.run(*IN_PARTS)
    job.check_failed(completed, "large", said="ETag is missing")
    assert job.entries()["large"]["upload_id"]
    job.proxy.clear_faults()
    sent = len(job.sent_parts())
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert len(job.sent_parts()) == sent
    job.check_all_is_there()


def test_an_object_that_cannot_be_looked_at_for_a_while_is_not_taken_as_proven(
    job: ProxiedJob,
) -> None:
    job.make({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(
        Fault(replace_in_answer(lambda _: b""), operation="CompleteMultipartUpload")
    )
    job.proxy.add_fault(Fault(answer(503, "SlowDown"), operation="HeadObject", times=2))
    assert job.run(*IN_PARTS).returncode == 0
    assert len(job.requests("HeadObject")) > 2
    job.check_all_is_there()


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs Linux's /proc")
def test_a_file_that_holds_more_than_its_size_fails(job: ProxiedJob) -> None:
    job.folder.mkdir()
    (job.folder / "version").symlink_to("/proc/version")
    completed = job.run()
    assert completed.returncode == 1
    assert "more than its size" in completed.stderr
    assert job.in_bucket() == {}
