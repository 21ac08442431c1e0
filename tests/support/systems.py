"""Marks for tests of what only some systems have; on Linux all of them run."""

from __future__ import annotations

import os
import sys

import pytest

from .script import is_root


def _not_on_windows(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(sys.platform == "win32", reason=f"POSIX only: {reason}")


def _on_linux(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(sys.platform != "linux", reason=f"Linux only: {reason}")


needs_permissions = _not_on_windows("a mode that keeps its owner out of a file")
needs_fifos = _not_on_windows("FIFOs, sockets and devices among the files")
needs_signals = _not_on_windows("SIGTERM, SIGHUP and SIGKILL as signals")
needs_shell = _not_on_windows("a shell that is sh")
needs_limits = _not_on_windows("resource limits")
needs_odd_names = _not_on_windows("control characters in names")
needs_replace_of_open_files = _not_on_windows("replacing a file that is open")
needs_limits_of_others = _on_linux("resource limits of another process")
needs_leases = _on_linux("leases of files")
needs_ctime = _not_on_windows("a time of the last change that nobody can set")
needs_full_device = _on_linux("/dev/full")
needs_long_paths = _on_linux("paths of more than 1,024 bytes")
needs_byte_names = _on_linux("names that are no text")

# Some tests look into the processes that a run has started.
needs_proc = _on_linux("/proc")
needs_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core, no lanes")
needs_root = pytest.mark.skipif(not is_root(), reason="only root may make a device")
needs_terminals = _not_on_windows("pseudo-terminals")
