"""Measure s3FileTransfer with 10,000 and with a million files: does a file cost the same?

    .venv-benchmark/boto3-crt/bin/python tests/benchmark/scale.py

The files hold a few bytes and lie on a tmpfs; the server is the null server, with no latency. The
table shows, for each number of files: seconds of `find` (a bare walk) and of --dryrun; seconds from
the start to the first PutObject, which come after the plan and the first complete state; the whole
run; CPU time of its process tree per file; memory of the main process per file, beyond what it
needs for ten files; and the share of the run in which the state was being written.

Linux only. The interpreter that runs it also runs the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from clients import environment
from measure import become_subreaper, read_stat, run_measured
from null_servers import BUCKET, null_server
from scenarios import place_for

FILES_IN_FOLDER = 1000
POLL_S = 0.02
INODE_BYTES = 1024  # of a tmpfs, about


@dataclass
class Watch:
    """What was seen of one run from outside, while it ran."""

    first_put_s: float = 0.0
    saving_s: float = 0.0
    main_rss_bytes: int = 0


def make_small_files(folder: Path, count: int) -> None:
    """Write `count` files of a few bytes, a thousand in each folder."""
    for number in range(count):
        place = folder / f"{number // FILES_IN_FOLDER:04}"
        if number % FILES_IN_FOLDER == 0:
            place.mkdir(parents=True)
        (place / f"file-{number:07}.dat").write_bytes(b"%d" % number)


def puts_seen(endpoint: str) -> int:
    """The PutObject requests that the null server has had."""
    with urllib.request.urlopen(f"{endpoint}/_stats") as answer:
        return int(json.load(answer).get("requests", {}).get("PutObject", 0))


def watch(watch: Watch, *, endpoint: str, temporary: Path, done: threading.Event) -> None:
    """Fill `watch` until `done`: the run is this process's child with the most memory."""
    started = last = time.monotonic()
    while not done.wait(POLL_S):
        now = time.monotonic()
        if temporary.exists():
            watch.saving_s += now - last
        last = now
        if not watch.first_put_s and puts_seen(endpoint):
            watch.first_put_s = now - started
        for pid in children_of(os.getpid()):
            stat = read_stat(pid)
            watch.main_rss_bytes = max(watch.main_rss_bytes, stat.rss_bytes if stat else 0)


def children_of(pid: int) -> list[int]:
    """The ids of a process's own children, of all its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def seconds_of(command: list[str]) -> float:
    """How long a command takes; its output is thrown away."""
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def measure(count: int, *, script: Path, base_rss_bytes: int) -> tuple[list[str], int]:
    """Measure runs over `count` files; return the table's row and the main process's memory."""
    place = place_for(count * INODE_BYTES)
    with tempfile.TemporaryDirectory(dir=place) as name, null_server(latency_ms=0) as server:
        files, state = Path(name, "files"), Path(name, "state.json")
        make_small_files(files, count)
        command = [sys.executable, str(script), "--bucketname", BUCKET, "--backupfolder"]
        command += [str(files), "--statefile", str(state)]
        find_s = seconds_of(["find", str(files), "-type", "f", "-newer", "/"])
        dryrun_s = seconds_of([*command, "--dryrun"])
        seen, done = Watch(), threading.Event()
        watcher = threading.Thread(
            target=watch,
            args=(seen,),
            kwargs={
                "endpoint": server.endpoint,
                "temporary": state.with_name(state.name + ".tmp"),
                "done": done,
            },
        )
        watcher.start()
        usage = run_measured(
            command,
            env=environment(endpoint=server.endpoint, home=Path(name)),
            cwd=Path(name),
            log=Path(name, "log"),
            timeout_s=3600,
        )
        done.set()
        watcher.join()
        if usage.error or puts_seen(server.endpoint) != count:
            sys.exit(f"the run over {count:,} files failed: {usage.error}")
    return [
        f"{count:,}",
        f"{find_s:.1f}",
        f"{dryrun_s:.1f}",
        f"{seen.first_put_s:.1f}",
        f"{usage.wall_s:.1f}",
        f"{usage.cpu_s / count * 1000:.2f}",
        f"{(seen.main_rss_bytes - base_rss_bytes) / count:.0f}",
        f"{seen.saving_s / usage.wall_s:.1%}",
    ], seen.main_rss_bytes


HEAD = ["files", "find, s", "--dryrun, s", "first put, s", "run, s", "CPU ms/file", "bytes/file"]
HEAD += ["saving"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 1_000_000])
    script = Path(__file__).resolve().parents[2] / "s3FileTransfer.py"
    parser.add_argument("--script", type=Path, default=script)
    args = parser.parse_args()
    become_subreaper()
    _, base_rss_bytes = measure(10, script=args.script, base_rss_bytes=0)
    print(f"| {' | '.join(HEAD)} |\n|{'---:|' * len(HEAD)}")
    for count in args.files:
        row, _ = measure(count, script=args.script, base_rss_bytes=base_rss_bytes)
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
