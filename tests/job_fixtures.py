"""Fixtures: backup jobs for the servers; a module asks for them with `pytest_plugins`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Proxied
from jobs import Job, Run, Start
from servers import S3Server, named_server


@pytest.fixture
def new_job(
    run: Run, start: Start, proxied: Proxied, tmp_path: Path, bucket_name: str
) -> Callable[[S3Server], Job]:
    """Makes a job for a server; other users may write its state."""
    state_folder = tmp_path / "state"
    state_folder.mkdir()
    state_folder.chmod(0o777)

    def new_job(server: S3Server) -> Job:
        return Job(
            server=server,
            bucket=bucket_name,
            folder=tmp_path / "backup",
            state_path=state_folder / "state.json",
            _run=run,
            _start=start,
            _proxied=proxied,
        )

    return new_job


@pytest.fixture
def job(new_job: Callable[[S3Server], Job], request: pytest.FixtureRequest) -> Job:
    """A job for one server, where it does not matter for which."""
    return new_job(named_server() or request.getfixturevalue("rclone_server"))


@pytest.fixture
def moto_job(new_job: Callable[[S3Server], Job], moto_s3: S3Server) -> Job:
    """A job for moto's server, which knows regions."""
    return new_job(moto_s3)


@pytest.fixture
def rclone_job(new_job: Callable[[S3Server], Job], rclone_s3: S3Server) -> Job:
    """A job for rclone's server, which checks signatures."""
    return new_job(rclone_s3)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine where nobody listens, nor will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        yield bound.getsockname()[1]
