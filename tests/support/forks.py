"""Starts the script in a fork of a process that has imported boto3 already, on Linux.

Each of some seven hundred runs would spend most of its time in that import. What such a run is
told, and how it is waited for and killed, is the same as of a program that was started; see
`fork_server` for what differs inside. With --long every run is started as a program.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("fork_server.py")
TEXT_PIPES: dict[str, Any] = {
    **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
    "text": True,
    "encoding": "utf-8",
    "errors": "surrogateescape",
}
# What Python itself looks at when it starts.
PYTHON_READS = ("PYTHON", "LC_", "LANG", "LD_", "TZ")
# A module in PYTHONPATH that Python imports when it starts: a fork imports it, too.
SITE_MODULE = "sitecustomize.py"

Command = tuple[Path, Path]  # an interpreter and a script

is_wanted = sys.platform == "linux" and hasattr(os, "pidfd_open")
_lock = threading.Lock()


def can_run(env: Mapping[str, str]) -> bool:
    """Whether a fork has all that a run in this environment inherits."""
    return (
        is_wanted
        and not any(name.startswith(PYTHON_READS) for name in env.keys() - _site_of(env))
        and signal.SIG_IGN not in map(signal.getsignal, (signal.SIGHUP, signal.SIGTERM))
    )


def _site_of(env: Mapping[str, str]) -> set[str]:
    """The variable that leads to a folder with nothing in it but the site module, if there is."""
    folder = Path(env.get("PYTHONPATH", ""))
    has_site = folder.is_absolute() and os.listdir(folder) == [SITE_MODULE]
    return {"PYTHONPATH"} if has_site else set()


@functools.cache
def _server(python: Path, script: Path) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [python, SERVER, script, str(theirs.fileno())],
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _ask(command: Command, request: object, files: tuple[int, ...] = ()) -> Any:
    with _lock:
        server = _server(*command)
        socket.send_fds(server, [json.dumps(request).encode()], files)
        answer = server.recv(1 << 16)
        assert answer, "the process that forks has ended; what it said is above"
        return json.loads(answer)


def start(
    python: Path,
    script: Path,
    *args: str | Path,
    cwd: Path,
    env: Mapping[str, str],
    user: int | None = None,
    before: str = "",
) -> subprocess.Popen[str]:
    """Start a script that is compiled, in a session of its own, as that user or as this one.

    `python` and all that it imports must be within reach of the user. `before` is code that the
    script's process runs first.
    """
    words = [os.fspath(arg) for arg in args]
    run = {"args": words, "cwd": os.fspath(cwd), "env": env, "user": user, "before": before}
    return Fork((python, script), words, run=run)


class Fork(subprocess.Popen[str]):
    """A run in a fork: a Popen whose process is the child of another one than this."""

    def __init__(self, command: Command, words: list[str], *, run: Mapping[str, object]) -> None:
        self._command, self._run = command, run
        super().__init__([*command, *words], **TEXT_PIPES)

    # The arguments are those of subprocess's own, by their places.
    def _execute_child(self, *arguments: Any) -> None:
        p2cread, _, _, c2pwrite, _, errwrite = arguments[10:16]
        try:
            self.pid = _ask(self._command, self._run, (p2cread, c2pwrite, errwrite))
        finally:
            for file in (p2cread, c2pwrite, errwrite):
                os.close(file)
        self._child_created = True
        self._pidfd = os.pidfd_open(self.pid)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        # Its process id is taken until the server is asked for the end.
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self._note_end()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._note_end()
        return self.returncode

    def _note_end(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(_ask(self._command, self.pid))
        os.close(self._pidfd)
