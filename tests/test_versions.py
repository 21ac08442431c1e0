"""The oldest packages that requirements.txt allows, installed into an environment of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.checks import assert_clean
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job
from support.script import PROJECT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages folder of an environment with the oldest versions."""
    venv = tmp_path_factory.mktemp("oldest")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (python,) = (path for path in venv.glob("*/python*") if path.stem == "python")
    wanted = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    pinned = [re.sub(r">=(\d+\.\d+)$", r"==\1.0", line) for line in lines]
    assert all("==" in line for line in pinned), pinned
    install: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",  # most of it is never imported
    ]
    subprocess.run([*install, *pinned], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([python, "-c", where], check=True, stdout=subprocess.PIPE, text=True)
    return Path(said.stdout.strip())


def test_the_oldest_packages_do_all_of_it(each_job: Job, oldest: Path) -> None:
    job = each_job
    job.write(small_files(100) | {"large": some_bytes(LARGE_BYTES), "streamed": bytes(9_000_000)})
    # Before the packages of the environment that the tests run in.
    env = {"PYTHONPATH": os.fspath(oldest)}
    (job.folder / "later").symlink_to("target")
    assert job.run(*IN_PARTS, env=env).returncode == 1
    (job.folder / "later").unlink()
    job.make("later")
    assert_clean(job.crash_run(*IN_PARTS, env=env))
    job.check_all_is_there()
    since = job.seen()
    assert_clean(job.run(*IN_PARTS, "--skip-unchanged", env=env))
    assert job.sent(since) == []
    assert_clean(job.run("--verify", env=env))


def test_the_oldest_boto3_is_what_ran(oldest: Path) -> None:
    (found,) = oldest.glob("boto3-*.dist-info")
    wanted = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    lowest = re.search(r"boto3.*>=(\S+)", wanted)
    assert lowest
    assert found.name == f"boto3-{lowest[1]}.0.dist-info"
