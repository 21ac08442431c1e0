"""Files for the tests: their bytes, sizes that matter, and names that are odd."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path

MIB = 1 << 20
PART_BYTES = 5 * MIB
# What makes a file of 5 MiB and more a multipart upload, in the smallest parts that S3 takes.
IN_PARTS = ("--multipart-threshold", "5MiB", "--multipart-chunksize", "5MiB")
LARGE_BYTES = 2 * PART_BYTES + 1  # three parts
# Up to this size the script reads a file once, into memory.
IN_MEMORY_BYTES = 8 * MIB

# Names that Windows cannot give to a file.
WINDOWS_FORBIDS = r'[<>:"/\\|?*\x00-\x1f]|[. ]$'
ODD_NAMES = [
    "with space",
    " leading space",
    "trailing space ",
    "two  spaces",
    "'single'",
    '"double"',
    "100%",
    "%41%2F%00",
    "a+b",
    "a&b=c",
    "#hash",
    "?question",
    "semi;colon",
    "colon:name",
    "*star*",
    "[brackets]",
    "{braces}",
    "<angle>",
    "back\\slash",
    "pipe|",
    "$HOME",
    "`tick`",
    "~tilde",
    "!bang",
    "@at",
    "-dash",
    "--bucketname",
    "comma,",
    unicodedata.normalize("NFC", "café"),
    unicodedata.normalize("NFD", "café"),
    "日本語",
    "emoji 🎉",
    "עברית",
    "tab\there",
    "new\nline",
    "return\rhere",
    "escape\x1b[31m",
    "bell\x07",
    "delete\x7f",
    "\u200bzero width",
    ".hidden",
    "trailing dot.",
    "...",
    "x" * 200,
    "ü" * 100,
]
if sys.platform == "win32":
    ODD_NAMES = [name for name in ODD_NAMES if not re.search(WINDOWS_FORBIDS, name)]
if sys.platform == "darwin":  # which takes two forms of a name for one
    ODD_NAMES.remove(unicodedata.normalize("NFD", "café"))


def odd_names(server: str) -> list[str]:
    """The odd names that a server of that name can have in its keys."""
    # moto's server finds no object with a line feed in its key.
    return [name for name in ODD_NAMES if server != "moto" or "\n" not in name]


def md5(data: bytes) -> str:
    """The MD5 in hexadecimal digits."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """The MD5 of each file, by key."""
    return {key: md5(body) for key, body in files.items()}


@functools.lru_cache(maxsize=16)
def some_bytes(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that are the same for the same seed."""
    return random.Random(seed).randbytes(size_bytes)


def small_files(count: int, seed: int = 0) -> dict[str, bytes]:
    """Files of up to 2 kB by their paths, in some folders."""
    rng = random.Random(seed)
    return {f"d{n % 7}/{n:04}.dat": rng.randbytes(rng.randrange(2000)) for n in range(count)}


def make_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, given by their paths relative to a folder that need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for relative_path, content in files.items():
        path = folder / relative_path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def relative_paths(folder: Path) -> set[str]:
    """The files below a folder, as keys."""
    found = (Path(top, name) for top, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix() for path in found}
