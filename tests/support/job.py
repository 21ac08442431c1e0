"""A backup job to try the script on: a folder, a bucket, and a proxy before the server."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .faults import Fault, answer
from .files import digests, make_files, md5
from .proxy import FaultProxy, Request
from .script import Completed, journal_of, kill_group, read_state, wait_until
from .servers import S3Server

NOBODY = 65534

Run = Callable[..., Completed]
Start = Callable[..., "subprocess.Popen[str]"]


@dataclass
class Job:
    """One backup job; `options` are those of each of its runs.

    `server` is looked at to see what came of a run; `endpoint` is that server as the script sees
    it, through `proxy`.
    """

    server: S3Server
    endpoint: S3Server
    proxy: FaultProxy
    bucket: str
    folder: Path
    state_path: Path
    _run: Run
    _start: Start
    options: tuple[str, ...] = ()

    # --- Runs --------------------------------------------------------------------------------

    def arguments(self, *more: str | Path) -> list[str | Path]:
        """The script's arguments: the last of an option that is given twice counts."""
        names = ("--bucketname", self.bucket, "--backupfolder", self.folder)
        return [*names, "--statefile", self.state_path, *self.options, *more]

    def run(self, *more: str | Path, **options: Any) -> Completed:
        """Run the script to its end; `options` are those of `run_script`."""
        return self._run(*self.arguments(*more), **{"server": self.endpoint, **options})

    def run_plainly(self, *arguments: str | Path, **options: Any) -> Completed:
        """Run the script with these arguments and no others."""
        return self._run(*arguments, **{"server": self.endpoint, **options})

    def crash_run(self, *more: str | Path, **options: Any) -> Completed:
        """Run the script with --crashrun 1."""
        return self.run("--crashrun", "1", *more, **options)

    def start(self, *more: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start the script; `finish` waits for it."""
        return self._start(*self.arguments(*more), **{"server": self.endpoint, **options})

    # --- The folder --------------------------------------------------------------------------

    def make(self, *names: str) -> dict[str, bytes]:
        """Write files that each hold their own name; return them by key."""
        files = {name: f"bytes of {name}".encode() for name in names}
        self.write(files)
        return files

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, given by their paths below the folder."""
        make_files(self.folder, files)

    def path(self, key: str) -> Path:
        """The file whose object has that key."""
        return self.folder / key

    def in_folder(self) -> dict[str, str]:
        """The MD5 of each file in the folder, by key."""
        files = {path for path in self.folder.rglob("*") if path.is_file()}
        return {p.relative_to(self.folder).as_posix(): md5(p.read_bytes()) for p in files}

    # --- The state file ----------------------------------------------------------------------

    @property
    def endpoint_name(self) -> str:
        """How the state names the server."""
        is_aws = self.endpoint.https_proxy is not None
        return "amazonaws.com" if is_aws else self.endpoint.endpoint_url.partition("//")[2]

    def entries(self) -> list[dict[str, Any]]:
        """The entries of the state file."""
        return read_state(self.state_path)

    def entry(self, key: str) -> dict[str, Any]:
        """The one entry of a key."""
        (entry,) = (entry for entry in self.entries() if entry["filename"] == key)
        return entry

    def state(self) -> dict[str, int]:
        """What the state file says of each key."""
        return {entry["filename"]: entry["uploadedSuccess"] for entry in self.entries()}

    def uploaded(self) -> set[str]:
        """The keys that the state calls uploaded."""
        return {key for key, uploaded in self.state().items() if uploaded == 1}

    def errors(self) -> dict[str, str]:
        """The reasons in the state file, by key."""
        return {entry["filename"]: entry["error"] for entry in self.entries() if "error" in entry}

    def pending_entry(self, key: str, **changes: object) -> dict[str, object]:
        """An entry of a file that is not uploaded, with the original three fields or more."""
        entry = {"filepath": str(self.folder / key), "uploadedSuccess": 0, "filename": key}
        return {**entry, **changes}

    def write_state(self, *entries: object) -> bytes:
        """Write a state file and return its bytes."""
        self.state_path.write_text(json.dumps(list(entries)), encoding="utf-8")
        return self.state_path.read_bytes()

    def write_journal(
        self, *entries: object, state: bytes | None = None, torn: bytes = b""
    ) -> Path:
        """Write a journal beside the state, or one that continues other bytes; return its path."""
        crc32 = zlib.crc32(self.state_path.read_bytes() if state is None else state)
        lines = [json.dumps(entry) for entry in ({"crc32": crc32}, *entries)]
        path = journal_of(self.state_path)
        path.write_bytes("".join(f"{line}\n" for line in lines).encode() + torn)
        return path

    def uploaded_entry(self, key: str) -> dict[str, object]:
        """The entry of a file that was sent in one part as it is now."""
        status = self.path(key).stat()
        return self.pending_entry(
            key,
            uploadedSuccess=1,
            bucket=self.bucket,
            endpoint=self.endpoint_name,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            **({} if sys.platform == "win32" else {"ctime_ns": status.st_ctime_ns}),
            etag=md5(self.path(key).read_bytes()),
        )

    def back_up(self, *names: str) -> dict[str, bytes]:
        """Make files, and leave bucket and state as a run of the script would; return the files."""
        files = self.make(*names)
        for key, body in files.items():
            self.put(key, body)
        self.write_state(*(self.uploaded_entry(key) for key in sorted(files)))
        return files

    # --- The bucket --------------------------------------------------------------------------

    def create_bucket(self) -> None:
        """Create the bucket."""
        self.server.client().create_bucket(
            Bucket=self.bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )

    def objects(self) -> dict[str, bytes]:
        """What the bucket holds."""
        return self.server.objects(self.bucket)

    def in_bucket(self) -> dict[str, str]:
        """The MD5 of each object's bytes, by key."""
        return self.server.digests(self.bucket)

    def head(self, key: str) -> Any:
        """What the server says of an object."""
        return self.server.client().head_object(Bucket=self.bucket, Key=key)

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.server.client().delete_object(Bucket=self.bucket, Key=key)

    def put(self, key: str, body: bytes) -> None:
        """Put an object there that the script did not send."""
        self.server.client().put_object(Bucket=self.bucket, Key=key, Body=body)

    def open_uploads(self) -> list[tuple[str, str, int]]:
        """The multipart uploads in progress: key, upload id, number of parts so far."""
        return self.server.open_uploads(self.bucket)

    # --- What the proxy saw ------------------------------------------------------------------

    def requests(self, *operations: str, since: int = 0) -> list[Request]:
        """The requests of these operations, without those of before (see `seen`)."""
        return [r for r in self.proxy.requests[since:] if r.operation in operations]

    def seen(self) -> int:
        """The number of all requests so far, for `since`."""
        return len(self.proxy.requests)

    def puts(self, since: int = 0) -> list[str]:
        """The keys of the PutObject requests, in their order."""
        return [request.key for request in self.requests("PutObject", since=since)]

    def sent(self, since: int = 0) -> list[str]:
        """The keys of the uploads that were begun, in one part or in several, sorted."""
        begun = self.requests("PutObject", "CreateMultipartUpload", since=since)
        return sorted(request.key for request in begun)

    def sent_parts(self, since: int = 0) -> list[int]:
        """The numbers of the parts that were sent, sorted."""
        return sorted(r.part_number or 0 for r in self.requests("UploadPart", since=since))

    def refuse(self, *keys: str) -> None:
        """Have the server refuse these keys until the proxy's faults are cleared."""
        for operation in ("PutObject", "CreateMultipartUpload"):
            refusal = answer(400, "EntityTooLarge")
            self.proxy.add_fault(Fault(refusal, operation=operation, key=lambda key: key in keys))

    def wait_for(self, operation: str, count: int = 1, *, answered: bool = False) -> None:
        """Wait until so many requests of an operation have come, or have been answered with 200."""
        wait_until(
            lambda: sum(r.status == 200 or not answered for r in self.requests(operation)) >= count,
            60,
            f"{count} x {operation}",
        )

    # --- Checks ------------------------------------------------------------------------------

    def check_all_is_there(self) -> None:
        """Check that the bucket and the state hold all of the folder, and nothing else."""
        there = self.in_folder()
        assert self.in_bucket() == there
        assert self.state() == dict.fromkeys(there, 1)

    def check_holds(self, files: Mapping[str, bytes]) -> None:
        """Check that the bucket holds these files, and nothing else."""
        assert self.in_bucket() == digests(files)

    def check_state_is_true(self) -> None:
        """Check that the bucket holds the bytes of each file that the state calls uploaded."""
        local, bucket = self.in_folder(), self.in_bucket()
        wrong = {key for key in self.uploaded() if bucket.get(key) != local[key]}
        assert wrong == set()

    def check_no_leftovers(self) -> None:
        """Check that a run left nothing beside the state but its lock."""
        name = self.state_path.name
        assert {path.name for path in self.state_path.parent.iterdir()} <= {name, f"{name}.lock"}

    def check_failed(self, completed: Completed, *keys: str, said: str) -> None:
        """Check that exactly these files failed, each with a line that says so and why."""
        assert completed.returncode == 1, completed.stderr
        lines = [line for line in completed.stderr.splitlines() if line.startswith("failed: ")]
        starts = [f"failed: {self.path(key)}: " for key in sorted(keys)]
        assert len(lines) == len(starts), completed.stderr
        for line, start in zip(sorted(lines), starts, strict=True):
            assert line.startswith(start)
            assert said in line, completed.stderr
        assert set(self.state()) - self.uploaded() == set(keys)
        errors = self.errors()
        assert all(said in errors[key] for key in keys)


def with_state(job: Job, name: str) -> Job:
    """The same job with another state file beside its own."""
    return replace(job, state_path=job.state_path.with_name(name))


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a run as a power cut would, and wait until it is gone."""
    kill_group(process)
    process.communicate()


def named(process: subprocess.Popen[str]) -> str:
    """How the script names the process of a run."""
    # In a virtual environment on Windows, it is the child of the one that was started.
    return "process " if sys.platform == "win32" else f"process {process.pid}"


def shell(redirection: str) -> list[str]:
    """Python flags that start the script anew with a redirection such as `>/dev/full`."""
    command = f'exec "$0" "$@" {redirection}'
    arguments = "['sh', '-c', command, sys.executable, *sys.argv[1:]]"
    return ["-c", f"import os, sys; command = {command!r}; os.execvp('sh', {arguments})"]
