"""Trouble with the network and the server: what passes is ridden out, what stays stops the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import Fault, answer, drop, drop_after_forward, drop_mid_body, stall
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job, Start
from support.proxy import Action, Answer, Exchange, pass_on
from support.script import Completed, finish
from support.servers import S3Server


@pytest.fixture(params=["classic", "crt"])
def transfer_client(request: pytest.FixtureRequest) -> str:
    """What sends the small files."""
    return str(request.param)


@pytest.fixture
def make_job(
    proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start, rclone_s3: S3Server
) -> Callable[..., Job]:
    """Makes a job on rclone's server, the faster one; its arguments are the job's options."""
    return lambda *options: Job(
        rclone_s3, proxied, bucket=bucket_name, folder=backup_folder, start=start, options=options
    )


@pytest.fixture
def job(make_job: Callable[..., Job], transfer_client: str) -> Job:
    """A job for each of the clients."""
    return make_job("--preferred-transfer-client", transfer_client)


@pytest.fixture
def large_job(make_job: Callable[..., Job]) -> Job:
    """A job of large files: these are always sent by boto3."""
    return make_job()


def stop_messages(completed: Completed) -> list[str]:
    """All that was said on stderr, which should be one line; pytest shows it if it is not."""
    lines = completed.stderr.splitlines()
    assert len(lines) == 1, completed.stderr
    return lines


# --- Trouble that stays; first, since these tests take the longest ---------------------------


@pytest.mark.parametrize(("way", "transfer_client"), [("drops-all", "classic"), ("refuses", "crt")])
def test_an_endpoint_that_goes_away_for_good_stops_the_run_with_one_message(
    job: Job, way: str
) -> None:
    files = small_files(300)
    job.write(files)
    if way == "drops-all":
        job.proxy.add_fault(Fault(drop(), after=30))
    started = time.monotonic()
    process = job.start()
    job.wait_for("PutObject", 20)
    if way == "refuses":
        job.proxy.close()
    completed = finish(process, timeout=130)
    assert completed.returncode == 2
    assert time.monotonic() - started > 50  # it did not give up at once
    (message,) = stop_messages(completed)
    assert "reached" in message
    assert set(job.state()) == set(files)
    assert len(job.uploaded()) < 100
    job.check_state_is_true()


def test_a_server_that_stalls_once_is_ridden_out(job: Job) -> None:
    job.write({"f": b"some bytes"})
    fault = job.proxy.add_fault(Fault(stall(600), operation="PutObject", times=1))
    assert job.run(timeout=100).returncode == 0
    assert (fault.hits, job.proxy.count("PutObject")) == (1, 2)
    job.check_all_is_there()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "ExpiredToken", "expired"),
        (403, "InvalidAccessKeyId", "credentials"),
        (403, "AccessDenied", "policy"),
        (404, "NoSuchBucket", "bucket"),
    ],
)
def test_what_every_file_would_meet_stops_the_run_with_one_message(
    job: Job, status: int, code: str, said: str
) -> None:
    files = small_files(300)
    job.write(files)
    job.proxy.add_fault(Fault(answer(status, code), operation="PutObject"))
    completed = job.run("--max-concurrency", "32")
    assert completed.returncode == 2
    (message,) = stop_messages(completed)
    assert code in message
    assert said in message
    assert set(job.state()) == set(files)
    assert job.uploaded() == set()
    assert job.proxy.count("PutObject") < 150


def test_a_token_that_expires_in_the_middle_stops_the_run(job: Job) -> None:
    job.write(small_files(100))
    job.proxy.add_fault(Fault(answer(400, "ExpiredToken"), operation="PutObject", after=40))
    completed = job.run()
    assert completed.returncode == 2
    (message,) = stop_messages(completed)
    assert "expired" in message
    assert len(job.uploaded()) == 40
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert job.crash_run().returncode == 0
    job.check_all_is_there()


@pytest.mark.parametrize("denied", ["d0/0000.dat", "d6/0048.dat"], ids=["first", "late"])
def test_a_key_that_is_denied_is_one_failure(job: Job, denied: str) -> None:
    job.write(small_files(50))
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="PutObject", key=denied))
    job.check_failed(job.run(), denied, said="AccessDenied")


# --- Trouble that passes ---------------------------------------------------------------------


def test_a_fifth_refused_and_a_twentieth_dropped_loses_nothing(job: Job) -> None:
    job.write(small_files(500))
    unavailable = job.proxy.add_fault(Fault(answer(503, "SlowDown"), one_in=5))
    dropped = job.proxy.add_fault(Fault(drop(), one_in=20))
    completed = job.run(timeout=120)
    assert completed.returncode == 0
    assert completed.stderr == ""
    assert unavailable.hits > 80
    assert dropped.hits > 15
    job.check_all_is_there()


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(drop(), id="drop"),
        pytest.param(drop_mid_body(), id="drop-mid-body"),
        pytest.param(drop_after_forward(), id="lost-answer"),
        pytest.param(answer(503, "SlowDown"), id="SlowDown"),
        pytest.param(answer(503, "ServiceUnavailable"), id="ServiceUnavailable"),
        pytest.param(answer(500, "InternalError"), id="InternalError"),
        pytest.param(answer(429, "TooManyRequests"), id="TooManyRequests"),
        pytest.param(answer(400, "RequestTimeout"), id="RequestTimeout"),
        pytest.param(answer(409, "OperationAborted"), id="OperationAborted"),
    ],
)
def test_trouble_that_passes_is_ridden_out(job: Job, action: Action) -> None:
    job.write({**small_files(20), "large": some_bytes(LARGE_BYTES)})
    faults = [
        job.proxy.add_fault(Fault(action, operation="PutObject", times=4)),
        job.proxy.add_fault(Fault(action, operation="UploadPart", times=2)),
    ]
    assert job.run(*IN_PARTS).returncode == 0
    assert [fault.hits for fault in faults] == [4, 2]
    job.check_all_is_there()


@pytest.mark.parametrize(
    "operation", ["HeadBucket", "CreateMultipartUpload", "CompleteMultipartUpload"]
)
@pytest.mark.parametrize(
    "action",
    [pytest.param(drop(), id="drop"), pytest.param(answer(503, "SlowDown"), id="SlowDown")],
)
def test_trouble_with_the_requests_around_is_ridden_out(
    large_job: Job, operation: str, action: Action
) -> None:
    large_job.write({"large": some_bytes(LARGE_BYTES)})
    fault = large_job.proxy.add_fault(Fault(action, operation=operation, times=2))
    assert large_job.run(*IN_PARTS).returncode == 0
    assert fault.hits == 2
    assert large_job.sent_parts() == [1, 2, 3]
    large_job.check_all_is_there()


def away(seconds: float) -> Action:
    """Drop every connection for so long, from the first one on."""
    until: list[float] = []

    def act(exchange: Exchange) -> None:
        until.append(time.monotonic() + seconds)
        if time.monotonic() < until[0]:
            exchange.reset()
        pass_on(exchange)

    return act


def test_an_endpoint_that_is_away_for_ten_seconds_is_waited_for(job: Job) -> None:
    job.write({**small_files(200), "large": some_bytes(LARGE_BYTES)})
    fault = job.proxy.add_fault(Fault(away(10), after=50))
    completed = job.run(*IN_PARTS)
    assert completed.returncode == 0
    assert completed.stderr == ""
    assert fault.hits > 16
    job.check_all_is_there()


def test_an_error_inside_a_good_answer_to_complete_is_an_error(large_job: Job) -> None:
    def act(exchange: Exchange) -> None:
        body = (
            b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InternalError</Code>'
            b"<Message>We encountered an internal error.</Message></Error>"
        )
        exchange.discard_body()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        exchange.reply(Answer(200, "OK", headers, [body], len(body)))

    large_job.write({"large": some_bytes(LARGE_BYTES)})
    fault = large_job.proxy.add_fault(Fault(act, operation="CompleteMultipartUpload", times=1))
    assert large_job.run(*IN_PARTS).returncode == 0
    assert fault.hits == 1
    assert large_job.proxy.count("CompleteMultipartUpload") == 2
    assert large_job.sent_parts() == [1, 2, 3]
    large_job.check_all_is_there()
