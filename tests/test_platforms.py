"""The branches for Windows and macOS, without them: what those lack is taken from the run.

They run the real script to the end, each against a real server. What is really different there,
as names and links, only a run there can show.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fault_proxy import Fault, delay
from jobs import MIB, Job, assert_clean, assert_stopped, named, prelude
from proxied_job import IN_PARTS, small_files
from script_runner import make_files, wait_until
from systems import needs_limits

pytest_plugins = ["job_fixtures"]

CLASSIC = ("--preferred-transfer-client", "classic")
FILES_FOR_WORKERS = 1000  # so many that there is more than one process
many_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core, one process")
as_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="has it all in reality")


def make(job: Job, count: int = 5) -> dict[str, bytes]:
    """Write small files, an empty one and one that is sent in parts; return them by key."""
    files = small_files(count) | {"empty": b"", "sub/parts": os.urandom(11 * MIB)}
    make_files(job.folder, files)
    return files


def back_up_twice(job: Job, files: dict[str, bytes], **options: object) -> None:
    """Back up, with and without an old state, and check that all is there."""
    for _ in range(2):
        assert_clean(job(*IN_PARTS, *CLASSIC, **options))
        assert job.objects() == files
        assert job.state() == dict.fromkeys(files, 1)


# --- What a system may lack ------------------------------------------------------------------

TAKEN_AWAY = """\
import os, signal, sys
for name in {names!r}:
    module, _, attribute = name.partition(".")
    vars(sys.modules[module]).pop(attribute, None)
"""


def without(folder: Path, *names: str) -> dict[str, str]:
    """The environment in which a run and its worker processes lack attributes of modules."""
    (folder / "sitecustomize.py").write_text(TAKEN_AWAY.format(names=names))
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "name", ["os.fchmod", "os.O_NONBLOCK", "os.sched_getaffinity", "signal.SIGHUP"]
)
def test_a_system_that_lacks(job: Job, tmp_path: Path, name: str) -> None:
    back_up_twice(job, make(job), env=without(tmp_path, name))


@many_cores
@pytest.mark.parametrize("name", ["os.sched_getaffinity", "signal.SIGHUP"])
def test_worker_processes_on_a_system_that_lacks(job: Job, tmp_path: Path, name: str) -> None:
    files = make(job, FILES_FOR_WORKERS)
    assert_clean(job(*IN_PARTS, *CLASSIC, env=without(tmp_path, name)))
    assert job.objects() == files


@needs_limits
def test_a_low_limit_of_open_files_is_raised(job: Job) -> None:
    files = small_files(400)
    make_files(job.folder, files)
    job.proxy.add_fault(Fault(delay(0.5), operation="PutObject"))
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.RLIM_INFINITY))"
    hard = "resource.getrlimit(resource.RLIMIT_NOFILE)[1]"
    limit = limit.replace("resource.RLIM_INFINITY", hard)
    assert_clean(job(python_flags=prelude(f"import resource; {limit}")))
    assert job.objects() == files


# --- Windows ---------------------------------------------------------------------------------

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
@pytest.mark.parametrize("count", [5, pytest.param(FILES_FOR_WORKERS, marks=many_cores)])
def test_backup_as_on_windows(job: Job, count: int) -> None:
    back_up_twice(job, make(job, count), python_flags=prelude(WINDOWS))


@as_on_windows
def test_small_files_by_the_crt_as_on_windows(job: Job) -> None:
    files = small_files(50)
    make_files(job.folder, files)
    client = ("--preferred-transfer-client", "crt")
    assert_clean(job(*client, python_flags=prelude(WINDOWS)))
    assert job.objects() == files


@as_on_windows
def test_lock_as_on_windows(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    first = job.start(python_flags=prelude(WINDOWS))
    wait_until(lambda: job.proxy.count("PutObject"), 60, "the first run's upload")
    before = job.state_path.read_bytes()
    second = job(python_flags=prelude(WINDOWS))
    assert_stopped(second, named(first), "--statefile")
    assert job.state_path.read_bytes() == before

    first.kill()
    first.wait()
    job.proxy.clear_faults()
    assert_clean(job.crash_run(python_flags=prelude(WINDOWS)))
    assert job.objects() == files
