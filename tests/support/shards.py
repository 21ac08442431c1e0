"""A folder's split into shards, known beforehand."""

from __future__ import annotations

import zlib

from .job import Job, with_state

NAMES = """
    100% a+b a.dat b.dat c.dat d.dat sub/a.dat sub/b.dat sub/deep/c.dat ümlaut.dat 日本語/x
""".split()
NAMES = sorted([*NAMES, "with space"])

# CRC-32 (as in zlib and PNG) of the key in UTF-8, modulo N: its rest is I - 1.
SPLIT_IN_3 = {
    "1/3": ["a+b", "a.dat", "ümlaut.dat"],
    "2/3": ["100%", "b.dat", "d.dat", "sub/b.dat", "sub/deep/c.dat"],
    "3/3": ["c.dat", "sub/a.dat", "with space", "日本語/x"],
}


def keys_of(shard: str, names: list[str]) -> list[str]:
    """The keys that a shard has to take."""
    index, count = map(int, shard.split("/"))
    return [name for name in names if zlib.crc32(name.encode("utf-8")) % count == index - 1]


def shards_of(job: Job, count: int) -> dict[str, Job]:
    """The same job with a state file for each of so many shards, by the shard's name."""
    names = [f"{index}/{count}" for index in range(1, count + 1)]
    return {name: with_state(job, f"state-{name.replace('/', '-of-')}.json") for name in names}
