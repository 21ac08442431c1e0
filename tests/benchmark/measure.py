"""Run a program and measure what its whole process tree takes (Linux only: it reads /proc).

CPU time is what the kernel has booked, not a sample. A parent's rusage has its own time and that of
the children that it waited for. Children that were not waited for pass, when their parent dies, to
the nearest "child subreaper" above them. The benchmark makes itself one, waits for them too, and
adds theirs. Sampling sees what is left: children of a process that ignores SIGCHLD.

Memory is the sum of the resident memory of all processes of the tree, sampled every 50 ms. Pages
that several of them share, such as libraries, count once for each process. So a client made of
several processes is shown somewhat larger than it is, never smaller.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SAMPLE_INTERVAL_S = 0.05
# What a program's helpers (a fork server, say) get to end in, once the program itself has ended.
ORPHANS_GRACE_S = 10.0
ERROR_LENGTH = 120
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """What one run of a program took; `error` says why it does not count, None if it does."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    error: str | None


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that matter here."""

    parent: int
    session: int
    cpu_s: float
    rss_bytes: int


def become_subreaper() -> None:
    """Make this process the new parent of every orphan below it; OSError if that cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run_measured(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, timeout_s: float
) -> Usage:
    """Run a command with exactly this environment, its output in `log`, and measure it.

    A command that takes longer than `timeout_s` is killed. Its wall time ends when the process that
    was started ends, as a person at a terminal sees it.
    """
    others = all_pids()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with ProcessTree(process.pid, others=others) as tree:
        timer = threading.Timer(timeout_s, tree.kill)
        timer.start()
        try:
            _, status, rusage = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - started
        except BaseException:  # Ctrl-C above all: leave nothing running
            tree.kill()
            raise
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        orphans_cpu_s, lingering = reap_orphans(tree)
    booked_cpu_s = rusage.ru_utime + rusage.ru_stime + orphans_cpu_s
    return Usage(
        wall_s=wall_s,
        cpu_s=max(booked_cpu_s, tree.cpu_s),
        peak_rss_bytes=tree.peak_rss_bytes,
        error=error_of(
            process.returncode, timed_out=wall_s >= timeout_s, lingering=lingering, log=log
        ),
    )


def error_of(exit_code: int, *, timed_out: bool, lingering: bool, log: Path) -> str | None:
    """Why a run does not count, in a few words; None if it does."""
    if timed_out:
        return "took too long"
    if exit_code:
        lines = log.read_text(errors="replace").strip().splitlines()
        last_line = lines[-1] if lines else "no output"
        return f"exit code {exit_code}: {last_line[:ERROR_LENGTH]}"
    if lingering:
        return "left processes behind"
    return None


class ProcessTree:
    """A process and all that descend from it, followed by sampling /proc in a thread."""

    def __init__(self, root: int, *, others: set[int]) -> None:
        """`root` leads a session of its own; `others` are the processes that were there before."""
        self.peak_rss_bytes = 0
        self._root = root
        self._members = {root}
        self._strangers = others
        self._cpu_s: dict[int, float] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProcessTree:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes of the tree, each as last seen: a lower bound."""
        with self._lock:
            return sum(self._cpu_s.values())

    def sample(self) -> dict[int, Stat]:
        """Look at all processes of the tree; returns those that there are, by process id."""
        with self._lock:
            pids = all_pids()
            # Dead processes are forgotten, since their ids may be used again.
            self._strangers &= pids
            self._members &= pids
            # In the order of their start, more or less: parents come before their children.
            for pid in sorted(pids - self._strangers - self._members):
                self._classify(pid)
            stats = {pid: stat for pid in self._members if (stat := read_stat(pid))}
            self._cpu_s.update((pid, stat.cpu_s) for pid, stat in stats.items())
            rss_bytes = sum(stat.rss_bytes for stat in stats.values())
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)
            return stats

    def kill(self) -> None:
        """Kill all processes of the tree."""
        for pid in self.sample():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _classify(self, pid: int) -> None:
        stat = read_stat(pid)
        if stat is None:
            return
        # A new child of this process is an orphan of the tree: its parent died between two samples.
        if stat.session == self._root or stat.parent in (*self._members, os.getpid()):
            self._members.add(pid)
        else:
            self._strangers.add(pid)

    def _follow(self) -> None:
        while not self._end.wait(SAMPLE_INTERVAL_S):
            self.sample()


def reap_orphans(tree: ProcessTree) -> tuple[float, bool]:
    """Wait for what a tree's root left behind: its CPU seconds, and whether it had to be killed."""
    cpu_s = 0.0
    lingering = False
    deadline = time.monotonic() + ORPHANS_GRACE_S
    while stats := tree.sample():
        for pid, stat in stats.items():
            if stat.parent != os.getpid():
                continue
            reaped, _, rusage = os.wait4(pid, os.WNOHANG)
            if reaped:
                cpu_s += rusage.ru_utime + rusage.ru_stime
        if time.monotonic() > deadline:
            lingering = True
            tree.kill()
        time.sleep(0.01)
    return cpu_s, lingering


def all_pids() -> set[int]:
    """The ids of all processes that there are."""
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}


def read_stat(pid: int) -> Stat | None:
    """What /proc says of a process; None if there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets, which may hold spaces and brackets.
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu_s=(int(fields[11]) + int(fields[12])) / TICKS_PER_S,
        rss_bytes=int(fields[21]) * PAGE_BYTES,
    )


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a running process, all its threads, without its children."""
    stat = read_stat(pid)
    return stat.cpu_s if stat else 0.0
