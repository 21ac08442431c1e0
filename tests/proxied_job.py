"""A backup job to try the script on: a folder, a bucket, and a proxy before the server."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import Proxied
from fault_proxy import Action, Exchange, Request
from script_runner import Completed, finish, kill_group, make_files, read_state, wait_until
from servers import S3Server

Start = Callable[..., "subprocess.Popen[str]"]

MIB = 1024 * 1024
PART_BYTES = 5 * MIB
# What makes a file of 5 MiB and more a multipart upload, in the smallest parts that S3 takes.
IN_PARTS = ("--multipart-threshold", "5MiB", "--multipart-chunksize", "5MiB")
LARGE_BYTES = 2 * PART_BYTES + 1  # three parts


class ProxiedJob:
    """What the tests of a run have in common; `options` are those of each of its runs."""

    def __init__(
        self,
        server: S3Server,
        proxied: Proxied,
        *,
        bucket: str,
        folder: Path,
        start: Start,
        options: tuple[str, ...] = (),
    ) -> None:
        self.server = server
        self.proxy, self.proxied = proxied(server)
        self.bucket = bucket
        self.folder = folder
        self.state_path = folder.parent / "stateFile.json"
        self.client = server.client()
        self._start = start
        self._options = options
        self.client.create_bucket(
            Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )

    def make(self, files: Mapping[str, bytes]) -> None:
        """Write files in the folder, given by their relative paths."""
        make_files(self.folder, files)

    def path(self, key: str) -> Path:
        """The file whose object has that key."""
        return self.folder / key

    def start(self, *args: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a run through the proxy."""
        where = ("--bucketname", self.bucket, "--backupfolder", str(self.folder))
        return self._start(*where, *self._options, *args, server=self.proxied, env=env)

    def run(
        self, *args: str, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> Completed:
        """Run to the end."""
        return finish(self.start(*args, env=env), timeout=timeout)

    def crash_run(self, *args: str) -> Completed:
        """Run with --crashrun 1 to the end."""
        return self.run("--crashrun", "1", *args)

    def entries(self) -> dict[str, dict[str, Any]]:
        """The state's entries by key."""
        return {entry["filename"]: entry for entry in read_state(self.state_path)}

    def uploaded(self) -> set[str]:
        """The keys that the state calls uploaded."""
        return {key for key, entry in self.entries().items() if entry["uploadedSuccess"] == 1}

    def in_folder(self) -> dict[str, str]:
        """The MD5 of each file in the folder, by key."""
        files = {path for path in self.folder.rglob("*") if path.is_file()}
        return {p.relative_to(self.folder).as_posix(): md5(p.read_bytes()) for p in files}

    def in_bucket(self) -> dict[str, str]:
        """The MD5 of each object's bytes, by key."""
        return {key: md5(body) for key, body in self.server.objects(self.bucket).items()}

    def sent_parts(self) -> list[int]:
        """The numbers of the parts that were sent, sorted."""
        numbers = [request.part_number or 0 for request in self.requests("UploadPart")]
        return sorted(numbers)

    def requests(self, operation: str) -> list[Request]:
        """The requests of an operation so far."""
        return [request for request in self.proxy.requests if request.operation == operation]

    def wait_for(self, operation: str, count: int, *, answered: bool = False) -> None:
        """Wait until so many requests of an operation have come, or have been answered."""
        wait_until(
            lambda: sum(r.status == 200 or not answered for r in self.requests(operation)) >= count,
            30,
            f"{count} x {operation}",
        )

    def check_all_is_there(self) -> None:
        """Check that the bucket and the state hold all of the folder, and nothing else."""
        there = self.in_folder()
        assert self.in_bucket() == there
        assert self.uploaded() == set(self.entries()) == set(there)

    def check_state_is_true(self) -> None:
        """Check that the bucket holds the bytes of each file that the state calls uploaded."""
        local, bucket = self.in_folder(), self.in_bucket()
        wrong = {key for key in self.uploaded() if bucket.get(key) != local[key]}
        assert wrong == set()

    def check_failed(self, completed: Completed, *keys: str, said: str) -> None:
        """Check that exactly these files failed, each with a line that says so and why."""
        assert completed.returncode == 1, completed.stderr
        lines = [line for line in completed.stderr.splitlines() if line.startswith("failed: ")]
        starts = [f"failed: {self.path(key)}: " for key in sorted(keys)]
        assert len(lines) == len(starts), completed.stderr
        for line, start in zip(sorted(lines), starts, strict=True):
            assert line.startswith(start)
            assert said in line, completed.stderr
        entries = self.entries()
        assert set(entries) - self.uploaded() == set(keys)
        assert all(said in entries[key]["error"] for key in keys)


def md5(data: bytes) -> str:
    """The MD5 in hexadecimal digits."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def some_bytes(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that are the same for the same seed."""
    return random.Random(seed).randbytes(size_bytes)


def small_files(count: int, seed: int = 0) -> dict[str, bytes]:
    """Files of up to 2 kB by their paths, in some folders."""
    rng = random.Random(seed)
    return {f"d{n % 7}/{n:04}.dat": rng.randbytes(rng.randrange(2000)) for n in range(count)}


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a run as a power cut would, and wait until it is gone."""
    kill_group(process)
    process.communicate()


# --- More actions for the proxy --------------------------------------------------------------


def set_headers(headers: Mapping[str, str]) -> Action:
    """Set some headers of the server's answer."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        for name, value in headers.items():
            answer.set_header(name, value)
        exchange.reply(answer)

    return act


def replace_in_answer(change: Callable[[bytes], bytes]) -> Action:
    """Change the body of the server's answer."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        answer.set_body(change(b"".join(answer.body)))
        exchange.reply(answer)

    return act


def after_forward(function: Callable[[], object]) -> Action:
    """Let the server do what is asked, call a function, then reset the connection."""

    def act(exchange: Exchange) -> None:
        for _ in exchange.forward().body:
            pass
        function()
        exchange.reset()

    return act


def cut_before_etag() -> Action:
    """Close the connection in the middle of the answer's head, before its ETag."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        (etag,) = (value for name, value in answer.headers if name.lower() == "etag")
        answer.set_header("ETag", etag)  # it is the last header now
        exchange.reply_half(answer)

    return act
