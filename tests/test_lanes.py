"""Many files in worker processes, and small ones by the AWS Common Runtime."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support.faults import Fault, answer, call, delay
from support.files import small_files
from support.job import Job, Start
from support.proxy import Request
from support.script import finish, wait_until
from support.servers import S3Server

FILES_THAT_PAY = 1000
CLIENT_OPTION = "--preferred-transfer-client"
# In the User-Agent of what awscrt sends.
CRT_MARK = "CRTS3NativeClient"

many_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core, one process")
on_linux = pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")


@pytest.fixture
def job(
    proxied: Proxied, bucket_name: str, backup_folder: Path, start: Start, rclone_s3: S3Server
) -> Job:
    return Job(rclone_s3, proxied, bucket=bucket_name, folder=backup_folder, start=start)


def workers_of(pid: int) -> list[int]:
    """The ids of the worker processes of a run."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"resource_tracker" not in command]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def start_with_workers(
    job: Job, *, after_puts: int = 100
) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run of so many files that it has workers; return when they are at work."""
    job.write(small_files(FILES_THAT_PAY))
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    process = job.start(CLIENT_OPTION, "classic")
    job.wait_for("PutObject", after_puts)
    return process, workers_of(process.pid)


@many_cores
@on_linux
@pytest.mark.parametrize("client", ["classic", "crt"])
def test_many_files_are_spread_over_processes(job: Job, client: str) -> None:
    job.write(small_files(FILES_THAT_PAY * 4 if client == "crt" else FILES_THAT_PAY))
    process = job.start(CLIENT_OPTION, client)
    job.wait_for("PutObject", 1)
    assert len(workers_of(process.pid)) > 1
    completed = finish(process)
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()


@on_linux
def test_few_files_are_sent_in_one_process(job: Job) -> None:
    job.write(small_files(300))
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    process = job.start(CLIENT_OPTION, "classic")
    job.wait_for("PutObject", 50)
    assert workers_of(process.pid) == []
    assert finish(process).returncode == 0


@many_cores
@on_linux
def test_a_killed_worker_costs_no_file(job: Job) -> None:
    process, workers = start_with_workers(job)
    os.kill(workers[0], signal.SIGKILL)
    completed = finish(process)
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()


@many_cores
@on_linux
def test_a_file_that_kills_every_worker_fails_and_stops_nothing_else(job: Job) -> None:
    job.write(small_files(FILES_THAT_PAY))
    deadly = "d0/0000.dat"

    def kill_workers(_: Request) -> None:
        for pid in workers_of(process.pid):
            os.kill(pid, signal.SIGKILL)

    job.proxy.add_fault(Fault(call(kill_workers), key=deadly))
    process = job.start(CLIENT_OPTION, "classic")
    completed = finish(process)
    job.check_failed(completed, deadly, said="was killed")


@many_cores
@on_linux
def test_workers_end_with_a_killed_run_and_do_not_keep_the_lock(job: Job) -> None:
    process, workers = start_with_workers(job)
    assert workers
    process.kill()
    wait_until(lambda: not any(map(is_alive, workers)), 5, "the end of the workers")
    process.communicate()
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert job.crash_run().returncode == 0
    job.check_all_is_there()


@many_cores
@on_linux
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_is_answered_once(job: Job, signum: int, code: int) -> None:
    process, workers = start_with_workers(job)
    os.killpg(process.pid, signum)
    completed = finish(process, timeout=10)
    assert completed.returncode == code
    (sentence,) = completed.stderr.splitlines()
    assert "--crashrun 1" in sentence
    assert not any(map(is_alive, workers))
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert job.crash_run().returncode == 0
    job.check_all_is_there()


@many_cores
def test_what_every_file_would_meet_is_said_once_by_all_workers(job: Job) -> None:
    files = small_files(FILES_THAT_PAY)
    job.write(files)
    job.proxy.add_fault(Fault(answer(403, "ExpiredToken"), operation="PutObject", after=300))
    completed = job.run(CLIENT_OPTION, "classic")
    assert completed.returncode == 2
    (sentence,) = completed.stderr.splitlines()
    assert "ExpiredToken" in sentence
    assert 0 < len(job.uploaded()) < len(files)
    job.check_state_is_true()


@many_cores
def test_worker_processes_ride_out_faults(job: Job) -> None:
    job.write(small_files(FILES_THAT_PAY))
    job.proxy.add_fault(Fault(answer(503, "SlowDown"), operation="PutObject", one_in=20))
    completed = job.run(CLIENT_OPTION, "classic")
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()


# --- The AWS Common Runtime ------------------------------------------------------------------


def put_of(job: Job, key: str) -> Request:
    """The PutObject of a key."""
    (request,) = (r for r in job.requests("PutObject") if r.key == key)
    return request


def is_by_crt(request: Request) -> bool:
    """Whether awscrt sent the request."""
    return CRT_MARK in str(request.headers["User-Agent"])


@pytest.mark.parametrize(("client", "by_crt"), [("auto", True), ("crt", True), ("classic", False)])
def test_preferred_transfer_client(job: Job, client: str, by_crt: bool) -> None:
    job.write({"a.txt": b"bytes"})
    assert job.run(CLIENT_OPTION, client).returncode == 0
    assert is_by_crt(put_of(job, "a.txt")) == by_crt
    job.check_all_is_there()


CRT_CANNOT = {
    "proxy": {"HTTP_PROXY": "{url}", "http_proxy": "{url}", "NO_PROXY": "", "no_proxy": ""},
    "not-installed": {"PYTHONPATH": "{folder}"},
}


@pytest.mark.parametrize("why", CRT_CANNOT)
def test_where_the_crt_cannot_do_what_is_asked_boto3_sends(
    job: Job, tmp_path: Path, why: str
) -> None:
    (tmp_path / "awscrt.py").write_text("raise ImportError")
    places = {"url": job.server.endpoint_url, "folder": str(tmp_path)}
    env = {name: value.format(**places) for name, value in CRT_CANNOT[why].items()}
    job.write({"a.txt": b"bytes"})
    refused = job.run(CLIENT_OPTION, "crt", env=env)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"s3FileTransfer: cannot use the AWS Common Runtime: .+\n", refused.stderr)
    completed = job.run(env=env)
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()
    assert not any(map(is_by_crt, job.requests("PutObject")))


OF_ONE_REQUEST = {"authorization", "x-amz-date", "user-agent", "accept", "connection"}
OF_ONE_CLIENT = {"amz-sdk-invocation-id", "amz-sdk-request", "accept-encoding"}


def test_the_crt_sends_the_request_that_boto3_sends(job: Job) -> None:
    keys = ("plain.txt", "no extension", "sp ace+%&#?'\"ü~*()!$,;=:@.bin", "deep/er/file.html")
    job.write({key: key.encode() for key in keys})
    options: tuple[str, ...] = (
        "--storage-class",
        "STANDARD",
        "--sse",
        "AES256",
        "--prefix",
        "pre fix/",
    )
    options += ("--expected-bucket-owner", "123456789012")
    sent = []
    for client in ("classic", "crt"):
        before = len(job.requests("PutObject"))
        assert job.run(CLIENT_OPTION, client, *options).returncode == 0
        puts = job.requests("PutObject")[before:]
        ignored = OF_ONE_REQUEST | OF_ONE_CLIENT
        sent.append(
            {
                request.path: {
                    name.lower(): value
                    for name, value in request.headers.items()
                    if name.lower() not in ignored
                }
                for request in puts
            }
        )
    for path, headers in sent[0].items():
        assert sent[1][path] == headers
    assert len(sent[0]) == len(sent[1]) == len(keys)
