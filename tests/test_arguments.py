"""The command line: what is refused, and how."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from support.checks import assert_clean, assert_stopped, lines_with
from support.files import IN_PARTS, LARGE_BYTES, some_bytes
from support.job import Job, Run
from support.script import PROJECT, SCRIPT_PATH, prelude, program

OPTIONS = """
    --backupfolder --bucketname --crashrun --dryrun --endpoint-url --exclude --expected-bucket-owner
    --help --max-bandwidth --max-concurrency --multipart-chunksize --multipart-threshold
    --no-follow-symlinks --no-progress --preferred-transfer-client --prefix --profile --quiet
    --region --shard --skip-unchanged --sse --sse-kms-key-id --statefile --storage-class --verbose
    --verify --version
""".split()

NO_RATES = [
    "",
    "0",
    "9999B/s",
    "abc",
    "10MBs",
    "10/s",
    "/s",
    "1e6",
    "nan",
    "inf",
    "10Mbit/s",
    "2TB/s",
]
NO_SHARDS = ["0/2", "3/2", "x", "1/0", "1", "1/2/3", "", "1/", "/2", "-1/2", "1/-2", "1.0/2"]

# An unset variable of a shell script: what seems to be set would not be.
NEVER_EMPTY = """
    --backupfolder --endpoint-url --exclude --expected-bucket-owner --profile --region
    --sse-kms-key-id --statefile --storage-class
""".split()

EXPRESS = ["--x-s3", "S3 Express directory bucket", "takes no Content-MD5"]

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
    return job


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bucketname", ""], ["bucket name"]),
        (["--bucketname", "no/slash"], ["no/slash", "bucket name"]),
        (["--bucketname", "white space"], ["white space", "bucket name"]),
        (["--bucketname", "ab/../cd"], ["bucket name"]),
        (["--bucketname", "a"], ["bucket name"]),
        (["--bucketname", "b--euw1-az1--x-s3"], EXPRESS),
        (["--bucketname", "b--euw1-az1--x-s3", "--dryrun"], EXPRESS),
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
        (["--storage-class", "A B"], ["--storage-class A B", "not the name"]),
        (["--storage-class", "A\nB"], [r"--storage-class A\nB", "not the name"]),
        (["--prefix", "p" * 1021], ["--prefix", "1025 bytes"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--crash", "1"], ["--crash"]),
        (["leftover"], ["leftover"]),
        (["--verify", "--crashrun", "1"], ["--verify"]),
        (["--verify", "--dryrun"], ["--verify"]),
        (["--verify", "--skip-unchanged"], ["--verify"]),
        (["--verify", "folder", "--crashrun", "1"], ["--verify"]),
        (["--verify", "folder", "--dryrun"], ["--verify"]),
        (["--verify", "folder", "--skip-unchanged"], ["--verify"]),
        (["--verify", "disk"], ["--verify", "disk", "bucket", "folder"]),
        (["--verify", ""], ["--verify", "bucket", "folder"]),
        (["--max-bandwidth", "-1", "--quiet"], ["--max-bandwidth"]),
        (["--max-bandwidth", "fast"], ["'fast' is not a rate such as 10MB/s"]),
        *[
            ([f"--max-bandwidth={value}"], ["--max-bandwidth", value.removesuffix("/s")])
            for value in NO_RATES
        ],
        *[([f"--shard={value}"], ["--shard", "I/N"]) for value in NO_SHARDS],
        *[(["--sse=aws:kms", option, ""], [f"{option} is empty"]) for option in NEVER_EMPTY],
        (["--exclude", "*.tmp", "--exclude", ""], ["--exclude is empty (an", "give it a value"]),
    ],
    ids=" ".join,
)
def test_usage_errors(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT_PATH.name])
    given = ["--bucketname", "bucket", "--backupfolder", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        program().parse_arguments([*given, *arguments])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    sentence = said.err.splitlines()[-1]
    assert re.match(r"s3FileTransfer\.py: error: .", sentence)
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5242880", 5_242_880),
        ("5242880B", 5_242_880),
        ("6000kB", 6_000_000),
        ("6000KiB", 6_144_000),
        ("6MB", 6_000_000),
        ("6 m", 6_000_000),
        ("6MiB", 6_291_456),
        ("5.5mib", 5_767_168),
        ("1GB", 1_000_000_000),
        ("1GiB", 1_073_741_824),
        ("0.001TB", 1_000_000_000),
        ("0.001TiB", 1_099_511_627),
    ],
)
def test_sizes_and_rates_have_decimal_and_binary_units(
    tmp_path: Path, text: str, size: int
) -> None:
    names = ["--bucketname", "bucket", "--backupfolder", str(tmp_path)]
    sizes = ["--multipart-threshold", text, "--multipart-chunksize", text]
    options = program().parse_arguments([*names, *sizes, "--max-bandwidth", f"{text}/s"])
    read = options.multipart_threshold, options.multipart_chunksize, options.max_bandwidth
    assert read == (size, size, size)


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
    completed = refused_job.run("--backupfolder", folder)
    assert (completed.returncode, completed.stdout) == (2, "")
    assert words in completed.stderr.splitlines()[-1]
    assert str(folder) in completed.stderr.splitlines()[-1]
    assert refused_job.proxy.requests == []
    assert refused_job.state_path.read_text() == "[]\n"


def test_an_empty_prefix_is_none(job: Job) -> None:
    job.make("a.dat")
    assert_clean(job.run("--prefix", ""))
    job.check_all_is_there()


def test_a_usage_error_ends_the_run_before_it_has_done_anything(refused_job: Job) -> None:
    completed = refused_job.run("--crashrun", "2")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert "--crashrun" in completed.stderr.splitlines()[-1]
    assert refused_job.proxy.requests == []
    assert refused_job.state_path.read_text() == "[]\n"
    assert [path.name for path in refused_job.state_path.parent.iterdir()] == ["state.json"]


def test_help_shows_every_option_and_exit_code(run: Run) -> None:
    completed = run("--help")
    assert (completed.returncode, completed.stderr) == (0, "")
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", completed.stdout, flags=re.MULTILINE)
    assert sorted(shown) == sorted(OPTIONS)
    _, _, codes = completed.stdout.partition("exit codes:\n")
    assert re.findall(r"^  (\d+) ", codes, flags=re.MULTILINE) == ["0", "1", "2", "130", "143"]
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
    completed = run(*arguments, python_flags=list(prelude(WATCH_IMPORTS)))
    assert completed.stderr.splitlines()[-1] == "imported []"


def test_boto3_is_not_imported_for_a_dry_run(job: Job) -> None:
    job.make("a.dat")
    completed = job.run("--dryrun", python_flags=list(prelude(WATCH_IMPORTS)))
    assert completed.stderr == "imported []\n"


def test_a_missing_boto3_is_said_in_a_sentence(job: Job) -> None:
    job.make("a.dat")
    completed = job.run(python_flags=list(prelude("import sys; sys.modules['boto3'] = None")))
    assert completed.returncode == 2
    assert "boto3 is not installed" in completed.stderr


# --- Locales ---------------------------------------------------------------------------------

# A locale whose encoding is another than UTF-8, which few machines have today.
LATIN = "import sys; sys.getfilesystemencoding = lambda: 'iso8859-1'"


@pytest.mark.parametrize("arguments", [[], ["--crashrun", "1"], ["--dryrun"]], ids=" ".join)
def test_a_locale_in_which_names_are_read_wrongly_is_refused(
    refused_job: Job, arguments: list[str]
) -> None:
    completed = refused_job.run(*arguments, python_flags=prelude(LATIN))
    assert_stopped(completed, "locale", "PYTHONUTF8=1")
    assert refused_job.proxy.requests == []
    assert refused_job.state_path.read_text() == "[]\n"


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
    ids=str,
)
@pytest.mark.few(1)
def test_unicode_names_where_the_terminal_knows_none(job: Job, env: dict[str, str]) -> None:
    files = job.make("ünïcode", "日本語 🎉")
    (job.folder / "zerbrochener Lünk").symlink_to("missing")
    completed = job.run("--verbose", env=env)
    assert completed.returncode == 1
    assert len(lines_with(completed.stderr, "failed: ")) == 1
    job.check_holds(files)
    assert job.state() == {**dict.fromkeys(files, 1), "zerbrochener Lünk": 0}


# --- Ways to start it ------------------------------------------------------------------------


def test_optimized_python_does_the_same(job: Job) -> None:
    job.make("a.dat")
    assert_clean(job.run(python_flags=["-OO"]))
    job.check_all_is_there()
    assert job.run("--help", python_flags=["-OO"]).returncode == 0


def test_nothing_deprecated_is_used(job: Job) -> None:
    job.write({"a.dat": b"a", "parts": some_bytes(LARGE_BYTES)})
    flags = [f"-Werror::{kind}:__main__" for kind in ("DeprecationWarning", "FutureWarning")]
    assert_clean(job.run(*IN_PARTS, python_flags=flags))


def test_the_versions_in_the_head_and_in_requirements_agree() -> None:
    head = SCRIPT_PATH.read_text(encoding="utf-8").partition('"""')[0]
    (dependencies,) = re.findall(r"^# dependencies = (\[.*\])$", head, flags=re.MULTILINE)
    wanted = (PROJECT / "requirements.txt").read_text(encoding="utf-8").split()
    assert json.loads(dependencies) == wanted
