"""What a person sees at a terminal: the progress line, and what is printed while it is there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
from support.faults import Fault, answer, call, delay
from support.files import IN_PARTS, MIB, small_files, some_bytes
from support.job import Job
from support.kills import left_in_parts
from support.proxy import Request
from support.screen import Frame, Terminal, wrapped
from support.script import launch_for, shared_folder

if sys.platform == "win32":
    pytest.skip("POSIX only: pseudo-terminals", allow_module_level=True)


# So many columns have room for all of the numbers.
ROOMY = 80
SIZE = r"(?:[\d,]+ B|[\d,]+\.\d [kMGT]B)"
PROGRESS = re.compile(
    r"(?P<files>[\d,]+)/(?P<all_files>[\d,]+) files"
    rf"(?:  (?P<size>{SIZE})/(?P<all_size>{SIZE}))?"
    r"(?:  (?P<percent>\d+)%)?"
    rf"(?:  (?P<rate>{SIZE})/s)?"
    r"(?:  (?P<left>\d+:[\d:,]+) left)?"
    r"(?:  (?P<failed>[\d,]+) failed)?"
)
PLANNING = re.compile(
    "looking for the bucket|saving the state|"
    r"[\d,]+ files found|objects listed: [\d,]+|stopping(  requests in flight have 3 seconds)?"
)
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

DRAWS_PER_SECOND = 10
# What the reading of the terminal may be late, when its first draw is taken for a later one.
LATE_SECONDS = 0.5


Show = Callable[..., Terminal]


@pytest.fixture
def show(job: Job) -> Iterator[Show]:
    """Starts a run of the job on a terminal of its own."""
    launch = launch_for(None)
    with ExitStack() as terminals:

        def show(
            *args: str | Path,
            columns: int = 80,
            env: dict[str, str] | None = None,
            stdout: IO[bytes] | None = None,
            stderr: IO[bytes] | None = None,
        ) -> Terminal:
            terminal = terminals.enter_context(Terminal(columns))
            home = {"HOME": str(shared_folder() / "home"), "PATH": os.environ["PATH"]}
            terminal.start(
                [launch.python, launch.script, *job.arguments(*args)],
                cwd=job.folder.parent,
                env={**home, **launch.environment, **job.endpoint.environment(), **(env or {})},
                stdout=stdout,
                stderr=stderr,
            )
            return terminal

        yield show


# --- What is on the screen -------------------------------------------------------------------


def is_progress(frame: Frame) -> bool:
    """Whether the cursor is on the line of the uploads' progress."""
    return bool(PROGRESS.fullmatch(frame.line))


def progress(terminal: Terminal) -> list[dict[str, str | None]]:
    """The numbers of each line of progress, one after the other."""
    matches = (PROGRESS.fullmatch(frame.line) for frame in terminal.frames)
    return [match.groupdict() for match in matches if match]


def numbers(lines: Sequence[dict[str, str | None]], name: str) -> list[float]:
    """One of these numbers, of all the lines that show it; sizes in bytes."""
    return [number(value) for line in lines if (value := line[name])]


def number(text: str) -> float:
    """The value of `1,234` or `1.5 MB`."""
    value, _, unit = text.replace(",", "").partition(" ")
    return float(value) * UNITS[unit or "B"]


def check_screen(terminal: Terminal) -> list[str]:
    """Check that each line was printed whole and nothing else stayed; return these lines.

    At every moment, above the cursor there are lines as they are in the end, and below it nothing.
    Where it is there is the progress line, shorter than the terminal is wide, or what is
    printed there, or nothing.
    """
    printed = terminal.printed()
    torn = [
        line for line in printed if re.search(r"\d/[\d,]+ files|files found|looking|saving", line)
    ]
    assert torn == []
    last = terminal.rows()
    assert last == wrapped(printed, terminal.screen.columns)
    for frame in terminal.frames:
        before = [row[: frame.columns].rstrip() for row in last[: frame.row]]
        assert list(frame.rows[: frame.row]) == before
        assert not any(frame.rows[frame.row + 1 :])
        if is_progress(frame) or PLANNING.fullmatch(frame.line):
            assert len(frame.line) < frame.columns
        elif frame.line:
            assert frame.line == last[frame.row]
    return printed


def check_numbers(lines: Sequence[dict[str, str | None]]) -> None:
    """Check that what is done never goes back, nor beyond what there is."""
    assert lines
    for name, most in (("files", "all_files"), ("size", "all_size")):
        done = numbers(lines, name)
        assert done == sorted(done)
        assert len(set(numbers(lines, most))) <= 1
        assert max(done, default=0) <= max(numbers(lines, most), default=0)
    percents = numbers(lines, "percent")
    assert percents == sorted(percents)
    assert max(percents) <= 100


def check_lines(printed: Sequence[str], *expected: str) -> None:
    """Check that just these lines were printed, given as regular expressions, in any order."""
    rest = list(printed)
    for pattern in expected:
        fitting = [line for line in rest if re.fullmatch(pattern, line)]
        assert fitting, f"no line is {pattern!r}:\n" + "\n".join(rest)
        rest.remove(fitting[0])
    assert rest == []


def summary(job: Job, files: int, failed: int = 0, left: int = 0) -> str:
    """What the summary of a run is."""
    what = f"{files:,} file{'' if files == 1 else 's'}, {SIZE} to s3://{job.bucket}/"
    counts = f"{failed:,} failed" + (f", {left:,} not yet sent" if left else "")
    state = re.escape(str(job.state_path))
    return rf"sent {what} in \d+\.\d s \({SIZE}/s\); {counts}; state: {state}"


def failure(job: Job, key: str, why: str = ".+") -> str:
    """What the line of a failure is."""
    return f"failed: {re.escape(str(job.folder / key))}: {why}"


CRASH_RUN = "s3FileTransfer: some files are not in the bucket; fix what is named above, "
CRASH_RUN += "then use --crashrun 1"
INTERRUPTED = "s3FileTransfer: interrupted; the state is saved; send the rest with --crashrun 1"


# --- The progress line -----------------------------------------------------------------------


def is_denied(key: str) -> bool:
    """One in ten of the small files, not the first."""
    return key.endswith("7.dat")


@pytest.fixture
def eventful(job: Job) -> list[str]:
    """A backup that takes a few seconds, with failures and notices; the lines it prints."""
    files = small_files(120)
    job.write(files)
    (job.folder / "broken").symlink_to("nowhere")
    os.mkfifo(job.folder / "d3" / "fifo")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), key=is_denied))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    failed = [key for key in [*files, "broken"] if key == "broken" or is_denied(key)]
    return [
        f"notice: .+: {re.escape(str(job.folder))}/d3/fifo",
        *(failure(job, key) for key in failed),
        summary(job, len(files) + 1 - len(failed), failed=len(failed)),
        CRASH_RUN,
    ]


@pytest.mark.parametrize("columns", [pytest.param(40, marks=pytest.mark.long), ROOMY])
def test_progress_fits_and_leaves_nothing_behind(
    job: Job, show: Show, eventful: list[str], columns: int
) -> None:
    terminal = show("--max-concurrency", "8", columns=columns)
    assert terminal.finish() == 1
    check_lines(check_screen(terminal), *eventful)
    lines = progress(terminal)
    check_numbers(lines)
    assert set(numbers(lines, "all_files")) == {120}
    assert max(numbers(lines, "files")) > 60
    assert max(numbers(lines, "percent")) > 60
    if columns >= ROOMY:
        check_all_is_shown(lines)


def check_all_is_shown(lines: Sequence[dict[str, str | None]]) -> None:
    """Check that a line that has room for all of the numbers shows them."""
    assert any(all(line.values()) for line in lines)
    assert all(line["size"] and line["all_size"] and line["percent"] for line in lines)
    assert max(numbers(lines, "failed")) > 8
    assert max(numbers(lines, "rate")) > 0


def test_progress_is_drawn_ten_times_a_second_at_most(job: Job, show: Show) -> None:
    job.write(small_files(320))
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    terminal = show("--max-concurrency", "8")
    assert terminal.finish() == 0
    drawn = [frame.at for frame in terminal.frames if is_progress(frame)]
    seconds = drawn[-1] - drawn[0] + LATE_SECONDS
    assert 10 < len(drawn) <= seconds * DRAWS_PER_SECOND + 1
    check_screen(terminal)


def test_what_a_run_does_before_it_sends_is_shown(job: Job, show: Show) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(delay(0.5), operation="HeadBucket"))
    terminal = show()
    assert terminal.finish() == 0
    lines = [frame.line for frame in terminal.frames]
    assert lines.index("looking for the bucket") < lines.index("saving the state")
    check_lines(check_screen(terminal), summary(job, 1))


@pytest.mark.parametrize("options", [IN_PARTS, ()], ids=["in-parts", "in-one-put"])
@pytest.mark.few(1)
def test_large_files_move_the_bytes_before_they_are_done(
    job: Job, show: Show, options: tuple[str, ...]
) -> None:
    job.write({f"large-{n}": some_bytes(n * 6 * MIB) for n in (1, 3)})
    terminal = show("--max-bandwidth", "8MB/s", *options)
    assert terminal.finish() == 0
    check_lines(check_screen(terminal), summary(job, 2))
    lines = progress(terminal)
    check_numbers(lines)
    under_way = [line for line in lines if line["files"] == "0"]
    sizes = set(numbers(under_way, "size"))
    assert len(sizes) > 5
    assert any(1e6 < size < 20e6 for size in sizes)
    assert any(line["left"] for line in under_way)


def test_the_time_left_of_large_files_is_that_of_their_bytes(job: Job, show: Show) -> None:
    job.write({f"large-{n}": some_bytes(8 * MIB) for n in range(4)})
    terminal = show("--max-bandwidth", "10MB/s", *IN_PARTS)
    assert terminal.finish() == 0
    told = [line for line in progress(terminal) if line["left"]]
    assert any(line["files"] == "2" for line in told)
    for line in told:
        (size,), (total,), (rate,) = (
            numbers([line], name) for name in ("size", "all_size", "rate")
        )
        minutes, _, seconds = (line["left"] or "").partition(":")
        assert int(minutes) * 60 + int(seconds) <= (total - size) / rate + 1, line


@pytest.mark.parametrize("changed_to", [5_000_000, pytest.param(10, marks=pytest.mark.long)])
def test_a_file_that_has_another_size_than_planned_breaks_no_number(
    job: Job, show: Show, changed_to: int
) -> None:
    sizes = {f"{number:02}": 50_000 for number in range(20)}
    job.write({key: some_bytes(size) for key, size in sizes.items()})
    changed = job.folder / "10"

    def change(_: Request) -> None:
        changed.write_bytes(some_bytes(changed_to))

    job.proxy.add_fault(Fault(call(change), operation="PutObject", times=1))
    job.proxy.add_fault(Fault(delay(0.3), operation="PutObject"))
    terminal = show("--max-concurrency", "2", "--preferred-transfer-client", "classic")
    assert terminal.finish() == 0
    check_lines(check_screen(terminal), summary(job, 20))
    assert len(job.objects()["10"]) == changed_to
    lines = progress(terminal)
    for line in lines:
        assert number(line["size"] or "") <= number(line["all_size"] or "")
    assert max(numbers(lines, "percent")) <= 100
    assert numbers(lines, "files")[-1] > 15


def test_a_resumed_file_counts_what_is_there_but_not_in_the_rate(job: Job, show: Show) -> None:
    left_in_parts(job, kept=list(range(1, 10)), size=57 * MIB)
    terminal = show("--crashrun", "1", "--max-bandwidth", "5MB/s", *IN_PARTS)
    assert terminal.finish() == 0
    lines = progress(terminal)
    check_numbers(lines)
    assert max(numbers(lines, "size")) > 50e6
    assert max(numbers(lines, "rate")) < 10e6
    check_lines(check_screen(terminal), summary(job, 1))


def test_a_resumed_file_that_fails_takes_nothing_from_the_rate(job: Job, show: Show) -> None:
    job.write(small_files(20))
    left_in_parts(job, kept=[1, 2, 3], size=20 * MIB)
    refuse = Fault(answer(400, "InvalidRequest"), part_number=4)
    job.proxy.add_fault(refuse)
    job.proxy.add_fault(Fault(delay(0.3), operation="PutObject"))
    terminal = show("--crashrun", "1", "--max-concurrency", "4", *IN_PARTS)
    assert terminal.finish() == 1
    lines = progress(terminal)
    assert max(numbers(lines, "failed")) == 1
    assert all(line["rate"] for line in lines)
    check_lines(
        check_screen(terminal), failure(job, "large"), summary(job, 20, failed=1), CRASH_RUN
    )


# --- Other lines beside it -------------------------------------------------------------------


def test_lines_wider_than_the_terminal_wrap_and_are_whole(job: Job, show: Show) -> None:
    files = {f"{n:02}-{'long name ' * 20}": b"x" for n in range(30)}
    job.write(files)
    failed = [key for key in files if key[:2] in ("10", "15", "20")]
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), key=lambda key: key in failed))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    terminal = show("--max-concurrency", "2", columns=40)
    assert terminal.finish() == 1
    failures = (failure(job, key) for key in failed)
    check_lines(check_screen(terminal), *failures, summary(job, 27, failed=3), CRASH_RUN)
    assert progress(terminal)


def test_verbose_lists_whole_lines(job: Job, show: Show) -> None:
    files = small_files(60)
    job.write(files)
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    terminal = show("--verbose", "--max-concurrency", "6", columns=40)
    assert terminal.finish() == 0
    uploaded = [
        rf"uploaded: {re.escape(str(job.folder / key))} -> s3://{job.bucket}/{re.escape(key)} "
        rf"\({SIZE}, \d+\.\d s\)"
        for key in files
    ]
    check_lines(check_screen(terminal), *uploaded, summary(job, 60))
    check_numbers(progress(terminal))


def test_dry_run_lists_whole_lines(job: Job, show: Show) -> None:
    files = small_files(60)
    job.write(files)
    terminal = show("--dryrun", columns=40)
    assert terminal.finish() == 0
    listed = [
        rf"would upload: {re.escape(str(job.folder / key))} -> s3://{job.bucket}/{key} \({SIZE}\)"
        for key in files
    ]
    total = rf"dry run: would send 60 files, {SIZE}; 0 failed"
    check_lines(check_screen(terminal), *listed, total)


def test_verify_lists_whole_lines(job: Job, show: Show) -> None:
    job.back_up(*small_files(20))
    job.delete("d3/0003.dat")
    terminal = show("--verify")
    assert terminal.finish() == 1
    wrong = rf"wrong: s3://{job.bucket}/d3/0003\.dat \(of {job.folder}/d3/0003\.dat\): .+"
    verified = rf"verified in s3://{job.bucket}/: 19 files right, .+"
    repair = "s3FileTransfer: some files are not in the bucket; send them with --crashrun 1"
    check_lines(check_screen(terminal), wrong, verified, repair)


# --- The terminal changes, or the run is interrupted -----------------------------------------


def test_a_terminal_made_narrower_gets_lines_that_fit(job: Job, show: Show) -> None:
    job.write(small_files(200))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    terminal = show("--max-concurrency", "10", columns=120)
    terminal.wait_for(lambda f: len(f.line) > 50, "progress")
    terminal.resize(40)
    terminal.wait_for(lambda f: f.columns == 40 and "%" in f.line, "progress")
    terminal.resize(100)
    terminal.wait_for(lambda f: len(f.line) > 40, "progress")
    assert terminal.finish() == 0
    check_lines(check_screen(terminal), summary(job, 200))


def test_ctrl_c_leaves_a_clean_screen(job: Job, show: Show) -> None:
    job.write(small_files(200))
    job.proxy.add_fault(Fault(delay(0.3), operation="PutObject"))
    terminal = show("--max-concurrency", "10", columns=200)
    terminal.wait_for(lambda f: is_progress(f) and "left" in f.line, "progress")
    terminal.type("\x03")
    assert terminal.finish(10) == 130
    check_interrupted(job, terminal, files=200)


@pytest.mark.parametrize("spare", [1, 3])
@pytest.mark.few(1)
def test_ctrl_c_leaves_a_clean_screen_where_the_line_nearly_fills_it(
    job: Job, show: Show, spare: int
) -> None:
    job.write({"only": some_bytes(10_000)})
    job.proxy.add_fault(Fault(delay(2), operation="PutObject"))
    line = "0/1 files  0 B/10.0 kB  0%  0 B/s"
    terminal = show(columns=len(line) + spare)
    terminal.wait_for(is_progress, "progress")
    terminal.type("\x03")  # which the terminal shows as ^C, behind the line
    assert terminal.finish(10) == 130
    check_interrupted(job, terminal, files=1)


def check_interrupted(job: Job, terminal: Terminal, *, files: int) -> None:
    """Check what stays on the screen of a run that Ctrl-C has ended."""
    sent = sum(job.state().values())
    printed = terminal.printed()
    check_lines(printed, summary(job, sent, left=files - sent), INTERRUPTED)
    assert terminal.rows() == wrapped(printed, terminal.screen.columns)


# --- Where there is none ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "env", "is_quiet"),
    [
        (["--no-progress"], {}, False),
        (["--quiet"], {}, True),
        ([], {"TERM": "dumb"}, False),
        (["--no-progress", "--verbose"], {}, False),
        (["--dryrun", "--no-progress"], {}, False),
    ],
    ids=["no-progress", "quiet", "dumb", "verbose", "dryrun"],
)
@pytest.mark.few(2)
def test_no_progress_where_it_is_not_wanted(
    job: Job, show: Show, options: list[str], env: dict[str, str], is_quiet: bool
) -> None:
    job.write(small_files(30))
    (job.folder / "broken").symlink_to("nowhere")
    job.proxy.add_fault(Fault(delay(0.1), operation="PutObject"))
    terminal = show("--max-concurrency", "4", *options, env=env)
    assert terminal.finish() == 1
    assert_plain(terminal)
    printed = check_screen(terminal)
    check_lines([line for line in printed if line.startswith("failed")], failure(job, "broken"))
    assert is_quiet != any("30 files" in line for line in printed)


def assert_plain(terminal: Terminal) -> None:
    """Check that nothing was written but lines: no carriage return, no escape sequence."""
    assert b"\r" not in terminal.raw.replace(b"\r\n", b"\n")
    assert b"\x1b" not in terminal.raw


def test_no_progress_where_stderr_is_a_file(job: Job, show: Show, tmp_path: Path) -> None:
    job.write(small_files(30))
    (job.folder / "broken").symlink_to("nowhere")
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    with (tmp_path / "stderr").open("wb") as stderr:
        terminal = show("--max-concurrency", "4", stderr=stderr)
        assert terminal.finish() == 1
    said = (tmp_path / "stderr").read_bytes()
    assert b"\r" not in said
    check_lines(said.decode().splitlines(), failure(job, "broken"), CRASH_RUN)
    assert_plain(terminal)
    check_lines(check_screen(terminal), summary(job, 30, failed=1))


def test_progress_where_stdout_is_a_file(
    job: Job, show: Show, eventful: list[str], tmp_path: Path
) -> None:
    with (tmp_path / "stdout").open("wb") as stdout:
        terminal = show("--max-concurrency", "8", stdout=stdout)
        assert terminal.finish() == 1
    is_summary = [line.startswith("sent ") for line in eventful]
    check_lines((tmp_path / "stdout").read_text().splitlines(), eventful[is_summary.index(True)])
    check_lines(
        check_screen(terminal), *(line for line in eventful if not line.startswith("sent "))
    )
    check_numbers(progress(terminal))


def test_nothing_is_left_on_the_screen_of_a_run_that_has_nothing_to_say_there(
    job: Job, show: Show, tmp_path: Path
) -> None:
    job.write(small_files(30))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    with (tmp_path / "stdout").open("wb") as stdout:
        terminal = show("--max-concurrency", "4", stdout=stdout)
        assert terminal.finish() == 0
    assert progress(terminal)
    assert check_screen(terminal) == terminal.rows() == []
