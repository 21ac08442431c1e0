"""Measure how well --max-bandwidth is kept: over a whole run, and over any few seconds of it.

    .venv-benchmark/boto3-crt/bin/python tests/benchmark/bandwidth.py

For each rate and each mix of files (small ones, medium ones, one in parts, and all of them) the
script sends for about half a minute to the null server, which counts the bytes of bodies as they
arrive. The table shows the rate from the first byte to the last one, how far it is from the wanted
one, and how far the slowest and the fastest window of five seconds are; then the CPU time of the
run for each second, which tells where the machine and not the limit was what held it back.

The design promises 10 % over a run of 30 seconds. Linux only. The interpreter that runs it also
runs the script.
"""

from __future__ import annotations

import argparse
import bisect
import json
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from clients import environment
from measure import become_subreaper, run_measured
from null_servers import BUCKET, null_server
from scenarios import Scenario, make_files, place_for

POLL_S = 0.05
WINDOW_S = 5.0
SMALL_BYTES, MEDIUM_BYTES = 10_000, 4_000_000
THRESHOLD_BYTES = 10_000_000
# Parts of each kind in a mix: small files, medium ones, one file that is sent in parts.
MIXES = {
    "files of 10 kB": (1, 0, 0),
    "files of 4 MB": (0, 1, 0),
    "one file in parts": (0, 0, 1),
    "all of these": (1, 1, 1),
}


@dataclass
class Arrival:
    """When how many bytes had come to the server, as it said: one number of each per look."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def look(self, endpoint: str) -> None:
        """Ask the server once."""
        with urllib.request.urlopen(f"{endpoint}/_stats") as answer:
            count = json.load(answer)["arrived_bytes"]
        self.times.append(time.monotonic())
        self.counts.append(count)

    def watch(self, endpoint: str, done: threading.Event) -> None:
        """Ask the server again and again, until `done`."""
        while not done.wait(POLL_S):
            self.look(endpoint)

    def sending(self) -> tuple[list[float], list[int]]:
        """The looks from the last one before the first byte to the first one with all bytes."""
        first = max(bisect.bisect_right(self.counts, 0) - 1, 0)
        last = bisect.bisect_left(self.counts, self.counts[-1])
        return self.times[first : last + 1], self.counts[first : last + 1]

    def rate(self) -> float:
        """Bytes a second, from the first byte to the last one."""
        times, counts = self.sending()
        return (counts[-1] - counts[0]) / (times[-1] - times[0])

    def window_rates(self) -> list[float]:
        """Bytes a second in each window, which may start at any look."""
        times, counts = self.sending()
        rates = []
        for start, started in enumerate(times):
            end = bisect.bisect_left(times, started + WINDOW_S)
            if end < len(times):
                rates.append((counts[end] - counts[start]) / (times[end] - started))
        return rates


def make_mix(folder: Path, parts: tuple[int, int, int], *, total_bytes: int) -> int:
    """Fill a folder with about so many bytes of files; returns how many they are."""
    made = 0
    for name, part, file_bytes in zip(
        ("small", "medium", "large"), parts, (SMALL_BYTES, MEDIUM_BYTES, 0), strict=True
    ):
        if part:
            share = total_bytes * part // sum(parts)
            place = folder / name
            place.mkdir(parents=True)
            count = max(1, share // file_bytes) if file_bytes else 1
            scenario = Scenario(name, name, count, file_bytes or share)
            make_files(place, scenario)
            made += scenario.total_bytes
    return made


def measure(mix: str, *, rate: int, seconds: float, script: Path) -> list[str]:
    """Measure one run; returns its row of the table."""
    total_bytes = round(rate * seconds)
    place = place_for(2 * total_bytes)
    with tempfile.TemporaryDirectory(dir=place) as name, null_server(latency_ms=0) as server:
        files = Path(name, "files")
        made = make_mix(files, MIXES[mix], total_bytes=total_bytes)
        arrival, done = Arrival(), threading.Event()
        watcher = threading.Thread(target=arrival.watch, args=(server.endpoint, done))
        watcher.start()
        command = [sys.executable, str(script), "--bucketname", BUCKET]
        command += ["--backupfolder", str(files), "--statefile", str(Path(name, "state.json"))]
        command += ["--max-bandwidth", str(rate), "--multipart-threshold", str(THRESHOLD_BYTES)]
        usage = run_measured(
            command,
            env=environment(endpoint=server.endpoint, home=Path(name)),
            cwd=Path(name),
            log=Path(name, "log"),
            timeout_s=3600,
        )
        done.set()
        watcher.join()
        arrival.look(server.endpoint)
        stored = server.stored()
    if usage.error or stored.bytes != made:
        sys.exit(f"the run of {mix} failed: {usage.error}")
    windows = arrival.window_rates()
    return [
        mix,
        f"{rate / 1e6:.1f}",
        f"{arrival.rate() / 1e6:.2f}",
        deviation(arrival.rate(), rate),
        deviation(min(windows), rate) if windows else "",
        deviation(max(windows), rate) if windows else "",
        f"{arrival.counts[-1] / made - 1:.1%}",
        f"{usage.wall_s:.1f}",
        f"{usage.cpu_s / usage.wall_s:.2f}",
    ]


def deviation(measured: float, wanted: float) -> str:
    """How far a rate is from the wanted one: `+1.2%`."""
    return f"{measured / wanted - 1:+.1%}"


HEAD = ["mix", "wanted, MB/s", "measured", "deviation", "slowest 5 s", "fastest 5 s"]
HEAD += ["sent twice", "run, s", "CPU s/s"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 20], help="MB a second")
    parser.add_argument("--seconds", type=float, default=30, help="of each run")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    script = Path(__file__).resolve().parents[2] / "s3FileTransfer.py"
    parser.add_argument("--script", type=Path, default=script)
    args = parser.parse_args()
    become_subreaper()
    print(f"| {' | '.join(HEAD)} |\n|---|{'---:|' * (len(HEAD) - 1)}")
    for rate in args.rates:
        for mix in args.mixes:
            row = measure(mix, rate=round(rate * 1e6), seconds=args.seconds, script=args.script)
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
