"""Checks of how a run ended, and of what it said."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .script import Completed


def lines_with(text: str, word: str) -> list[str]:
    """The lines that hold a word."""
    return [line for line in text.splitlines() if word in line]


def assert_clean(completed: Completed) -> None:
    """Check that a run ended well: exit code 0, one line on stdout, nothing on stderr."""
    assert (completed.returncode, completed.stderr) == (0, ""), completed
    assert completed.stdout.count("\n") == 1


def assert_lost(completed: Completed, files: str) -> None:
    """Check that a run ended well, and said of how many files the objects were gone or others."""
    said = f" has lost or replaced objects (was it re-created?): {files} to send again\n"
    assert completed.returncode == 0, completed
    assert completed.stderr.count("\n") == 1
    assert completed.stderr.endswith(said)


def assert_replaced(completed: Completed, job: str) -> None:
    """Check that a run ended well, and said that the state file was of that job before."""
    assert completed.returncode == 0, completed
    (said,) = completed.stderr.splitlines()
    assert said.startswith(
        f"s3FileTransfer: the state file was another job's, and is replaced: {job}"
    )


def assert_stopped(completed: Completed, *words: str) -> None:
    """Check that a run ended with exit code 2 and one sentence, no more, that has these words."""
    assert completed.returncode == 2, completed
    (said,) = completed.stderr.splitlines()
    assert said.startswith("s3FileTransfer: ")
    for word in words:
        assert word.lower() in said.lower(), said


def assert_failed(completed: Completed, paths: Iterable[Path | str]) -> None:
    """Check for exit code 1, and for one line of failure for each of the paths and no other."""
    assert completed.returncode == 1, completed
    failures = lines_with(completed.stderr, "failed: ")
    unsaid = [path for path in paths if not any(_names(line, path) for line in failures)]
    assert (unsaid, len(failures)) == ([], len(list(paths))), completed.stderr


def _names(failure: str, path: Path | str) -> bool:
    start = f"failed: {path}: "
    return failure.startswith(start) and len(failure) > len(start)
