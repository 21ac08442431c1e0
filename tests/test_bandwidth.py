"""--max-bandwidth: what is sent slowly arrives too; tests/benchmark/bandwidth.py measures it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import pytest
from fault_proxy import Fault, answer, drop_mid_body, flip_byte
from jobs import MIB, Job, assert_clean
from script_runner import finish, make_files, wait_until
from systems import needs_signals
from test_backup import PARTS
from test_workers import is_by_crt

pytest_plugins = ["job_fixtures"]


@pytest.fixture
def job(job: Job) -> Job:
    """A job that is seen through the proxy from its first run."""
    job.proxy  # noqa: B018
    return job


def make_mixed_files(job: Job) -> dict[str, bytes]:
    """Make files that are sent in each of the ways there are; return them by key."""
    sizes = {"empty": 0, "one": 1, "memory": 2 * MIB + 1, "streamed": 9 * MIB, "parts": 11 * MIB}
    sizes |= {f"small/{n:02}": 10_000 + n for n in range(30)}
    files = {key: os.urandom(size) for key, size in sizes.items()}
    make_files(job.folder, files)
    return files


# --- What arrives ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["20MB/s", "1TB/s"])
def test_files_of_all_sizes_arrive(job: Job, rate: str) -> None:
    files = make_mixed_files(job)
    assert_clean(job("--max-bandwidth", rate, *PARTS))
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)
    uploads = {r.operation for r in job.proxy.requests if r.method in ("PUT", "POST")}
    assert uploads >= {"PutObject", "CreateMultipartUpload", "UploadPart"}
    # Each byte once: a body is not read to be signed, and nothing is tried twice.
    bodies = (r for r in job.proxy.requests if r.operation in ("PutObject", "UploadPart"))
    assert sum(request.body_bytes for request in bodies) == sum(map(len, files.values()))


@pytest.mark.parametrize("rate", ["1MB/s", "500kB/s", "1MiB", "700000", " 0.7 mb/s "])
def test_rates_are_written_like_sizes(job: Job, rate: str) -> None:
    files = {"a": os.urandom(300_000), **{f"{n}": os.urandom(10_000) for n in range(10)}}
    make_files(job.folder, files)
    assert_clean(job("--max-bandwidth", rate))
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


def test_the_lowest_rate_sends_too(job: Job) -> None:
    files = job.make(*(f"{n:03}" for n in range(100)))
    assert_clean(job("--max-bandwidth", "10kB/s"))
    assert job.objects() == files


def test_many_files_arrive(rclone_job: Job) -> None:
    files = rclone_job.make(*(f"{n:04}" for n in range(900)))
    assert_clean(rclone_job("--max-bandwidth", "10MB/s"))
    assert rclone_job.objects() == files


@pytest.mark.parametrize("operation", ["PutObject", "UploadPart"])
@pytest.mark.parametrize(
    "action",
    [answer(503, "SlowDown"), drop_mid_body(), flip_byte()],
    ids=["throttled", "cut-off", "damaged"],
)
def test_what_fails_once_is_sent_again(
    job: Job, operation: str, action: Callable[..., None]
) -> None:
    files = make_mixed_files(job)
    fault = Fault(action, operation=operation, key=lambda key: key in AGAIN, times=3)
    job.proxy.add_fault(fault)
    assert_clean(job("--max-bandwidth", "100MB/s", *PARTS))
    assert fault.hits
    assert job.objects() == files


AGAIN = {"streamed", "memory", "parts"}


@needs_signals
def test_a_signal_ends_a_run_that_waits_for_its_turn(job: Job) -> None:
    files = make_mixed_files(job)
    process = job.start("--max-bandwidth", "100kB/s", *PARTS)
    wait_until(lambda: job.proxy.count("PutObject"), 60, "the first upload")
    process.send_signal(signal.SIGTERM)
    completed = finish(process, timeout=15)
    assert completed.returncode == 143
    assert "--crashrun 1" in completed.stderr
    assert 0 in job.state().values()
    assert_clean(job.crash_run(*PARTS))
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


# --- By which client -------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["classic", "crt"])
def test_both_clients_send_what_is_limited(job: Job, client: str) -> None:
    files = make_mixed_files(job)
    assert_clean(job("--max-bandwidth", "20MB/s", "--preferred-transfer-client", client, *PARTS))
    assert job.objects() == files
    by_crt = {r.key for r in job.proxy.requests if r.operation == "PutObject" and is_by_crt(r)}
    small = {key for key, body in files.items() if len(body) <= 256 * 1024}
    assert by_crt == (small if client == "crt" else set())


def test_a_low_rate_sends_piece_by_piece_with_both_clients(job: Job) -> None:
    files = {f"{n}": os.urandom(60_000) for n in range(3)}  # more than a tenth of the rate
    make_files(job.folder, files)
    for client in ("classic", "crt"):
        assert_clean(job("--max-bandwidth", "500kB/s", "--preferred-transfer-client", client))
        assert job.objects() == files


# --- Usage -----------------------------------------------------------------------------------


NO_RATES = """
    0 0MB/s 9999B/s -1 -1MB/s abc 10MBs 10MB/m 10/s 1000 MB/s /s 1e6 nan inf 10MB/s/s 10Mbit/s 2TB/s
""".split()


@pytest.mark.parametrize("value", ["", *NO_RATES])
def test_what_is_no_rate_is_refused(job: Job, value: str) -> None:
    job.make("a.dat")
    completed = job(f"--max-bandwidth={value}")
    assert (completed.returncode, completed.stdout) == (2, "")
    sentence = completed.stderr.splitlines()[-1]
    assert re.match(r"s3FileTransfer\.py: error: argument --max-bandwidth: .", sentence)
    assert value.removesuffix("/s") in sentence
    assert job.proxy.requests == []
    assert not job.state_path.exists()


def test_a_negative_rate_apart_is_refused(job: Job) -> None:
    completed = job("--max-bandwidth", "-1", "--backupfolder", job.state_path.parent)
    assert completed.returncode == 2
    assert "--max-bandwidth" in completed.stderr.splitlines()[-1]
