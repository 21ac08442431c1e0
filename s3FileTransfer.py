#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.37"]
# ///
"""Back up a folder to an S3 bucket, prove every object, remember what is missing.

  python3 s3FileTransfer.py --bucketname NAME --backupfolder DIR
  python3 s3FileTransfer.py --bucketname NAME --backupfolder DIR --crashrun 1

The first command sends every file below DIR; the second, after a failure or a
crash, sends what the state file marks as not uploaded.

The state file is a JSON list with one entry a line: filepath (absolute),
uploadedSuccess (0 or 1), filename (the object's key) and, where known, bucket,
size, mtime_ns, etag, shard, error and, of an open multipart upload, upload_id,
part_size and sse.

exit codes:
  0    everything that should be in the bucket is there
  1    some files are not; --crashrun 1 sends them
  2    the run could not start or had to stop: usage, folder, state file, lock,
       credentials, bucket
  130  interrupted by SIGINT; the state is saved
  143  ended by SIGTERM or SIGHUP; the state is saved
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import errno
import fnmatch
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mimetypes
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import random
import re
import signal
import stat
import sys
import threading
import time
import urllib.parse
import zlib
from argparse import ArgumentTypeError, Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    import boto3
    import boto3.s3.transfer
    import botocore.awsrequest
    import botocore.config
    import botocore.exceptions
    import botocore.parsers
    import botocore.utils
    import s3transfer.utils
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")

__version__ = "1.0.0"

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": KIB, "MI": MIB, "GI": GIB, "TI": TIB}

# Limits of S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
KEY_MAX_BYTES = 1024
PUT_MAX_BYTES = 5 * GIB
PART_MIN_BYTES, PART_MAX_BYTES, PARTS_MAX = 5 * MIB, 5 * GIB, 10_000

DEFAULT_REGION = "eu-west-1"
DEFAULT_THRESHOLD_BYTES = 10**9
# Small enough that a lost part costs little on a slow line, large enough that a
# request's round trip does not show.
DEFAULT_PART_BYTES = 16 * MIB
# Files up to this size are read once: the bytes that are hashed are the bytes sent.
IN_MEMORY_BYTES = 8 * MIB
READ_BYTES, LARGE_READ_BYTES, CRT_MAX_BYTES = MIB, 256 * KIB, 256 * KIB

# boto3 has a thread per request, and more threads than these only wait for the
# interpreter lock; the CRT needs none. A second process takes half a second of CPU time
# to start, so it must have enough to do.
REQUESTS_PER_PROCESS = {"classic": 16, "crt": 256}
FILES_PER_PROCESS = {"classic": 400, "crt": 1500}
PROCESSES_MAX, WORKERS_LOST_MAX, FILES_OPEN_MAX = 8, 10, 4096
LARGE_FILES_AT_ONCE, PART_THREADS = 2, 8
# Files handed out per thread, so that none waits for the next; and the bytes of all
# of them. A slow uplink with large files then has few connections, and each moves
# often enough that S3 does not close it as idle (after about 20 seconds).
QUEUED_PER_THREAD, BYTES_UNDER_WAY, ALWAYS_UNDER_WAY = 2, 64 * MIB, 4

CONNECT_TIMEOUT_SECONDS = 10
# Longer than a NAS needs to flush a large file, short enough to notice a stall.
READ_TIMEOUT_SECONDS = 60
# A request that fails for a passing reason is tried again until this long after
# its first failure; a run's very first request gives up sooner.
PATIENCE_SECONDS = 60
FIRST_PATIENCE_SECONDS = 9
FIRST_REQUEST_SECONDS = 18
FIRST_CONNECT_TIMEOUT_SECONDS = 5
FIRST_READ_TIMEOUT_SECONDS = 8
BACKOFF_FIRST_SECONDS = 0.5
BACKOFF_MAX_SECONDS = 10
DAMAGED_TRIES, CHANGED_TRIES = 3, 3
CHANGED_PAUSE_SECONDS = 2

BATCH_SECONDS = 0.003
# Of the progress line: how often it is drawn, and the time over which its rate is taken.
DRAW_SECONDS, RATE_SECONDS = 0.1, 15
SAVE_INTERVAL_SECONDS = 1.0
SAVE_SHARE = 0.03
SIGNAL_GRACE_SECONDS = 8
SECOND_SIGNAL_SECONDS = 0.3
EXIT_SIGINT, EXIT_SIGTERM = 130, 143
INTERRUPTED = "interrupted; the state is saved, send the rest with --crashrun 1"

NOT_ABORTED = "could not be aborted, and its parts are paid for until it is"

PASSING_CODES = frozenset(
    "SlowDown SlowDownRead SlowDownWrite Throttling ThrottlingException RequestThrottled "
    "RequestLimitExceeded TooManyRequests TooManyRequestsException BandwidthLimitExceeded "
    "ServiceUnavailable Busy InternalError InternalServerError OperationAborted RequestTimeout "
    "XMinioServerNotInitialized PriorRequestNotComplete 408 425 429 500 502 503 504".split()
)
DAMAGED_CODES = frozenset(
    "BadDigest InvalidDigest XAmzContentSHA256Mismatch XAmzContentChecksumMismatch "
    "IncompleteBody".split()
)
# A server that has other regions, or none, answers CreateBucket with one of these.
LOCATION_CODES = frozenset(
    "InvalidLocationConstraint IllegalLocationConstraintException InvalidRegion "
    "AuthorizationHeaderMalformed".split()
)
# Headers of a PutObject that are other for each file, or made anew with its signature.
HEADERS_OF_ONE_PUT = frozenset(
    "authorization x-amz-date x-amz-content-sha256 x-amz-security-token expect content-length "
    "content-type content-md5 x-amz-meta-mtime".split()
)
# What every further request would meet too: what to do about it, and S3's codes for it.
STOPPING_CODES = {
    "the session token is not valid or has expired; renew it": "ExpiredToken "
    "ExpiredTokenException TokenRefreshRequired InvalidToken",
    "this machine's clock is too far off; set it (NTP)": "RequestTimeTooSkewed RequestExpired",
    "there is no such bucket; check --bucketname, or create it": "NoSuchBucket InvalidBucketName",
    "the bucket is in another region; set --region": "AuthorizationHeaderMalformed "
    "IllegalLocationConstraintException PermanentRedirect",
    "ask the owner of the bucket": "AllAccessDisabled AccountProblem NotSignedUp",
    "check --storage-class": "InvalidStorageClass",
    "check --sse and --sse-kms-key-id": "InvalidEncryptionAlgorithmError KMS.NotFoundException "
    "KMS.DisabledException",
    "leave out --storage-class, --sse and --expected-bucket-owner": "NotImplemented",
    "make room there": "QuotaExceeded XMinioStorageFull",
}
# These stop the run only while nothing has been accepted: later it may be that one key.
STOPPING_AT_FIRST_CODES = {
    "check the policy (it needs s3:PutObject) and whose bucket it is": "AccessDenied Forbidden 403",
    "check the credentials": "InvalidAccessKeyId SignatureDoesNotMatch InvalidSecurity",
}


# --- records and errors -----------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """One line of the state file: a file (or an unreadable folder) and its object."""

    filepath: str
    filename: str
    uploaded: bool = False
    bucket: str | None = None
    size: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None
    shard: str | None = None
    error: str | None = None
    upload_id: str | None = None
    part_size: int | None = None
    sse: str | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        """Return the entry that a JSON object of a state file is; raise ValueError if none."""
        path, key, done = (fields.get(k) for k in ("filepath", "filename", "uploadedSuccess"))
        if not (isinstance(path, str) and path and isinstance(key, str) and done in (0, 1)):
            raise ValueError("an entry lacks filepath, filename or an uploadedSuccess of 0 or 1")
        if b"\0" in os.fsencode(path):
            raise ValueError("an entry's filepath is not valid")
        known = {name: fields[name] for name in OPTIONAL_FIELDS if fields.get(name) is not None}
        for name, value in known.items():
            if type(value) is not OPTIONAL_FIELDS[name]:
                raise ValueError(f"an entry's {name} is not valid")
        for name in {"bucket", "shard"} & known.keys():
            known[name] = sys.intern(known[name])
        if done:
            known.pop("error", None)
            if key_problem(key):
                raise ValueError("an uploaded entry's filename can be no key")
        return cls(os.path.abspath(path), key, done == 1, **known)

    def to_json(self) -> str:
        """Return the entry as one line of JSON, the three original fields first."""
        fields: dict[str, Any] = {
            "filepath": self.filepath,
            "uploadedSuccess": int(self.uploaded),
            "filename": self.filename,
        }
        for name in OPTIONAL_FIELDS:
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        # A name that is no valid UTF-8 (here it has lone surrogates) survives as escapes.
        text = READABLE_JSON.encode(fields)
        return text if text.isprintable() else json.dumps(fields)


READABLE_JSON = json.JSONEncoder(ensure_ascii=False)
OPTIONAL_FIELDS = {
    "bucket": str, "size": int, "mtime_ns": int, "etag": str, "shard": str,
    "error": str, "upload_id": str, "part_size": int, "sse": str,
}  # fmt: skip


@dataclass  # without slots, which would make it slow to pickle
class Task:
    """One file for a worker, which returns a copy that says how the sending went.

    `outcome` is then "started" (a multipart upload has its id; no part is sent before the
    state holds it), "uploaded", "failed", "refused" (as all may be), "changed" (try again
    later), "fatal" (the run must stop) or "stopped" (the run stopped first). `upload_id` is
    that of a multipart upload that is still open.
    """

    index: int
    filepath: str
    key: str
    size: int = 0
    large: bool = False
    upload_id: str | None = None
    part_size: int | None = None
    tries: int = 1
    outcome: str = ""
    mtime_ns: int | None = None
    etag: str | None = None
    error: str | None = None
    notice: str | None = None
    seconds: float = 0.0


@dataclass
class Moved:
    """So many bytes of a large file have been sent so far, `found` of them by an earlier run."""

    index: int
    size: int
    found: int


@dataclass(slots=True)
class WorkerEnded:
    """A worker process has ended, by itself or killed; `error` says why if it could."""

    number: int
    error: str | None = None


Event = Task | Moved | WorkerEnded


class StopRun(Exception):
    """The run cannot start or cannot go on; the text is for the user (exit code 2)."""


class Stopped(Exception):
    """The run is being stopped, by a signal or by trouble that another file met."""


class UploadError(Exception):
    """One file could not be sent; the text says what happened and what to do.

    `kind` is "passing" (try again), "damaged" (try again, a few times), "permanent" (of
    this file), "stops" (the run) or "stops at first" (unless something was accepted).
    """

    def __init__(self, message: str, code: str = "", kind: str = "permanent") -> None:
        super().__init__(message)
        self.code, self.kind = code, kind


class FileChanged(UploadError):
    """The file changed while it was read or sent."""

    def __init__(self) -> None:
        super().__init__("it changed while it was sent; stop its writer or back up a snapshot")


class NoAnswer(Exception):
    """The very first request takes too long."""


class DigestMismatch(Exception):
    """S3's answer does not prove that the object holds the bytes that were read."""


def reason(error: OSError) -> str:
    """Return the operating system's words for `error`, without path and number."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def shown(text: str) -> str:
    """Return `text` fit for one line of a terminal or a log: control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: object) -> str:
    """Return the text of `error` as one printable line."""
    return shown(" ".join(str(error).split())) or type(error).__name__


# --- arguments --------------------------------------------------------------------


def size_bytes(low: int, high: int, limits: str) -> Callable[[str], int]:
    """Return an argparse type for a size of `low` to `high` bytes: 500, 64MiB, 1GB, 1.5G."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?|[KMGT]I)B?", text.strip().upper())
        if not match:
            raise ArgumentTypeError(f"{text!r} is not a size such as 64MiB or 1GB")
        if not low <= (size := int(Decimal(match[1]) * UNITS[match[2]])) <= high:
            raise ArgumentTypeError(f"{text} is out of bounds: {limits}")
        return size

    return parse


def rate(text: str) -> int:
    """Return the bytes a second that `text` is: 10MB/s, 500kB (an argparse type)."""
    # At lower rates many connections would be idle for so long that servers close them.
    return size_bytes(10_000, TIB, "10kB/s to 1TiB/s")(re.sub(r"/s$", "", text.strip()))


def shard_name(text: str) -> str:
    """Return `text` if it is I/N, a part of the folder (an argparse type)."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", text)
    if not match or int(match[1]) > int(match[2]):
        raise ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/4")
    return text


def positive(text: str) -> int:
    """Return the whole number of 1 or more that `text` is (an argparse type)."""
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to 9999")
    return int(text)


def bucket_name(text: str) -> str:
    """Return `text` if it can be a bucket's name (some have one that S3 no longer creates)."""
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}|arn:[\w:/.+=,@-]+", text):
        raise ArgumentTypeError(f"{text!r} is not a bucket name, which has {BUCKET_NAME_RULES}")
    return text


BUCKET_NAME_RULES = "3 to 63 lower-case letters, digits, dots and hyphens"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its help has the module's docstring."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s --bucketname NAME --backupfolder DIR [--crashrun 1] [...]",
        description=summary,
        epilog="examples:\n" + details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("what to back up").add_argument
    add("--backupfolder", metavar="DIR", required=True, help="folder to send, with all below it")
    add("--exclude", metavar="GLOB", action="append", default=[],
        help="leave out paths relative to the folder; * matches / too; repeatable")
    add("--no-follow-symlinks", dest="follow_symlinks", action="store_false",
        help="skip symbolic links instead of following them")
    add("--shard", metavar="I/N", type=shard_name,
        help="only the I-th of N parts of the folder, for N tasks on several machines, each "
        "with its own state file")
    add("--skip-unchanged", action="store_true",
        help="do not send again what the state and the bucket's listing show to be there")
    add = parser.add_argument_group("where to").add_argument
    add("--bucketname", metavar="NAME", required=True, type=bucket_name,
        help="bucket; created when it does not exist")
    add("--prefix", default="", help="put in front of every key")
    add("--region", help=f"where a missing bucket is created (default: {DEFAULT_REGION})")
    add("--profile", help="profile of the AWS configuration")
    add("--endpoint-url", metavar="URL", help="server other than AWS, e.g. https://minio:9000")
    add("--storage-class", metavar="CLASS", help="e.g. STANDARD_IA (default: the bucket's own)")
    add("--sse", choices=["AES256", "aws:kms", "aws:kms:dsse"],
        help="server-side encryption (default: the bucket's own)")
    add("--sse-kms-key-id", metavar="ID", help="KMS key for --sse aws:kms")
    add("--expected-bucket-owner", metavar="ACCOUNT",
        help="fail if another account owns the bucket")
    add = parser.add_argument_group("how").add_argument
    add("--crashrun", type=int, choices=[0, 1], default=0,
        help="1: send only what the state file marks as not uploaded (default: 0)")
    add("--statefile", metavar="PATH", default="stateFile.json",
        help="where the state is kept (default: stateFile.json in the current directory)")
    add("--dryrun", action="store_true",
        help="show what would be sent; touch neither bucket nor state")
    add("--verify", action="store_true",
        help="send nothing; compare the bucket with the state file, for --crashrun 1 to repair")
    add("--max-bandwidth", metavar="RATE", type=rate,
        help="e.g. 10MB/s, over all uploads together (default: no limit)")
    add("--max-concurrency", metavar="N", type=positive,
        help="requests in flight (default: chosen for the machine)")
    add("--preferred-transfer-client", choices=["auto", "classic", "crt"], default="auto",
        help="crt: send small files with the AWS Common Runtime; classic: with boto3's own "
        "HTTP (default: crt where boto3[crt] is installed and does what is asked)")
    add("--multipart-threshold", metavar="SIZE", default=DEFAULT_THRESHOLD_BYTES,
        type=size_bytes(1, PUT_MAX_BYTES, "S3 takes up to 5GiB in one part"),
        help="files of this size and more go in parts (default: 1GB)")
    add("--multipart-chunksize", metavar="SIZE", default=DEFAULT_PART_BYTES,
        type=size_bytes(PART_MIN_BYTES, PART_MAX_BYTES, "S3 takes parts of 5MiB to 5GiB"),
        help="size of a part (default: 16MiB, more where a file would need over 10,000 parts)")
    add = parser.add_argument_group("output").add_argument
    add("--quiet", action="store_true", help="failures only")
    add("--verbose", action="store_true", help="one line a file on stderr")
    add("--no-progress", dest="progress", action="store_false",
        help="no progress line on a terminal")
    add("--version", action="version", version=f"s3FileTransfer {__version__}")
    # fmt: on
    return parser


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Return the parsed command line, or raise SystemExit (2) after a sentence on stderr."""
    parser = build_parser()
    options = parser.parse_args(argv)
    is_terminal = bool(sys.stderr and sys.stderr.isatty()) and os.environ.get("TERM") != "dumb"
    options.shows_progress = options.progress and is_terminal and not options.quiet
    if options.sse_kms_key_id and not (options.sse or "").startswith("aws:kms"):
        parser.error("--sse-kms-key-id needs --sse aws:kms")
    if options.verify and (options.crashrun or options.dryrun or options.skip_unchanged):
        parser.error("--verify sends nothing: leave out --crashrun, --dryrun, --skip-unchanged")
    if problem := key_problem(options.prefix + "name"):
        parser.error(f"--prefix {shown(options.prefix)}: {problem}")
    if options.storage_class and not re.fullmatch(r"[A-Za-z0-9_-]+", options.storage_class):
        parser.error(f"--storage-class {shown(options.storage_class)} is no name of a class")
    for name in ("sse_kms_key_id", "expected_bucket_owner"):
        if not re.fullmatch(r"[!-~]+", getattr(options, name) or "none"):
            parser.error(f"--{name.replace('_', '-')} has white space or other odd characters")
    for name in ("backupfolder", "statefile"):
        if not getattr(options, name):  # an unset variable of a shell script
            parser.error(f"--{name} is empty")
    options.backupfolder = os.path.abspath(options.backupfolder)
    if not os.path.isdir(options.backupfolder):
        there = os.path.lexists(options.backupfolder)
        what = "is not a folder" if there else "does not exist (is its disk mounted?)"
        parser.error(f"--backupfolder {shown(options.backupfolder)} {what}")
    return options


# --- plan: which files, and their keys ---------------------------------------------


class Interruption:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag, and the second into the end."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

    def __init__(self) -> None:
        self.signum, self._came_at = 0, 0.0
        for signum in self.SIGNALS:
            # A signal that is ignored at the start (SIGHUP under nohup) stays ignored.
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _frame: object) -> None:
        now = time.monotonic()
        # timeout(1), systemd and terminals send two at once.
        if self.signum and now - self._came_at > SECOND_SIGNAL_SECONDS:
            os._exit(self.exit_code)
        if not self.signum:
            self.signum, self._came_at = signum, now

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM or SIGHUP."""
        return EXIT_SIGINT if self.signum == signal.SIGINT else EXIT_SIGTERM

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum:
            raise Stopped


@dataclass(slots=True)
class Subfolder:
    """A folder that the walk has found and has yet to enter."""

    path: str
    key_prefix: str
    ancestors: tuple[tuple[int, int], ...] = ()


class Walk:
    """Finds what is to be sent, in sorted order, and says what cannot be."""

    def __init__(
        self, options: Namespace, report: Report, interruption: Interruption, state: StateFile
    ) -> None:
        self._root = options.backupfolder
        self._prefix = options.prefix
        self._is_crash_run = options.crashrun == 1
        self._bucket = sys.intern(options.bucketname)
        self._shard = options.shard
        self._follow_symlinks = options.follow_symlinks
        self._has_excludes = bool(options.exclude)
        self._excludes = globs_matcher(options.exclude)
        # Such a glob that matches "folder/" matches all below the folder too.
        self._excludes_folder = globs_matcher([g for g in options.exclude if g.endswith("*")])
        self._report = report
        self._interruption = interruption
        self._own_files = state.own_files()

    def entries(self, previous: list[Entry] | None) -> Iterator[Entry]:
        """Yield the entries of the run: of the whole folder, or in a crash run of the state."""
        if self._is_crash_run:
            return self.again(previous or [])
        return self.folder(self._root, key_prefix=self._prefix)

    def folder(self, path: str, *, key_prefix: str) -> Iterator[Entry]:
        """Yield an entry for every file below `path`, and one with an `error` for the rest.

        The `filename` of an unreadable folder is the prefix of the keys below it.
        """
        open_folders = [self._list(Subfolder(path, key_prefix))]
        while open_folders:
            found = next(open_folders[-1], None)
            if found is None:
                open_folders.pop()
            elif isinstance(found, Subfolder):
                open_folders.append(self._list(found))
            else:
                yield found

    def again(self, previous: list[Entry]) -> Iterator[Entry]:
        """Yield the uploaded entries of a state as they are, and find the others anew.

        One whose path is a folder (it was unreadable, or is the whole backup folder after
        a kill during the walk) is walked again: what is found replaces the entries below it.
        """
        pending = (entry.filepath for entry in previous if not entry.uploaded)
        pending_folders = tuple(os.path.join(path, "") for path in pending if os.path.isdir(path))
        for entry in previous:
            path, key = entry.filepath, entry.filename
            if pending_folders and path.startswith(pending_folders) and path != self._root:
                continue
            if entry.uploaded:
                yield entry
            elif path == self._root:
                yield from self.folder(path, key_prefix=key)
            elif not self._excludes_file(path):
                found = self._examine(path, key.rstrip("/"), is_link=os.path.islink(path))
                if isinstance(found, Subfolder):
                    yield from self.folder(path, key_prefix=found.key_prefix.lstrip("/"))
                elif found:
                    yield found

    def _list(self, folder: Subfolder) -> Iterator[Entry | Subfolder]:
        self._interruption.check()
        try:
            status = os.stat(folder.path)
            # Names and not DirEntry objects, which cache a stat result each: too much
            # memory for a folder of a million files.
            with os.scandir(folder.path) as children:
                names = sorted((child.name, child.is_symlink()) for child in children)
        except OSError as error:
            why = f"cannot read the folder: {reason(error)}; check its permissions"
            yield self._entry(folder.path, folder.key_prefix, error=why)
            return
        identity = (status.st_dev, status.st_ino)
        if identity in folder.ancestors:
            self._report.notice("link to a folder above it, not followed", folder.path)
            return
        own_names = {name for folder_id, name in self._own_files if folder_id == identity}
        path_prefix = os.path.join(folder.path, "")
        for name, is_link in names:
            self._interruption.check()
            path = path_prefix + name
            if name in own_names or self._excludes_file(path):
                continue
            found = self._examine(path, folder.key_prefix + name, is_link=is_link)
            if isinstance(found, Subfolder):
                found.ancestors = (*folder.ancestors, identity)
                if self._excludes_folder(self._relative(path) + "/"):
                    continue
            if found:
                yield found

    def _entry(self, path: str, key: str, error: str | None = None) -> Entry:
        return Entry(path, key, bucket=self._bucket, shard=self._shard, error=error)

    def _excludes_file(self, path: str) -> bool:
        # As for `aws s3`, a glob leaves out files: what a folder of such a name holds stays.
        if not self._has_excludes:
            return False
        return bool(self._excludes(self._relative(path))) and not os.path.isdir(path)

    def _relative(self, path: str) -> str:
        return path[len(os.path.join(self._root, "")) :].replace(os.sep, "/")

    def _examine(self, path: str, key: str, *, is_link: bool) -> Entry | Subfolder | None:
        if is_link and not self._follow_symlinks:
            self._report.notice("symbolic link, skipped", path)
            return None
        entry = self._entry(path, key)
        try:
            status = os.stat(path)
        except OSError as error:
            what, advice = "cannot read it", "check its permissions"
            if os.path.islink(path):
                what, advice = "its link is broken", "mend it, or leave it out with --exclude"
            entry.error = f"{what}: {reason(error)}; {advice}"
            return entry
        if stat.S_ISDIR(status.st_mode):
            return Subfolder(path, key + "/")
        if not stat.S_ISREG(status.st_mode):
            self._report.notice("socket, FIFO or device, skipped", path)
            return None
        entry.error = key_problem(key)
        if not entry.error:
            entry.size, entry.mtime_ns = status.st_size, status.st_mtime_ns
        return entry


def globs_matcher(globs: list[str]) -> Callable[[str], object]:
    """Return a function that tells whether a path matches one of the shell patterns."""
    return re.compile("|".join(map(fnmatch.translate, globs)) or r"(?!)").match


def key_problem(key: str) -> str | None:
    """Return why S3 cannot have `key`, or None when it can."""
    if not key:
        return "its key is empty; it needs a name"
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        return "its name is not valid UTF-8, which S3 needs; rename it"
    if length > KEY_MAX_BYTES:
        return f"its key has {length} bytes and S3 takes {KEY_MAX_BYTES}; shorten the path"
    return None


def is_in_shard(entry: Entry, options: Namespace) -> bool:
    """Tell whether an entry is of this run's part of the folder.

    One that could not be looked at is of every part: it may be a folder with anything in it.
    """
    is_folder = entry.filename.endswith("/") or entry.filepath == options.backupfolder
    is_unknown = entry.error is not None and key_problem(entry.filename) is None
    if not options.shard or is_folder or is_unknown:
        return True
    part, parts = map(int, options.shard.split("/"))
    return zlib.crc32(entry.filename.encode("utf-8", "surrogateescape")) % parts == part - 1


def find_files(
    options: Namespace, previous: list[Entry] | None, walk: Walk, report: Report
) -> Iterator[Entry]:
    """Yield the entries of this run: all of the folder, or in a crash run the state's.

    When that is nothing, its disk may not be mounted. Raises StopRun then, if the state
    lists uploads of the folder, or the folder itself: that must not be forgotten.
    """
    root, found = options.backupfolder, None
    for count, found in enumerate(walk.entries(previous)):
        if count % 1000 == 999:
            report.progress.draw([(0, f"{count + 1:,} files found")])
        if is_in_shard(found, options):
            yield found
    if found:
        return
    for entry in previous or ():
        if is_within(entry.filepath, root) and not (options.crashrun and entry.filepath != root):
            what = "uploaded files of it" if entry.uploaded else "files of it as still to be sent"
            raise StopRun(f"there is nothing in {shown(root)}, but the state lists {what}; is its "
                          "disk mounted?")  # fmt: skip
    if not options.crashrun:
        report.error(f"there is nothing to send in {shown(root)}; is its disk mounted?")


def encryption_of(options: Namespace) -> str | None:
    """Return what was asked for, in one text: S3 tells of no open upload how it is encrypted."""
    return " ".join(filter(None, (options.sse, options.sse_kms_key_id))) or None


def carry_uploads(
    entries: list[Entry], recorded: dict[str, Entry], options: Namespace
) -> list[Entry]:
    """Hand each recorded multipart upload to the entry of its file, and return the others."""
    abandoned = dict(recorded)
    for entry in entries if recorded else ():
        old = abandoned.get(entry.filepath)
        if old is None or entry.uploaded or entry.filename != old.filename:
            continue
        if entry.error:  # it may be readable again for the next crash run
            entry.size, entry.mtime_ns = old.size, old.mtime_ns
        unchanged = (old.size, old.mtime_ns) == (entry.size, entry.mtime_ns)
        unchanged &= old.sse == encryption_of(options)
        if unchanged and part_size_for(old.size or 0, old.part_size or 0) == old.part_size:
            entry.upload_id, entry.part_size, entry.sse = old.upload_id, old.part_size, old.sse
            del abandoned[entry.filepath]
    return list(abandoned.values())


# --- state ------------------------------------------------------------------------


class StateFile:
    """The JSON state file: read, replaced atomically, and locked for one run at a time."""

    def __init__(self, path: str) -> None:
        self._given_path = os.path.abspath(path)
        # os.replace would put a plain file in the place of a symbolic link.
        self.path = os.path.realpath(path)
        self._temporary, self._lock_path = self.path + ".tmp", self.path + ".lock"
        self._lock: IO[str] | None = None
        self._save_seconds = 0.0
        self._saved_at = -math.inf

    @property
    def has_saved(self) -> bool:
        """Whether this run has saved a state."""
        return self._saved_at > -math.inf

    def own_files(self) -> list[tuple[tuple[int, int], str]]:
        """Return the state file, its companions and a link to it: folder's identity, and name."""
        own = []
        for path in (self._given_path, self.path, self._temporary, self._lock_path):
            with contextlib.suppress(OSError):
                status = os.stat(os.path.dirname(path))
                own.append(((status.st_dev, status.st_ino), os.path.basename(path)))
        return own

    def lock(self) -> None:
        """Take the lock, until this process ends, or raise StopRun if that cannot be."""
        if os.path.lexists(self.path) and not os.path.isfile(self.path):
            raise StopRun(f"the state file {shown(self.path)} is no regular file; choose another "
                          "with --statefile")  # fmt: skip
        try:
            handle = open(self._lock_path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        except OSError as error:
            why = f"cannot write beside the state file {shown(self.path)}: {reason(error)}"
            raise StopRun(f"{why}; choose another place with --statefile") from error
        try:
            lock_handle(handle)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                why = f"cannot lock {shown(self._lock_path)}: {reason(error)}"
                raise StopRun(f"{why}; put --statefile on a local disk") from error
            handle.seek(0)
            why = f"another run (process {shown(handle.read(20))}) uses {shown(self.path)}"
            raise StopRun(f"{why}; wait for it, or give this job its own --statefile") from error
        self._lock = handle
        with contextlib.suppress(OSError):  # a full disk is met when the state is saved
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)  # a killed run may have left it

    def read(self) -> list[Entry] | None:
        """Return the entries, or None without a state; raise StopRun for a damaged one."""
        try:
            with open(self.path, encoding="utf-8-sig") as handle:
                text = handle.read()
            entries = json.loads(text, object_hook=Entry.from_json) if text else None
            if text and not (isinstance(entries, list) and all(type(e) is Entry for e in entries)):
                raise ValueError("it is not a list of entries")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StopRun(f"cannot read {shown(self.path)}: {reason(error)}") from error
        except (ValueError, RecursionError) as error:
            why = f"the state file {shown(self.path)} is damaged: {one_line(error)}"
            raise StopRun(f"{why}; move it away, or choose another --statefile") from error
        return entries

    def save(self, entries: Iterable[Entry]) -> None:
        """Replace the state file, all or nothing; raise OSError when that fails."""
        started = time.monotonic()
        try:
            self._write(entries)
            os.replace(self._temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            raise
        finally:
            self._saved_at = time.monotonic()
            self._save_seconds = self._saved_at - started
        # The new name lasts through a power cut then; Windows and some file systems cannot.
        with contextlib.suppress(OSError):
            descriptor = os.open(os.path.dirname(self.path), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _write(self, entries: Iterable[Entry]) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)
        # "x": in a folder that others may write to, never through a link of theirs.
        with open(self._temporary, "x", encoding="utf-8", newline="\n") as handle:
            if hasattr(os, "fchmod") and os.path.exists(self.path):
                os.fchmod(handle.fileno(), stat.S_IMODE(os.stat(self.path).st_mode))
            separator = "[\n"
            for entry in entries:
                handle.write(separator + entry.to_json())
                separator = ",\n"
            handle.write("\n]\n" if separator == ",\n" else "[]\n")
            handle.flush()
            os.fsync(handle.fileno())

    def is_due(self) -> bool:
        """Tell whether a save now keeps saving below its share of the run's time."""
        pause = max(SAVE_INTERVAL_SECONDS, self._save_seconds / SAVE_SHARE)
        return time.monotonic() - self._saved_at >= pause


def lock_handle(handle: IO[str]) -> None:
    """Lock the open file for this process, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        handle.seek(1 << 30)  # a locked region cannot be read, and the text names the holder
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_previous(previous: list[Entry] | None, options: Namespace) -> None:
    """Raise StopRun for a run that would bury another job's failures, and name the ways out."""
    needs_state = "--crashrun 1" if options.crashrun else "--verify" if options.verify else None
    if needs_state and previous is None:
        why = f"{needs_state} needs the state file of an earlier run, and there is none"
        raise StopRun(f"{why}; run without {needs_state.split()[0]}, or name it with --statefile")
    for entry in previous or ():
        if entry.uploaded and not needs_state:
            continue
        if (job := other_job(entry, options)) is None:
            continue
        if needs_state:
            raise StopRun(f"the state file is of {job}; give that job's options, or another "
                          "--statefile")  # fmt: skip
        raise StopRun(f"the state file lists files not yet uploaded, of {job}; finish that job "
                      "with --crashrun 1, or give this one its own --statefile")  # fmt: skip


def other_job(entry: Entry, options: Namespace) -> str | None:
    """Return what to call the job that an entry is of, or None when it is this run's."""
    if entry.bucket not in (None, options.bucketname):
        return f"bucket {shown(entry.bucket or '')}"
    if entry.shard != options.shard:
        return f"shard {shown(entry.shard)}" if entry.shard else "the whole folder, no shard"
    if not is_within(entry.filepath, options.backupfolder):
        return f"another folder, with {shown(entry.filepath)}"
    return None


def is_within(path: str, folder: str) -> bool:
    """Tell whether `path` is `folder` or below it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


# --- upload -----------------------------------------------------------------------


def import_boto3() -> None:
    """Import boto3 for the functions below; it takes most of a second, so not for --help."""
    global boto3, botocore, s3transfer  # noqa: PLW0603
    # botocore's CRT signer reads every body through Python: three times slower.
    os.environ["BOTO_DISABLE_CRT"] = "true"
    try:
        import boto3
        import boto3.s3.transfer
        import botocore.awsrequest
        import botocore.config
        import botocore.exceptions
        import botocore.parsers
        import botocore.utils
        import s3transfer.utils
    except ImportError as error:
        raise StopRun("boto3 is not installed; run: python3 -m pip install boto3") from error


@functools.cache
def session_of(profile: str | None) -> boto3.Session:
    """Return the one boto3 session: each new one would read S3's model of some megabytes."""
    return boto3.Session(profile_name=profile)


def build_client(
    options: Namespace,
    region: str | None,
    *,
    connect_timeout: int = CONNECT_TIMEOUT_SECONDS,
    read_timeout: int = READ_TIMEOUT_SECONDS,
) -> S3Client:
    """Return boto3's S3 client, or raise StopRun when it cannot be had."""
    config = botocore.config.Config(
        # The one retry loop is Retries: botocore's own has a quota per client, which many
        # threads spend within a second on a dead endpoint.
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=(options.max_concurrency or 0) + 2,
        # Over plain http, boto3 would sign a SHA-256 of each body too; the signature already
        # covers its Content-MD5.
        s3={"payload_signing_enabled": False},
        # Content-MD5 is the checksum that every server understands.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # boto3 would put its own together anew for each request, a tenth of the CPU time.
        user_agent=f"s3FileTransfer/{__version__}",
        tcp_keepalive=True,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
    )
    try:
        session = session_of(options.profile)
        if (credentials := session.get_credentials()) is None:
            raise StopRun("no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                          "or run: aws configure")  # fmt: skip
        # As headers that cannot be sent they would be shown in the error.
        if any(
            re.search(r"[^!-~]", text or "") for text in credentials.get_frozen_credentials()[:3]
        ):
            raise StopRun("the credentials have white space or other odd characters in them; set "
                          "them again")  # fmt: skip
        region = region or options.region or session.region_name or DEFAULT_REGION
        client = session.client(
            "s3", region_name=region, endpoint_url=options.endpoint_url, config=config
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        why = f"cannot start S3: {one_line(error)}"
        raise StopRun(f"{why}; check profile, credentials and endpoint") from error
    client.meta.events.register_first("before-call.s3.PutObject", send_small_body_at_once)

    def name_owner(params: dict[str, Any], model: Any, **_: object) -> None:
        if "ExpectedBucketOwner" in model.input_shape.members:  # CreateBucket lacks it
            params["ExpectedBucketOwner"] = options.expected_bucket_owner

    if options.expected_bucket_owner:
        client.meta.events.register("provide-client-params.s3", name_owner)
    return client


def send_small_body_at_once(params: dict[str, Any], **_: object) -> None:
    """Spare small puts the `Expect: 100-continue` round trip (a botocore event handler)."""
    if isinstance(params["body"], io.BytesIO):
        # botocore waits for leave to send what it has to read; bytes leave with the headers.
        params["body"] = params["body"].getvalue()


def is_aws(client: S3Client) -> bool:
    """Tell whether the client's server is AWS itself and not a compatible one."""
    return ".amazonaws." in client.meta.endpoint_url.split("/")[2]


def trouble_of(error: Exception) -> UploadError:
    """Return what `error`, raised by boto3 or by a proof, means."""
    exceptions, text = botocore.exceptions, one_line(error)
    if isinstance(error, DigestMismatch):
        what = f"{text}; the network or the server damages data"
        return UploadError(what, code="BadDigest", kind="damaged")
    if isinstance(error, exceptions.ClientError):
        return trouble_of_answer(error.response)
    if isinstance(error, exceptions.SSLError) and "CERTIFICATE" in text.upper():
        what = f"the server's certificate is not trusted ({text})"
        return UploadError(f"{what}; set AWS_CA_BUNDLE to its CA file", kind="stops")
    if isinstance(getattr(error, "kwargs", {}).get("error"), FileNotFoundError):
        return UploadError(f"{text}; check the CA file in AWS_CA_BUNDLE", kind="stops")
    broken = exceptions.ConnectionError, exceptions.HTTPClientError
    if isinstance(error, (*broken, botocore.parsers.ResponseParserError)):
        what = f"the server could not be reached or broke off ({text})"
        return UploadError(f"{what}; check network and endpoint", kind="passing")
    if isinstance(error, exceptions.CredentialRetrievalError):
        return UploadError(f"{text}; check the source of the credentials", kind="passing")
    if isinstance(error, exceptions.ParamValidationError):
        return UploadError(text)
    return UploadError(f"{text}; check the credentials and the configuration", kind="stops")


def trouble_of_answer(response: Any) -> UploadError:
    """Return what an error answer of S3 means; the code decides, then the HTTP status.

    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    """
    status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    error = response.get("Error", {})
    code = str(error.get("Code") or status)
    said = f"S3 answered {code}"
    message = shown(" ".join(str(error.get("Message") or "").split())).rstrip(".")
    if message.replace(" ", "").lower() not in ("", code.lower()):
        said += f" ({message})"
    for kind, codes in (("stops", STOPPING_CODES), ("stops at first", STOPPING_AT_FIRST_CODES)):
        for advice, names in codes.items():
            if code in names.split():
                return UploadError(f"{said}; {advice}", code, kind)
    if code in DAMAGED_CODES:
        return UploadError(f"{said}; the network or the server damages data", code, "damaged")
    if code in PASSING_CODES or status in PASSING_CODES:
        return UploadError(f"{said}; try again later", code, "passing")
    return UploadError(said, code)


def request_errors() -> tuple[type[Exception], ...]:
    """Return what a request, or the proof of its answer, may raise."""
    return (
        DigestMismatch,
        botocore.exceptions.ClientError,
        botocore.exceptions.BotoCoreError,
        botocore.parsers.ResponseParserError,
    )


class Retries:
    """The one retry loop around requests, shared by the threads of a client."""

    def __init__(self, *, slots: int = 1, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.stop = threading.Event()
        self._slots = threading.BoundedSemaphore(slots)
        self._patience_seconds = patience_seconds
        self._alive_at = -math.inf

    def note_life(self) -> None:
        """Take note that the server takes bytes, or answers."""
        self._alive_at = time.monotonic()

    def check_stopped(self) -> None:
        """Raise Stopped when the run is being stopped."""
        if self.stop.is_set():
            raise Stopped

    def run(
        self,
        attempt: Callable[[], T],
        *,
        may_stop_run: bool = True,
        trouble: UploadError | None = None,
    ) -> T:
        """Return what `attempt` returns, trying again while the trouble is a passing one.

        `trouble` is that of a try before. Raises UploadError when this file cannot be sent,
        StopRun when no file can (an UploadError too with `may_stop_run` false: for what a
        tight policy may refuse).
        """
        give_up_at, damaged = math.inf, 0
        for tries in itertools.count():
            self.check_stopped()
            if not trouble:
                try:
                    with self._slots:
                        answer = attempt()
                except request_errors() as error:
                    cause = getattr(error, "kwargs", {}).get("error")
                    if isinstance(cause, UploadError):  # raised by the body, while it was sent
                        raise cause from error
                    trouble = trouble_of(error)
                else:
                    self.note_life()
                    return answer
            give_up_at = min(give_up_at, time.monotonic() + self._patience_seconds)
            damaged += trouble.kind == "damaged"
            is_passing = trouble.kind == "passing" or 0 < damaged < DAMAGED_TRIES
            if is_passing and time.monotonic() < give_up_at:
                longest = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(tries, 10))
                self.stop.wait(random.uniform(longest / 2, longest))
            elif may_stop_run and self._meets_every_file(trouble):
                raise StopRun(str(trouble))
            else:
                raise trouble
            trouble = None
        raise AssertionError("unreachable")

    def _meets_every_file(self, trouble: UploadError) -> bool:
        # A server that has long been silent to all is gone; one that serves others is not.
        silent_seconds = time.monotonic() - self._alive_at
        gone = trouble.kind == "passing" and silent_seconds > self._patience_seconds / 2
        return gone or trouble.kind == "stops"


def new_md5(data: bytes = b"") -> hashlib._Hash:
    """Return an MD5 hash object that FIPS systems allow too: it proves, it does not secure."""
    return hashlib.md5(data, usedforsecurity=False)


def base64_of(digest: bytes) -> str:
    """Return `digest` as S3's headers want it."""
    return base64.b64encode(digest).decode("ascii")


def etag_of(answer: Any) -> str:
    """Return the ETag of an answer without its quotes, or an empty string."""
    return str(answer.get("ETag") or "").strip('"').lower()


def is_md5_etag(answer: Any) -> bool:
    """Tell whether the ETag of an answer is made of MD5s: not under SSE-KMS and SSE-C.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    encryption = answer.get("ServerSideEncryption") or ""
    return not encryption.startswith("aws:kms") and not answer.get("SSECustomerAlgorithm")


def proven_etag(answer: Any, md5: bytes) -> str:
    """Return the ETag of a put; raise DigestMismatch if it should be the MD5 and is not."""
    etag = etag_of(answer)
    if is_md5_etag(answer) and etag != md5.hex():
        raise DigestMismatch(f"its ETag is {etag or 'missing'} and its MD5 {md5.hex()}")
    return etag


@dataclass(slots=True)
class Part:
    """The digests of one part, and the ETag under which S3 has it, in its quotes."""

    md5: bytes
    crc32: bytes
    etag: str = ""

    def is_same_as(self, listed: Any) -> bool:
        """Tell whether the part that ListParts describes has the same bytes."""
        if checksum := listed.get("ChecksumCRC32"):
            return base64_of(self.crc32) == str(checksum)
        return self.md5.hex() == etag_of(listed)


def read_part(body: Any, size: int, *, with_crc32: bool = False) -> Part:
    """Return the digests of `size` bytes of `body`; raise FileChanged if there are fewer."""
    md5, crc32, left = new_md5(), 0, size
    while left and (data := body.read(min(left, READ_BYTES))):
        md5.update(data)
        if with_crc32:
            crc32 = zlib.crc32(data, crc32)
        left -= len(data)
    if left:
        raise FileChanged
    return Part(md5.digest(), crc32.to_bytes(4, "big"))


class Bandwidth:
    """Keeps what all threads of all processes send below a rate, in bytes a second.

    `free_at` is the time on the system's monotonic clock when the next byte may leave, in
    memory that the processes share. It has no lock: one that is killed would never give
    it back, and what is lost when two write at once is a piece.
    """

    def __init__(self, rate: int, free_at: Any) -> None:
        self._rate, self._free_at = rate, free_at
        # So small that even many connections at a low rate are never idle for long.
        self.piece_bytes = min(LARGE_READ_BYTES, max(KIB, rate // 10))
        self._lock = threading.Lock()

    def wait_for(self, size: int) -> None:
        """Return when it is the turn of so many bytes."""
        with self._lock:
            now = time.monotonic()
            starts_at = max(now, self._free_at.value)
            self._free_at.value = starts_at + size / self._rate
        time.sleep(starts_at - now)


class LargeReads:
    """A body of `size` bytes for boto3 that is read in large pieces, or as bandwidth allows.

    urllib3 asks for 16 KiB at a time and sends whatever it gets: at a gigabyte a second
    the small reads would cost as much as the sending. `on_read(bytes_so_far)` is called for
    each piece.
    """

    def __init__(
        self, body: Any, size: int, *, on_read: Callable[[int], None], bandwidth: Bandwidth | None
    ) -> None:
        self._body, self._size, self._on_read, self._bandwidth = body, size, on_read, bandwidth
        self._piece_bytes = bandwidth.piece_bytes if bandwidth else LARGE_READ_BYTES
        self.seek, self.tell = body.seek, body.tell

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes: as many as are good, whatever `size` says."""
        if size < 0:  # nothing but a hash would ask for all at once
            return bytes(self._body.read())
        try:
            data = bytes(self._body.read(self._piece_bytes))
        except OSError as error:
            raise unreadable(error) from error
        if not data and self._body.tell() < self._size:
            raise FileChanged  # it is shorter now, and the server would wait for the rest
        if self._bandwidth:
            self._bandwidth.wait_for(len(data))
        self._on_read(self._body.tell())
        return data


def open_regular(path: str) -> tuple[io.FileIO, os.stat_result]:
    """Open `path`, or raise UploadError for what is no regular file (a FIFO never hangs)."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = io.FileIO(os.open(path, flags))
    status = os.fstat(handle.fileno())
    if not stat.S_ISREG(status.st_mode):
        handle.close()
        raise UploadError("it is no longer a regular file")
    return handle, status


def unreadable(error: OSError) -> UploadError:
    """Return what to say of a file that cannot be read."""
    advice = "its permissions" if isinstance(error, PermissionError) else "the disk"
    return UploadError(f"cannot read it: {reason(error)}; check {advice}")


def check_unchanged(
    after: os.stat_result, before: os.stat_result, has_same_start: Callable[[], bool]
) -> None:
    """Raise FileChanged unless the file is the same, or has only grown at its end."""
    is_same_file = after.st_ino == before.st_ino
    if is_same_file and after.st_size > before.st_size:
        is_same_file = has_same_start()
    elif (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        is_same_file = False
    if not is_same_file:
        raise FileChanged


def check_unchanged_handle(handle: io.FileIO, before: os.stat_result, md5: bytes) -> None:
    """Raise FileChanged unless the open file still has the bytes with this MD5 at its start."""

    def has_same_start() -> bool:
        handle.seek(0)
        return bool(read_part(handle, before.st_size).md5 == md5)

    check_unchanged(os.fstat(handle.fileno()), before, has_same_start)


def is_multipart(size: int, options: Namespace) -> bool:
    """Decide how a file of `size` bytes is sent: in parts, or else in one."""
    threshold: int = options.multipart_threshold
    return size >= threshold


def part_size_for(size: int, wanted: int) -> int:
    """Return the part size in bytes for a file: `wanted`, or what S3's limits make of it."""
    needed = -(-size // PARTS_MAX)
    return min(max(wanted, PART_MIN_BYTES, -(-needed // MIB) * MIB), PART_MAX_BYTES)


def read_small(handle: io.FileIO, size: int) -> bytes:
    """Return the `size` bytes of a small file; raise UploadError for fewer or inexplicably more."""
    data = handle.read(size + 1)
    while len(data) < size and (more := handle.read(size + 1 - len(data))):
        data += more
    if len(data) < size:
        raise FileChanged
    if len(data) > size and os.fstat(handle.fileno()).st_size == size:
        raise UploadError("it holds more than its size says, as files of the kernel do; leave it "
                          "out with --exclude")  # fmt: skip
    return data[:size]


def run_parameters(options: Namespace) -> dict[str, Any]:
    """Return the parameters that all new objects of the run have in common."""
    wanted = {
        "StorageClass": options.storage_class,
        "ServerSideEncryption": options.sse,
        "SSEKMSKeyId": options.sse_kms_key_id,
    }
    return {name: value for name, value in wanted.items() if value}


@functools.lru_cache(1024)
def content_type_of(suffixes: str) -> str | None:
    """Return the media type of a file whose name has such suffixes, as "tar.gz"."""
    return mimetypes.guess_type(f"name.{suffixes}")[0]


@dataclass(slots=True)
class Sent:
    """A small file whose request is under way."""

    task: Task
    handle: io.FileIO
    before: os.stat_result
    md5: bytes
    answer: dict[str, Any]
    started_at: float


class Uploader:
    """Sends one file per calling thread, and proves that S3 has its bytes.

    `tell(event)` hands an event to the main thread.
    """

    def __init__(
        self, client: S3Client, options: Namespace, tell: Callable[[Event], None], free_at: Any
    ) -> None:
        self.client = client
        self.options = options
        self._tell = tell
        self._unsaved: dict[int, threading.Event] = {}
        self._put_object: Callable[..., Any] = client.put_object
        self._run_parameters = run_parameters(options)
        self.crt: CrtPut | None = None
        if options.preferred_transfer_client == "crt":
            self.crt = CrtPut(client, options, self._run_parameters)
        self._put_small_object = self.crt.put_object if self.crt else self._put_object
        self.retries = Retries(slots=options.max_concurrency)
        self.bandwidth: Bandwidth | None = None
        if options.max_bandwidth:
            self.bandwidth = Bandwidth(options.max_bandwidth, free_at)
        self._begin_max_bytes = min(CRT_MAX_BYTES, options.multipart_threshold - 1)
        if self.bandwidth:
            self._begin_max_bytes = min(self._begin_max_bytes, self.bandwidth.piece_bytes)
        self._moved_at: dict[int, float] = {}
        # Other servers may not know CRC32; Content-MD5 proves the parts everywhere.
        self.sends_crc32 = is_aws(client)

    def upload(self, task: Task, trouble: UploadError | None = None) -> Task:
        """Send one file and return the task with how that ended; raises only for a bug.

        `trouble` is what a first try has met, if there was one.
        """
        # A copy: the main thread counts by its own, whose size stays what was planned.
        task, started = replace(task, outcome="failed"), time.monotonic()
        try:
            self._upload(task, trouble)
            task.outcome = "uploaded"
        except FileChanged as error:
            task.outcome, task.error = "changed", str(error)
        except UploadError as error:
            task.outcome = "refused" if error.kind == "stops at first" else "failed"
            task.error = str(error)
        except StopRun as error:
            task.outcome, task.error = "fatal", str(error)
        except Stopped:
            task.outcome = "stopped"
        except FileNotFoundError:
            task.error = "it vanished before it was sent; restore it"
        except OSError as error:
            task.error = str(unreadable(error))
        task.seconds = time.monotonic() - started
        return task

    def _upload(self, task: Task, trouble: UploadError | None) -> None:
        self.retries.check_stopped()
        handle, before = open_regular(task.filepath)
        with handle:
            task.size, task.mtime_ns = before.st_size, before.st_mtime_ns
            if is_multipart(before.st_size, self.options):
                task.etag = MultipartUpload(self, task, before).send()
            else:
                self.abort(task)
                task.etag = self._put(task, handle, before, trouble)

    def begin(self, task: Task) -> tuple[Sent, Future[None]] | None:
        """Send a small file in one request, for `end`; None when that is not to be tried."""
        if not self.crt or self.retries.stop.is_set() or task.upload_id:
            return None
        handle, started_at = None, time.monotonic()
        trouble: tuple[type[Exception], ...] = (OSError, UploadError, *request_errors())
        try:
            handle, before = open_regular(task.filepath)
            if before.st_size > self._begin_max_bytes:
                raise UploadError("it is too large for one thread to read along with others")
            data = read_small(handle, before.st_size)
            md5 = new_md5(data).digest()
            if self.bandwidth:
                self.bandwidth.wait_for(len(data))
            future, answer = self.crt.begin(
                Body=io.BytesIO(data),
                ContentMD5=base64_of(md5),
                **self.object_parameters(task, before),
                **self.location(task),
            )
        except trouble:  # upload() meets it too, and says so
            if handle:
                handle.close()
            return None
        return Sent(task, handle, before, md5, answer, started_at), future

    def end(self, sent: Sent, future: Future[None]) -> Task | UploadError:
        """Return the task of a request that has succeeded, or what is wrong for `upload`."""
        with sent.handle:
            try:
                assert self.crt
                etag = proven_etag(self.crt.end(future, sent.answer), sent.md5)
                self.retries.note_life()
                check_unchanged_handle(sent.handle, sent.before, sent.md5)
            except FileChanged as error:
                return replace(sent.task, outcome="changed", error=str(error))
            except request_errors() as error:
                return trouble_of(error)
        return replace(
            sent.task, outcome="uploaded", size=sent.before.st_size, etag=etag,
            mtime_ns=sent.before.st_mtime_ns, seconds=time.monotonic() - sent.started_at,
        )  # fmt: skip

    def _put(
        self, task: Task, handle: io.FileIO, before: os.stat_result, trouble: UploadError | None
    ) -> str:
        """Send the file with PutObject and return the ETag."""
        size, limit = before.st_size, self.bandwidth
        body: Any
        # For larger bodies the CRT is no faster, and keeps a copy of each.
        is_small = size <= self._begin_max_bytes
        put_object = self._put_small_object if is_small else self._put_object
        if size <= IN_MEMORY_BYTES:
            data = read_small(handle, size)
            body, md5 = io.BytesIO(data), new_md5(data).digest()
        else:
            md5 = read_part(handle, size).md5
            handle.seek(0)
            body = s3transfer.utils.ReadFileChunk(handle, size, size)
        if size > (limit.piece_bytes if limit else IN_MEMORY_BYTES):
            body = LargeReads(
                body, size, on_read=lambda sent: self.note_moved(task.index, {1: sent}),
                bandwidth=limit,
            )  # fmt: skip

        def put() -> str:
            body.seek(0)
            if limit and isinstance(body, io.BytesIO):
                limit.wait_for(size)
            parameters = self.object_parameters(task, before) | self.location(task)
            answer = put_object(Body=body, ContentMD5=base64_of(md5), **parameters)
            return proven_etag(answer, md5)

        try:
            etag = self.retries.run(put, trouble=trouble)
        except UploadError:
            # A file that changes between hashing and sending is refused as damaged.
            check_unchanged_handle(handle, before, md5)
            raise
        check_unchanged_handle(handle, before, md5)
        return etag

    def location(self, task: Task) -> dict[str, Any]:
        """Return the parameters that every request for the object has."""
        return {"Bucket": self.options.bucketname, "Key": task.key}

    def object_parameters(self, task: Task, status: os.stat_result) -> dict[str, Any]:
        """Return the parameters that describe a new object."""
        parameters = dict(self._run_parameters)
        if content_type := content_type_of(os.path.basename(task.filepath).partition(".")[2]):
            parameters["ContentType"] = content_type
        # Seconds since 1970: the form in which rclone keeps and restores it.
        parameters["Metadata"] = {"mtime": f"{Decimal(status.st_mtime_ns).scaleb(-9):f}"}
        return parameters

    def note_moved(self, index: int, sizes: dict[int, int], found: int = 0) -> None:
        """Take note of how many bytes of a file have been sent, by part; tell it now and then."""
        self.retries.note_life()
        now = time.monotonic()
        if self.options.shows_progress and now - self._moved_at.get(index, 0.0) > DRAW_SECONDS:
            self._moved_at[index] = now
            self._tell(Moved(index, sum(list(sizes.values())), found))

    def announce(self, task: Task) -> None:
        """Have the id of a new multipart upload saved, and return when it is."""
        saved = self._unsaved[task.index] = threading.Event()
        self._tell(replace(task, outcome="started"))
        while not saved.wait(0.5):
            self.retries.check_stopped()

    def saved(self, index: int) -> None:
        """Take note that the state holds the id that `announce` told."""
        self._unsaved.pop(index).set()

    def abort(self, task: Task) -> None:
        """Abort the task's multipart upload, whose parts are paid for; say so if that fails."""
        if task.upload_id:
            upload = self.location(task) | {"UploadId": task.upload_id}
            if abort_upload(self.client, self.retries, upload):
                task.upload_id = task.part_size = None
            else:
                task.notice = f"multipart upload {task.upload_id} {NOT_ABORTED}"


def abort_upload(client: S3Client, retries: Retries, upload: dict[str, Any]) -> bool:
    """Abort the multipart upload and tell whether it is gone."""
    try:
        retries.run(lambda: client.abort_multipart_upload(**upload), may_stop_run=False)
    except UploadError as error:
        return error.code in ("NoSuchUpload", "404")
    return True


def crt_problem(client: S3Client, options: Namespace) -> str | None:
    """Return why small files cannot go through the AWS Common Runtime, or None if they can."""
    try:
        import awscrt.s3
    except ImportError:
        return "awscrt is not installed; run: python3 -m pip install 'boto3[crt]'"
    if not hasattr(awscrt.s3, "S3RetryConfig"):
        return "awscrt is too old; run: python3 -m pip install --upgrade 'boto3[crt]'"
    if options.bucketname.startswith("arn:") or options.bucketname.endswith("--x-s3"):
        return "it does not know access points and directory buckets"
    if botocore.utils.get_environ_proxies(client.meta.endpoint_url):
        return "it does not know the proxy of the environment"
    config = session_of(options.profile)._session
    bundles = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    has_bundle = config.get_config_variable("ca_bundle") or any(map(os.environ.get, bundles))
    if has_bundle and client.meta.endpoint_url.startswith("https:"):
        return "it does not know the CA bundle of the environment"
    if client.meta.config.signature_version != "s3v4":  # type: ignore[attr-defined]
        return "it does not know the signature version of the configuration"
    return None


THREAD = threading.local()


def keep_thread_state() -> None:
    """Let a thread of the CRT keep its Python state from one callback to the next.

    Python would make a new one for each callback, and map and unmap memory for it: a tenth
    of all the time that a small file takes.
    """
    if not hasattr(THREAD, "state"):
        THREAD.state = ctypes.pythonapi.PyGILState_Ensure()


class CrtBody:
    """A body as the CRT reads it."""

    def __init__(self, body: io.BytesIO) -> None:
        self.read, self.seek, self._readinto = body.read, body.seek, body.readinto

    def readinto1(self, buffer: memoryview) -> int:
        """Read into the buffer and return how many bytes; the CRT has a thread for this."""
        keep_thread_state()
        return self._readinto(buffer)


class CrtPut:
    """PutObject of small bodies by the AWS Common Runtime, for a third of the CPU time.

    The request is boto3's: botocore serialises one, which gives the address and the headers,
    and per file only key, length, MD5, type and modification time change.
    """

    def __init__(self, client: S3Client, options: Namespace, parameters: dict[str, Any]) -> None:
        import awscrt.auth
        import awscrt.exceptions
        import awscrt.http
        import awscrt.io
        import awscrt.s3

        self._crt = awscrt
        request = self._serialised(client, options.bucketname, parameters)
        url = urllib.parse.urlsplit(request.url)
        self._path = url.path.removesuffix("KEY")
        self._headers = [("Host", url.netloc)]
        for name, value in request.headers.items():
            if name.lower() not in HEADERS_OF_ONE_PUT:
                text = value.decode("ascii") if isinstance(value, bytes) else value
                self._headers.append((name, text))
        self._region = client.meta.region_name
        self._credentials: Any = session_of(options.profile).get_credentials()
        self._signed_with: Any = None
        modes = awscrt.s3.S3RequestTlsMode
        loops = awscrt.io.EventLoopGroup(1)
        self._client = awscrt.s3.S3Client(
            bootstrap=awscrt.io.ClientBootstrap(loops, awscrt.io.DefaultHostResolver(loops)),
            region=self._region,
            tls_mode=modes.ENABLED if url.scheme == "https" else modes.DISABLED,
            signing_config=self._current_signing_config(),
            # Decides the number of connections: 250 of them, about as many as requests in flight.
            throughput_target_gbps=100,
            connect_timeout_ms=CONNECT_TIMEOUT_SECONDS * 1000,
            # Retries is the one retry loop; 0 would mean the default, which is 5.
            retry_config=awscrt.s3.S3RetryConfig(max_retries=1),
        )
        self._parser = botocore.parsers.create_parser("rest-xml")
        self._shape: Any = client.meta.service_model.operation_model("PutObject").output_shape

    def _current_signing_config(self) -> Any:
        """Return how to sign a request now: the boto3 session refreshes the credentials."""
        credentials = self._credentials.get_frozen_credentials()[:3]
        # The CRT would otherwise ask Python for them with each request, from another thread.
        if credentials != self._signed_with:
            provider = self._crt.auth.AwsCredentialsProvider.new_static(*credentials)
            self._signing_config = self._crt.s3.create_default_s3_signing_config(
                region=self._region, credential_provider=provider
            )
            self._signed_with = credentials
        return self._signing_config

    @staticmethod
    def _serialised(client: S3Client, bucket: str, parameters: dict[str, Any]) -> Any:
        """Return the HTTP request that boto3 would send for a PutObject of the key KEY."""
        requests = []

        def take(request: Any, **_: object) -> Any:
            requests.append(request)
            return botocore.awsrequest.AWSResponse(request.url, 200, request.headers, io.BytesIO())

        client.meta.events.register_first("before-send.s3.PutObject", take)
        try:
            with contextlib.suppress(AttributeError):  # the answer has no body to parse
                client.put_object(Bucket=bucket, Key="KEY", Body=b"", **parameters)
        finally:
            client.meta.events.unregister("before-send.s3.PutObject", take)
        return requests[0]

    def put_object(self, **parameters: Any) -> dict[str, Any]:
        """Send one object as boto3's put_object would, and return what a proof needs."""
        return self.end(*self.begin(**parameters))

    def begin(
        self, *, Key: str, Body: Any, ContentMD5: str, Metadata: dict[str, str],
        ContentType: str | None = None, **_: Any,
    ) -> tuple[Future[None], dict[str, Any]]:  # fmt: skip
        """Send a request; the answer is filled when the future is done, and is for `end`."""
        headers = [
            *self._headers,
            ("Content-MD5", ContentMD5),
            ("Content-Length", str(Body.getbuffer().nbytes)),
        ]
        headers += [(f"x-amz-meta-{name}", value) for name, value in Metadata.items()]
        if ContentType:
            headers.append(("Content-Type", ContentType))
        path = self._path + urllib.parse.quote(Key, safe="/-_.~")
        http = self._crt.http
        answer: dict[str, Any] = {}

        def take(status_code: int, headers: list[tuple[str, str]], **_: object) -> None:
            keep_thread_state()
            answer.update((name.lower(), value) for name, value in headers)

        request = self._client.make_request(
            type=self._crt.s3.S3RequestType.DEFAULT,
            operation_name="PutObject",
            signing_config=self._current_signing_config(),
            request=http.HttpRequest("PUT", path, http.HttpHeaders(headers), CrtBody(Body)),
            on_headers=take,
        )
        return request.finished_future, answer

    def end(self, future: Future[None], answer: dict[str, Any]) -> dict[str, Any]:
        """Return what a proof needs of an answer, or raise what boto3 would."""
        try:
            future.result()
        except self._crt.s3.S3ResponseError as error:
            parsed = self._parser.parse(
                {
                    "status_code": error.status_code,
                    "headers": botocore.awsrequest.HeadersDict(error.headers or []),
                    "body": error.body or b"",
                },
                self._shape,
            )
            raise botocore.exceptions.ClientError(parsed, "PutObject") from error
        except self._crt.exceptions.AwsCrtError as error:
            # The runtime keeps the answer of some of S3's errors to itself.
            code = error.name.removeprefix("AWS_ERROR_S3_").title().replace("_", "")
            if code in ("RequestTimeTooSkewed", "SlowDown", "InternalError", "RequestTimeout"):
                answer = {"Error": {"Code": code}}
                raise botocore.exceptions.ClientError(answer, "PutObject") from error  # type: ignore[arg-type]
            raise botocore.exceptions.HTTPClientError(error=error) from error
        return {
            "ETag": answer.get("etag"),
            "ServerSideEncryption": answer.get("x-amz-server-side-encryption"),
            "SSECustomerAlgorithm": answer.get("x-amz-server-side-encryption-customer-algorithm"),
        }


class MultipartUpload:
    """One file sent in parts: the client that boto3's S3Transfer sees for it.

    S3Transfer divides the file and sends the parts in parallel. Its requests pass
    through the methods that are named as boto3's: here each part gets its Content-MD5
    and is tried again by itself, a part that S3 already has is answered in S3's place
    (which is all that resuming is), and a failure aborts nothing, so that a later
    run can go on.
    """

    def __init__(self, uploader: Uploader, task: Task, before: os.stat_result) -> None:
        self.meta = uploader.client.meta
        self._uploader, self._retries, self._client = uploader, uploader.retries, uploader.client
        self._task = task
        self._before = before
        self._sends_crc32 = uploader.sends_crc32
        self._etags_are_md5 = True
        self._on_s3: dict[int, Any] = {}
        self._parts: dict[int, Part] = {}
        self._moved: dict[int, int] = {}
        self._found_bytes = 0
        self._etag = ""

    def send(self) -> str:
        """Send the file and return the object's proven ETag.

        On an error, `task.upload_id` is the upload that a later run can go on with, if any.
        """
        if self._before.st_size > PARTS_MAX * PART_MAX_BYTES:
            raise UploadError("it is larger than the 48.8 TiB that S3 takes; split it")
        for tries in itertools.count(1):
            try:
                return self._attempt()
            except FileChanged:
                self._uploader.abort(self._task)
                raise
            except DigestMismatch as error:
                if tries == DAMAGED_TRIES:
                    raise trouble_of(error) from error
            except UploadError as error:
                # Somebody else aborted it: there is nothing left to go on with.
                if error.code != "NoSuchUpload" or tries == DAMAGED_TRIES:
                    raise
                self._forget_upload()
        raise AssertionError("unreachable")

    def _attempt(self) -> str:
        self._find_parts()
        try:
            if not self._etag:
                self._transfer()
        except UploadError:
            # A part that changes between hashing and sending is refused as damaged.
            self._check_unchanged()
            raise
        return self._etag

    def _check_unchanged(self) -> None:
        check_unchanged(os.stat(self._task.filepath), self._before, self._has_same_parts)

    def _transfer(self) -> None:
        task, options = self._task, self._uploader.options
        self._parts.clear()
        config = boto3.s3.transfer.TransferConfig(
            multipart_threshold=1,
            multipart_chunksize=self._part_size(),
            max_concurrency=min(PART_THREADS, options.max_concurrency),
            # boto3's own "auto" may pick the CRT, which ignores --endpoint-url.
            preferred_transfer_client="classic",
        )
        files = s3transfer.utils.OSUtils()
        # A file that grows is sent as long as it was at the start.
        files.get_file_size = lambda filename: self._before.st_size  # type: ignore[method-assign]
        extra_args = self._uploader.object_parameters(task, self._before)
        if self._sends_crc32:
            extra_args["ChecksumAlgorithm"] = "CRC32"
        with boto3.s3.transfer.S3Transfer(self, config, files) as transfer:  # type: ignore[arg-type]
            transfer.upload_file(task.filepath, options.bucketname, task.key, None, extra_args)

    def _part_size(self) -> int:
        wanted = self._task.part_size or self._uploader.options.multipart_chunksize
        return part_size_for(self._before.st_size, wanted)

    def _forget_upload(self) -> None:
        self._task.upload_id = self._task.part_size = None

    # The requests of S3Transfer:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html

    def create_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        """Start the multipart upload, or answer with the one to go on with.

        Returns only when the state holds its id: no kill leaves parts that nobody knows of.
        """
        task = self._task
        if not task.upload_id:

            def create() -> str:
                answer = self._client.create_multipart_upload(**parameters)
                if not answer.get("UploadId"):
                    raise DigestMismatch("the answer has no UploadId")
                return answer["UploadId"]

            upload_id, task.part_size = self._retries.run(create), self._part_size()
            task.upload_id = upload_id
            self._uploader.announce(task)
        return {"UploadId": task.upload_id}

    def upload_part(self, *, PartNumber: int, Body: Any, **parameters: Any) -> dict[str, Any]:
        """Send one part and prove it, unless S3 has the same bytes under its number."""
        self._retries.check_stopped()
        handle, _ = open_regular(self._task.filepath)
        with handle:
            handle.seek((PartNumber - 1) * self._part_size())
            # Not Body itself, which breaks off in the middle once another part has failed.
            body = s3transfer.utils.ReadFileChunk(handle, len(Body), self._before.st_size)
            part = self._send_part(PartNumber, body, parameters)
        self._parts[PartNumber] = part
        return {"ETag": part.etag}

    def _send_part(self, number: int, body: Any, parameters: dict[str, Any]) -> Part:
        part = read_part(body, len(body), with_crc32=self._sends_crc32)
        listed = self._on_s3.get(number)
        if listed and listed.get("Size") == len(body) and part.is_same_as(listed):
            part.etag = listed["ETag"]
            self._found_bytes += len(body)
            self._note_moved(number, len(body))
            return part
        parameters |= {"PartNumber": number, "ContentMD5": base64_of(part.md5)}
        parameters.pop("ChecksumAlgorithm", None)
        if self._sends_crc32:
            parameters["ChecksumCRC32"] = base64_of(part.crc32)
        parameters["Body"] = LargeReads(
            body, len(body), on_read=functools.partial(self._note_moved, number),
            bandwidth=self._uploader.bandwidth,
        )  # fmt: skip

        def send() -> str:
            body.seek(0)
            answer = self._client.upload_part(**parameters)
            self._etags_are_md5 &= is_md5_etag(answer)
            proven_etag(answer, part.md5)
            return str(answer.get("ETag"))

        part.etag = self._retries.run(send)
        return part

    def _note_moved(self, number: int, size: int) -> None:
        self._moved[number] = size
        self._uploader.note_moved(self._task.index, self._moved, self._found_bytes)

    def complete_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        """Make the parts one object, unless the file changed meanwhile, and prove it."""
        self._check_unchanged()
        parts: list[dict[str, Any]] = []
        for number, part in sorted(self._parts.items()):
            parts.append({"PartNumber": number, "ETag": part.etag})
            if self._sends_crc32:
                parts[-1]["ChecksumCRC32"] = base64_of(part.crc32)
        parameters["MultipartUpload"] = {"Parts": parts}
        try:
            answer = self._retries.run(lambda: self._client.complete_multipart_upload(**parameters))
        except UploadError as error:
            # Perhaps a first request did complete it, and only its answer was lost.
            if error.code != "NoSuchUpload" or not self._is_in_place():
                raise
        else:
            self._prove(answer)
        self._forget_upload()
        return {}

    def abort_multipart_upload(self, **_: Any) -> dict[str, Any]:
        """Do nothing: S3Transfer aborts after any failure, but the parts are of use."""
        return {}

    def _has_same_parts(self) -> bool:
        again = self._read_parts()
        return all(part.md5 == again[number].md5 for number, part in self._parts.items())

    def _read_parts(self) -> dict[int, Part]:
        """Return the digests of all parts, read from the file anew."""
        size, part_size, parts = self._before.st_size, self._part_size(), {}
        handle, _ = open_regular(self._task.filepath)
        with handle:
            for number, start in enumerate(range(0, size, part_size), start=1):
                self._retries.check_stopped()
                length = min(part_size, size - start)
                parts[number] = read_part(handle, length, with_crc32=self._sends_crc32)
        return parts

    def _find_parts(self) -> None:
        """Look up what S3 has of the recorded upload: parts, all of it (`_etag`), or nothing."""
        self._on_s3 = {}
        if not self._task.upload_id:
            return
        found = None
        try:
            found = self._retries.run(self._list_parts, may_stop_run=False)
        except UploadError as error:
            if error.kind in ("passing", "stops"):
                raise
            if error.code == "NoSuchUpload":
                self._parts.clear()
                self._is_in_place()
                self._forget_upload()
                return
        if found is None:
            self._uploader.abort(self._task)
            self._forget_upload()
        else:
            self._on_s3 = found

    def _list_parts(self) -> dict[int, Any] | None:
        """Return the parts by number, or None when the upload is not as this run wants it."""
        parts: dict[int, Any] = {}
        wanted_class = self._uploader.options.storage_class
        parameters = self._uploader.location(self._task) | {"UploadId": self._task.upload_id}
        for page in self._client.get_paginator("list_parts").paginate(**parameters):
            if wanted_class and page.get("StorageClass", wanted_class) != wanted_class:
                return None
            if page.get("Key", self._task.key) != self._task.key:
                return None
            self._sends_crc32 = page.get("ChecksumAlgorithm") == "CRC32"
            parts |= {part["PartNumber"]: part for part in page.get("Parts", ())}
        return parts

    # The proof:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html

    def _prove(self, answer: Any) -> None:
        """Set `_etag`; raise DigestMismatch when the object does not hold the bytes.

        Where neither the answer nor HeadObject tells, the parts stand as proof: S3 has
        accepted each with its Content-MD5.
        """
        proven = self._compare(answer)
        if proven is None and (head := self._head()) is not None:
            answer = head
            proven = head.get("ContentLength") == self._before.st_size and self._compare(head)
        self._etag = etag_of(answer)
        if proven is False:
            if answer:  # not so when there is no object: the server has not completed it
                self._forget_upload()
            wrong, self._etag = self._etag, ""
            if self._has_crc32(answer):
                crc32 = answer["ChecksumCRC32"]
                raise DigestMismatch(f"its CRC32 is {crc32} and should be {self._expected_crc32()}")
            raise DigestMismatch(
                f"its ETag is {wrong or 'missing'} and should be {self._expected_etag()}"
            )

    def _is_in_place(self) -> bool:
        """Tell whether the object is there and provably holds the bytes; then set `_etag`."""
        head = self._head() or {}
        if head.get("ContentLength") != self._before.st_size:
            return False
        self._parts = self._parts or self._read_parts()
        if self._compare(head):
            self._etag = etag_of(head)
        return bool(self._etag)

    def _compare(self, answer: Any) -> bool | None:
        """Tell whether the object in `answer` holds the bytes; None when it does not say."""
        etag = etag_of(answer)
        if etag == self._expected_etag():
            return True
        if self._has_crc32(answer):
            return bool(answer["ChecksumCRC32"] == self._expected_crc32())
        if not self._etags_are_md5 or not is_md5_etag(answer):
            return None
        if re.fullmatch(r"[0-9a-f]{32}", etag):
            handle, _ = open_regular(self._task.filepath)
            with handle:
                return read_part(handle, self._before.st_size).md5.hex() == etag
        # Another number of parts: the server has put them together in its own way.
        return False if re.fullmatch(rf"[0-9a-f]{{32}}-{len(self._parts)}", etag) else None

    def _expected_etag(self) -> str:
        md5s = b"".join(part.md5 for _, part in sorted(self._parts.items()))
        return f"{new_md5(md5s).hexdigest()}-{len(self._parts)}"

    def _has_crc32(self, answer: Any) -> bool:
        """Tell whether the answer has a CRC32 that is made of those of the parts."""
        crc32 = answer.get("ChecksumCRC32") or ""
        return self._sends_crc32 and crc32.endswith(f"-{len(self._parts)}")

    def _expected_crc32(self) -> str:
        crc32s = b"".join(part.crc32 for _, part in sorted(self._parts.items()))
        return f"{base64_of(zlib.crc32(crc32s).to_bytes(4, 'big'))}-{len(self._parts)}"

    def _head(self) -> Any:
        """Return HeadObject's answer, empty for no object, or None where it is refused."""
        location = self._uploader.location(self._task)
        if self._sends_crc32:
            location["ChecksumMode"] = "ENABLED"  # without it S3 tells no checksum
        try:
            return self._retries.run(
                lambda: self._client.head_object(**location), may_stop_run=False
            )
        except UploadError as error:
            if error.kind == "passing":
                raise
            return {} if error.code in ("404", "NoSuchKey", "NotFound") else None


# --- the bucket -------------------------------------------------------------------


def open_bucket(options: Namespace, interruption: Interruption) -> S3Client:
    """Return a client for the bucket, which is created where missing, or raise StopRun."""
    client, exists = find_bucket(options, interruption)
    options.is_new_bucket = not exists
    if not exists:
        create = functools.partial(create_bucket, client, options)
        client = build_client(options, interruptible(create, interruption))
    choose_transfer_client(client, options)
    return client


def find_bucket(options: Namespace, interruption: Interruption) -> tuple[S3Client, bool]:
    """Return a client for the bucket, and whether it exists; raise StopRun if that is unclear.

    A 403 does not stop: a write-only credential may not look, and the first upload will tell.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadBucket.html
    """
    probe = build_client(
        options, None,
        connect_timeout=FIRST_CONNECT_TIMEOUT_SECONDS, read_timeout=FIRST_READ_TIMEOUT_SECONDS,
    )  # fmt: skip
    try:
        # A name server or a black hole may hang far longer than any timeout of ours.
        look = functools.partial(look_at_bucket, probe, options)
        status, region = interruptible(look, interruption, seconds=FIRST_REQUEST_SECONDS)
    except NoAnswer as error:
        where = probe.meta.endpoint_url
        raise StopRun(f"no answer from {where}; check network and endpoint") from error
    if status == 401 or (status == 400 and not region):
        raise StopRun("the server refuses these credentials; check keys, session token and clock")
    if status != 404 and region not in (None, probe.meta.region_name):
        probe = build_client(options, region)
    return probe, status != 404


def interruptible(
    function: Callable[[], T], interruption: Interruption, *, seconds: float = math.inf
) -> T:
    """Return what `function` returns; it runs in a thread that a signal does not wait for.

    Raises Stopped after a signal, and NoAnswer when it takes longer than `seconds`.
    """
    answer = ThreadPoolExecutor(max_workers=1).submit(function)
    deadline = time.monotonic() + seconds
    while not wait([answer], timeout=0.05).done:
        interruption.check()
        if time.monotonic() > deadline:
            raise NoAnswer
    return answer.result()


def choose_transfer_client(client: S3Client, options: Namespace) -> None:
    """Replace the option's "auto"; raise StopRun when "crt" is asked for and cannot be had."""
    if options.preferred_transfer_client != "classic":
        problem = crt_problem(client, options)
        if problem and options.preferred_transfer_client == "crt":
            raise StopRun(f"cannot use the AWS Common Runtime: {problem}")
        options.preferred_transfer_client = "classic" if problem else "crt"


def look_at_bucket(client: S3Client, options: Namespace) -> tuple[int, str | None]:
    """Return the HTTP status that HeadBucket gives, and the region it names."""

    def head() -> tuple[int, str | None]:
        answer: Any
        try:
            answer = client.head_bucket(Bucket=options.bucketname)
        except botocore.exceptions.ClientError as error:
            if trouble_of(error).kind == "passing":
                raise
            answer = error.response
        metadata = answer["ResponseMetadata"]
        return metadata["HTTPStatusCode"], metadata["HTTPHeaders"].get("x-amz-bucket-region")

    return Retries(patience_seconds=FIRST_PATIENCE_SECONDS).run(head)


def is_there_soon(client: S3Client, options: Namespace) -> bool:
    """Tell whether the bucket is ours; another run may be creating it this very moment."""
    for _ in range(6):
        status, _region = look_at_bucket(client, options)
        if status != 404:
            break
        time.sleep(0.5)
    return status == 200


def create_bucket(client: S3Client, options: Namespace) -> str:
    """Create the bucket, wait until it exists, and return its region, or raise StopRun."""
    name, region = options.bucketname, options.region or DEFAULT_REGION
    if not re.fullmatch(r"(?![\d.]+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
        raise StopRun(f"there is no bucket {name}, and none can be created: the name of a bucket "
                      f"has {BUCKET_NAME_RULES}")  # fmt: skip
    location: Any = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    location = {} if region == "us-east-1" else location
    attempts: list[tuple[S3Client, Any]] = [(build_client(options, region), location)]
    if not (options.region or is_aws(client)):
        attempts.append((client, {}))  # other servers have regions of their own, or none
    for creator, location in attempts:
        try:
            create = functools.partial(creator.create_bucket, Bucket=name, **location)
            Retries().run(create, may_stop_run=False)
            break
        except UploadError as error:
            # A second request, or another run's, finds the bucket there already.
            if error.code in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                if is_there_soon(creator, options):
                    break
                why = f"the bucket name {name} is taken by another account"
                raise StopRun(f"{why}; choose another with --bucketname") from error
            if error.code not in LOCATION_CODES or creator is attempts[-1][0]:
                raise StopRun(f"cannot create the bucket {name}: {error}") from error
    try:
        creator.get_waiter("bucket_exists").wait(Bucket=name, WaiterConfig={"Delay": 1})
    except botocore.exceptions.WaiterError as error:
        raise StopRun(f"the new bucket {name} does not appear; try again") from error
    return creator.meta.region_name


def list_objects(
    client: S3Client, options: Namespace, keys: list[str], *,
    report: Report, interruption: Interruption,
) -> Iterator[Any]:  # fmt: skip
    """Yield what the bucket says of its objects that may have one of the keys: 1,000 a request.

    Raises UploadError when they cannot be listed.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
    """
    prefix = os.path.commonprefix(keys)  # noqa: RUF071 (of strings, which keys are, not of paths)
    parameters = {"Bucket": options.bucketname, "Prefix": prefix}
    request = functools.partial(client.list_objects_v2, **parameters)
    retries, count, token = Retries(), 0, None
    while True:
        get_page = functools.partial(retries.run, request, may_stop_run=False)
        page: Any = interruptible(get_page, interruption)
        yield from page.get("Contents", ())
        count += page.get("KeyCount", 0)
        report.progress.draw([(0, f"{count:,} objects listed")])
        if not page.get("IsTruncated"):
            return
        if page.get("NextContinuationToken") in (None, token):
            raise UploadError("the server breaks the listing off")
        token = page["NextContinuationToken"]
        request = functools.partial(client.list_objects_v2, **parameters, ContinuationToken=token)


def find_unchanged(
    entries: list[Entry], previous: list[Entry] | None, client: S3Client, options: Namespace, *,
    report: Report, interruption: Interruption,
) -> None:  # fmt: skip
    """Take as uploaded what has the size and time of the state, and size and ETag in the bucket."""
    pending = {entry.filepath: entry for entry in entries if is_pending(entry)}
    candidates: dict[str, tuple[Entry, str | None]] = {}
    for old in previous or ():
        entry = pending.get(old.filepath)
        if entry and old.uploaded and old.etag and is_same_file(old, entry):
            candidates[entry.filename] = entry, old.etag
    if not candidates:
        return
    try:
        keys = list(candidates)
        for found in list_objects(client, options, keys, report=report, interruption=interruption):
            same, etag = candidates.get(found["Key"], (None, None))
            if same and (found["Size"], etag_of(found)) == (same.size, etag):
                same.uploaded, same.etag = True, etag
                report.unchanged_files += 1
    except UploadError as error:
        report.error(f"cannot list the bucket, so what it has is sent again: {error}")


def is_same_file(old: Entry, entry: Entry) -> bool:
    """Tell whether a file has the key, size and time that a state recorded."""
    then = old.filename, old.size, old.mtime_ns
    return then == (entry.filename, entry.size, entry.mtime_ns)


def find_wrong(
    entries: list[Entry], client: S3Client, options: Namespace, *,
    report: Report, interruption: Interruption,
) -> list[Entry]:  # fmt: skip
    """Mark the uploaded entries that the bucket lacks, or holds otherwise; return them."""
    unseen = {entry.filename: entry for entry in entries if entry.uploaded}
    wrong: list[Entry] = []
    if not unseen:
        return wrong
    try:
        keys = list(unseen)
        for found in list_objects(client, options, keys, report=report, interruption=interruption):
            if entry := unseen.pop(found["Key"], None):
                compare = functools.partial(difference, entry, found, client, options)
                try:
                    # Only a comparison with the local file takes long.
                    entry.error = compare() if entry.etag else interruptible(compare, interruption)
                except (OSError, UploadError) as error:
                    report.unproven(entry, error)
                if entry.error:
                    wrong.append(entry)
    except UploadError as error:
        raise StopRun(f"cannot list the bucket {options.bucketname}: {error}") from error
    for entry in unseen.values():
        entry.error = "it is not in the bucket"
        wrong.append(entry)
    for entry in wrong:
        entry.uploaded, entry.etag = False, None
    return wrong


def difference(entry: Entry, found: Any, client: S3Client, options: Namespace) -> str | None:
    """Return what is wrong with the object that a listing found, or None.

    Without an ETag in the state, it is compared with the local file: raises OSError or
    UploadError when that cannot be done.
    """
    size, etag = found["Size"], etag_of(found)
    if entry.size not in (None, size):
        return f"it has {size:,} bytes there and not {entry.size:,}"
    if entry.etag:
        is_same = etag in ("", entry.etag)  # some listings have no ETags
        return None if is_same else f"its ETag there is {shown(etag)} and not {shown(entry.etag)}"
    handle, status = open_regular(entry.filepath)
    with handle:
        if status.st_size != size:
            return f"it has {size:,} bytes there and {status.st_size:,} here"
        # Of a multipart ETag the part size is not known, and the size has to do.
        if re.fullmatch(r"[0-9a-f]{32}", etag) and read_part(handle, size).md5.hex() != etag:
            head = functools.partial(client.head_object, Bucket=options.bucketname)
            answer = Retries().run(lambda: head(Key=entry.filename), may_stop_run=False)
            if is_md5_etag(answer):
                return "it has other bytes there than here"
    return None


# --- transfer: the main thread's side ---------------------------------------------


def raise_file_limit() -> None:
    """Let this process open as many files as it will have under way: macOS gives 256."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES_OPEN_MAX if hard == resource.RLIM_INFINITY else min(FILES_OPEN_MAX, hard)
        if soft < wanted:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Worker:
    """The threads that upload: some for small files and a few for large ones.

    Neither kind waits for the other, and large files do not multiply threads. `tell(event)`
    hands events, each finished task among them, to the main thread.
    """

    def __init__(
        self, client: S3Client, options: Namespace, tell: Callable[[Event], None], free_at: Any
    ) -> None:
        raise_file_limit()
        self.uploader = Uploader(client, options, tell, free_at)
        self.saved = self.uploader.saved
        self.stop = self.uploader.retries.stop.set
        self._tell = tell
        self._ready: dict[bool, queue.SimpleQueue[tuple[Task, UploadError | None]]] = {}
        self._begun: queue.SimpleQueue[tuple[Sent, Future[None]] | Task] = queue.SimpleQueue()
        small_threads = options.max_concurrency
        if self.uploader.crt:
            small_threads = min(small_threads, REQUESTS_PER_PROCESS["classic"])
        for large, threads in ((False, small_threads), (True, LARGE_FILES_AT_ONCE)):
            self._ready[large] = queue.SimpleQueue()
            for _ in range(threads):
                # Daemons: a thread that is stuck in a socket must not hold up the exit.
                threading.Thread(target=self._work, args=(large,), daemon=True).start()
        if self.uploader.crt:
            threading.Thread(target=self._pump, daemon=True).start()

    def submit(self, tasks: list[Task]) -> None:
        """Take tasks for the threads."""
        for task in tasks:
            if self.uploader.crt and not task.large:
                self._begun.put(task)
            else:
                self._ready[task.large].put((task, None))

    def _pump(self) -> None:
        """Have many small files under way from one thread, which many threads would slow down.

        It makes the first try of each; what does not succeed at once goes to the threads.
        """
        task = None
        try:
            while True:
                item = self._begun.get()
                if isinstance(item, tuple):
                    task = item[0].task
                    self._take_answer(*item)
                elif begun := self.uploader.begin(task := item):
                    sent, future = begun
                    future.add_done_callback(functools.partial(self._note_done, sent))
                else:
                    self._ready[False].put((item, None))
        finally:
            self._tell_bug(task)

    def _take_answer(self, sent: Sent, future: Future[None]) -> None:
        ended = self.uploader.end(sent, future)
        if isinstance(ended, Task):
            self._tell(ended)
        else:
            self._ready[False].put((sent.task, ended))

    def _note_done(self, sent: Sent, future: Future[None]) -> None:
        self._begun.put((sent, future))

    def _work(self, large: bool) -> None:
        task = None
        try:
            while True:
                task, trouble = self._ready[large].get()
                self._tell(self.uploader.upload(task, trouble))
        finally:
            self._tell_bug(task)

    def _tell_bug(self, task: Task | None) -> None:
        # Only a bug ends a thread, and its traceback follows: the run must not hang.
        if task:
            self._tell(replace(task, outcome="fatal", error="this is a bug; please report it"))


SPAWN = multiprocessing.get_context("spawn")


class WorkerProcess:
    """A Worker in a process of its own, so that several do not share one interpreter lock.

    It imports boto3 while the main process plans, and then waits for work(). Spawned: a fork
    would hold the state's lock beyond the death of the main process, which ends the pipe and
    with it the worker.
    """

    def __init__(self, number: int, options: Namespace, free_at: Any) -> None:
        self._number = number
        self._pipe, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=serve, args=(number, theirs, options, free_at), daemon=True)
        if sys.platform == "win32":
            process.start()
        else:
            # Else the first start() starts it, which would unblock the signals again.
            multiprocessing.resource_tracker.ensure_running()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, Interruption.SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        # What a Worker takes, told apart by its type: tasks, the index of one, or nothing.
        self.submit = self.saved = self.stop = self._send

    def work(self, options: Namespace, region: str, tell: Callable[[Event], None]) -> None:
        """Let it take tasks, now that the options and the bucket's region are known."""
        self._tell = tell
        self._send((options, region))
        threading.Thread(target=self._listen, daemon=True).start()

    def _send(self, message: tuple[Namespace, str] | list[Task] | int | None = None) -> None:
        with contextlib.suppress(OSError):  # it has ended, and _listen says so
            self._pipe.send(message)

    def _listen(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    for event in self._pipe.recv():
                        self._tell(event)
        finally:  # a bug too must not make the run wait for ever
            self._tell(WorkerEnded(self._number))


def serve(number: int, pipe: Any, options: Namespace, free_at: Any) -> None:
    """Be a worker process: take tasks from the pipe and send events back, until it closes."""
    gc.disable()  # as in main()
    # A signal to the whole process group is for the main process to answer.
    for signum in Interruption.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    threading.Thread(target=send_events, args=(events, pipe), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        try:
            import_boto3()
            build_client(options, None)  # fills the caches of boto3, of which the next one profits
            options, region = pipe.recv()
            worker = Worker(build_client(options, region), options, events.put, free_at)
        except StopRun as error:
            pipe.send([WorkerEnded(number, str(error))])
            return
        gc.freeze()
        gc.enable()
        while True:
            message = pipe.recv()
            if message is None:
                worker.stop()
            elif isinstance(message, list):
                worker.submit(message)
            else:
                worker.saved(message)
    os._exit(0)


def send_events(events: queue.SimpleQueue[Event], pipe: Any) -> None:
    """Send events through the pipe, as many at a time as there are."""
    with contextlib.suppress(OSError):
        while True:
            batch = [events.get()]
            time.sleep(BATCH_SECONDS)  # each message wakes the main process
            while not events.empty():
                batch.append(events.get())
            pipe.send(batch)


def processes_for(small: Iterable[Entry], options: Namespace) -> int:
    """Return in how many processes so many small files are best sent; reads no more than needed."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    most = min(cores, PROCESSES_MAX, options.max_concurrency or cores)
    client = options.preferred_transfer_client
    if client == "auto":
        client = "crt" if importlib.util.find_spec("awscrt") else "classic"
    per_process = FILES_PER_PROCESS[client]
    count = sum(1 for _ in itertools.islice(small, most * per_process))
    return max(1, min(most, count // per_process))


def is_small(entry: Entry, options: Namespace) -> bool:
    """Tell whether an entry is a file that is to be sent in one part."""
    return is_pending(entry) and not is_multipart(entry.size or 0, options)


def start_processes(
    options: Namespace, previous: list[Entry] | None, free_at: Any, *,
    interruption: Interruption, state: StateFile,
) -> list[WorkerProcess]:  # fmt: skip
    """Start worker processes if there is work for them; they get ready while the run is planned."""
    if options.skip_unchanged:  # how much there is to do is not known yet
        return []
    silent = Report(Namespace(quiet=True, verbose=False, shows_progress=False))
    walk = Walk(options, silent, interruption, state)
    found = (entry for entry in walk.entries(previous) if is_in_shard(entry, options))
    small = (entry for entry in found if is_small(entry, options))
    processes = processes_for(small, options)
    if processes == 1:
        return []
    return [WorkerProcess(number, options, free_at) for number in range(processes)]


class Transfer:
    """Sends the pending entries: hands out tasks, records results, saves the state.

    All but the uploading runs in the main thread.
    """

    def __init__(
        self, entries: list[Entry], client: S3Client, options: Namespace, *,
        processes: list[WorkerProcess], free_at: Any,
        state: StateFile, report: Report, interruption: Interruption,
    ) -> None:  # fmt: skip
        self._entries = entries
        self._region = client.meta.region_name
        self._options = options
        self._state = state
        self._report = report
        self._interruption = interruption
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._waiting = {large: self._tasks(large=large) for large in (False, True)}
        self._next = {large: next(tasks, None) for large, tasks in self._waiting.items()}
        self._again: deque[tuple[float, Task]] = deque()
        self._processes, self._free_at = processes, free_at
        self._workers: list[Worker | WorkerProcess] = []
        self._tasks_of: list[dict[int, Task]] = []
        self._under_way, self._bytes_under_way = {False: 0, True: 0}, 0
        self._can_save, self._workers_lost = True, 0
        self._refused: list[Task] = []
        # What a crash run's state says was uploaded shows that a refusal is not of everything.
        is_uploaded = (entry.uploaded for entry in entries)
        self._accepted = options.crashrun == 1 and any(is_uploaded)
        self.stop_message: str | None = None

    def run(self) -> None:
        """Send every pending entry, until all is done or the run must stop (`stop_message`).

        What is under way then has a few seconds to end.
        """
        self._report.progress.begin(filter(is_pending, self._entries))
        self._start_workers()
        stop_at = math.inf
        while time.monotonic() < stop_at:
            if not (self._interruption.signum or self.stop_message):
                if not self._refused:
                    self._hand_out()
            elif stop_at == math.inf:
                stop_at = time.monotonic() + SIGNAL_GRACE_SECONDS
                for worker in self._workers:
                    worker.stop()
            is_idle = not any(self._under_way.values())
            if is_idle and (stop_at < math.inf or not (self._again or self._refused)):
                break
            self._take_events()
            self._settle_refused()
            self._report.draw_progress(is_stopping=stop_at < math.inf)

    def _settle_refused(self) -> None:
        """Decide whether a refusal is of one key or of all; while nothing tells, wait."""
        if self._accepted:
            for task in self._refused:
                self._try_again(task, error=task.error, is_passing=False)
            self._refused.clear()
        elif self._refused and not any(self._under_way.values()):
            self.stop_message = self.stop_message or self._refused[0].error

    def _start_workers(self) -> None:
        options = self._options
        small = (entry for entry in self._entries if is_small(entry, options))
        processes = max(processes_for(small, options), len(self._processes))
        if not options.max_concurrency:
            threads = REQUESTS_PER_PROCESS[options.preferred_transfer_client]
            options.max_concurrency = processes * threads
        if processes == 1:
            client = build_client(options, self._region)
            self._workers = [Worker(client, options, self._events.put, self._free_at)]
        else:
            self._workers = [self._start_process(number, processes) for number in range(processes)]
        self._tasks_of = [{} for _ in self._workers]

    def _start_process(self, number: int, processes: int) -> WorkerProcess:
        options = Namespace(**vars(self._options))
        options.max_concurrency = -(-options.max_concurrency // processes)
        if self._processes:
            process = self._processes.pop(0)
        else:
            process = WorkerProcess(number, options, self._free_at)
        process.work(options, self._region, self._events.put)
        return process

    def _tasks(self, *, large: bool) -> Iterator[Task]:
        for index, entry in enumerate(self._entries):
            size = entry.size or 0
            if is_pending(entry) and is_multipart(size, self._options) == large:
                yield Task(
                    index, entry.filepath, entry.filename, size, large,
                    entry.upload_id, entry.part_size,
                )  # fmt: skip

    def _hand_out(self) -> None:
        batches: list[list[Task]] = [[] for _ in self._workers]
        for large, tasks in self._waiting.items():
            while (task := self._next[large]) and self._has_room_for(task):
                self._assign(task, batches)
                self._next[large] = next(tasks, None)
        # Files that changed come after all others: their writer may have finished.
        while self._again and not any(self._next.values()):
            due, task = self._again[0]
            # A last try is made alone: a file that kills its worker takes no other with it.
            is_last = task.tries == CHANGED_TRIES and any(self._under_way.values())
            if time.monotonic() < due or is_last or not self._has_room_for(task):
                break
            self._assign(self._again.popleft()[1], batches)
        for worker, batch in zip(self._workers, batches, strict=True):
            if batch:
                worker.submit(batch)

    def _has_room_for(self, task: Task) -> bool:
        under_way = self._under_way[task.large]
        if task.large:
            return under_way < LARGE_FILES_AT_ONCE
        if under_way < min(ALWAYS_UNDER_WAY, self._options.max_concurrency):
            return True
        queued = 1 if self._options.preferred_transfer_client == "crt" else QUEUED_PER_THREAD
        return (
            under_way < self._options.max_concurrency * queued
            and self._bytes_under_way + task.size <= BYTES_UNDER_WAY
        )

    def _assign(self, task: Task, batches: list[list[Task]]) -> None:
        number = min(range(len(batches)), key=lambda n: len(self._tasks_of[n]))
        self._tasks_of[number][task.index] = task
        batches[number].append(task)
        self._under_way[task.large] += 1
        self._bytes_under_way += 0 if task.large else task.size

    def _take_back(self, index: int) -> Task:
        task = next(tasks.pop(index) for tasks in self._tasks_of if index in tasks)
        self._under_way[task.large] -= 1
        self._bytes_under_way -= 0 if task.large else task.size
        return task

    def _take_events(self) -> None:
        """Record what the workers report; wait a moment for it if there is nothing."""
        started: list[Task] = []
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=0.1)
            while True:
                if isinstance(event, WorkerEnded):
                    self._replace_worker(event)
                elif isinstance(event, Moved):
                    self._report.progress.moving[event.index] = event.size
                    self._report.progress.found[event.index] = event.found
                else:
                    self._record(event)
                    if event.outcome == "started":
                        started.append(event)
                event = self._events.get_nowait()
        if started or self._state.is_due():
            self.save()
        for event in started:
            for worker, tasks in zip(self._workers, self._tasks_of, strict=True):
                if event.index in tasks:
                    worker.saved(event.index)

    def _record(self, task: Task) -> None:
        """Write down in the entry what a worker says of it."""
        entry = self._entries[task.index]
        entry.upload_id, entry.part_size = task.upload_id, task.part_size
        entry.sse = encryption_of(self._options) if task.upload_id else None
        if task.notice:
            self._report.notice(task.notice, entry.filepath)
        if task.outcome in ("uploaded", "started"):
            entry.size, entry.mtime_ns = task.size, task.mtime_ns
        if task.outcome == "started":
            self._accepted = True  # starting an upload takes the same permission
            return
        self._take_back(task.index)
        self._report.progress.moving.pop(task.index, None)
        if task.outcome == "uploaded":
            entry.uploaded, entry.etag = True, task.etag
            self._accepted = True
            self._report.uploaded(entry, task.seconds)
        elif task.outcome == "fatal":
            self.stop_message = self.stop_message or task.error
        elif task.outcome == "refused":
            self._refused.append(task)
        elif task.outcome != "stopped":
            self._try_again(task, error=task.error, is_passing=task.outcome == "changed")

    def _try_again(self, task: Task, *, error: str | None, is_passing: bool = True) -> None:
        """Send the file of a task again later, or have it fail for good with `error`."""
        entry = self._entries[task.index]
        if is_passing and task.tries < CHANGED_TRIES:
            again = replace(task, tries=task.tries + 1, upload_id=entry.upload_id)
            again.part_size = entry.part_size
            self._again.append((time.monotonic() + CHANGED_PAUSE_SECONDS, again))
        else:
            entry.error = error
            self._report.failed(entry)

    def _replace_worker(self, ended: WorkerEnded) -> None:
        """Start another process for one that ended, and try its files again."""
        self.stop_message = self.stop_message or ended.error
        self._workers_lost += 1
        if self._workers_lost == WORKERS_LOST_MAX and not self.stop_message:
            self.stop_message = "worker processes are killed again and again; check the memory"
        error = "the process that sent it was killed, three times; check the memory"
        for index in list(self._tasks_of[ended.number]):
            self._try_again(self._take_back(index), error=error)
        if not (self._interruption.signum or self.stop_message):
            self._workers[ended.number] = self._start_process(ended.number, len(self._workers))

    def save(self) -> bool:
        """Save the state and tell whether it worked; for the data's sake a run goes on without."""
        worked = True
        try:
            self._state.save(self._entries)
        except OSError as error:
            worked = False
            if self._can_save:
                self._report.error(f"cannot save {shown(self._state.path)}: {reason(error)}")
        self._can_save = worked
        return worked


def is_pending(entry: Entry) -> bool:
    """Tell whether an entry is to be sent."""
    return not (entry.uploaded or entry.error)


# --- report -----------------------------------------------------------------------


class Report:
    """What the user sees: failures and notices on stderr, the summary on stdout."""

    NOTICES_OF_A_KIND = 3

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._started = time.monotonic()
        self._notices: Counter[str] = Counter()
        self.files = self.bytes = self.failed_files = 0
        self.unchanged_files = self.unproven_files = 0
        self.progress = Progress(is_shown=options.shows_progress)

    def error(self, text: str) -> None:
        """Say what is wrong with the run."""
        self._print(f"s3FileTransfer: {text}", sys.stderr)

    def notice(self, kind: str, path: str) -> None:
        """Say that something at `path` is left out; many of a kind are counted, not listed."""
        self._notices[kind] += 1
        if self._options.verbose or self._notices[kind] <= self.NOTICES_OF_A_KIND:
            self._notify(f"{kind}: {shown(path)}")

    def end_of_notices(self) -> None:
        """Say how many notices were not listed."""
        for kind, count in self._notices.items():
            if not self._options.verbose and count > self.NOTICES_OF_A_KIND:
                self._notify(f"{kind}: {count - self.NOTICES_OF_A_KIND:,} more")

    def _notify(self, text: str) -> None:
        if not self._options.quiet:
            self._print(f"notice: {text}", sys.stderr)

    def draw_progress(self, *, is_stopping: bool) -> None:
        """Show how far the run is, if it is time."""
        if is_stopping:
            seconds = f"{SIGNAL_GRACE_SECONDS} seconds"
            self.progress.draw([(0, "stopping"), (1, f"what is under way has {seconds}")])
        else:
            self.progress.draw_run(self.files, self.bytes, failed_files=self.failed_files)

    def failed(self, entry: Entry) -> None:
        """Say that an entry was not uploaded, and why."""
        self.failed_files += 1
        self.progress.failed(entry)
        self._print(f"failed: {shown(entry.filepath)}: {entry.error}", sys.stderr)

    def uploaded(self, entry: Entry, seconds: float = 0.0) -> None:
        """Count an uploaded file (or one that a run without --dryrun would send), and list it."""
        self.files += 1
        self.bytes += entry.size or 0
        self.progress.ended(entry)
        if not (self._options.dryrun or self._options.verbose):
            return
        size = human_size(entry.size or 0)
        line = f"{shown(entry.filepath)} -> {self._url(entry.filename)} ({size}"
        if self._options.dryrun:
            self._print(f"would upload: {line})", sys.stdout)
        else:
            self._print(f"uploaded: {line}, {seconds:.1f} s)", sys.stderr)

    def _url(self, key: str) -> str:
        return shown(f"s3://{self._options.bucketname}/{key}")

    def summary(self, state_path: str, *, left: int = 0) -> None:
        """Say on stdout how the run went; `left` files were neither sent nor failed."""
        if self._options.quiet:
            return
        seconds = time.monotonic() - self._started
        what = f"{self.files:,} file{'' if self.files == 1 else 's'}, {human_size(self.bytes)}"
        failed = f"{self.failed_files:,} failed" + (f", {left:,} not yet sent" if left else "")
        if self._options.skip_unchanged or self.unchanged_files:
            failed = f"{self.unchanged_files:,} unchanged, {failed}"
        text = f"dry run: would send {what}; {failed}"
        if not self._options.dryrun:
            rate = human_size(self.bytes / max(seconds, 0.001))
            text = f"sent {what} to {self._url(self._options.prefix)} in {seconds:.1f} s ({rate}/s)"
            text += f"; {failed}; state: {shown(state_path)}"
        self._print(text, sys.stdout)

    def wrong(self, entry: Entry, *, kind: str = "wrong", why: str | None = None) -> None:
        """Say that the bucket does not hold what the state says of an entry."""
        self.failed_files += 1
        where = f"{self._url(entry.filename)} (of {shown(entry.filepath)})"
        self._print(f"{kind}: {where}: {why or entry.error}", sys.stdout)

    def unproven(self, entry: Entry, error: OSError | UploadError) -> None:
        """Say that nothing tells whether the bucket holds what the state says of an entry."""
        self.unproven_files += 1
        why = reason(error) if isinstance(error, OSError) else str(error)
        self.wrong(entry, kind="unproven", why=f"it cannot be compared with the file: {why}")

    def verified(self, entries: list[Entry], state_path: str, *, left: int) -> None:
        """Say on stdout how a comparison of the bucket with the state ended."""
        if not self._options.quiet:
            right = sum(entry.uploaded for entry in entries) - self.unproven_files
            size = human_size(sum(entry.size or 0 for entry in entries if entry.uploaded))
            what = f"{right:,} file{'' if right == 1 else 's'} right, {size}"
            wrong = f"{self.failed_files - self.unproven_files:,} wrong"
            if self.unproven_files:
                wrong += f", {self.unproven_files:,} unproven"
            text = f"verified in {self._url('')}: {what}; {wrong}, {left:,} not yet sent; state: "
            self._print(text + shown(state_path), sys.stdout)

    def _print(self, text: str, stream: TextIO | None) -> None:
        self.progress.clear()
        # A closed pipe or a full disk behind a stream must not end a backup.
        with contextlib.suppress(OSError, ValueError):
            if stream:  # None when it was closed at the start
                print(text, file=stream, flush=stream is sys.stderr)


class Progress:
    """The line on a terminal that says how far a run is.

    `moving` has the bytes sent of each large file that is under way, and `found` those of
    them, and of the large files before, that an earlier run had sent.
    """

    ERASE = "\033[K"  # what is right of the cursor

    def __init__(self, *, is_shown: bool) -> None:
        self.moving: dict[int, int] = {}
        self.found: dict[int, int] = {}
        self._small_total = self._small_left = 0
        self._is_shown = is_shown
        if is_shown and sys.platform == "win32":
            os.system("")  # lets the console know such sequences
        self._line, self._drawn_at = "", -math.inf
        self._total_files = self._total_bytes = self._failed_files = self._failed_bytes = 0
        self._is_begun = False
        self._past: deque[tuple[float, int, int]] = deque()

    def begin(self, pending: Iterable[Entry]) -> None:
        """Take note of what is to be sent."""
        self._is_begun = True
        self._past.append((time.monotonic(), 0, 0))
        for entry in pending if self._is_shown else ():
            self._total_files += 1
            self._total_bytes += entry.size or 0
            self._small_left += (entry.size or 0) < MIB
        self._small_total = self._small_left

    def ended(self, entry: Entry) -> None:
        """Take note that a file has been sent, or will not be."""
        self._small_left -= (entry.size or 0) < MIB

    def failed(self, entry: Entry) -> None:
        """Take note that a file will not be sent."""
        if self._is_begun:
            self._failed_files += 1
            self._failed_bytes += entry.size or 0
            self.ended(entry)

    def draw_run(self, files: int, size: int, *, failed_files: int) -> None:
        """Draw how far the run is: so many files and bytes have been sent, so many failed."""
        now = time.monotonic()
        if not self._is_due(now):
            return
        size += sum(self.moving.values())
        total = max(self._total_bytes, size)
        moved, small = size - sum(self.found.values()), self._small_total - self._small_left
        self._past.append((now, small, moved))
        while now - self._past[0][0] > RATE_SECONDS:
            self._past.popleft()
        before, small_before, moved_before = self._past[0]
        seconds = max(now - before, 0.001)
        bytes_left = max(self._total_bytes - self._failed_bytes - size, 0)
        files_left = self._total_files - self._failed_files - files
        parts = [
            (0, f"{files:,}/{self._total_files:,} files"),
            (4, f"{human_size(size)}/{human_size(total)}"),
            (1, self._percent(files_left, bytes_left)),
            (3, f"{human_size((moved - moved_before) / seconds)}/s"),
        ]
        rates = (self._small_left, small - small_before), (bytes_left, moved - moved_before)
        # Small files take their time for each, large ones for their bytes.
        lefts = [left / moved * seconds for left, moved in rates if moved > 0]
        if seconds > 1 and lefts:
            parts.append((2, f"{human_time(max(lefts))} left"))
        if failed_files:
            parts.append((1, f"{failed_files:,} failed"))
        self.draw(parts)

    def _percent(self, files_left: int, bytes_left: int) -> str:
        left, total = bytes_left, self._total_bytes
        if not total:
            left, total = files_left, max(self._total_files, 1)
        return f"{100 * (total - left) // total}%"

    def _is_due(self, now: float) -> bool:
        return self._is_shown and now - self._drawn_at >= DRAW_SECONDS

    def draw(self, parts: list[tuple[int, str]]) -> None:
        """Draw the texts if it is time, without those of the highest numbers if space is short."""
        now = time.monotonic()
        if not self._is_due(now):
            return
        try:
            # Behind the line there must be room for the ^C that a terminal shows.
            room = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 3
        except (OSError, ValueError):
            room = 77
        while len(parts) > 1 and len("  ".join(text for _, text in parts)) > room:
            parts.remove(max(parts))
        line = "  ".join(text for _, text in parts)[:room]
        self._write(f"\r{line}{self.ERASE}")
        self._line, self._drawn_at = line, now

    def clear(self) -> None:
        """Take the line off the terminal, so that other text can be written."""
        if self._line:
            self._write(f"\r{self.ERASE}")
            self._line = ""

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def human_time(seconds: float) -> str:
    """Return a time as clocks show it: 0:07, 12:34, 3:45:06."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    return f"{minutes // 60:,}:{minutes % 60:02}:{rest:02}"


def human_size(size: float) -> str:
    """Return bytes in decimal units, as disks and `ls --si` count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


# --- main -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the program with the given arguments, and return the exit code (see above)."""
    # Imports and plan make much and drop little: looking for garbage in it takes long.
    gc.disable()
    interruption = Interruption()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parse_arguments(argv)
    report, state = Report(options), StateFile(options.statefile)
    if sys.getfilesystemencoding() != "utf-8":
        report.error("file names would be read wrongly in this locale; set PYTHONUTF8=1")
        return 2
    try:
        if options.dryrun:
            return show_plan(options, report, interruption, state)
        state.lock()
        if options.verify:
            return verify(options, report, interruption, state)
        return back_up(options, report, interruption, state)
    except (StopRun, UploadError) as error:
        report.error(str(error))
        return 2
    except Stopped:
        report.error(INTERRUPTED if state.has_saved else "interrupted before anything was sent")
        return interruption.exit_code


def show_plan(
    options: Namespace, report: Report, interruption: Interruption, state: StateFile
) -> int:
    """List what a run would send and return the exit code; nothing is changed."""
    previous = state.read()
    check_previous(previous, options)
    walk = Walk(options, report, interruption, state)
    found: Iterable[Entry] = find_files(options, previous, walk, report)
    if options.skip_unchanged:
        import_boto3()
        client, exists = find_bucket(options, interruption)
        found = list(found)
        if exists:
            find_unchanged(
                found, previous, client, options, report=report, interruption=interruption
            )
    for entry in found:
        if entry.error:
            report.failed(entry)
        elif not entry.uploaded:
            report.uploaded(entry)
    report.end_of_notices()
    report.summary(state.path)
    return 1 if report.failed_files else 0


def verify(options: Namespace, report: Report, interruption: Interruption, state: StateFile) -> int:
    """Compare the bucket with the state, mark there what is wrong, and return the exit code."""
    previous = state.read()
    check_previous(previous, options)
    entries = previous or []
    import_boto3()
    client, exists = find_bucket(options, interruption)
    if not exists:
        raise StopRun(f"there is no bucket {options.bucketname}; check --bucketname and "
                      "--endpoint-url, or create it and send all with --crashrun 1")  # fmt: skip
    wrong = find_wrong(entries, client, options, report=report, interruption=interruption)
    if wrong:
        save_or_stop(state, entries)
    for entry in wrong:
        report.wrong(entry)
    left = sum(not entry.uploaded for entry in entries) - len(wrong)
    report.verified(entries, state.path, left=left)
    return exit_code_for_files(report, left=left)


def back_up(
    options: Namespace, report: Report, interruption: Interruption, state: StateFile
) -> int:
    """Plan, send and record; return the exit code."""
    previous = state.read()
    check_previous(previous, options)
    free_at = SPAWN.RawValue("d", 0.0) if options.max_bandwidth else None
    processes = start_processes(options, previous, free_at, interruption=interruption, state=state)
    import_boto3()
    client = open_bucket(options, interruption)
    if (
        options.crashrun
        and options.is_new_bucket
        and any(entry.uploaded for entry in previous or ())
    ):
        report.error(f"the bucket {options.bucketname} was gone: all files are sent again")
        for entry in previous or ():
            entry.uploaded, entry.etag, entry.upload_id = False, None, None
    walk = Walk(options, report, interruption, state)
    found = find_files(options, previous, walk, report)
    # What else the state said is of no use to this run, or to a crash run after it.
    kept = [
        e for e in previous or ()
        if e.upload_id or (options.skip_unchanged and e.uploaded and not other_job(e, options))
    ]  # fmt: skip
    uploads = {e.filepath: e for e in kept if e.upload_id}
    first = next(found, None)
    if first and not options.crashrun:
        # A crash run after a kill during the walk finds this, and walks the folder.
        folder = Entry(options.backupfolder, options.prefix, bucket=options.bucketname)
        folder.shard = options.shard
        save_or_stop(state, [folder, *kept])
    entries = [first, *found] if first else []
    report.end_of_notices()
    # A crash run has such files too, after an incremental run was killed during its walk.
    if (options.skip_unchanged or options.crashrun) and not options.is_new_bucket:
        find_unchanged(entries, previous, client, options, report=report, interruption=interruption)
    del previous, kept  # of a million files: half a gigabyte
    abandoned = carry_uploads(entries, uploads, options)
    abort_abandoned(abandoned, client, options, report=report, interruption=interruption)
    save_or_stop(state, entries)
    for entry in entries:
        if entry.error:
            report.failed(entry)
    gc.freeze()
    gc.enable()
    transfer = Transfer(
        entries, client, options, processes=processes, free_at=free_at,
        state=state, report=report, interruption=interruption,
    )  # fmt: skip
    transfer.run()
    saved = transfer.save()
    left = sum(not entry.uploaded for entry in entries) - report.failed_files
    report.summary(state.path, left=left)
    return exit_code_of(transfer, report, interruption, saved=saved)


def abort_abandoned(
    abandoned: list[Entry], client: S3Client, options: Namespace, *,
    report: Report, interruption: Interruption,
) -> None:  # fmt: skip
    """Abort recorded multipart uploads that no file goes on with, before the state forgets them."""
    retries = Retries(patience_seconds=FIRST_PATIENCE_SECONDS)
    for entry in abandoned:
        upload = {"Bucket": options.bucketname, "Key": entry.filename, "UploadId": entry.upload_id}
        abort = functools.partial(abort_upload, client, retries, upload)
        if interruptible(abort, interruption):
            entry.upload_id = entry.part_size = None
        else:
            report.notice(f"multipart upload {entry.upload_id} {NOT_ABORTED}", entry.filepath)


def exit_code_of(
    transfer: Transfer, report: Report, interruption: Interruption, *, saved: bool
) -> int:
    """Say why not all is in the bucket, if so, and return the exit code."""
    if transfer.stop_message:
        report.error(f"stopped: {transfer.stop_message}")
    if interruption.signum:
        report.error(INTERRUPTED)
        return interruption.exit_code
    if transfer.stop_message or not saved:
        return 2
    return exit_code_for_files(report)


def exit_code_for_files(report: Report, *, left: int = 0) -> int:
    """Return 1, and say what to do about it, if some files are not in the bucket; else 0."""
    if report.failed_files or left:
        report.error("some files are not in the bucket; send them with --crashrun 1")
        return 1
    return 0


def save_or_stop(state: StateFile, entries: list[Entry]) -> None:
    """Save the state; raise StopRun when that fails, since nothing has been sent yet."""
    try:
        state.save(entries)
    except OSError as error:
        why = f"cannot save the state file {shown(state.path)}: {reason(error)}"
        raise StopRun(f"{why}; make room, or choose another place with --statefile") from error


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, AttributeError):  # stdout is full, or closed
        sys.stdout.flush()
    # Not sys.exit: threads stuck in a socket would hold it up, and freeing the entries
    # of a million files takes seconds.
    os._exit(code)
