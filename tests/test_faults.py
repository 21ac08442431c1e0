"""Trouble with the network and the server: what passes is ridden out, what stays stops the run."""

from __future__ import annotations

import time
import types
from typing import Any, NoReturn

import pytest
from conftest import NewJob
from support.checks import assert_clean, assert_stopped, lines_with
from support.faults import (
    Fault,
    answer,
    delay,
    drop,
    drop_after_forward,
    drop_mid_body,
    stall,
    trickle,
)
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job
from support.proxy import Action, Answer, Exchange, pass_on
from support.script import finish, program
from support.servers import S3Server


@pytest.fixture
def small_job(new_job: NewJob, rclone_server: S3Server, each_client: tuple[str, ...]) -> Job:
    """A job by each of the clients."""
    return new_job(rclone_server, *each_client)


def say(body: bytes) -> Action:
    """Answer with 200 and that, as a web server may that is no S3 server."""

    def act(exchange: Exchange) -> None:
        exchange.discard_body()
        headers = [("Content-Type", "text/html"), ("Content-Length", str(len(body)))]
        exchange.reply(Answer(200, "OK", headers, [body], len(body)))

    return act


# --- Trouble that stays ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["drops-all", "refuses"])
@pytest.mark.parametrize(
    ("real_time", "patience_seconds"),
    [(False, 4), pytest.param(True, 60, marks=pytest.mark.long)],
    ids=["hasty", "real"],
)
@pytest.mark.few(1)
def test_an_endpoint_that_goes_away_for_good_stops_the_run_with_one_message(
    job: Job, way: str, real_time: bool, patience_seconds: float
) -> None:
    files = small_files(120)
    job.write(files)
    if way == "drops-all":
        job.proxy.add_fault(Fault(drop(), after=30))
    started = time.monotonic()
    process = job.start("--max-concurrency", "16", real_time=real_time)
    job.wait_for("PutObject", 20)
    if way == "refuses":
        job.proxy.close()
    completed = finish(process, timeout=130)
    assert time.monotonic() - started > 0.8 * patience_seconds  # it did not give up at once
    assert_stopped(completed, "reached")
    assert set(job.state()) == set(files)
    assert len(job.uploaded()) < 100
    job.check_state_is_true()


def test_a_temporary_redirect_that_stays_ends_as_a_server_that_is_away(job: Job) -> None:
    files = small_files(60)
    job.write(files)
    job.proxy.add_fault(Fault(answer(307, "TemporaryRedirect"), operation="PutObject"))
    started = time.monotonic()
    assert_stopped(job.run(), "TemporaryRedirect; try again later")
    assert time.monotonic() - started > 3
    assert job.state() == dict.fromkeys(files, 0)
    assert job.errors() == {}


@pytest.mark.long
def test_a_server_that_stalls_once_is_ridden_out_with_real_patience(small_job: Job) -> None:
    # The runtime has a patience of its own, of half a minute.
    small_job.write({"f": b"some bytes"})
    fault = small_job.proxy.add_fault(Fault(stall(600), operation="PutObject", times=1))
    assert_clean(small_job.run(real_time=True))
    assert (fault.hits, len(small_job.puts())) == (1, 2)
    small_job.check_all_is_there()


def test_a_server_that_stalls_once_is_ridden_out(new_job: NewJob, server: S3Server) -> None:
    job = new_job(server, "--preferred-transfer-client", "classic")
    job.write({"f": b"some bytes", "large": some_bytes(LARGE_BYTES)})
    faults = [
        job.proxy.add_fault(Fault(stall(600), operation=operation, times=1))
        for operation in ("PutObject", "UploadPart")
    ]
    assert_clean(job.run(*IN_PARTS))
    assert [fault.hits for fault in faults] == [1, 1]
    job.check_all_is_there()


@pytest.mark.parametrize(
    "operation", ["PutObject", pytest.param("UploadPart", marks=pytest.mark.long)]
)
def test_an_answer_that_trickles_is_given_up(
    new_job: NewJob, server: S3Server, operation: str
) -> None:
    job = new_job(server, "--preferred-transfer-client", "classic")
    job.write({"f": b"some bytes", "large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(trickle(0.4), operation=operation, times=1))
    assert_clean(job.run(*IN_PARTS))
    assert len(job.requests("PutObject", "UploadPart")) == 5
    job.check_all_is_there()


@pytest.mark.long
def test_a_server_that_takes_its_time_to_read_gets_a_body_of_some_megabytes(job: Job) -> None:
    # It waits for longer than a connection may take to be made.
    job.write({"f": some_bytes(8_000_000)})
    job.proxy.add_fault(Fault(delay(2.5), operation="PutObject"))
    assert_clean(job.run())
    assert job.puts() == ["f"]
    job.check_all_is_there()


@pytest.mark.few(1)
def test_what_every_file_meets_from_some_moment_on_stops_the_run(small_job: Job) -> None:
    job, code = small_job, "ExpiredToken"
    job.write(small_files(100))
    job.proxy.add_fault(Fault(answer(400, code), operation="PutObject", after=40))
    completed = job.run("--max-concurrency", "8")
    assert_stopped(completed, code)
    assert "40 files" in completed.stdout
    assert "60 not yet sent" in completed.stdout
    assert len(job.uploaded()) == 40
    assert len(job.puts()) < 100
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


def test_refusals_of_every_file_from_some_moment_on_stop_the_run(small_job: Job) -> None:
    job = small_job
    job.write(small_files(100))
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="PutObject", after=40))
    completed = job.run("--max-concurrency", "8")
    assert completed.returncode == 2
    (_sentence,) = lines_with(completed.stderr, "stopped: S3 answered AccessDenied")
    assert "not yet sent" in completed.stdout
    assert len(job.uploaded()) == 40
    # Refusals of a few files, among the last successes and after them, are theirs alone: they fail.
    assert len(lines_with(completed.stderr, "failed: ")) < 50
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


@pytest.mark.parametrize("others", [0, 40], ids=["alone", "among-others"])
@pytest.mark.few(1)
def test_one_key_at_which_the_server_always_fails_is_one_failure(job: Job, others: int) -> None:
    job.write({**small_files(others), "z-cursed": b"cursed"})
    job.proxy.add_fault(Fault(answer(500, "InternalError"), operation="PutObject", key="z-cursed"))
    job.check_failed(job.run(), "z-cursed", said="InternalError")
    # The server says no more than its code, and so does the program.
    assert job.errors()["z-cursed"] == "S3 answered InternalError; try again later"
    assert len(job.uploaded()) == others
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


def test_a_server_that_fails_at_every_file_stops_the_run(job: Job) -> None:
    files = small_files(60)
    job.write(files)
    job.proxy.add_fault(Fault(answer(500, "InternalError"), operation="PutObject"))
    completed = job.run()
    assert completed.returncode == 2
    assert "stopped: one file after the other fails: S3 answered InternalError" in completed.stderr
    assert len(job.errors()) < len(files)
    assert job.state() == dict.fromkeys(files, 0)


# How each put is answered, and what the last sentence has to name.
REFUSALS_OF_ALL = [
    pytest.param(answer(402, "PaymentRequired"), "Payment", id="402", marks=pytest.mark.long),
    pytest.param(answer(413, "413"), "--multipart-threshold", id="413"),
    pytest.param(answer(507, "NoRoom"), "NoRoom", id="507", marks=pytest.mark.long),
    pytest.param(say(b""), "ETag", id="nothing"),
    # Which some versions of botocore take for an error 500.
    pytest.param(say(b"<html>Welcome</html>"), "", id="page", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("action", "said"), REFUSALS_OF_ALL)
@pytest.mark.few(1)
def test_the_same_answer_to_every_file_stops_the_run(
    job: Job, client: tuple[str, ...], action: Action, said: str
) -> None:
    files = small_files(600)
    job.write(files)
    job.proxy.add_fault(Fault(action, operation=("PutObject", "HeadObject")))
    completed = job.run(*client)
    assert completed.returncode == 2
    (sentence,) = lines_with(completed.stderr, "stopped: one file after the other fails: ")
    assert said in sentence
    assert job.state() == dict.fromkeys(files, 0)
    assert 20 <= len(job.errors()) < 400


@pytest.mark.parametrize(
    ("way", "status", "code"),
    [
        ("crt", 403, "AccessDenied"),
        ("classic", 403, "AccessDenied"),
        ("classic", 400, "SomethingNew"),
        pytest.param("classic", 500, "InternalError", marks=pytest.mark.long),
        pytest.param("crt", 500, "InternalError", marks=pytest.mark.long),
    ],
)
@pytest.mark.few(2)
def test_bad_keys_do_not_stop_the_good_ones(job: Job, way: str, status: int, code: str) -> None:
    bad = [f"aaa/{number:02}" for number in range(49)]
    good = [f"zzz/{number:03}" for number in range(100)]
    job.make(*bad, *good)
    job.proxy.add_fault(
        Fault(answer(status, code), operation="PutObject", key=lambda key: key in bad)
    )
    completed = job.run("--preferred-transfer-client", way)
    job.check_failed(completed, *bad, said=code)
    assert job.uploaded() == set(good)
    assert set(job.in_bucket()) == set(good)


@pytest.mark.long
def test_a_body_that_breaks_off_again_and_again_should_go_in_parts(job: Job) -> None:
    job.write({"f": some_bytes(9_000_000), "g": b"g"})
    job.proxy.add_fault(Fault(drop_mid_body(), operation="PutObject", key="f"))
    job.check_failed(job.run(), "f", said="--multipart-threshold")


@pytest.mark.long
def test_many_keys_at_which_the_server_fails_beside_others_that_it_takes_do_not_stop_the_run(
    job: Job,
) -> None:
    cursed = [f"{number:03}-cursed" for number in range(21)]
    # The cursed ones are given up after four seconds, while others still arrive.
    others = [f"{number:03}-good" for number in range(150)]
    job.make(*cursed, *others)
    curse = Fault(answer(500, "InternalError"), operation="PutObject", key=lambda k: k in cursed)
    job.proxy.add_fault(curse)
    job.proxy.add_fault(Fault(delay(0.15), operation="PutObject"))
    completed = job.run("--preferred-transfer-client", "classic")
    job.check_failed(completed, *cursed, said="InternalError")
    assert job.uploaded() == set(others)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch"])
@pytest.mark.parametrize("after", [0, 30])
@pytest.mark.few(3)
def test_credentials_that_are_wrong_stop_every_run(small_job: Job, code: str, after: int) -> None:
    job = small_job
    job.write(small_files(80))
    job.back_up("earlier.dat")
    pending = [job.pending_entry(key, bucket=job.bucket) for key in small_files(80)]
    job.write_state(job.uploaded_entry("earlier.dat"), *pending)
    job.proxy.add_fault(Fault(answer(403, code), operation="PutObject", after=after))
    assert_stopped(job.crash_run("--max-concurrency", "8"), code, "check the credentials")
    assert job.uploaded() >= {"earlier.dat"}
    assert len(job.uploaded()) == after + 1
    assert job.errors() == {}


# --- Trouble that passes ---------------------------------------------------------------------


@pytest.mark.few(1)
def test_a_fifth_refused_and_a_twentieth_dropped_loses_nothing(small_job: Job) -> None:
    job = small_job
    job.write(small_files(200))
    unavailable = job.proxy.add_fault(Fault(answer(503, "SlowDown"), one_in=5))
    dropped = job.proxy.add_fault(Fault(drop(), one_in=20))
    assert_clean(job.run())
    assert unavailable.hits > 25
    assert dropped.hits > 4
    job.check_all_is_there()


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(drop(), id="drop"),
        pytest.param(drop_mid_body(), id="drop-mid-body"),
        pytest.param(drop_after_forward(), id="lost-answer"),
        pytest.param(answer(503, "SlowDown"), id="SlowDown"),
        pytest.param(
            answer(503, "ServiceUnavailable"), id="ServiceUnavailable", marks=pytest.mark.long
        ),
        pytest.param(answer(307, "TemporaryRedirect"), id="TemporaryRedirect"),
        pytest.param(answer(500, "InternalError"), id="InternalError"),
        pytest.param(answer(429, "TooManyRequests"), id="TooManyRequests", marks=pytest.mark.long),
        pytest.param(answer(400, "RequestTimeout"), id="RequestTimeout", marks=pytest.mark.long),
        pytest.param(
            answer(409, "OperationAborted"), id="OperationAborted", marks=pytest.mark.long
        ),
    ],
)
@pytest.mark.few(3)
def test_trouble_that_passes_is_ridden_out(
    job: Job, client: tuple[str, ...], action: Action
) -> None:
    job.write({**small_files(20), "large": some_bytes(LARGE_BYTES)})
    faults = [
        job.proxy.add_fault(Fault(action, operation="PutObject", times=4)),
        job.proxy.add_fault(Fault(action, operation="UploadPart", times=2)),
    ]
    assert_clean(job.run(*IN_PARTS, *client))
    assert [fault.hits for fault in faults] == [4, 2]
    job.check_all_is_there()


@pytest.mark.parametrize(
    "action",
    [pytest.param(drop(), id="drop"), pytest.param(answer(503, "SlowDown"), id="SlowDown")],
)
@pytest.mark.few(1)
def test_trouble_with_the_requests_around_is_ridden_out(job: Job, action: Action) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    faults = [
        job.proxy.add_fault(Fault(action, operation=operation, times=2))
        for operation in ("HeadBucket", "CreateMultipartUpload", "CompleteMultipartUpload")
    ]
    assert_clean(job.run(*IN_PARTS))
    assert [fault.hits for fault in faults] == [2, 2, 2]
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()


def away(seconds: float) -> Action:
    """Drop every connection for so long, from the first one on."""
    until: list[float] = []

    def act(exchange: Exchange) -> None:
        until.append(time.monotonic() + seconds)
        if time.monotonic() < until[0]:
            exchange.reset()
        pass_on(exchange)

    return act


@pytest.mark.parametrize(
    ("real_time", "seconds"),
    [(False, 1.5), pytest.param(True, 10, marks=pytest.mark.long)],
    ids=["hasty", "real"],
)
def test_an_endpoint_that_is_away_for_a_while_is_waited_for(
    job: Job, client: tuple[str, ...], real_time: bool, seconds: float
) -> None:
    job.write({**small_files(120), "large": some_bytes(LARGE_BYTES)})
    fault = job.proxy.add_fault(Fault(away(seconds), after=50))
    assert_clean(job.run(*IN_PARTS, *client, real_time=real_time))
    assert fault.hits > 16
    job.check_all_is_there()


def test_the_pauses_between_tries_grow_to_ten_seconds_within_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, now = program(), 0.0
    pauses: list[float] = []

    def wait(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        assert now < 60, "nothing is tried again after a minute"
        pauses.append(seconds)
        now += seconds

    def attempt() -> NoReturn:
        raise ConnectionResetError

    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    error = module.UploadError("away", trouble=module.Trouble.NO_ANSWER)
    monkeypatch.setattr(module, "request_errors", lambda: (ConnectionResetError,))
    monkeypatch.setattr(module, "error_of", lambda _: error)
    plain: Any = types.SimpleNamespace(renewing=lambda attempt: attempt())
    retries = module.Retries(plain)
    monkeypatch.setattr(retries.stop, "wait", wait)
    with pytest.raises(module.UploadError, match="away"):
        retries.run(attempt, may_stop_run=False)
    longest = [0.5, 1, 2, 4, 8, *[10] * 60][: len(pauses)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    # At random, so that not all threads come again at once.
    assert len(set(pauses)) == len(pauses)
    assert 60 <= sum(pauses) < 70


def test_an_error_inside_a_good_answer_to_complete_is_an_error(job: Job) -> None:
    body = (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InternalError</Code>'
        b"<Message>We encountered an internal error.</Message></Error>"
    )
    job.write({"large": some_bytes(LARGE_BYTES)})
    fault = job.proxy.add_fault(Fault(say(body), operation="CompleteMultipartUpload", times=1))
    assert_clean(job.run(*IN_PARTS))
    assert fault.hits == 1
    assert len(job.requests("CompleteMultipartUpload")) == 2
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()
