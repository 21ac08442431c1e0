"""A terminal for the programs under test: a pty, and an emulation of the screen behind it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import pyte

from .script import wait_until

ROWS = 500  # so many that nothing is ever scrolled out of sight
ESCAPES = re.compile(rb"\x1b\[[\d;?]*[A-Za-z]")
# Makes standard input the controlling terminal, so that Ctrl-C and a new size come as signals.
CONTROLLING = (
    "import fcntl, os, sys, termios; "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Frame:
    """The screen at the end of a piece of output, from one carriage return to the next.

    `row` is the one with the cursor, `at` the time when the piece began to arrive.
    """

    at: float
    rows: tuple[str, ...]
    row: int
    columns: int

    @property
    def line(self) -> str:
        """The text where the cursor is."""
        return self.rows[self.row]


@dataclass(frozen=True)
class Cell:
    """A character on the screen, and how it is shown."""

    text: str
    colour: str
    is_bold: bool


class Terminal:
    """A terminal of so many columns that shows what one program writes.

    It is a context manager, which kills the program if it still runs at the end. Frames are taken
    where a carriage return comes, and not where a read happens to end: so the same output always
    makes the same frames.
    """

    def __init__(self, columns: int, rows: int = ROWS) -> None:
        self.frames: list[Frame] = []
        self.raw = b""
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._rows = [""] * rows
        self._piece_at = time.monotonic()
        self._is_cut = False
        self._lock = threading.Lock()
        self._master, self._slave = os.openpty()
        self._set_size()
        self._reader = threading.Thread(target=self._read)
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        """Start the program; its outputs go to this terminal where they have no file."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLING, *command],
            cwd=cwd,
            env={"TERM": "xterm-256color", **env},
            stdin=self._slave,
            stdout=stdout or self._slave,
            stderr=stderr or self._slave,
            start_new_session=True,
        )
        os.close(self._slave)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process:
            self._reader.join()
        os.close(self._master)

    def finish(self, timeout_seconds: float = 60) -> int:
        """Wait for the end of the program and of its output; return its exit code."""
        assert self._process
        returncode = self._process.wait(timeout_seconds)
        self._reader.join(timeout_seconds)
        assert not self._reader.is_alive(), "somebody still holds the terminal"
        assert b"Traceback" not in self.raw, self.raw.decode(errors="replace")
        return returncode

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._master, keys.encode())

    def resize(self, columns: int) -> None:
        """Make the terminal so wide, right after something was written; SIGWINCH tells of it.

        What is written next is then written for the new width. What was there is cut off, as in
        xterm, and makes no frame any more.
        """
        seen = len(self.raw)
        wait_until(lambda: len(self.raw) > seen, 30, "output")
        with self._lock:
            self.screen.resize(columns=columns)
            self._set_size()
            self._is_cut = True

    def wait_for(
        self, condition: Callable[[Frame], object], what: str, timeout_seconds: float = 30
    ) -> Frame:
        """Wait until a frame, from now on, fits the condition; return it."""
        seen = len(self.frames)

        def found() -> Frame | None:
            return next((frame for frame in self.frames[seen:] if condition(frame)), None)

        return wait_until(found, timeout_seconds, what)

    def rows(self) -> list[str]:
        """The rows of the screen as it is now, down to the last with text."""
        with self._lock:
            rows = self._rendered()
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def cells(self) -> list[list[Cell]]:
        """The same rows, with their colours; each ends with its last character."""
        with self._lock:
            texts = self._rendered()
            while texts and not texts[-1]:
                texts.pop()
            rows = [
                [self.screen.buffer[number][column] for column in range(len(text))]
                for number, text in enumerate(texts)
            ]
        return [[Cell(char.data, char.fg, char.bold) for char in row] for row in rows]

    def printed(self) -> list[str]:
        """The lines that were written and ended, each as what followed its last carriage return."""
        lines = ESCAPES.sub(b"", self.raw).replace(b"\r\n", b"\n").split(b"\n")[:-1]
        return [line.rpartition(b"\r")[2].decode() for line in lines]

    def _set_size(self) -> None:
        # As high as most: a program that asked for more would not notice.
        size = struct.pack("HHHH", 24, self.screen.columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        while data := self._next_bytes():
            with self._lock:
                self.raw += data
                for piece in re.split(rb"(\r)", data):
                    if piece == b"\r":
                        self._take_frame()
                    self._stream.feed(piece)
        with self._lock:
            self._take_frame()

    def _next_bytes(self) -> bytes:
        try:
            return os.read(self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that nobody has it open any more
                raise
            return b""

    def _take_frame(self) -> None:
        rows, cursor = self._rendered(), self.screen.cursor
        if not self._is_cut:
            self.frames.append(Frame(self._piece_at, tuple(rows), cursor.y, self.screen.columns))
        self._is_cut = False
        self._piece_at = time.monotonic()

    def _rendered(self) -> list[str]:
        for number in self.screen.dirty:
            row = self.screen.buffer[number]
            cells = (row[column].data for column in range(self.screen.columns))
            self._rows[number] = "".join(cells).rstrip()
        self.screen.dirty.clear()
        return list(self._rows)


def wrapped(lines: Sequence[str], columns: int) -> list[str]:
    """The rows that a terminal makes of lines of narrow characters."""
    rows: list[str] = []
    for line in lines:
        starts = range(0, max(len(line), 1), columns)
        rows += [line[start : start + columns].rstrip() for start in starts]
    return rows
