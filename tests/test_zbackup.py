"""The whole job, end to end: every file is in the bucket, or is said not to be."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.checks import assert_clean, assert_failed, assert_stopped, lines_with
from support.faults import Fault, answer, flip_byte, wrong_etag, call
from support.files import MIB, WINDOWS_FORBIDS, make_files, relative_paths
from support.job import Job, NOBODY, shell
from support.proxy import Request
from support.script import Completed, finish
from support.servers import S3Server, moto
from support.systems import needs_permissions, needs_fifos, needs_shell, needs_odd_names, needs_full_device

ODD_NAMES = [
    "with space",
    " leading space",
    "trailing space ",
    "two  spaces",
    "'single'",
    '"double"',
    "100%",
    "%41%2F%00",
    "a+b",
    "a&b=c",
    "#hash",
    "?question",
    "semi;colon",
    "colon:name",
    "*star*",
    "[brackets]",
    "{braces}",
    "<angle>",
    "back\\slash",
    "pipe|",
    "$HOME",
    "`tick`",
    "~tilde",
    "!bang",
    "@at",
    "-dash",
    "--bucketname",
    "comma,",
    unicodedata.normalize("NFC", "café"),
    unicodedata.normalize("NFD", "café"),
    "日本語",
    "emoji 🎉",
    "עברית",
    "tab\there",
    "new\nline",
    "return\rhere",
    "escape\x1b[31m",
    "bell\x07",
    "delete\x7f",
    "\u200bzero width",
    ".hidden",
    "trailing dot.",
    "...",
    "x" * 200,
    "ü" * 100,
]
if sys.platform == "win32":
    ODD_NAMES = [name for name in ODD_NAMES if not re.search(WINDOWS_FORBIDS, name)]
if sys.platform == "darwin":  # which takes two forms of a name for one
    ODD_NAMES.remove(unicodedata.normalize("NFD", "café"))


@pytest.fixture
def odd_job(s3: S3Server, new_job: Callable[[S3Server], Job]) -> tuple[Job, dict[str, bytes]]:
    """A job of over 300 files with odd names and contents, for each server."""
    job = new_job(s3)
    # moto's server finds no object with a line feed in its key.
    names = [name for name in ODD_NAMES if s3.name != "moto" or "\n" not in name]
    files = {name: f"bytes of {name}".encode() for name in names}
    for name in names:
        files[f"folder {name}/{name}"] = os.urandom(100)
    for number in range(260):
        size_bytes = (0, 1, 1000, 70_000)[number % 4]
        files[f"deep/{number % 7}/{number % 3}/{number:03}.dat"] = os.urandom(size_bytes)
    files["large.dat"] = os.urandom(9 * MIB)  # more than is read into memory at once
    files["parts.dat"] = os.urandom(11 * MIB)
    job.write(files)
    assert len(files) >= 300
    return job, files


PARTS = ("--multipart-threshold", "10MiB", "--multipart-chunksize", "5MiB")


def test_every_file_arrives_and_a_crash_run_sends_nothing(
    odd_job: tuple[Job, dict[str, bytes]],
) -> None:
    job, files = odd_job
    assert_clean(job.run(*PARTS))
    assert job.objects() == files
    assert job.state() == dict.fromkeys(relative_paths(job.folder), 1)
    assert {entry["filepath"] for entry in job.entries()} == {
        str(job.folder / key) for key in files
    }
    assert_clean(job.crash_run(*PARTS))
    methods = {request.method for request in job.proxy.requests}
    assert methods == {"HEAD"}


def test_a_second_run_sends_all_again(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    assert_clean(job.run())
    (job.folder / "a.dat").write_bytes(b"changed")
    assert_clean(job.run())
    assert job.objects() == {**files, "a.dat": b"changed"}


# --- Several things that go wrong ------------------------------------------------------------


@needs_permissions
def test_exactly_the_troubled_files_fail_and_the_crash_run_sends_them(
    s3: S3Server, new_job: Callable[[S3Server], Job]
) -> None:
    job = new_job(s3)
    good = job.make(*(f"good/{number:02}" for number in range(40)))
    troubled = job.make("unreadable", "vanished", "changed", "corrupted", "wrong-etag")
    (job.folder / "unreadable").chmod(0)

    def change(_: Request) -> None:
        with (job.folder / "changed").open("r+b") as file:
            file.write(os.urandom(8))

    def vanish(_: Request) -> None:
        (job.folder / "vanished").unlink(missing_ok=True)

    # The walk is over when the first file is sent; the one that vanishes is the last of all.
    for fault in (
        Fault(flip_byte(), operation="PutObject", key="corrupted"),
        Fault(wrong_etag(), operation="PutObject", key="wrong-etag"),
        Fault(call(change), operation="PutObject", key="changed"),
        Fault(call(vanish), operation="PutObject", times=1),
    ):
        job.proxy.add_fault(fault)
    completed = job.run("--max-concurrency", "2", user=NOBODY)
    assert_failed(completed, [job.folder / name for name in troubled])
    assert job.state() == {**dict.fromkeys(good, 1), **dict.fromkeys(troubled, 0)}
    reasons = job.errors()
    assert set(reasons) == set(troubled)
    for name, word in (
        ("unreadable", "permission"),
        ("vanished", "vanished"),
        ("changed", "changed"),
        ("corrupted", "damage"),
        ("wrong-etag", "etag"),
    ):
        assert word in reasons[name].lower()
    objects = job.objects()
    assert {key: objects.get(key) for key in good} == good

    job.proxy.clear_faults()
    (job.folder / "unreadable").chmod(0o644)
    mended = job.make("vanished", "changed")
    sent_before = len(job.puts())
    assert_clean(job.crash_run(user=NOBODY))
    assert sorted(job.puts()[sent_before:]) == sorted(troubled)
    assert job.objects() == {**good, **troubled, **mended}
    assert set(job.state().values()) == {1}
    assert job.errors() == {}


def test_file_that_changes_once_is_sent_as_it_is_then(job: Job) -> None:
    job.make("changed.dat")

    def change(_: Request) -> None:
        (job.folder / "changed.dat").write_bytes(b"something else")

    job.proxy.add_fault(Fault(call(change), operation="PutObject", times=1))
    assert_clean(job.run())
    assert job.objects() == {"changed.dat": b"something else"}


def test_log_that_grows_does_not_fail(job: Job) -> None:
    (content,) = job.make("growing.log").values()

    def grow(_: Request) -> None:
        with (job.folder / "growing.log").open("ab") as file:
            file.write(b"one more line")

    job.proxy.add_fault(Fault(call(grow), operation="PutObject"))
    assert_clean(job.run())
    assert job.objects() == {"growing.log": content}


# --- TLS -------------------------------------------------------------------------------------


@pytest.fixture
def tls_job(new_job: Callable[[S3Server], Job], rclone_tls_server: S3Server) -> Job:
    """A job for a server with a certificate of its own."""
    job = new_job(rclone_tls_server)
    make_files(
        job.folder,
        {
            "empty": b"",
            "small": os.urandom(1000),
            "sub/streamed": os.urandom(9 * MIB),
            "sub/parts": os.urandom(11 * MIB),
        },
    )
    return job


def test_https(tls_job: Job) -> None:
    assert_clean(tls_job.run(*PARTS))
    paths = relative_paths(tls_job.folder)
    assert tls_job.objects() == {key: (tls_job.folder / key).read_bytes() for key in paths}
    assert tls_job.state() == dict.fromkeys(paths, 1)


def test_certificate_that_is_not_trusted(tls_job: Job) -> None:
    completed = tls_job.run(server=replace(tls_job.server, ca_bundle=None))
    assert_stopped(completed, "certificate", "AWS_CA_BUNDLE")
    assert completed.stderr.count("\n") == 1
    assert not tls_job.state_path.exists()


# --- Output ----------------------------------------------------------------------------------


def make_mixed(job: Job) -> list[Path]:
    """Write two files, a FIFO and two broken links; return the paths of the links."""
    job.make("a.dat", "b.dat")
    os.mkfifo(job.folder / "fifo")
    broken = [job.folder / "broken-1", job.folder / "broken-2"]
    for path in broken:
        path.symlink_to("missing")
    return broken


def test_summary_says_what_was_sent(job: Job) -> None:
    job.make("a.dat")
    (job.folder / "b.dat").write_bytes(bytes(1_500_000 - len(b"bytes of a.dat")))
    completed = job.run("--prefix", "daily/")
    assert_clean(completed)
    for words in ("2 files", "1.5 MB", f"s3://{job.bucket}/daily/", "0 failed", job.state_path):
        assert str(words) in completed.stdout


@needs_fifos
def test_failures_are_lines_on_stderr_and_a_number_in_the_summary(job: Job) -> None:
    broken = make_mixed(job)
    completed = job.run()
    assert_failed(completed, broken)
    assert "--crashrun 1" in completed.stderr
    (summary,) = completed.stdout.splitlines()
    assert "2 files" in summary
    assert "2 failed" in summary


@needs_fifos
def test_quiet_leaves_failures_only(job: Job) -> None:
    broken = make_mixed(job)
    completed = job.run("--quiet")
    assert_failed(completed, broken)
    assert completed.stdout == ""
    assert lines_with(completed.stderr, "notice") == []


@needs_fifos
def test_quiet_says_nothing_of_a_run_without_failures(job: Job) -> None:
    job.make("a.dat")
    os.mkfifo(job.folder / "fifo")
    assert job.run("--quiet") == Completed(0, "", "")


def test_verbose_says_a_line_for_each_file_on_stderr(job: Job) -> None:
    job.make("a.dat", "sub/b.dat")
    completed = job.run("--verbose", "--prefix", "daily/")
    assert completed.returncode == 0
    assert completed.stdout.count("\n") == 1
    for name in ("a.dat", "sub/b.dat"):
        (line,) = lines_with(completed.stderr, str(job.folder / name))
        assert f"s3://{job.bucket}/daily/{name}" in line


def test_summary_comes_when_the_run_is_stopped_after_the_plan(job: Job) -> None:
    job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), operation="PutObject"))
    completed = job.run()
    assert_stopped(completed, "NoSuchBucket")
    (summary,) = completed.stdout.splitlines()
    assert "0 files" in summary
    assert "2 not yet sent" in summary


def test_no_summary_when_there_is_no_plan(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="CreateBucket"))
    assert job.run().stdout == ""


NASTY = "red\x1b[31m bell\x07 line\nfeed c1\x9b31m bidi\u202e del\x7f"


@needs_odd_names
@pytest.mark.parametrize("arguments", [["--verbose"], ["--dryrun"], ["--no-follow-symlinks"]])
def test_control_characters_do_not_reach_the_terminal(job: Job, arguments: list[str]) -> None:
    job.make(f"file {NASTY}")
    (job.folder / f"broken {NASTY}").symlink_to("missing")
    os.mkfifo(job.folder / f"fifo {NASTY}")
    completed = job.run(*arguments)
    said = completed.stdout + completed.stderr
    assert re.findall(r"[^\x20-\x7e\n]", said) == []
    assert said.count("broken red\\x1b") == 1
    assert [line for line in said.splitlines() if line.startswith("feed")] == []


def test_control_characters_of_arguments_do_not_reach_the_terminal(job: Job) -> None:
    completed = job.run("--backupfolder", f"missing {NASTY}", "--statefile", f"state {NASTY}")
    assert completed.returncode == 2
    assert re.findall(r"[^\x20-\x7e\n]", completed.stderr) == []


def test_control_characters_of_the_server_do_not_reach_the_terminal(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied", "no\u202e\x7fno"), operation="PutObject"))
    completed = job.run()
    assert_stopped(completed, "AccessDenied")
    assert re.findall(r"[^\x20-\x7e\n]", completed.stderr) == []


# --- Streams ---------------------------------------------------------------------------------


@needs_shell
@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param(">/dev/full", marks=needs_full_device),
        ">&-",
        pytest.param("2>/dev/full", marks=needs_full_device),
        "2>&-",
        "<&-",
    ],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_streams_that_cannot_be_written_do_not_matter(
    job: Job, redirection: str, is_mixed: bool
) -> None:
    job.make("a.dat", "b.dat")
    if is_mixed:
        make_mixed(job)
    completed = job.run("--verbose", python_flags=shell(redirection))
    assert completed.returncode == int(is_mixed)
    assert set(job.objects()) == {"a.dat", "b.dat"}
    assert job.state() == {
        **{"a.dat": 1, "b.dat": 1},
        **({"broken-1": 0, "broken-2": 0} if is_mixed else {}),
    }


@needs_shell
def test_messages_for_a_closed_stderr_do_not_get_into_stdout(job: Job) -> None:
    make_mixed(job)
    assert job.run(python_flags=shell("2>&-")).stdout.count("\n") == 1


@needs_shell
def test_usage_error_without_streams(job: Job) -> None:
    assert job.run("--crashrun", "2", python_flags=shell(">&- 2>&-")).returncode == 2


def test_reader_of_stdout_that_went_away_does_not_matter(job: Job) -> None:
    job.make("a.dat")
    process = job.start()
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert finish(process).returncode == 0
    assert job.state() == {"a.dat": 1}


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
    ids=str,
)
def test_unicode_names_where_the_terminal_knows_none(job: Job, env: dict[str, str]) -> None:
    files = job.make("ünïcode", "日本語 🎉")
    (job.folder / "zerbrochener Lünk").symlink_to("missing")
    completed = job.run("--verbose", env=env)
    assert completed.returncode == 1
    assert len(lines_with(completed.stderr, "failed: ")) == 1
    assert job.objects() == files
    assert job.state() == {**dict.fromkeys(files, 1), "zerbrochener Lünk": 0}


def test_optimized_python_does_the_same(job: Job) -> None:
    files = job.make("a.dat")
    assert_clean(job.run(python_flags=["-OO"]))
    assert job.objects() == files
    assert job.run("--help", python_flags=["-OO"]).returncode == 0


def test_nothing_deprecated_is_used(job: Job) -> None:
    job.make("a.dat")
    (job.folder / "parts").write_bytes(bytes(11 * MIB))
    flags = [f"-Werror::{kind}:__main__" for kind in ("DeprecationWarning", "FutureWarning")]
    assert_clean(job.run(*PARTS, python_flags=flags))
