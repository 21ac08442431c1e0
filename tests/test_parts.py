"""How a large file is sent in parts, what is taken as proof, and what is gone on with."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.checks import assert_clean, lines_with
from support.faults import (
    Fault,
    answer,
    call,
    delay,
    drop,
    drop_after_forward,
    flip_byte,
    replace_in_answer,
    set_headers,
    stall,
    wrong_etag,
)
from support.files import IN_PARTS, LARGE_BYTES, PART_BYTES, md5, small_files, some_bytes
from support.job import NOBODY, Job, kill
from support.kills import killed_in_parts, killing_call, left_in_parts
from support.proxy import Action, Answer, Exchange, Request, pass_on
from support.script import prelude, program, wait_until
from support.systems import needs_permissions, needs_proc

AGAIN = [pytest.param("1", id="crash-run"), pytest.param("0", id="normal-run")]
FOREIGN_ETAG = '"0123456789abcdef0123456789abcdef"'
CHANGED = "changed while it was sent"


def base64_md5(body: bytes) -> str:
    return base64.b64encode(bytes.fromhex(md5(body))).decode()


def multipart_etag(body: bytes) -> str:
    """The ETag that S3 gives to an object made of parts of 5 MiB."""
    parts = [body[start : start + PART_BYTES] for start in range(0, len(body), PART_BYTES)]
    return f"{md5(b''.join(bytes.fromhex(md5(part)) for part in parts))}-{len(parts)}"


# --- In parts --------------------------------------------------------------------------------


@pytest.fixture
def job(moto_job: Job) -> Job:
    """A job on moto, which gives ETags and lists parts as S3 does."""
    return moto_job


# --- Part sizes ------------------------------------------------------------------------------


GB, TIB = 10**9, 2**40
# Of S3: at most 10,000 parts of 5 MiB to 5 GiB.
PARTS_MAX, PART_MIN, PART_MAX = 10_000, 5 * 2**20, 5 * 2**30
SIZES = [GB, 160 * GB, PARTS_MAX * 16 * 2**20, PARTS_MAX * 16 * 2**20 + 1, 5 * TIB, 48 * TIB]
SIZES += [PARTS_MAX * PART_MAX]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [PART_MIN, 16 * 2**20, PART_MAX])
def test_no_file_needs_more_parts_than_s3_takes(size: int, wanted: int) -> None:
    part_size = program().part_size_for(size, wanted)
    assert PART_MIN <= part_size <= PART_MAX
    assert -(-size // part_size) <= PARTS_MAX
    # What is asked for is kept where it can be, and exceeded by a MiB at most where not.
    assert part_size == wanted or part_size - 2**20 < -(-size // PARTS_MAX)


@pytest.mark.parametrize(("size", "is_large"), [(GB - 1, False), (GB, True)])
def test_files_of_1_gb_and_more_go_in_parts(tmp_path: Path, size: int, is_large: bool) -> None:
    names = ["--bucketname", "bucket", "--backupfolder", str(tmp_path)]
    assert program().parse_arguments(names).is_multipart(size) == is_large


@pytest.mark.parametrize(
    ("size", "operation"), [(99_999, "PutObject"), (100_000, "CreateMultipartUpload")]
)
def test_the_threshold_is_the_first_size_in_parts(job: Job, size: int, operation: str) -> None:
    job.write({"f": some_bytes(size)})
    assert_clean(job.run("--multipart-threshold", "100KB"))
    started = {r.operation for r in job.requests("PutObject", "CreateMultipartUpload")}
    assert started == {operation}
    job.check_all_is_there()


# --- What is sent ----------------------------------------------------------------------------


def in_parts(job: Job, *faults: Fault) -> Job:
    """The job with a file of three parts, and these faults."""
    job.write({"large": some_bytes(LARGE_BYTES)})
    for fault in faults:
        job.proxy.add_fault(fault)
    return job


SIZES_IN_PARTS = [PART_BYTES, 2 * PART_BYTES - 1, 2 * PART_BYTES, LARGE_BYTES]


@pytest.mark.parametrize(
    ("name", "size"), [*(("moto", size) for size in SIZES_IN_PARTS), ("rclone", LARGE_BYTES)]
)
@pytest.mark.few(3)
def test_a_file_in_parts_arrives_whole(
    request: pytest.FixtureRequest, name: str, size: int
) -> None:
    job: Job = request.getfixturevalue(f"{name}_job")
    body = some_bytes(size)
    job.write({"large": body})
    assert_clean(job.run(*IN_PARTS))
    job.check_all_is_there()
    assert job.open_uploads() == []
    parts = {r.part_number: r.headers["Content-MD5"] for r in job.requests("UploadPart")}
    starts = range(0, size, PART_BYTES)
    assert parts == {
        number: base64_md5(body[start : start + PART_BYTES])
        for number, start in enumerate(starts, start=1)
    }
    assert len(job.requests("UploadPart")) == len(starts)
    # Content-MD5 alone is the proof that every server understands.
    sending = (request for request in job.proxy.requests if request.method in ("PUT", "POST"))
    names = {name.lower() for request in sending for name in request.headers}
    assert [name for name in names if "checksum" in name or "trailer" in name] == []
    assert "upload_id" not in job.entry("large")
    # With that a later run can tell whether the file would still have the same ETag.
    assert job.entry("large")["part_size"] == PART_BYTES
    assert "sse" not in job.entry("large")
    if job.server.name == "moto":
        assert job.entry("large")["etag"] == multipart_etag(body)


def test_how_the_object_is_to_be_kept_is_said_at_the_start(job: Job) -> None:
    path = job.path("report.html")
    job.write({"report.html": some_bytes(LARGE_BYTES), "f": b"small"})
    os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    options = ("--storage-class", "STANDARD_IA", "--sse", "aws:kms", "--sse-kms-key-id", "alias/k")
    assert_clean(job.run(*IN_PARTS, *options))
    for request in job.requests("PutObject", "CreateMultipartUpload"):
        assert request.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert request.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/k"
    for key in ("f", "report.html"):
        head = job.head(key)
        assert (head["StorageClass"], head["ServerSideEncryption"]) == ("STANDARD_IA", "aws:kms")
        assert re.search("alias/k$", head["SSEKMSKeyId"])
    head = job.head("report.html")
    assert head["ContentType"] == "text/html"
    assert head["Metadata"]["mtime"] == "1600000000.123456789"


# --- The proof -------------------------------------------------------------------------------


def test_a_wrong_etag_of_the_whole_is_a_failure(job: Job) -> None:
    in_parts(job, Fault(wrong_etag(), operation="CompleteMultipartUpload"))
    job.check_failed(job.run(*IN_PARTS), "large", said="ETag")


def test_a_wrong_etag_of_the_whole_once_is_mended_by_sending_again(job: Job) -> None:
    in_parts(job, Fault(wrong_etag(), operation="CompleteMultipartUpload", times=1))
    assert_clean(job.run(*IN_PARTS))
    job.check_all_is_there()


def without_etag() -> Fault:
    """The answer that Ceph gives to CompleteMultipartUpload."""
    empty: Callable[[bytes], bytes] = lambda body: re.sub(  # noqa: E731
        b"<ETag>.*?</ETag>", b"<ETag></ETag>", body, flags=re.DOTALL
    )
    return Fault(replace_in_answer(empty), operation="CompleteMultipartUpload")


def test_without_an_etag_of_the_whole_the_object_is_looked_at(job: Job) -> None:
    in_parts(job, without_etag())
    assert_clean(job.run(*IN_PARTS))
    (head,) = job.requests("HeadObject")
    assert head.headers["x-amz-checksum-mode"] == "ENABLED"
    job.check_all_is_there()


def test_an_object_with_a_wrong_etag_is_a_failure(job: Job) -> None:
    in_parts(job, without_etag(), Fault(wrong_etag(), operation="HeadObject"))
    job.check_failed(job.run(*IN_PARTS), "large", said="ETag")


def test_an_object_of_another_size_is_a_failure(job: Job) -> None:
    other_size = set_headers({"Content-Length": str(LARGE_BYTES - 1)})
    in_parts(job, without_etag(), Fault(other_size, operation="HeadObject"))
    assert job.run(*IN_PARTS).returncode == 1
    assert job.uploaded() == set()


def test_an_object_that_may_not_be_looked_at_stands(job: Job) -> None:
    in_parts(job, without_etag(), Fault(answer(403, "AccessDenied"), operation="HeadObject"))
    assert_clean(job.run(*IN_PARTS))
    job.check_all_is_there()


def test_an_etag_that_is_the_md5_of_the_whole_file_is_proof(job: Job) -> None:
    right = set_headers({"ETag": f'"{md5(some_bytes(LARGE_BYTES))}"'})
    in_parts(job, without_etag(), Fault(right, operation="HeadObject"))
    assert_clean(job.run(*IN_PARTS))
    job.check_all_is_there()


def test_an_etag_that_is_the_md5_of_other_bytes_is_a_failure(job: Job) -> None:
    other = set_headers({"ETag": FOREIGN_ETAG})
    in_parts(job, without_etag(), Fault(other, operation="HeadObject"))
    job.check_failed(job.run(*IN_PARTS), "large", said="ETag")


def test_an_etag_of_parts_under_kms_is_not_compared(job: Job) -> None:
    encryption = "aws:kms:dsse"
    headers = {"x-amz-server-side-encryption": encryption}
    in_parts(
        job,
        Fault(
            set_headers({**headers, "ETag": FOREIGN_ETAG.replace('f"', 'f-3"')}),
            operation="HeadObject",
        ),
        Fault(kms_answer(encryption), operation="CompleteMultipartUpload"),
        Fault(set_headers(headers), operation=("CreateMultipartUpload", "UploadPart")),
    )
    assert_clean(job.run(*IN_PARTS))
    assert job.proxy.count("CompleteMultipartUpload") == 1
    job.check_all_is_there()
    assert job.entry("large")["sse"] == encryption


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


@pytest.mark.few(1)
def test_a_lost_answer_to_complete_costs_no_part(job: Job) -> None:
    in_parts(job, Fault(drop_after_forward(), operation="CompleteMultipartUpload", times=1))
    assert_clean(job.run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()


@pytest.mark.long
def test_a_slow_complete_is_waited_for(job: Job) -> None:
    # Longer than the server may be silent otherwise.
    in_parts(job, Fault(delay(6), operation="CompleteMultipartUpload"))
    assert_clean(job.run(*IN_PARTS))
    assert job.proxy.count("CompleteMultipartUpload") == 1
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "InvalidPart"), (404, ""), pytest.param(504, "", marks=pytest.mark.long)],
)
@pytest.mark.few(1)
def test_an_object_that_appears_after_a_lost_complete_is_waited_for(
    job: Job, status: int, code: str
) -> None:
    in_parts(
        job,
        Fault(drop_after_forward(), operation="CompleteMultipartUpload", times=1),
        Fault(answer(status, code), operation="CompleteMultipartUpload"),
        Fault(answer(404, ""), operation="HeadObject", times=2),
    )
    assert_clean(job.run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 3]
    assert job.proxy.count("HeadObject") == 3
    assert job.proxy.count("AbortMultipartUpload") == 0
    job.check_all_is_there()


def test_an_upload_that_may_be_completed_still_is_not_aborted(job: Job) -> None:
    job.write({"small": b"small"})
    in_parts(
        job,
        Fault(drop(), operation="CompleteMultipartUpload", times=1),
        Fault(answer(400, "InvalidPart"), operation="CompleteMultipartUpload"),
    )
    job.check_failed(job.run(*IN_PARTS), "large", said="does not appear")
    assert job.sent_parts() == [1, 2, 3]
    assert job.proxy.count("AbortMultipartUpload") == 0
    assert job.entry("large")["upload_id"]
    job.proxy.clear_faults()
    since = job.seen()
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert job.sent_parts(since) == []
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
@pytest.mark.few(3)
def test_a_part_that_fails_once_is_sent_again_alone(job: Job, action: Action) -> None:
    in_parts(job, Fault(action, part_number=2, times=1))
    assert_clean(job.run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 2, 3]
    assert job.proxy.count("CreateMultipartUpload") == 1
    job.check_all_is_there()


KMS_HEADERS = {"x-amz-server-side-encryption": "aws:kms"}


def without_etag_of_part(headers: Mapping[str, str]) -> Action:
    """Answer to a part without its ETag, and with these headers."""

    def act(exchange: Exchange) -> None:
        said = exchange.forward()
        kept = [header for header in said.headers if header[0].lower() != "etag"]
        said.headers = [*kept, *headers.items()]
        exchange.reply(said)

    return act


@pytest.mark.parametrize("headers", [{}, KMS_HEADERS], ids=["plain", "kms"])
@pytest.mark.few(1)
def test_an_answer_to_a_part_without_its_etag_is_no_answer(
    job: Job, headers: dict[str, str]
) -> None:
    fault = Fault(without_etag_of_part(headers), part_number=2, times=1)
    in_parts(job, fault)
    assert_clean(job.run(*IN_PARTS))
    assert (fault.hits, job.sent_parts()) == (1, [1, 2, 2, 3])
    job.check_all_is_there()


@pytest.mark.parametrize("headers", [{}, KMS_HEADERS], ids=["plain", "kms"])
@pytest.mark.few(1)
def test_a_part_that_is_never_answered_with_its_etag_fails_after_three_tries(
    job: Job, headers: dict[str, str]
) -> None:
    job.write({"small": b"small"})
    in_parts(job, Fault(without_etag_of_part(headers), part_number=2))
    job.check_failed(job.run(*IN_PARTS), "large", said="ETag")
    assert job.sent_parts() == [1, 2, 2, 2, 3]
    # Of its parts none is lost.
    assert job.open_uploads() == [("large", job.entry("large")["upload_id"], 3)]
    job.proxy.clear_faults()
    since = job.seen()
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert job.sent_parts(since) == []
    job.check_all_is_there()


def change_first_part_once_sent(job: Job) -> None:
    """Change the file's first bytes when this try has sent them."""
    tries = job.proxy.count("CreateMultipartUpload")

    def is_sent() -> bool:
        first = [r for r in job.requests("UploadPart") if r.part_number == 1 and r.status == 200]
        return len(first) == tries

    wait_until(is_sent, 30, "the first part")
    with job.path("large").open("r+b") as file:
        file.write(b"changed %d" % tries)


def test_a_file_changed_between_parts_is_never_completed(job: Job) -> None:
    in_parts(job, Fault(call(lambda _: change_first_part_once_sent(job)), part_number=3))
    job.check_failed(job.run(*IN_PARTS), "large", said=CHANGED)
    assert job.proxy.count("CompleteMultipartUpload") == 0
    assert job.proxy.count("CreateMultipartUpload") == 3
    assert job.proxy.count("AbortMultipartUpload") == 3
    assert job.open_uploads() == []
    assert "upload_id" not in job.entry("large")


def test_an_upload_that_fails_for_good_can_be_gone_on_with(job: Job) -> None:
    in_parts(job, Fault(answer(400, "InvalidRequest"), part_number=2))
    job.check_failed(job.run(*IN_PARTS), "large", said="InvalidRequest")
    (upload,) = job.open_uploads()
    assert upload == ("large", job.entry("large")["upload_id"], 2)
    job.proxy.clear_faults()
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


def test_a_complete_that_is_a_lie_is_a_failure_that_keeps_the_parts(job: Job) -> None:
    def lie(exchange: Exchange) -> None:
        exchange.discard_body()
        exchange.reply(Answer(200, "OK", [("Content-Length", "0")], (), 0))

    job.write({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(lie, operation="CompleteMultipartUpload"))
    completed = job.run(*IN_PARTS)
    job.check_failed(completed, "large", said="ETag is missing")
    assert job.entry("large")["upload_id"]
    job.proxy.clear_faults()
    sent = len(job.sent_parts())
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert len(job.sent_parts()) == sent
    job.check_all_is_there()


def test_an_object_that_cannot_be_looked_at_for_a_while_is_not_taken_as_proven(job: Job) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(
        Fault(replace_in_answer(lambda _: b""), operation="CompleteMultipartUpload")
    )
    job.proxy.add_fault(Fault(answer(503, "SlowDown"), operation="HeadObject", times=2))
    assert_clean(job.run(*IN_PARTS))
    assert len(job.requests("HeadObject")) > 2
    job.check_all_is_there()


# --- One object, one file --------------------------------------------------------------------

# Two files have the same number, each on a device of its own.
ON_OTHER_DEVICES = """
import os

def other(look):
    def look_otherwise(*args, **keywords):
        status = look(*args, **keywords)
        names = "st_atime st_mtime st_ctime st_atime_ns st_mtime_ns st_ctime_ns".split()
        numbers = [status.st_mode, 7, status.st_ino, *status[3:10]]
        return os.stat_result(numbers, {name: getattr(status, name) for name in names})
    return look_otherwise

os.stat, os.lstat, os.fstat = map(other, (os.stat, os.lstat, os.fstat))
"""


class Versions:
    """A link that leads to one of two files of the same size and time."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._link, self._folder = job.path("large"), folder
        self.bodies = {name: some_bytes(LARGE_BYTES, seed) for seed, name in enumerate("12")}
        for name, body in self.bodies.items():
            (folder / name).write_bytes(body)
            os.utime(folder / name, ns=(0, 1_600_000_000_000_000_000))
        job.folder.mkdir()
        self.turn("1")

    def turn(self, name: str) -> None:
        """Have the link lead to that file."""
        new = self._folder / "new"
        new.symlink_to(self._folder / name)
        new.replace(self._link)

    def turning(self, name: str) -> Action:
        """Have it turned to that file by a request, before it is forwarded."""
        return call(lambda _: self.turn(name))


@pytest.mark.parametrize("code", ["", ON_OTHER_DEVICES], ids=["one-device", "two-devices"])
@pytest.mark.few(1)
def test_all_parts_are_of_one_file_when_a_link_is_turned_between_them(
    job: Job, tmp_path: Path, code: str
) -> None:
    versions = Versions(job, tmp_path)
    for number, name in ((1, "2"), (2, "1")):
        job.proxy.add_fault(Fault(versions.turning(name), part_number=number, times=1))
    assert_clean(job.run(*IN_PARTS, "--max-concurrency", "1", python_flags=prelude(code)))
    assert job.in_bucket() == {"large": md5(versions.bodies["1"])}
    assert job.open_uploads() == []


def test_the_proof_is_of_the_file_that_was_sent_when_a_link_is_turned_before_it(
    job: Job, tmp_path: Path
) -> None:
    versions = Versions(job, tmp_path)
    job.proxy.add_fault(without_etag())
    etag = set_headers({"ETag": f'"{md5(versions.bodies["2"])}"'})

    def turn_and_answer(exchange: Exchange) -> None:
        versions.turn("2")
        etag(exchange)

    job.proxy.add_fault(Fault(turn_and_answer, operation="HeadObject"))
    assert_clean(job.run(*IN_PARTS))
    assert job.in_bucket() == {"large": md5(versions.bodies["2"])}


def test_a_link_that_is_turned_between_two_runs_gives_an_object_of_one_file(
    job: Job, tmp_path: Path
) -> None:
    versions = Versions(job, tmp_path)
    killed_in_parts(job, kept=[1])  # which writes version 1 through the link
    os.utime(tmp_path / "1", ns=(0, 1_600_000_000_000_000_000))
    job.write_state({**job.entry("large"), "mtime_ns": 1_600_000_000_000_000_000})
    versions.turn("2")
    check_finished_by(job, "--crashrun", "1", parts=[1, 2, 3])
    assert job.in_bucket() == {"large": md5(versions.bodies["2"])}
    assert job.requests("AbortMultipartUpload") == []


# --- A multipart upload that was cut off -----------------------------------------------------


def check_finished_by(job: Job, *options: str, parts: list[int], user: int | None = None) -> None:
    """Run again: it must send these parts, and leave nothing open."""
    since = job.seen()
    assert_clean(job.run(*IN_PARTS, *options, user=user))
    assert job.sent_parts(since) == parts
    job.check_all_is_there()
    assert job.open_uploads() == []
    assert "upload_id" not in job.entry("large")


@pytest.mark.parametrize(
    ("kept", "crashrun"), [([], "1"), ([1], "0"), ([2, 4], "1"), ([1, 2, 3, 4], "0")], ids=str
)
@pytest.mark.few(2)
def test_only_missing_parts_are_sent(job: Job, crashrun: str, kept: list[int]) -> None:
    leave = killed_in_parts if kept == [1] else left_in_parts
    leave(job, kept=kept, size=4 * PART_BYTES + 1)
    missing = sorted({1, 2, 3, 4, 5} - set(kept))
    check_finished_by(job, "--crashrun", crashrun, parts=missing)
    assert len(job.requests("CreateMultipartUpload")) == (kept == [1])


def test_the_upload_goes_on_at_a_server_whose_etag_is_the_md5_of_the_whole(rclone_job: Job) -> None:
    left_in_parts(rclone_job, kept=[1, 3])
    check_finished_by(rclone_job, "--crashrun", "1", parts=[2])


def test_parts_are_listed_page_by_page(job: Job) -> None:
    # A page holds 1,000 parts, which would be 5 GB here: the proxy asks for pages of two.
    left_in_parts(job, kept=[1, 2, 3, 4], size=4 * PART_BYTES + 1)
    job.proxy.add_fault(Fault(in_pages_of_two, operation="ListParts"))
    check_finished_by(job, "--crashrun", "1", parts=[5])
    assert len(job.requests("ListParts")) == 2


def in_pages_of_two(exchange: Exchange) -> None:
    """Ask the server for two parts a page."""
    exchange.ask_more("&max-parts=2")
    pass_on(exchange)


@pytest.mark.parametrize("damaged", [b"x" * PART_BYTES, b"x" * (PART_BYTES + 1)], ids=len)
@pytest.mark.few(1)
def test_a_part_damaged_on_the_server_is_sent_again(job: Job, damaged: bytes) -> None:
    upload_id = left_in_parts(job, kept=[1, 2])
    job.server.client().upload_part(
        Bucket=job.bucket, Key="large", UploadId=upload_id, PartNumber=2, Body=damaged
    )
    check_finished_by(job, "--crashrun", "1", parts=[2, 3])


@pytest.mark.parametrize("crashrun", AGAIN)
@pytest.mark.few(1)
def test_a_file_changed_since_is_sent_afresh(job: Job, crashrun: str) -> None:
    upload_id = left_in_parts(job, kept=[1, 2])
    job.write({"large": some_bytes(LARGE_BYTES + 1, seed=1)})
    check_finished_by(job, "--crashrun", crashrun, parts=[1, 2, 3])
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id


def test_a_file_that_is_small_now_is_sent_in_one_part(job: Job) -> None:
    left_in_parts(job, kept=[1, 2])
    job.write({"large": b"small now"})
    check_finished_by(job, "--crashrun", "1", parts=[])


def test_an_upload_that_cannot_be_aborted_says_nothing_of_the_object(job: Job) -> None:
    shrink = Fault(call(lambda _: job.write({"large": b"small now"})), part_number=3, times=1)
    in_parts(job, shrink)
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="AbortMultipartUpload"))
    completed = job.run(*IN_PARTS, "--sse", "AES256")
    assert completed.returncode == 0
    ((_key, upload_id, _parts),) = job.open_uploads()
    assert f"{upload_id} could not be aborted" in completed.stderr
    job.check_all_is_there()
    assert "sse" not in job.entry("large")  # its ETag is its MD5
    completed = job.run("--verify", "folder")
    assert_clean(completed)
    assert "by size" not in completed.stdout


def test_an_upload_that_somebody_aborted_is_started_afresh(job: Job) -> None:
    upload_id = left_in_parts(job, kept=[1, 2])
    job.server.client().abort_multipart_upload(Bucket=job.bucket, Key="large", UploadId=upload_id)
    check_finished_by(job, "--crashrun", "1", parts=[1, 2, 3])


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented")])
@pytest.mark.few(1)
def test_an_upload_whose_parts_cannot_be_listed_is_started_afresh(
    job: Job, status: int, code: str
) -> None:
    upload_id = left_in_parts(job, kept=[1, 2])
    job.proxy.add_fault(Fault(answer(status, code), operation="ListParts"))
    check_finished_by(job, "--crashrun", "1", parts=[1, 2, 3])
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id


def test_an_upload_of_which_the_server_has_lost_a_part_is_started_afresh(job: Job) -> None:
    upload_id = left_in_parts(job, kept=[1, 2])
    lost = Fault(answer(400, "InvalidPart"), operation="CompleteMultipartUpload", times=1)
    job.proxy.add_fault(lost)
    check_finished_by(job, "--crashrun", "1", parts=[1, 2, 3, 3])
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id


def test_an_upload_that_can_never_be_completed_fails_after_three_tries(job: Job) -> None:
    job.write({"small": b"small"})
    in_parts(job, Fault(answer(400, "InvalidPart"), operation="CompleteMultipartUpload"))
    job.check_failed(job.run(*IN_PARTS), "large", said="InvalidPart")
    assert job.proxy.count("CreateMultipartUpload") == 3


def test_other_options_of_the_crash_run_do_not_spoil_the_parts(job: Job) -> None:
    killed_in_parts(job, "--shard", "1/1", kept=[1, 2])
    options = ("--shard", "1/1", "--multipart-chunksize", "6MiB", "--max-bandwidth", "50MB/s")
    check_finished_by(job, "--crashrun", "1", *options, parts=[3])


def test_a_refusal_of_one_key_beside_accepted_parts_is_of_that_key(job: Job) -> None:
    job.write({"denied": b"denied"})
    left_in_parts(job, kept=[1])
    begun, is_said = threading.Event(), threading.Event()

    def refuse(exchange: Exchange) -> None:
        begun.wait(60)
        answer(403, "AccessDenied")(exchange)

    def hold(exchange: Exchange) -> None:
        # Part 2 has been accepted, and the upload is still under way.
        job.wait_for("UploadPart", 1, answered=True)
        begun.set()
        wait_until(lambda: "AccessDenied" in job.errors().get("denied", ""), 20, "the failure")
        is_said.set()
        pass_on(exchange)

    job.proxy.add_fault(Fault(refuse, operation="PutObject", key="denied"))
    job.proxy.add_fault(Fault(hold, part_number=3))
    job.check_failed(job.crash_run(*IN_PARTS), "denied", said="AccessDenied")
    assert is_said.is_set()
    assert set(job.sent_parts()) == {2, 3}
    assert job.proxy.count("CreateMultipartUpload") == 0
    assert set(job.in_bucket()) == {"large"}


OBJECT = ("--storage-class", "STANDARD_IA", "--sse", "AES256")
# moto lists the parts of every upload as STANDARD.
LISTED_AS_IA = replace_in_answer(lambda page: page.replace(b">STANDARD<", b">STANDARD_IA<"))


@pytest.mark.parametrize(
    "again", [("--crashrun", "1"), (), ("--skip-unchanged",)], ids=["crash", "normal", "skip"]
)
@pytest.mark.few(2)
def test_a_resumed_upload_has_the_storage_class_and_sse_it_began_with(
    job: Job, again: tuple[str, ...]
) -> None:
    killed_in_parts(job, *OBJECT, kept=[1, 3])
    job.proxy.add_fault(Fault(LISTED_AS_IA, operation="ListParts"))
    check_finished_by(job, *OBJECT, *again, parts=[2])
    head = job.head("large")
    assert (head["StorageClass"], head["ServerSideEncryption"]) == ("STANDARD_IA", "AES256")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--storage-class", "STANDARD_IA"), ("STANDARD_IA", None)),
        (("--sse", "aws:kms"), (None, "aws:kms")),
        (OBJECT, ("STANDARD_IA", "AES256")),
    ],
    ids=["class", "kms", "both"],
)
@pytest.mark.few(2)
def test_storage_class_and_sse_that_only_the_crash_run_asks_for_apply_to_the_whole(
    job: Job, options: tuple[str, ...], expected: tuple[str | None, str | None]
) -> None:
    left_in_parts(job, kept=[1, 3])
    check_finished_by(job, "--crashrun", "1", *options, parts=[1, 2, 3])
    head = job.head("large")
    assert (head.get("StorageClass"), head.get("ServerSideEncryption")) == expected


def test_verify_keeps_an_upload_that_is_to_be_resumed(job: Job) -> None:
    job.write({"small": b"small"})
    upload_id = left_in_parts(job, kept=[1, 3])
    assert job.run(*IN_PARTS, "--verify").returncode == 1
    assert job.entry("large")["upload_id"] == upload_id
    check_finished_by(job, "--crashrun", "1", parts=[2])


def test_the_upload_id_is_on_disk_before_the_first_part_is_sent(job: Job) -> None:
    seen: list[tuple[str, str]] = []

    def look(request: Request) -> None:
        seen.append((request.query["uploadId"], job.entry("large")["upload_id"]))

    in_parts(job, Fault(call(look), operation="UploadPart"))
    assert_clean(job.run(*IN_PARTS))
    assert len(seen) == 3
    assert all(sent == on_disk for sent, on_disk in seen)


STARTS = """
import os
def recorded(name, real):
    def call(*args):
        path = os.readlink(f"/proc/self/fd/{{args[0]}}") if name == "fsync" else args[1]
        with open({record!r}, "a") as record:
            print(name, os.path.basename(path), file=record)
        return real(*args)
    return call
os.fsync, os.replace = recorded("fsync", os.fsync), recorded("replace", os.replace)
"""


@needs_proc
def test_the_start_of_a_large_file_costs_a_line_and_no_save_of_the_whole(
    job: Job, tmp_path: Path
) -> None:
    names = [f"large-{number}" for number in range(4)]
    job.write({name: some_bytes(LARGE_BYTES, seed) for seed, name in enumerate(names)})
    job.write(small_files(10))
    record, folder = tmp_path / "record", job.state_path.parent.name
    flags = prelude(STARTS.format(record=str(record)))
    # In real time the next save comes ten seconds after the last at the soonest.
    assert_clean(job.run(*IN_PARTS, python_flags=flags, real_time=True))
    job.check_all_is_there()
    calls = record.read_text().splitlines()
    assert (
        calls.count(f"replace {job.state_path.name}") == 3
    )  # at the walk, of the plan, at the end
    journal = f"fsync {job.state_path.name}.journal"
    assert calls.count(journal) >= 2  # two files are under way
    # Its name is on the disk before what it says.
    assert calls[calls.index(journal) - 2 :][:2] == [f"fsync {folder}"] * 2


def test_a_normal_run_aborts_the_upload_of_a_file_that_is_gone(job: Job) -> None:
    job.write({"f": b"f"})
    upload_id = left_in_parts(job, kept=[1, 2])
    job.path("large").unlink()
    assert_clean(job.run(*IN_PARTS))
    (abort,) = job.requests("AbortMultipartUpload")
    assert abort.query["uploadId"] == upload_id
    assert job.open_uploads() == []
    job.check_all_is_there()


@pytest.mark.parametrize("again", [(), ("--skip-unchanged",)], ids=["normal", "skip"])
@pytest.mark.few(1)
def test_the_upload_of_another_bucket_is_not_looked_for_in_this_one(
    job: Job, tmp_path: Path, again: tuple[str, ...]
) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    status = job.path("large").stat()
    sent = job.pending_entry("large", uploadedSuccess=1, bucket="another", size=status.st_size)
    sent |= {"mtime_ns": status.st_mtime_ns, "upload_id": "of-another", "part_size": PART_BYTES}
    job.write_state(sent)
    env = killing_call(tmp_path / "killing", "replace", count=2)  # after the walk
    assert job.start(*IN_PARTS, *again, env=env).wait(60) == -signal.SIGKILL
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.requests("AbortMultipartUpload", "ListParts") == []
    job.check_all_is_there()


@pytest.mark.parametrize("source", ["state", pytest.param("server", marks=pytest.mark.long)])
def test_an_upload_id_with_control_characters_does_not_reach_the_terminal(
    job: Job, source: str
) -> None:
    odd = "id\u009b31m\u0085"
    job.write({"f": b"f", "large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="AbortMultipartUpload"))
    if source == "state":
        status = job.path("large").stat()
        large = job.pending_entry("large", bucket=job.bucket, size=status.st_size)
        job.write_state({**large, "upload_id": odd, "part_size": PART_BYTES})
        job.path("large").unlink()
        completed = job.run(*IN_PARTS)
        assert completed.returncode == 0
    else:
        with_odd_id = lambda body: re.sub(  # noqa: E731
            b"<UploadId>.*?<", f"<UploadId>{odd}<".encode(), body
        )
        create = Fault(replace_in_answer(with_odd_id), operation="CreateMultipartUpload")
        job.proxy.add_fault(create)
        change = call(lambda _: job.path("large").write_bytes(b"x" * LARGE_BYTES))
        job.proxy.add_fault(Fault(change, operation="UploadPart"))
        completed = job.run(*IN_PARTS)
        assert completed.returncode == 1
    (notice, *_) = lines_with(completed.stderr, "could not be aborted")
    assert r"id\x9b31m\x85" in notice
    assert "\u009b" not in completed.stderr + completed.stdout
    assert "\u0085" not in completed.stderr + completed.stdout


def test_a_file_that_is_gone_stays_missing_in_a_crash_run(job: Job) -> None:
    job.write({"f": b"f"})
    left_in_parts(job, kept=[1, 2])
    job.path("large").unlink()
    job.check_failed(job.crash_run(*IN_PARTS), "large", said="no such file")


@pytest.mark.parametrize("again", ["--crashrun", "--skip-unchanged"])
@pytest.mark.few(1)
def test_a_half_sent_file_on_a_disk_that_is_away_for_a_night_keeps_its_parts(
    job: Job, tmp_path: Path, again: str
) -> None:
    options = [*IN_PARTS, again] + ["1"] * (again == "--crashrun")
    job.write({"disk/large": some_bytes(LARGE_BYTES)})
    shutil.move(job.path("disk"), tmp_path / "disk")
    job.path("disk").symlink_to(tmp_path / "disk")
    job.proxy.add_fault(Fault(answer(400, "InvalidRequest"), part_number=2))
    job.check_failed(job.run(*IN_PARTS), "disk/large", said="InvalidRequest")
    uploads = job.open_uploads()
    assert len(uploads) == 1
    job.proxy.clear_faults()
    (tmp_path / "disk").rename(tmp_path / "away")
    completed = job.run(*options)
    assert completed.returncode == 1
    assert f"failed: {job.path('disk')}" in completed.stderr
    assert job.open_uploads() == uploads
    (tmp_path / "away").rename(tmp_path / "disk")
    since = job.seen()
    assert job.run(*options).returncode == 0
    assert job.sent_parts(since) == [2]
    assert job.in_bucket() == {"disk/large": md5(some_bytes(LARGE_BYTES))}


@needs_permissions
@pytest.mark.parametrize(
    "options", [("--storage-class", "STANDARD_IA"), ("--sse", "AES256")], ids=["class", "sse"]
)
@pytest.mark.few(1)
def test_a_half_sent_file_that_cannot_be_looked_at_for_a_night_keeps_its_parts(
    job: Job, options: tuple[str, ...]
) -> None:
    upload_id = killed_in_parts(job, *options, kept=[1, 3], user=NOBODY)
    if "--storage-class" in options:
        job.proxy.add_fault(Fault(LISTED_AS_IA, operation="ListParts"))
    job.folder.chmod(0o644)
    completed = job.run(*IN_PARTS, *options, user=NOBODY)
    job.check_failed(completed, "large", said="permission denied")
    assert job.requests("AbortMultipartUpload") == []
    assert job.open_uploads() == [("large", upload_id, 2)]
    assert job.entry("large")["upload_id"] == upload_id
    job.folder.chmod(0o755)
    check_finished_by(job, *options, parts=[2], user=NOBODY)
    assert job.proxy.count("CreateMultipartUpload") == 1


@needs_permissions
def test_an_upload_below_an_unreadable_folder_is_aborted_once(job: Job) -> None:
    killed_in_parts(job, kept=[1, 3], user=NOBODY)
    job.folder.chmod(0)
    options = (*IN_PARTS, "--sse", "AES256")
    for _ in range(2):
        assert job.run(*options, "--skip-unchanged", user=NOBODY).returncode == 1
        assert len(job.requests("AbortMultipartUpload")) == 1
    job.folder.chmod(0o755)
    assert_clean(job.crash_run(*options, user=NOBODY))
    assert job.open_uploads() == []
    job.check_all_is_there()


def test_a_half_sent_file_whose_link_is_broken_for_a_night_keeps_its_parts_and_class(
    job: Job, tmp_path: Path
) -> None:
    options = ("--storage-class", "STANDARD_IA")
    disk = tmp_path / "disk"
    disk.mkdir()
    job.folder.mkdir()
    job.path("large").symlink_to(disk / "large")
    upload_id = killed_in_parts(job, *options, kept=[1, 3])
    job.proxy.add_fault(Fault(LISTED_AS_IA, operation="ListParts"))
    disk.rename(tmp_path / "away")
    job.check_failed(job.run(*IN_PARTS, *options), "large", said="its link is broken")
    assert job.open_uploads() == [("large", upload_id, 2)]
    assert job.entry("large")["upload_id"] == upload_id
    (tmp_path / "away").rename(disk)
    check_finished_by(job, *options, parts=[2])
    assert job.head("large")["StorageClass"] == "STANDARD_IA"


@pytest.mark.parametrize("crashrun", AGAIN)
@pytest.mark.few(1)
def test_uploads_that_no_state_recorded_are_never_touched(job: Job, crashrun: str) -> None:
    client, foreign = job.server.client(), {}
    for key in ("large", "elsewhere"):
        upload_id = client.create_multipart_upload(Bucket=job.bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=job.bucket, Key=key, UploadId=upload_id, PartNumber=1, Body=b"x")
        foreign[upload_id] = key
    in_parts(job, Fault(stall(600), part_number=2))
    process = job.start(*IN_PARTS)
    job.wait_for("UploadPart", 2, answered=True)
    kill(process)
    job.proxy.clear_faults()
    assert_clean(job.run(*IN_PARTS, "--crashrun", crashrun))
    left = {upload_id: key for key, upload_id, _ in job.open_uploads()}
    assert left == foreign
    job.check_all_is_there()
