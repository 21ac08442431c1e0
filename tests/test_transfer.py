"""SIGINT, SIGTERM and SIGHUP: the run ends soon, the state is saved, the crash run finishes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import Fault, call, delay, slow, stall
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job, Start
from support.script import finish, wait_until
from support.servers import S3Server

if sys.platform == "win32":
    pytest.skip("POSIX only: SIGTERM and SIGHUP as signals", allow_module_level=True)

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
ENDS_WITHIN_SECONDS = 10


@pytest.fixture
def job(
    proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start, moto_s3: S3Server
) -> Job:
    return Job(moto_s3, proxied, bucket=bucket_name, folder=backup_folder, start=start)


def ended_by(process: subprocess.Popen[str], signum: int) -> tuple[int, str, str]:
    """Send the signal, and return how the run ended and what it said."""
    process.send_signal(signum)
    completed = finish(process, timeout=ENDS_WITHIN_SECONDS)
    return completed.returncode, completed.stdout, completed.stderr


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_among_small_files_ends_the_run(job: Job, signum: int, code: int) -> None:
    files = small_files(200)
    job.write(files)
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    process = job.start("--max-concurrency", "16")
    job.wait_for("PutObject", 40)
    returncode, stdout, stderr = ended_by(process, signum)
    assert returncode == code
    (sentence,) = stderr.splitlines()
    assert "--crashrun 1" in sentence
    (summary,) = stdout.splitlines()
    assert "not yet sent" in summary
    assert set(job.state()) == set(files)
    assert 0 < len(job.uploaded()) < 200
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert job.crash_run().returncode == 0
    job.check_all_is_there()


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_during_a_multipart_upload_keeps_its_parts(
    job: Job, signum: int, code: int
) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(stall(600), part_number=2))
    process = job.start(*IN_PARTS)
    job.wait_for("UploadPart", 3)
    job.wait_for("UploadPart", 2, answered=True)
    returncode, stdout, stderr = ended_by(process, signum)
    assert returncode == code
    assert "--crashrun 1" in stderr
    assert len(stderr.splitlines()) == len(stdout.splitlines()) == 1
    assert job.uploaded() == set()
    upload_id = job.entry("large")["upload_id"]
    assert job.open_uploads() == [("large", upload_id, 2)]
    job.proxy.clear_faults()
    assert job.crash_run(*IN_PARTS).returncode == 0
    assert job.sent_parts() == [1, 2, 2, 3]
    job.check_all_is_there()


def test_no_new_file_starts_after_a_signal_and_those_in_flight_end(job: Job) -> None:
    job.write(small_files(100))
    job.proxy.add_fault(Fault(delay(2), operation="PutObject"))
    process = job.start("--max-concurrency", "8")
    job.wait_for("PutObject", 8)
    assert ended_by(process, signal.SIGTERM)[0] == 143
    assert job.proxy.count("PutObject") == 8
    assert len(job.uploaded()) == 8
    job.check_state_is_true()


def test_a_slow_upload_is_cut_off(job: Job) -> None:
    job.write({"slow": some_bytes(1_000_000), "fast": b"fast"})
    job.proxy.add_fault(Fault(slow(1000), key="slow"))
    process = job.start()
    job.wait_for("PutObject", 2)
    wait_until(lambda: job.proxy.count("PutObject", "fast"), 30, "the other file")
    assert ended_by(process, signal.SIGTERM)[0] == 143
    assert job.uploaded() == {"fast"}


def test_a_signal_while_a_request_is_tried_again_ends_the_run(job: Job) -> None:
    job.write({"f": b"f"})
    fault = job.proxy.add_fault(Fault(call(hang_up), operation="PutObject"))
    process = job.start()
    wait_until(lambda: fault.hits >= 3, 30, "some tries")
    assert ended_by(process, signal.SIGTERM)[0] == 143
    assert job.uploaded() == set()


def hang_up(_: object) -> None:
    raise ConnectionResetError


def test_a_second_signal_ends_the_run_at_once(job: Job) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(stall(600), operation="UploadPart"))
    process = job.start(*IN_PARTS)
    job.wait_for("UploadPart", 1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()

    def again() -> bool:
        process.send_signal(signal.SIGTERM)
        return process.poll() is not None

    # Again and again, since one that comes at once with the first does not count as a second.
    wait_until(again, ENDS_WITHIN_SECONDS, "the end of the run")
    assert finish(process).returncode == 130
    assert time.monotonic() - started < 3  # with one signal, what is in flight has longer
    job.check_state_is_true()


def test_two_signals_at_once_are_one(job: Job) -> None:
    job.write(small_files(100))
    job.proxy.add_fault(Fault(delay(0.5), operation="PutObject"))
    process = job.start()
    job.wait_for("PutObject", 10)
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # as timeout(1) does
    completed = finish(process, timeout=ENDS_WITHIN_SECONDS)
    assert completed.returncode == 143
    assert "--crashrun 1" in completed.stderr
    assert completed.stdout


@contextlib.contextmanager
def ignored(signum: int) -> Iterator[None]:
    """Ignore a signal, here and in the processes that are started meanwhile."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signum, before)


def test_a_hangup_ignored_at_the_start_stays_ignored(job: Job) -> None:
    job.write(small_files(60))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    with ignored(signal.SIGHUP):
        process = job.start()
    job.wait_for("PutObject", 20)
    process.send_signal(signal.SIGHUP)
    completed = finish(process, timeout=60)
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_during_the_first_request_ends_the_run(job: Job, signum: int, code: int) -> None:
    job.write({"f": b"f"})
    job.proxy.add_fault(Fault(stall(600)))
    process = job.start()
    job.wait_for("HeadBucket", 1)
    returncode, stdout, stderr = ended_by(process, signum)
    assert (returncode, stdout) == (code, "")
    assert len(stderr.splitlines()) == 1
    assert not job.state_path.exists()


def test_a_signal_leaves_no_temporary_file(job: Job) -> None:
    job.write(small_files(50))
    job.proxy.add_fault(Fault(delay(0.5), operation="PutObject"))
    process = job.start()
    job.wait_for("PutObject", 10)
    assert ended_by(process, signal.SIGTERM)[0] == 143
    beside = {path.name for path in job.state_path.parent.iterdir()} - {job.folder.name}
    assert beside <= {"stateFile.json", "stateFile.json.lock"}
