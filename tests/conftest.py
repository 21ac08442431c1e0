"""Fixtures: S3 servers, the fault proxy before them, and backup jobs for the script.

Most tests run against `rclone serve s3`, those that need AWS's semantics against moto's server;
both are started here. A test that asks for `each_server` runs against both, one that asks for
`each_client` by both ways of sending small files; with --long all others do so too. Of the cases
of a test that is marked `few`, only some run without --long. With S3_TEST_ENDPOINT and the usual
AWS_* variables, that endpoint is the server.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import pytest
import trustme

pytest.register_assert_rewrite("support")

from support import forks, script
from support.job import Job, Run, Start
from support.proxy import FaultProxy
from support.script import kill_group, run_script, start_script
from support.servers import S3Server, moto, named_server, rclone

LINES_SHOWN = 40
HANDLERS: dict[int, Callable[[int, FrameType | None], object]] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: lambda *_: None,
}
CLIENT_OPTION = "--preferred-transfer-client"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="test each server with each client, all cases, many kills, and the pictures",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes long; runs with --long only")
    config.addinivalue_line("markers", "few(n): without --long, only n of its cases run")
    if config.getoption("--long"):
        forks.is_wanted = False
    # Another user, as whom root runs some tests, must get at their folders.
    temporary = Path(tempfile.gettempdir()).resolve()
    is_open = all(folder.stat().st_mode & 0o001 for folder in (temporary, *temporary.parents))
    if script.is_root() and not is_open:
        tempfile.tempdir = "/tmp"
    # In the background of a shell and under nohup they are ignored: so they would be by the script,
    # which inherits that. A handler is not inherited.
    for signum, handler in HANDLERS.items():
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        kept = _without_long_cases(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _without_long_cases(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of the tests that are not long, all cases or those few, evenly spread, that are marked."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("long"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set[pytest.Item]()
    for of_one in cases.values():
        few = of_one[0].get_closest_marker("few")
        count = min(few.args[0] if few else len(of_one), len(of_one))
        kept.update(of_one[number * len(of_one) // count] for number in range(count))
    return kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_long = metafunc.config.getoption("--long")
    servers = ["named"] if named_server() else ["rclone", "moto"]
    clients = ["crt", "classic"]
    cross = {
        "each_server": servers,
        "server": servers if is_long else servers[:1],
        "each_client": clients,
        "client": clients if is_long else clients[:1],
    }
    for name, values in cross.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, indirect=True)


class NewJob(Protocol):
    """Makes a job for a server: the fixture `new_job`."""

    def __call__(self, server: S3Server, *options: str, has_bucket: bool = True) -> Job: ...


# --- Servers ---------------------------------------------------------------------------------

_log_paths: list[Path] = []
_proxies: list[FaultProxy] = []


@pytest.fixture(scope="session")
def new_log(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the path of a server's log, which failing tests then show."""
    folder = tmp_path_factory.mktemp("servers")

    def new_log(name: str) -> Path:
        _log_paths.append(folder / f"{name}.log")
        return _log_paths[-1]

    return new_log


@pytest.fixture(scope="session")
def rclone_server(
    tmp_path_factory: pytest.TempPathFactory, new_log: Callable[[str], Path]
) -> Iterator[S3Server]:
    """`rclone serve s3`, which checks signatures and keeps the objects as files."""
    with rclone(tmp_path_factory.mktemp("rclone"), log_path=new_log("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(new_log: Callable[[str], Path]) -> Iterator[S3Server]:
    """moto's server, which knows nearly all of S3's requests but takes any signature."""
    with moto(log_path=new_log("moto")) as server:
        yield server


def _server_of(request: pytest.FixtureRequest) -> S3Server:
    server = named_server() or request.getfixturevalue(f"{request.param}_server")
    assert isinstance(server, S3Server)
    return server


@pytest.fixture
def server(request: pytest.FixtureRequest) -> S3Server:
    """A server where it does not matter which; with --long each of them in turn."""
    return _server_of(request)


@pytest.fixture
def each_server(request: pytest.FixtureRequest) -> S3Server:
    """Each of the servers in turn, or the one that S3_TEST_ENDPOINT names."""
    return _server_of(request)


@pytest.fixture
def client(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The option for a way of sending small files, where it does not matter which."""
    return (CLIENT_OPTION, request.param)


@pytest.fixture
def each_client(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The option for each way of sending small files, in turn."""
    return (CLIENT_OPTION, request.param)


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """A certificate authority that only the tests know."""
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_path(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for AWS_CA_BUNDLE that vouches for that authority."""
    path = tmp_path_factory.mktemp("certificate") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def proxies() -> Iterator[contextlib.ExitStack]:
    """Closes the proxies that a test has opened, and fails for what went wrong in them."""
    with contextlib.ExitStack() as stack:
        yield stack


# --- Jobs ------------------------------------------------------------------------------------


@pytest.fixture
def new_job(
    run: Run, start: Start, proxies: contextlib.ExitStack, tmp_path: Path, bucket_name: str
) -> NewJob:
    """Makes a job for a server, seen through a proxy; other users may write its state."""
    state_folder = tmp_path / "state"
    state_folder.mkdir()
    state_folder.chmod(0o777)

    def new_job(server: S3Server, *options: str, has_bucket: bool = True) -> Job:
        proxy = proxies.enter_context(server.proxy())
        _proxies.append(proxy)
        job = Job(
            server=server,
            endpoint=replace(server, endpoint_url=proxy.url),
            proxy=proxy,
            bucket=bucket_name,
            folder=tmp_path / "backup",
            state_path=state_folder / "state.json",
            _run=run,
            _start=start,
            options=options,
        )
        if has_bucket:
            job.create_bucket()
        return job

    return new_job


@pytest.fixture
def job(new_job: NewJob, server: S3Server) -> Job:
    """A job for a server, where it does not matter for which."""
    return new_job(server)


@pytest.fixture
def each_job(new_job: NewJob, each_server: S3Server) -> Job:
    """A job for each of the servers."""
    return new_job(each_server)


@pytest.fixture
def rclone_job(new_job: NewJob, rclone_server: S3Server) -> Job:
    """A job for rclone's server, which checks signatures and Content-MD5."""
    return new_job(rclone_server)


@pytest.fixture
def moto_job(new_job: NewJob, moto_server: S3Server) -> Job:
    """A job for moto's server, which gives ETags, lists parts and knows regions as S3 does."""
    return new_job(moto_server)


@pytest.fixture
def tls_job(
    new_job: NewJob, server: S3Server, proxies: contextlib.ExitStack, ca: trustme.CA, ca_path: Path
) -> Job:
    """A job whose server speaks https, with a certificate that only its `ca_bundle` vouches for."""
    proxy = proxies.enter_context(server.proxy(ca=ca, tls=True))
    _proxies.append(proxy)
    endpoint = replace(server, endpoint_url=proxy.url, ca_bundle=ca_path)
    return replace(new_job(server), proxy=proxy, endpoint=endpoint)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine where nobody listens, nor will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        yield bound.getsockname()[1]


# --- Folders and names -----------------------------------------------------------------------


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder for the test, in place of pytest's own.

    That one lies below a folder which only its owner may enter, and some tests run the script as
    another user. For the same reason the tester's umask does not count.
    """
    # Windows does not remove a file that a process still has open.
    is_lenient = sys.platform == "win32"
    with tempfile.TemporaryDirectory(
        prefix="s3FileTransfer-test-", ignore_cleanup_errors=is_lenient
    ) as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        umask = os.umask(0o022)
        yield path
        os.umask(umask)


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
def run(tmp_path: Path) -> Run:
    """`run_script`, in the test's folder."""
    return functools.partial(run_script, cwd=tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start_script`, in the test's folder; what still runs when the test ends is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*args: str | Path, **options: object) -> subprocess.Popen[str]:
        processes.append(start_script(*args, **{"cwd": tmp_path, **options}))  # type: ignore[arg-type]
        return processes[-1]

    yield start
    for process in processes:
        kill_group(process)


# --- What a failure shows --------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """Forget the runs and the proxies of the test before."""
    script.runs.clear()
    _proxies.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that failed its runs, the requests that came, and the servers' logs."""
    report = yield
    if report.failed:
        for number, (command, completed) in enumerate(script.runs, start=1):
            said = f"{command}\nexit {completed.returncode}\n{completed.stdout}{completed.stderr}"
            report.sections.append((f"run {number}", said))
        for proxy in _proxies:
            requests = proxy.requests
            shown = [f"({len(requests)} requests)", *map(str, requests[-LINES_SHOWN:])]
            report.sections.append((f"requests at {proxy.url}", "\n".join(shown)))
        for path in _log_paths:
            lines = path.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
            report.sections.append((f"end of {path}", "\n".join(lines)))
    return report
