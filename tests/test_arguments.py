"""The command line: what is refused, and how."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import Job, Run, prelude

pytest_plugins = ["job_fixtures"]

OPTIONS = """
    --bucketname --backupfolder --crashrun --statefile --prefix --region --profile --endpoint-url
    --storage-class --sse --sse-kms-key-id --expected-bucket-owner --exclude --no-follow-symlinks
    --dryrun --max-concurrency --multipart-threshold --multipart-chunksize --quiet --verbose
    --version --help
""".split()

# At the end of the process say whether boto3 or botocore were imported.
WATCH_IMPORTS = """
import os, sys
real_exit = os._exit
def leave(code):
    print("imported", sorted({"boto3", "botocore"} & set(sys.modules)), file=sys.__stderr__)
    sys.__stderr__.flush()
    real_exit(code)
os._exit = leave
import atexit
atexit.register(lambda: leave(0))
"""


@pytest.fixture
def refused_job(job: Job) -> Job:
    """A job with files and an old state that is not to change."""
    job.make("a.dat")
    job.state_path.write_text("[]\n")
    job.proxy  # noqa: B018
    return job


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bucketname", ""], ["bucket name"]),
        (["--bucketname", "no/slash"], ["no/slash", "bucket name"]),
        (["--bucketname", "white space"], ["white space", "bucket name"]),
        (["--bucketname", "ab/../cd"], ["bucket name"]),
        (["--bucketname", "a"], ["bucket name"]),
        (["--crashrun", "2"], ["--crashrun", "2"]),
        (["--crashrun", "yes"], ["--crashrun", "yes"]),
        (["--crashrun", ""], ["--crashrun"]),
        (["--multipart-threshold", "lots"], ["--multipart-threshold", "lots"]),
        (["--multipart-threshold", "-1"], ["--multipart-threshold"]),
        (["--multipart-threshold", "0"], ["--multipart-threshold"]),
        (["--multipart-threshold", "6GiB"], ["--multipart-threshold", "5GiB"]),
        (["--multipart-threshold", "1e9"], ["--multipart-threshold", "1e9"]),
        (["--multipart-threshold", "nan"], ["--multipart-threshold", "nan"]),
        (["--multipart-chunksize", "1XB"], ["--multipart-chunksize", "1XB"]),
        (["--multipart-chunksize", "4MiB"], ["--multipart-chunksize", "5MiB"]),
        (["--multipart-chunksize", "5242879"], ["--multipart-chunksize", "5MiB"]),
        (["--multipart-chunksize", "6GiB"], ["--multipart-chunksize", "5GiB"]),
        (["--max-concurrency", "0"], ["--max-concurrency", "0"]),
        (["--max-concurrency", "many"], ["--max-concurrency", "many"]),
        (["--sse-kms-key-id", "k"], ["--sse-kms-key-id", "--sse"]),
        (["--sse", "aws:kms", "--sse-kms-key-id", "\u00e9"], ["--sse-kms-key-id", "odd"]),
        (["--sse", "aws:kms", "--sse-kms-key-id", "a\nb"], ["--sse-kms-key-id", "odd"]),
        (["--expected-bucket-owner", "1 2"], ["--expected-bucket-owner", "odd"]),
        (["--sse", "AES256", "--sse-kms-key-id", "k"], ["--sse-kms-key-id", "aws:kms"]),
        (["--sse", "rot13"], ["--sse", "rot13"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--crash", "1"], ["--crash"]),
        (["leftover"], ["leftover"]),
    ],
)
def test_usage_errors(refused_job: Job, arguments: list[str], words: list[str]) -> None:
    completed = refused_job(*arguments)
    assert (completed.returncode, completed.stdout) == (2, "")
    sentence = completed.stderr.splitlines()[-1]
    assert re.match(r"s3FileTransfer\.py: error: .", sentence)
    assert [word for word in words if word not in sentence] == []
    assert refused_job.proxy.requests == []
    assert refused_job.state_path.read_text() == "[]\n"


@pytest.mark.parametrize("missing", ["--bucketname", "--backupfolder"])
def test_required_options(run: Run, tmp_path: Path, missing: str) -> None:
    given = {"--bucketname": "bucket", "--backupfolder": str(tmp_path)}
    del given[missing]
    completed = run(*(word for pair in given.items() for word in pair))
    assert completed.returncode == 2
    assert missing in completed.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "does not exist"), ("file", "is not a folder"), ("", "folder")]
)
def test_what_is_no_folder_is_refused(refused_job: Job, name: str, words: str) -> None:
    (refused_job.folder / "file").touch()
    folder = refused_job.folder / name if name else ""
    completed = refused_job("--backupfolder", folder)
    assert (completed.returncode, completed.stdout) == (2, "")
    assert words in completed.stderr.splitlines()[-1]
    assert str(folder) in completed.stderr.splitlines()[-1]
    assert refused_job.proxy.requests == []
    assert refused_job.state_path.read_text() == "[]\n"


def test_usage_errors_leave_no_lock_behind(refused_job: Job) -> None:
    refused_job("--crashrun", "2")
    assert [path.name for path in refused_job.state_path.parent.iterdir()] == ["state.json"]


def test_help_shows_every_option(run: Run) -> None:
    completed = run("--help")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert [option for option in OPTIONS if f"{option}" not in completed.stdout.split()] == []
    for code in ("0", "1", "2", "130", "143"):
        assert re.search(rf"^  {code} ", completed.stdout, re.MULTILINE)
    assert "--crashrun 1" in completed.stdout


def test_version(run: Run) -> None:
    completed = run("--version")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert re.fullmatch(r"s3FileTransfer \d+\.\d+\.\d+\n", completed.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        [],
        ["--crashrun", "2"],
        ["--bucketname", "bucket", "--backupfolder", "missing"],
    ],
)
def test_boto3_is_not_imported_for(run: Run, arguments: list[str]) -> None:
    completed = run(*arguments, python_flags=prelude(WATCH_IMPORTS))
    assert completed.stderr.splitlines()[-1] == "imported []"


def test_boto3_is_not_imported_for_a_dry_run(job: Job) -> None:
    job.make("a.dat")
    completed = job("--dryrun", python_flags=prelude(WATCH_IMPORTS))
    assert completed.stderr == "imported []\n"


def test_a_missing_boto3_is_said_in_a_sentence(job: Job) -> None:
    job.make("a.dat")
    completed = job(python_flags=prelude("import sys; sys.modules['boto3'] = None"))
    assert completed.returncode == 2
    assert "boto3 is not installed" in completed.stderr
