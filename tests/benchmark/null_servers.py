"""The servers that the clients send to: the null server, and a real one, `rclone serve s3`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY_ID = "benchmark"
SECRET_ACCESS_KEY = "benchmark-secret"
BUCKET = "bench"
START_S = 20.0
NULL_S3 = Path(__file__).with_name("null_s3.py")


@dataclass(frozen=True)
class Stored:
    """What a server has at the end of a run; `requests` where it counts them by operation."""

    objects: int
    bytes: int
    requests: dict[str, int]


@dataclass(frozen=True)
class Server:
    """A running server; `settle` makes it ready for another client, so many milliseconds away."""

    endpoint: str
    pid: int
    stored: Callable[[], Stored]
    settle: Callable[[int], object] = lambda latency_ms: None


@contextlib.contextmanager
def null_server(*, latency_ms: int, folder: Path | None = None) -> Iterator[Server]:
    """A null server, for as long as the context lasts; its bucket begins with a folder's files."""
    command = [sys.executable, str(NULL_S3), "--latency-ms", str(latency_ms)]
    if folder:
        command += ["--fill", f"{BUCKET}={folder}"]
    with terminating(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout
        line = process.stdout.readline()
        match = re.fullmatch(r"listening on (http://\S+)\n", line)
        if not match:
            raise OSError(f"the null server did not start: {line!r}")
        endpoint = match[1]
        yield Server(
            endpoint,
            process.pid,
            stored=lambda: ask_null_server(f"{endpoint}/_stats"),
            settle=lambda latency_ms: ask_null_server(
                f"{endpoint}/_settle?latency-ms={latency_ms}"
            ),
        )


def ask_null_server(url: str) -> Stored:
    """What a null server says that it has got."""
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with no_proxy.open(url) as answer:
        statistics = json.load(answer)
    return Stored(statistics["objects"], statistics["object_bytes"], statistics["requests"])


@contextlib.contextmanager
def rclone_server(rclone: Path, *, folder: Path) -> Iterator[Server]:
    """`rclone serve s3` with its buckets in a folder, for as long as the context lasts."""
    bucket = folder / BUCKET
    bucket.mkdir()
    port = free_port()
    command = [
        str(rclone), "serve", "s3", str(folder),
        "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}",
        "--config", "",
        "--log-level", "ERROR",
    ]  # fmt: skip
    with terminating(subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True)) as process:
        wait_for_port(port)
        yield Server(f"http://127.0.0.1:{port}", process.pid, lambda: stored_in_folder(bucket))


def stored_in_folder(bucket: Path) -> Stored:
    """What `rclone serve s3` has in a bucket, without what it keeps there for itself."""
    files = [entry for entry in os.scandir(bucket) if not entry.name.startswith(".rclone_temp_")]
    return Stored(len(files), sum(entry.stat().st_size for entry in files), {})


@contextlib.contextmanager
def terminating(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End a process with the context, by SIGTERM and, if need be, by SIGKILL."""
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Wait until something listens; OSError if nothing does in time."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
