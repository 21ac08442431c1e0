"""What the benchmark sends: the scenarios, and the files that they are made of."""

from __future__ import annotations

import enum
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# Memory that is to stay free beside the files, for the clients and the system.
MEMORY_RESERVE_BYTES = 4_000_000_000
SECOND_NIGHT_FAR_MS = 30
RANDOM_BLOCK_BYTES = 16 * 1024 * 1024


class Night(enum.Enum):
    """Which run of the same job a scenario is; all of a job meet one server, in this order."""

    FIRST = "first night"
    SECOND = "second night"
    CRASH_RUN = "crash run"


@dataclass(frozen=True)
class Scenario:
    """So many files of one size, sent to one kind of server (`null` or `rclone`).

    They lie in one folder or, where `folder_files` says how many, in folders of so many. One with
    a `night` is a run of a job that comes back every night: see `job`.
    """

    name: str
    title: str
    files: int
    file_bytes: int
    latency_ms: int = 0
    server: str = "null"
    folder_files: int = 0
    night: Night | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return self.files * self.file_bytes

    @property
    def is_large(self) -> bool:
        """Whether there is less to say about files per second than about bytes."""
        return self.file_bytes >= 1_000_000

    def scaled(self, factor: float) -> Scenario:
        """The same with fewer files or, where there are only a few, with smaller ones."""
        if self.files >= 100:
            files = max(1, round(self.files * factor))
            title = f"{files:,} files" if self.night else self.title
            return replace(self, files=files, title=title)
        return replace(self, file_bytes=max(1, round(self.file_bytes * factor)))

    def rate(self, seconds: float) -> float:
        """What was sent in a second: MB for large files, else files."""
        return (self.total_bytes / 1e6 if self.is_large else self.files) / seconds

    def job(self) -> list[Scenario]:
        """The runs that are measured one after the other against one server: mostly one.

        Of a job that comes back every night they are the first one; two second ones, from near and
        from far, on which nothing has changed; and a crash run.
        """
        if not self.night:
            return [self]
        nights = [(night, 0) for night in Night]
        nights.insert(2, (Night.SECOND, SECOND_NIGHT_FAR_MS))
        return [replace(self, night=night, latency_ms=far_ms) for night, far_ms in nights]

    @property
    def full_title(self) -> str:
        """For example: `20,000 files: second night, 30 ms away`."""
        return f"{self.title}: {self.run_name}" if self.night else self.title

    @property
    def run_name(self) -> str:
        """Which run of its job it is, in words; empty if it is the only one."""
        away = f", {self.latency_ms} ms away" if self.latency_ms else ""
        return f"{self.night.value}{away}" if self.night else ""

    @property
    def unit(self) -> str:
        """What `rate` counts."""
        return "MB/s" if self.is_large else "files/s"

    def __str__(self) -> str:
        """For example: `300 files of 4.0 MB, null server`."""
        files = f"{self.files:,} file{'s' if self.files != 1 else ''} of {size(self.file_bytes)}"
        server = "`rclone serve s3`" if self.server == "rclone" else "null server"
        latency = f" that answers after {self.latency_ms} ms" if self.latency_ms else ""
        return f"{files}, {server}{latency}"


NIGHTS = {"nights-20k": 20_000, "nights-200k": 200_000, "nights-1m": 1_000_000}
# Those that take hours are measured only where they are asked for by name.
LONG_SCENARIOS = ("nights-200k", "nights-1m")
SCENARIOS = (
    Scenario("small", "Many small files", 10_000, 10_000),
    Scenario("small-30ms", "Many small files, 30 ms away", 10_000, 10_000, latency_ms=30),
    Scenario("more", "More small files", 50_000, 10_000),
    Scenario("more-30ms", "More small files, 30 ms away", 50_000, 10_000, latency_ms=30),
    Scenario("medium", "Medium files", 300, 4_000_000),
    Scenario("large", "One large file", 1, 3_000_000_000),
    Scenario("many-large", "Many large files", 8, 1_200_000_000),
    Scenario("small-rclone", "Many small files, real server", 10_000, 10_000, server="rclone"),
    *(
        Scenario(name, f"{files:,} files", files, 1_000, folder_files=1_000, night=Night.FIRST)
        for name, files in NIGHTS.items()
    ),
)


def size(size_bytes: int) -> str:
    """A size for people, in decimal units: `10 kB`, `1.2 GB`."""
    for unit, unit_bytes in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.3g} {unit}"
    return f"{size_bytes} bytes"


def place_for(needed_bytes: int) -> Path:
    """A folder with room for so much: in memory, where the disk does not count, or on disk.

    OSError when there is no such room.
    """
    if (
        SHARED_MEMORY.is_dir()
        and shutil.disk_usage(SHARED_MEMORY).free >= needed_bytes
        and available_memory() >= needed_bytes + MEMORY_RESERVE_BYTES
    ):
        return SHARED_MEMORY
    place = Path(tempfile.gettempdir())
    if shutil.disk_usage(place).free < needed_bytes:
        raise OSError(f"no room for {size(needed_bytes)} in {SHARED_MEMORY} or {place}")
    return place


def available_memory() -> int:
    """Bytes of memory that the kernel could give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def make_files(folder: Path, scenario: Scenario) -> None:
    """Fill a folder with the files of a scenario: pseudo-random, the same in every run.

    They are cut from one random block, each from another place of it, since making random bytes
    takes longer than writing them. Nothing here compresses or deduplicates, so that will do.
    """
    block = random.Random(0).randbytes(RANDOM_BLOCK_BYTES)
    digits = len(str(scenario.files))
    place = folder
    for number in range(scenario.files):
        if scenario.folder_files and number % scenario.folder_files == 0:
            place = folder / f"folder-{number // scenario.folder_files:0{digits}}"
            place.mkdir()
        # Not by Path.open(), which takes as long as the writing.
        with open(f"{place}/file-{number:0{digits}}.dat", "wb") as file:
            start = number * 4099 % (RANDOM_BLOCK_BYTES // 2)
            left = scenario.file_bytes
            while left:
                left -= file.write(memoryview(block)[start : start + left])
                start = 0
