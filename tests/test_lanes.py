"""Many small files: in processes of their own, by the AWS Common Runtime or by boto3."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NewJob
from support.checks import assert_clean, assert_stopped
from support.faults import Fault, answer, call, delay
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job, named, prelude
from support.proxy import Request
from support.script import finish, wait_until
from support.servers import S3Server
from support.systems import needs_cores, needs_limits, needs_proc

CLIENT_OPTION = "--preferred-transfer-client"
CLASSIC, CRT = (CLIENT_OPTION, "classic"), (CLIENT_OPTION, "crt")
# So many that the hasty script starts a process for each core, by each of the clients.
FILES_THAT_PAY = {CLASSIC: 100, CRT: 320}
# In the User-Agent of what awscrt sends.
CRT_MARK = "CRTS3NativeClient"

as_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="has it all in reality")


@pytest.fixture
def job(new_job: NewJob, server: S3Server) -> Job:
    """A job that is sent by boto3, of which fewer files make a process worth its while."""
    return new_job(server, *CLASSIC)


def workers_of(pid: int) -> list[int]:
    """The ids of the processes that a run has started to send files."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def kill_all(workers: list[int]) -> None:
    """Kill processes, some of which may have ended meanwhile."""
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def start_with_workers(
    job: Job, *, after_puts: int = 30
) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run of so many files that it has workers; return when they are at work."""
    job.write(small_files(FILES_THAT_PAY[CLASSIC]))
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    process = job.start()
    job.wait_for("PutObject", after_puts)
    return process, workers_of(process.pid)


# --- Processes -------------------------------------------------------------------------------


@needs_cores
@needs_proc
@pytest.mark.parametrize("way", [CLASSIC, CRT], ids=["classic", "crt"])
def test_many_files_are_spread_over_processes_and_few_are_not(
    new_job: NewJob, server: S3Server, way: tuple[str, str]
) -> None:
    job = new_job(server, *way)
    job.proxy.add_fault(Fault(delay(0.02), operation="PutObject"))
    for count, is_spread in ((FILES_THAT_PAY[way], True), (10, False)):
        files = small_files(count)
        job.folder = job.folder.with_name(f"{count} files")
        job.write(files)
        since = len(job.puts())
        process = job.start()
        job.wait_for("PutObject", since + 1)
        assert (len(workers_of(process.pid)) > 1) == is_spread
        assert_clean(finish(process))
        assert job.state() == dict.fromkeys(files, 1)
    assert set(job.in_bucket()) == set(small_files(FILES_THAT_PAY[way]))


@needs_cores
@needs_proc
def test_a_killed_worker_costs_no_file(job: Job) -> None:
    process, workers = start_with_workers(job)
    os.kill(workers[0], signal.SIGKILL)
    assert_clean(finish(process))
    job.check_all_is_there()


@needs_cores
@needs_proc
def test_a_file_that_kills_every_worker_fails_and_stops_nothing_else(job: Job) -> None:
    job.write(small_files(FILES_THAT_PAY[CLASSIC]))
    deadly = "d0/0000.dat"

    def kill_workers(_: Request) -> None:
        kill_all(workers_of(process.pid))

    job.proxy.add_fault(Fault(call(kill_workers), key=deadly))
    process = job.start()
    completed = finish(process)
    job.check_failed(completed, deadly, said="was killed")
    assert set(job.in_bucket()) >= job.uploaded()


@needs_cores
@needs_proc
def test_workers_that_are_killed_again_and_again_lead_to_no_lie(job: Job) -> None:
    job.write(small_files(FILES_THAT_PAY[CLASSIC]))
    killed: set[int] = set()

    def kill_workers(_: Request) -> None:
        workers = workers_of(process.pid)
        killed.update(workers)
        kill_all(workers)

    job.proxy.add_fault(Fault(call(kill_workers), operation="PutObject"))
    process = job.start()
    completed = finish(process)
    assert killed
    job.check_state_is_true()
    # Whether it gives up the run, or files, or finds another way: what it says is so.
    has_all = len(job.uploaded()) == FILES_THAT_PAY[CLASSIC]
    assert (completed.returncode == 0) == has_all
    assert has_all or "killed" in completed.stderr
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


@needs_cores
@needs_proc
def test_workers_end_with_a_killed_run_and_do_not_keep_the_lock(job: Job) -> None:
    process, workers = start_with_workers(job)
    assert workers
    process.kill()
    wait_until(lambda: not any(map(is_alive, workers)), 20, "the end of the workers")
    process.communicate()
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


@needs_cores
@needs_proc
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_is_answered_once(job: Job, signum: int, code: int) -> None:
    process, workers = start_with_workers(job)
    os.killpg(process.pid, signum)
    completed = finish(process, timeout=30)
    assert completed.returncode == code
    (sentence,) = completed.stderr.splitlines()
    assert "--crashrun 1" in sentence
    assert not any(map(is_alive, workers))
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


@needs_cores
def test_what_every_file_would_meet_is_said_once_by_all_workers(job: Job) -> None:
    files = small_files(FILES_THAT_PAY[CLASSIC])
    job.write(files)
    job.proxy.add_fault(Fault(answer(403, "ExpiredToken"), operation="PutObject", after=40))
    assert_stopped(job.run(), "ExpiredToken")
    assert len(job.uploaded()) == 40
    job.check_state_is_true()


@needs_cores
def test_worker_processes_ride_out_faults(job: Job) -> None:
    job.write(small_files(FILES_THAT_PAY[CLASSIC]))
    job.proxy.add_fault(Fault(answer(503, "SlowDown"), operation="PutObject", one_in=5))
    assert_clean(job.run())
    job.check_all_is_there()


# --- The AWS Common Runtime ------------------------------------------------------------------


def is_by_crt(request: Request) -> bool:
    """Whether awscrt sent the request."""
    return CRT_MARK in str(request.headers["User-Agent"])


@pytest.mark.parametrize(("name", "by_crt"), [("auto", True), ("crt", True), ("classic", False)])
def test_preferred_transfer_client(job: Job, name: str, by_crt: bool) -> None:
    job.write({"a.txt": b"bytes", "large": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(CLIENT_OPTION, name, *IN_PARTS))
    (put,) = job.requests("PutObject")
    assert is_by_crt(put) == by_crt
    assert not any(map(is_by_crt, job.requests("UploadPart")))
    job.check_all_is_there()


CRT_CANNOT = {
    "proxy": {"HTTP_PROXY": "{url}", "http_proxy": "{url}", "NO_PROXY": "", "no_proxy": ""},
    "not-installed": {"PYTHONPATH": "{folder}"},
}


def check_that_boto3_sends(job: Job, env: dict[str, str]) -> None:
    """Check that asking for the runtime is refused, and that not asking for it works."""
    job.make("a.txt")
    assert_stopped(job.run(*CRT, env=env), "cannot use the AWS Common Runtime: ")
    assert_clean(job.run(CLIENT_OPTION, "auto", env=env))
    job.check_all_is_there()
    assert not any(map(is_by_crt, job.requests("PutObject")))


@pytest.mark.parametrize("why", CRT_CANNOT)
def test_where_the_runtime_cannot_do_what_is_asked_boto3_sends(
    job: Job, tmp_path: Path, why: str
) -> None:
    (tmp_path / "awscrt.py").write_text("raise ImportError")
    places = {"url": job.endpoint.endpoint_url, "folder": str(tmp_path)}
    check_that_boto3_sends(
        job, {name: value.format(**places) for name, value in CRT_CANNOT[why].items()}
    )


OF_ONE_REQUEST = {"authorization", "x-amz-date", "user-agent", "accept", "connection"}
OF_ONE_CLIENT = {"amz-sdk-invocation-id", "amz-sdk-request", "accept-encoding"}


def test_the_runtime_sends_the_request_that_boto3_sends(job: Job) -> None:
    keys = ("plain.txt", "no extension", "sp ace+%&#?'\"ü~*()!$,;=:@.bin", "deep/er/file.html")
    job.write({key: key.encode() for key in keys})
    options = ["--storage-class", "STANDARD", "--sse", "AES256", "--prefix", "pre fix/"]
    options += ["--expected-bucket-owner", "123456789012"]
    sent = []
    for client in (CLASSIC, CRT):
        since = job.seen()
        assert_clean(job.run(*client, *options))
        puts = job.requests("PutObject", since=since)
        assert len(puts) == len(keys)
        headers = [
            {name.lower(): value for name, value in request.headers.items()} for request in puts
        ]
        ignored = OF_ONE_REQUEST | OF_ONE_CLIENT
        kept = [{n: v for n, v in h.items() if n not in ignored} for h in headers]
        sent.append({put.path: header for put, header in zip(puts, kept, strict=True)})
    assert sent[0] == sent[1]


# --- Systems that lack something -------------------------------------------------------------

TAKEN_AWAY = """\
import os, signal, sys
for name in {names!r}:
    module, _, attribute = name.partition(".")
    vars(sys.modules[module]).pop(attribute, None)
"""


def make_mixed(job: Job, count: int) -> None:
    """Write small files, an empty one and one that is sent in parts."""
    job.write(small_files(count) | {"empty": b"", "sub/parts": some_bytes(LARGE_BYTES)})


@pytest.mark.parametrize(
    "names", [("os.fchmod", "os.O_NONBLOCK"), ("os.sched_getaffinity", "signal.SIGHUP")], ids=str
)
def test_a_system_that_lacks(job: Job, tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(TAKEN_AWAY.format(names=names))
    make_mixed(job, FILES_THAT_PAY[CLASSIC])
    for _ in range(2):  # with and without an old state
        assert_clean(job.run(*IN_PARTS, env={"PYTHONPATH": str(tmp_path)}))
        job.check_all_is_there()


@needs_limits
def test_a_low_limit_of_open_files_is_raised(job: Job) -> None:
    job.write(small_files(140))
    job.proxy.add_fault(Fault(delay(0.5), operation="PutObject"))
    hard = "resource.getrlimit(resource.RLIMIT_NOFILE)[1]"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))"
    assert_clean(job.run(*CRT, "--max-concurrency", "200", python_flags=prelude(limit)))
    job.check_all_is_there()


# What the script meets on Windows, in its main process. All that looks at the system when it is
# imported is imported before.
WINDOWS = """\
import errno, fcntl, multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker
import os, signal, sys, types
os.environ["BOTO_DISABLE_CRT"] = "true"  # as the script does before it imports boto3
import awscrt.s3, boto3.s3.transfer

multiprocessing.resource_tracker.ensure_running()

class Main(types.ModuleType):  # under its other name, what workers send finds the script
    def __getattr__(self, name):
        return getattr(sys.modules["__main__"], name)

sys.modules["__mp_main__"] = Main("__mp_main__")
real_open = os.open

def windows_open(path, flags, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    if not flags & os.O_BINARY:
        raise OSError(errno.EINVAL, "it would be read as text", path)
    return real_open(path, flags & ~os.O_BINARY, *rest, **named)

def locking(descriptor, mode, size):
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    if mode != msvcrt.LK_NBLCK or at < 1000:
        raise OSError(errno.EINVAL, "it would wait, or nobody could read the text")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, size, at)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK, msvcrt.locking = 2, locking
sys.modules.update(msvcrt=msvcrt, fcntl=None, resource=None)
for module, names in (
    (os, "fchmod sched_getaffinity O_NONBLOCK geteuid getuid"),
    (signal, "SIGHUP SIGKILL pthread_sigmask"),
):
    for name in names.split():
        vars(module).pop(name, None)
os.O_BINARY, os.open = 1 << 30, windows_open
sys.platform = "win32"
"""


@as_on_windows
def test_backup_as_on_windows(job: Job) -> None:
    make_mixed(job, FILES_THAT_PAY[CLASSIC])
    assert_clean(job.run(*IN_PARTS, python_flags=prelude(WINDOWS)))
    job.check_all_is_there()
    assert_clean(job.run(*IN_PARTS, *CRT, python_flags=prelude(WINDOWS)))
    job.check_all_is_there()


@as_on_windows
def test_lock_as_on_windows(job: Job) -> None:
    job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    first = job.start(python_flags=prelude(WINDOWS))
    job.wait_for("PutObject")
    before = job.state_path.read_bytes()
    second = job.run(python_flags=prelude(WINDOWS))
    assert_stopped(second, named(first), "--statefile")
    assert job.state_path.read_bytes() == before

    first.kill()
    first.wait()
    job.proxy.clear_faults()
    assert_clean(job.crash_run(python_flags=prelude(WINDOWS)))
    job.check_all_is_there()
