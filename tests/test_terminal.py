"""What a run prints, on which stream, and what becomes of it where nobody can read it."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import IO

import pytest
from support.checks import assert_clean, assert_failed, assert_stopped, lines_with
from support.faults import Fault, answer
from support.job import Job, shell
from support.script import Completed, finish, wait_until
from support.systems import needs_fifos, needs_full_device, needs_odd_names, needs_shell

# --- Output ----------------------------------------------------------------------------------


def make_mixed(job: Job) -> list[Path]:
    """Write two files, a FIFO and two broken links; return the paths of the links."""
    job.make("a.dat", "b.dat")
    os.mkfifo(job.folder / "fifo")
    broken = [job.folder / "broken-1", job.folder / "broken-2"]
    for path in broken:
        path.symlink_to("missing")
    return broken


def test_the_summary_says_what_was_sent(job: Job) -> None:
    job.make("a.dat")
    job.path("b.dat").write_bytes(bytes(1_500_000 - len(b"bytes of a.dat")))
    completed = job.run("--prefix", "daily/")
    assert_clean(completed)
    what = f"sent 2 files, 1.5 MB to s3://{job.bucket}/daily/ in "
    assert completed.stdout.startswith(what)
    assert completed.stdout.endswith(f"; 0 failed; state: {job.state_path}\n")


@needs_fifos
def test_failures_are_lines_on_stderr_and_a_number_in_the_summary(job: Job) -> None:
    broken = make_mixed(job)
    completed = job.run()
    assert_failed(completed, broken)
    lines = completed.stderr.splitlines()
    assert len(lines) == 4  # the notice of the FIFO, two failures, and what to do
    assert lines_with(completed.stderr, "notice: ") == [lines[0]]
    assert "--crashrun 1" in lines[-1]
    (summary,) = completed.stdout.splitlines()
    assert summary.startswith("sent 2 files, ")
    assert "; 2 failed; " in summary


@pytest.mark.parametrize("options", [(), ("--quiet",)], ids=["plain", "quiet"])
def test_reasons_are_counted_where_the_failures_do_not_fit_on_a_screen(
    job: Job, options: tuple[str, ...]
) -> None:
    job.folder.mkdir(exist_ok=True)
    for number in range(19):
        (job.folder / f"broken-{number}").symlink_to("missing")
    (job.folder / "loop").symlink_to("loop")
    completed = job.run(*options)
    assert len(lines_with(completed.stderr, "failed: ")) == 20
    assert lines_with(completed.stderr, " of the ") == []

    (job.folder / "one-more").symlink_to("missing")
    completed = job.run(*options)
    assert len(lines_with(completed.stderr, "failed: ")) == 21
    (said,) = lines_with(completed.stderr, " of the ")  # one of a kind stands above
    why = "its link is broken: no such file or directory; fix it, or leave it out with --exclude"
    assert said == f"20 of the 21 failures: {why}"


@needs_fifos
def test_quiet_leaves_failures_only(job: Job) -> None:
    broken = make_mixed(job)
    completed = job.run("--quiet")
    assert_failed(completed, broken)
    assert completed.stdout == ""
    assert lines_with(completed.stderr, "notice") == []
    for path in broken:
        path.unlink()
    assert job.run("--quiet") == Completed(0, "", "")


def test_verbose_says_a_line_for_each_file_on_stderr(job: Job) -> None:
    job.make("a.dat", "sub/b.dat")
    completed = job.run("--verbose", "--prefix", "daily/")
    assert completed.returncode == 0
    assert completed.stdout.count("\n") == 1
    for name in ("a.dat", "sub/b.dat"):
        (line,) = lines_with(completed.stderr, str(job.folder / name))
        assert f"s3://{job.bucket}/daily/{name}" in line


NASTY = "red\x1b[31m bell\x07 line\nfeed c1\x9b31m bidi\u202e del\x7f"


@needs_odd_names
def test_control_characters_do_not_reach_the_terminal(job: Job) -> None:
    job.make(f"file {NASTY}")
    (job.folder / f"broken {NASTY}").symlink_to("missing")
    os.mkfifo(job.folder / f"fifo {NASTY}")
    job.proxy.add_fault(Fault(answer(400, "Odd\u202e\n", "no\u202e\x7fno"), operation="PutObject"))
    for arguments in (["--verbose"], ["--dryrun"], ["--no-follow-symlinks"]):
        completed = job.run(*arguments)
        assert completed.returncode == 1 or "--no-follow-symlinks" in arguments
        said = completed.stdout + completed.stderr
        assert re.findall(r"[^\x20-\x7e\n]", said) == []
        assert said.count("broken red\\x1b") == 1
        assert [line for line in said.splitlines() if line.startswith("feed")] == []


def test_control_characters_of_arguments_do_not_reach_the_terminal(job: Job) -> None:
    completed = job.run("--backupfolder", f"missing {NASTY}", "--statefile", f"state {NASTY}")
    assert completed.returncode == 2
    assert re.findall(r"[^\x20-\x7e\n]", completed.stderr) == []


# --- Streams ---------------------------------------------------------------------------------


@needs_shell
@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param(">/dev/full 2>/dev/full", marks=needs_full_device),
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
    ],
)
@pytest.mark.few(2)
def test_streams_that_cannot_be_written_do_not_matter(job: Job, redirection: str) -> None:
    make_mixed(job)
    completed = job.run("--verbose", python_flags=shell(redirection))
    assert completed.returncode == 1
    # Nor do messages for a stream that is closed get into another.
    assert completed.stdout.count("\n") == (redirection == "2>&-")
    assert set(job.in_bucket()) == {"a.dat", "b.dat"}
    assert job.state() == {"a.dat": 1, "b.dat": 1, "broken-1": 0, "broken-2": 0}
    for name in ("broken-1", "broken-2"):
        job.path(name).unlink()
    assert job.run(python_flags=shell(redirection)).returncode == 0


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


@needs_shell
@needs_full_device
@pytest.mark.parametrize(
    "what", [("--dryrun",), ("--verify",), ("--verify", "folder")], ids=" ".join
)
def test_a_list_that_cannot_be_written_is_an_error(job: Job, what: tuple[str, ...]) -> None:
    job.back_up("a.dat")
    completed = job.run(*what, python_flags=shell(">/dev/full"))
    assert_stopped(completed, "stdout", "no space left")
    assert job.state() == {"a.dat": 1}


def waiting_bytes(pipe: IO[str] | None) -> int:
    """The number of bytes that wait in a pipe for its reader."""
    import fcntl
    import termios

    assert pipe
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4), sys.byteorder)


@needs_fifos
@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_signal_ends_a_run_whose_output_nobody_reads(job: Job, stream: str) -> None:
    job.make("a.dat")
    for number in range(450):
        path = job.folder / f"{number:03}{'x' * 180}"
        path.symlink_to("missing" if stream == "stderr" else "a.dat")
    process = job.start() if stream == "stderr" else job.start("--dryrun")
    seen = [0, 1]

    def is_full() -> bool:  # and nothing more gets into it
        seen[:] = seen[1], waiting_bytes(getattr(process, stream))
        return seen[0] == seen[1] > 50_000

    wait_until(is_full, 60, "a full pipe")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert finish(process).returncode == 143
    if stream == "stderr":
        assert len(job.state()) == 451
