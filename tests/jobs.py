"""A backup job in a test: the script's usual arguments, and what came of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import Proxied
from fault_proxy import FaultProxy
from script_runner import Completed, make_files, read_state
from servers import S3Server

NOBODY = 65534
MIB = 1 << 20

Run = Callable[..., Completed]
Start = Callable[..., "subprocess.Popen[str]"]


@dataclass
class Job:
    """One backup job: calling it runs the script, through `proxy` once that was asked for."""

    server: S3Server
    bucket: str
    folder: Path
    state_path: Path
    _run: Run
    _start: Start
    _proxied: Proxied
    _proxy: tuple[FaultProxy, S3Server] | None = field(default=None)

    @property
    def proxy(self) -> FaultProxy:
        """The proxy before the server, for every run from now on."""
        if self._proxy is None:
            self._proxy = self._proxied(self.server)
        return self._proxy[0]

    @property
    def endpoint(self) -> S3Server:
        """The server as the script is to see it."""
        return self._proxy[1] if self._proxy else self.server

    def arguments(self, *more: str | Path) -> list[str | Path]:
        """The script's arguments: the last of an option that is given twice counts."""
        names = ("--bucketname", self.bucket, "--backupfolder", self.folder)
        return [*names, "--statefile", self.state_path, *more]

    def __call__(self, *more: str | Path, **options: Any) -> Completed:
        """Run the script to its end; `options` are those of `run_script`."""
        return self._run(*self.arguments(*more), **{"server": self.endpoint, **options})

    def start(self, *more: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start the script."""
        return self._start(*self.arguments(*more), **{"server": self.endpoint, **options})

    def crash_run(self, *more: str | Path, **options: Any) -> Completed:
        """Run the script with --crashrun 1."""
        return self("--crashrun", "1", *more, **options)

    def make(self, *names: str) -> dict[str, bytes]:
        """Write files that each hold their own name; return them by key."""
        files = {name: f"bytes of {name}".encode() for name in names}
        self.folder.mkdir(exist_ok=True)
        make_files(self.folder, files)
        return files

    def create_bucket(self) -> None:
        """Create the bucket."""
        self.server.client().create_bucket(
            Bucket=self.bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )

    def objects(self) -> dict[str, bytes]:
        """What the bucket holds."""
        return self.server.objects(self.bucket)

    def state(self) -> dict[str, int]:
        """What the state file says of each key."""
        return {entry["filename"]: entry["uploadedSuccess"] for entry in self.entries()}

    def entries(self) -> list[dict[str, Any]]:
        """The entries of the state file."""
        return read_state(self.state_path)

    def errors(self) -> dict[str, str]:
        """The reasons in the state file, by key."""
        return {entry["filename"]: entry["error"] for entry in self.entries() if "error" in entry}

    def puts(self) -> list[str]:
        """The keys of the put requests that the proxy has seen, in their order."""
        return [r.key for r in self.proxy.requests if r.operation == "PutObject"]

    def pending_entry(self, key: str, **changes: object) -> dict[str, object]:
        """An entry of a file that is not uploaded, with the original three fields or more."""
        entry = {"filepath": str(self.folder / key), "uploadedSuccess": 0, "filename": key}
        return {**entry, **changes}


def prelude(code: str) -> list[str]:
    """Python flags that run some code before the script, in its process.

    The script sees the command line that it would see without.
    """
    then = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return ["-c", f"{code}\n{then}"]


def shell(redirection: str) -> list[str]:
    """Python flags that start the script anew with a redirection such as `>/dev/full`."""
    command = f'exec "$0" "$@" {redirection}'
    arguments = "['sh', '-c', command, sys.executable, *sys.argv[1:]]"
    return ["-c", f"import os, sys; command = {command!r}; os.execvp('sh', {arguments})"]


def named(process: subprocess.Popen[str]) -> str:
    """How the script names the process of a run."""
    # In a virtual environment on Windows, it is the child of the one that was started.
    return "process " if sys.platform == "win32" else f"process {process.pid}"


def relative_paths(folder: Path) -> set[str]:
    """The files below a folder, as keys."""
    found = (Path(top, name) for top, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix() for path in found}


def lines_with(text: str, word: str) -> list[str]:
    """The lines that hold a word."""
    return [line for line in text.splitlines() if word in line]


def assert_stopped(completed: Completed, *words: str) -> None:
    """Check that a run ended with exit code 2 and one sentence that has these words."""
    assert completed.returncode == 2, completed
    said = [line for line in completed.stderr.splitlines() if line.startswith("s3FileTransfer: ")]
    assert len(said) == 1, completed.stderr
    for word in words:
        assert word.lower() in said[0].lower()


def assert_clean(completed: Completed) -> None:
    """Check that a run ended well: exit code 0, one line on stdout, nothing on stderr."""
    assert (completed.returncode, completed.stderr) == (0, ""), completed
    assert completed.stdout.count("\n") == 1


def assert_failed(completed: Completed, paths: Iterable[Path | str]) -> None:
    """Check for exit code 1, and for one line of failure for each of the paths and no other."""
    assert completed.returncode == 1, completed
    failures = [line for line in completed.stderr.splitlines() if line.startswith("failed: ")]
    missing = [str(path) for path in paths if not _has_line(failures, f"failed: {path}: ")]
    assert (missing, len(failures)) == ([], len(list(paths))), completed.stderr


def _has_line(lines: Sequence[str], start: str) -> bool:
    return any(line.startswith(start) and len(line) > len(start) for line in lines)
