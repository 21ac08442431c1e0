"""Code for each process of the script: another clock, and a record of what is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CLOCK = """\
import time

real, real_ns = time.time, time.time_ns
time.time = lambda: real() + {seconds}
time.time_ns = lambda: real_ns() + {seconds} * 10**9
"""

RECORDER = """\
import os, sys

def record(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith({folder!r}):
        if os.path.isfile(args[0]):
            with open({record!r}, "a") as file:
                print(args[0], file=file)

sys.addaudithook(record)
"""

# As on Windows: a path cannot be opened name by name.
WITHOUT_DIR_FD = "import os; os.supports_dir_fd.clear()"

CGROUPS = """\
import builtins, os

real_open = builtins.open

def open_made_up(path, *rest, **named):
    if str(path).startswith(("/proc/self/cgroup", "/sys/fs/cgroup/")):
        path = {root!r} + path
    return real_open(path, *rest, **named)

builtins.open = open_made_up
os.sched_getaffinity = lambda _: set(range(64))
"""

# To the script, files made up to now are older than the two seconds in which a file may change
# without another time.
LATER_SECONDS = 1000


def run_first(folder: Path, *codes: str) -> dict[str, str]:
    """The environment in which each of the script's processes begins with this code."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text("\n".join(codes), encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def clock(seconds: int = LATER_SECONDS) -> str:
    """Code after which the clock of a run is ahead by so much, or behind."""
    return CLOCK.format(seconds=seconds)


def cgroups(root: Path, files: Mapping[str, str]) -> str:
    """Code after which a run finds itself on a machine of 64 cores, with these files of cgroups."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return CGROUPS.format(root=f"{root}/")


def recorder(folder: Path, record: Path) -> str:
    """Code after which a run writes down which files of a folder it opens."""
    return RECORDER.format(folder=f"{folder}/", record=str(record))


def recorded(folder: Path, record: Path) -> list[str]:
    """The files that were opened since the last call, by their paths below the folder, sorted."""
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    record.unlink(missing_ok=True)
    return sorted({Path(line).relative_to(folder).as_posix() for line in text.splitlines()})
