"""Fixtures: S3 servers, the fault proxy before them, and the script as a program.

The tests run against `rclone serve s3` and against moto's server, both started here. With
S3_TEST_ENDPOINT and the usual AWS_* variables they run against that endpoint instead; tests that
need one of the two (`rclone_s3`, `moto_s3`) still start theirs.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
from fault_proxy import FaultProxy
from script_runner import (
    Completed,
    finish,
    kill_group,
    make_files,
    read_state,
    run_script,
    start_script,
    wait_until,
)
from servers import Certificate, S3Server, moto, named_server, rclone

__all__ = [
    "Completed",
    "FaultProxy",
    "Proxied",
    "S3Server",
    "finish",
    "make_files",
    "read_state",
    "run_script",
    "start_script",
    "wait_until",
]

LOG_LINES_SHOWN = 40
_log_paths = pytest.StashKey[list[Path]]()


class Proxied(Protocol):
    """Puts a proxy before a server: the fixture `proxied`."""

    def __call__(
        self, server: S3Server, bytes_per_second: float | None = None
    ) -> tuple[FaultProxy, S3Server]: ...


# --- Servers ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def new_log(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[str], Path]:
    """Makes the path of a server's log, which failing tests then show."""
    folder = tmp_path_factory.mktemp("servers")
    paths = pytestconfig.stash.setdefault(_log_paths, [])

    def new_log(name: str) -> Path:
        paths.append(folder / f"{name}.log")
        return paths[-1]

    return new_log


@pytest.fixture(scope="session")
def rclone_server(
    tmp_path_factory: pytest.TempPathFactory, new_log: Callable[[str], Path]
) -> Iterator[S3Server]:
    """`rclone serve s3`, which checks signatures and keeps the objects as files."""
    with rclone(tmp_path_factory.mktemp("rclone"), log_path=new_log("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_tls_server(
    tmp_path_factory: pytest.TempPathFactory, new_log: Callable[[str], Path]
) -> Iterator[S3Server]:
    """The same over https, with a certificate that only its `ca_bundle` vouches for."""
    certificate = Certificate.create(tmp_path_factory.mktemp("certificate"))
    folder = tmp_path_factory.mktemp("rclone-tls")
    with rclone(folder, log_path=new_log("rclone-tls"), tls=certificate) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(new_log: Callable[[str], Path]) -> Iterator[S3Server]:
    """moto's server, which knows nearly all of S3's requests but takes any signature."""
    with moto(log_path=new_log("moto")) as server:
        yield server


@pytest.fixture
def rclone_s3(rclone_server: S3Server) -> S3Server:
    """rclone's server, for a test that needs this one."""
    return rclone_server


@pytest.fixture
def moto_s3(moto_server: S3Server) -> S3Server:
    """moto's server, for a test that needs this one."""
    return moto_server


@pytest.fixture(params=["named"] if named_server() else ["rclone", "moto"])
def s3(request: pytest.FixtureRequest) -> S3Server:
    """Each of the servers in turn, or the one that S3_TEST_ENDPOINT names."""
    server = named_server() or request.getfixturevalue(f"{request.param}_server")
    assert isinstance(server, S3Server)
    return server


@pytest.fixture
def proxied() -> Iterator[Proxied]:
    """Puts a `FaultProxy` before a server; returns it, and the server as seen through it."""
    with contextlib.ExitStack() as proxies:

        def proxied(
            server: S3Server, bytes_per_second: float | None = None
        ) -> tuple[FaultProxy, S3Server]:
            proxy = proxies.enter_context(FaultProxy(server.endpoint_url, bytes_per_second))
            return proxy, replace(server, endpoint_url=proxy.url)

        yield proxied


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the servers' logs with a test that failed."""
    report = yield
    if report.failed:
        for path in item.config.stash.get(_log_paths, []):
            lines = path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            report.sections.append((f"end of {path}", "\n".join(lines)))
    return report


# --- Folders and names -----------------------------------------------------------------------


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder for the test, in place of pytest's own.

    That one lies below a folder which only its owner may enter, and some tests run the script as
    another user.
    """
    # Windows does not remove a file that a process still has open.
    is_lenient = sys.platform == "win32"
    with tempfile.TemporaryDirectory(
        prefix="s3FileTransfer-test-", ignore_cleanup_errors=is_lenient
    ) as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path


@pytest.fixture
def backup_folder(tmp_path: Path) -> Path:
    """The path for the folder to back up; `make_files` creates it."""
    return tmp_path / "backup"


@pytest.fixture
def bucket_name() -> Iterator[str]:
    """The name of a bucket that does not exist yet."""
    name = f"s3filetransfer-test-{uuid.uuid4().hex}"
    yield name
    # The servers of our own go away with all that is in them.
    if server := named_server():
        server.remove_bucket(name)


# --- The script ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Completed]:
    """`run_script`, in the test's folder."""
    return functools.partial(run_script, cwd=tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start_script`, in the test's folder; what still runs when the test ends is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*args: str | Path, **options: object) -> subprocess.Popen[str]:
        processes.append(start_script(*args, **{"cwd": tmp_path, **options}))  # type: ignore[arg-type]
        return processes[-1]

    yield start
    for process in processes:
        kill_group(process)
