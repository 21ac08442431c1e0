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
size, mtime_ns, etag, error, upload_id and part_size.

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
import errno
import hashlib
import io
import itertools
import json
import math
import mimetypes
import os
import queue
import random
import re
import signal
import stat
import sys
import threading
import time
import zlib
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import translate
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TextIO, TypeVar

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")

__version__ = "1.0.0"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": KIB, "MI": MIB, "GI": GIB, "TI": 1 << 40}

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
READ_BYTES = MIB

# One process gains nothing from more threads: they share the interpreter lock.
DEFAULT_CONCURRENCY = 16
LARGE_FILES_AT_ONCE = 2
PART_THREADS = 8
# Files that may wait ready for a free thread, and the bytes of all files under way.
# A slow uplink with large files then has few connections, each with enough of the
# line that S3 does not close it as idle (after about 20 seconds).
QUEUED_PER_THREAD = 2
BYTES_UNDER_WAY = 64 * MIB
ALWAYS_UNDER_WAY = 4

CONNECT_TIMEOUT_SECONDS = 10
# Longer than a NAS needs to flush a large file, short enough to notice a stall.
READ_TIMEOUT_SECONDS = 60
# A request that fails for a passing reason is tried again until this long after
# its first failure.
PATIENCE_SECONDS = 60
FIRST_REQUEST_SECONDS = 18
BACKOFF_FIRST_SECONDS, BACKOFF_MAX_SECONDS = 0.5, 10
DAMAGED_TRIES = 3
CHANGED_TRIES, CHANGED_PAUSE_SECONDS = 3, 2.0

SAVE_INTERVAL_SECONDS = 1.0
SAVE_SHARE = 0.05
SIGNAL_GRACE_SECONDS = 8
EXIT_SIGINT, EXIT_SIGTERM = 130, 143
INTERRUPTED = "interrupted; the state is saved, send the rest with --crashrun 1"

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
# What every further request would meet too, and what to do about it.
STOPPING_CODES = {
    "ExpiredToken": "the session token has expired; renew it",
    "ExpiredTokenException": "the session token has expired; renew it",
    "TokenRefreshRequired": "the session token must be renewed",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN or the profile",
    "RequestTimeTooSkewed": "this machine's clock is too far off; set it (NTP)",
    "RequestExpired": "this machine's clock is too far off; set it (NTP)",
    "NoSuchBucket": "the bucket does not exist; check --bucketname, or let an account "
    "that may look and create buckets run this once",
    "InvalidBucketName": "the bucket name is not valid; check --bucketname",
    "AuthorizationHeaderMalformed": "the region of the signature is wrong; set --region",
    "IllegalLocationConstraintException": "the bucket is in another region; set --region",
    "PermanentRedirect": "the bucket is in another region; set --region",
    "AllAccessDisabled": "all access to the bucket has been disabled; ask its owner",
    "AccountProblem": "there is a problem with the account; ask its owner",
    "NotSignedUp": "the account is not signed up for S3",
    "InvalidPayer": "all access to the bucket has been disabled; ask its owner",
    "InvalidStorageClass": "the server does not know this storage class; check --storage-class",
    "InvalidEncryptionAlgorithmError": "the server does not know this encryption; check --sse",
    "KMS.NotFoundException": "the KMS key does not exist; check --sse-kms-key-id",
    "KMS.DisabledException": "the KMS key is disabled; check --sse-kms-key-id",
    "NotImplemented": "the server does not support this request; leave out --storage-class, "
    "--sse and --expected-bucket-owner",
    "QuotaExceeded": "the quota of the bucket or account is used up; make room",
    "XMinioStorageFull": "the server's disks are full; make room",
}
# A server that has other regions, or none, answers CreateBucket with one of these.
LOCATION_CODES = frozenset(
    "InvalidLocationConstraint IllegalLocationConstraintException InvalidRegion".split()
)
# These stop the run only while nothing has succeeded: later it may be that one key.
STOPPING_AT_FIRST_CODES = {
    "AccessDenied": "the credentials may not write there, or another account owns the bucket; "
    "the policy needs s3:PutObject",
    "Forbidden": "the credentials may not do that; check the policy",
    "403": "the credentials may not do that; check the policy",
    "InvalidAccessKeyId": "the server does not know this access key; check the credentials",
    "SignatureDoesNotMatch": "the secret key is wrong; check the credentials",
    "InvalidSecurity": "the credentials are not valid; check them",
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
    error: str | None = None
    upload_id: str | None = None
    part_size: int | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        """Return the entry that a JSON object of a state file describes.

        Raises ValueError when the object is not such an entry.
        """
        path, key, done = (fields.get(k) for k in ("filepath", "filename", "uploadedSuccess"))
        if not (isinstance(path, str) and path and isinstance(key, str) and done in (0, 1)):
            raise ValueError("an entry lacks filepath, filename or an uploadedSuccess of 0 or 1")
        known: dict[str, Any] = {}
        for name, kind in OPTIONAL_FIELDS:
            value = fields.get(name)
            if value is not None and (type(value) is not kind):
                raise ValueError(f"an entry's {name} is not valid")
            known[name] = value
        if known["bucket"]:
            known["bucket"] = sys.intern(known["bucket"])
        return cls(os.path.abspath(path), key, done == 1, **known)

    def to_json(self) -> str:
        """Return the entry as one line of JSON, the three original fields first."""
        fields: dict[str, Any] = {
            "filepath": self.filepath,
            "uploadedSuccess": int(self.uploaded),
            "filename": self.filename,
        }
        for name, _ in OPTIONAL_FIELDS:
            value = getattr(self, name)
            if value is not None:
                fields[name] = value
        return encode_json(fields)


OPTIONAL_FIELDS: tuple[tuple[str, type], ...] = (
    ("bucket", str),
    ("size", int),
    ("mtime_ns", int),
    ("etag", str),
    ("error", str),
    ("upload_id", str),
    ("part_size", int),
)


@dataclass(slots=True)
class Task:
    """What a worker needs to send one file: an entry's place, path, key and open upload."""

    index: int
    filepath: str
    key: str
    size: int
    large: bool
    upload_id: str | None = None
    part_size: int | None = None
    tries: int = 1


@dataclass(slots=True)
class UploadStarted:
    """A multipart upload has its id; no part is sent before the state holds it."""

    task: Task
    upload_id: str
    part_size: int
    size: int
    mtime_ns: int
    saved: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Result:
    """How the sending of one file ended.

    `outcome` is "uploaded", "failed", "changed" (try again later), "fatal" (the run
    must stop) or "stopped" (the run stopped first). `error` says why in a sentence.
    """

    task: Task
    outcome: str
    size: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None
    error: str | None = None
    seconds: float = 0.0


Event = Result | UploadStarted


class StopRun(Exception):
    """The run cannot start or cannot go on; the text is for the user (exit code 2)."""


class Stopped(Exception):
    """The run is being stopped, by a signal or by trouble that another file met."""


class UploadError(Exception):
    """One file could not be sent; the text says what happened and what to do."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class FileChanged(UploadError):
    """The file changed while it was read or sent."""

    def __init__(self) -> None:
        super().__init__("it changed while it was sent; stop its writer or back up a snapshot")


class DigestMismatch(Exception):
    """S3's answer does not prove that the object holds the bytes that were read."""


def encode_json(fields: dict[str, Any]) -> str:
    """Return `fields` as JSON, readable where the text is valid Unicode.

    A file name that is no valid UTF-8 (a lone surrogate in Python) is escaped, so
    that the state file is valid UTF-8 and the name survives.
    """
    text = READABLE_JSON.encode(fields)
    return text if text.isprintable() else json.dumps(fields)


READABLE_JSON = json.JSONEncoder(ensure_ascii=False)


def reason(error: OSError) -> str:
    """Return the operating system's words for `error`, without path and number."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def shown(text: str) -> str:
    """Return `text` fit for one line of a terminal or a log: control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- arguments --------------------------------------------------------------------


def size_bytes(text: str) -> int:
    """Return the bytes that a size such as 500, 64MiB, 1GB or 1.5G names.

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB are powers of 1024.
    Raises argparse.ArgumentTypeError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MiB or 1GB")
    return int(float(match[1]) * UNITS[match[2]])


def bounded(low: int, high: int, what: str) -> Callable[[str], int]:
    """Return an argparse type for a size between `low` and `high` bytes."""

    def parse(text: str) -> int:
        if not low <= (size := size_bytes(text)) <= high:
            raise argparse.ArgumentTypeError(f"{what}, not {text}")
        return size

    return parse


def positive(text: str) -> int:
    """Return the whole number of 1 or more that `text` is (an argparse type)."""
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 99999")
    return int(text)


def bucket_name(text: str) -> str:
    """Return `text` if S3 or a compatible server could have a bucket of that name.

    Old buckets and other servers have names that AWS no longer allows; the strict
    rules are S3's own and apply when a bucket is created. Access point ARNs pass.
    """
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}|arn:[\w:/.+=,@-]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a bucket name: 3 to 63 lower-case letters, digits, dots and hyphens"
        )
    return text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its help is the module's docstring."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
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
    add("--max-concurrency", metavar="N", type=positive, default=DEFAULT_CONCURRENCY,
        help=f"requests in flight (default: {DEFAULT_CONCURRENCY})")
    add("--multipart-threshold", metavar="SIZE", default=DEFAULT_THRESHOLD_BYTES,
        type=bounded(1, PUT_MAX_BYTES, "S3 takes up to 5GiB in one part"),
        help="files of this size and more go in parts (default: 1GB)")
    add("--multipart-chunksize", metavar="SIZE", default=DEFAULT_PART_BYTES,
        type=bounded(PART_MIN_BYTES, PART_MAX_BYTES, "S3 wants parts of 5MiB to 5GiB"),
        help="size of a part (default: 16MiB, more where a file would need over 10,000 parts)")
    add = parser.add_argument_group("output").add_argument
    add("--quiet", action="store_true", help="failures only")
    add("--verbose", action="store_true", help="one line a file on stderr")
    add("--version", action="version", version=f"s3FileTransfer {__version__}")
    # fmt: on
    return parser


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Return the parsed command line, with absolute paths.

    Raises SystemExit (2) with a sentence on stderr when it is not valid.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.sse_kms_key_id and not (options.sse or "").startswith("aws:kms"):
        parser.error("--sse-kms-key-id needs --sse aws:kms")
    options.backupfolder = os.path.abspath(options.backupfolder)
    if not os.path.isdir(options.backupfolder):
        there = os.path.lexists(options.backupfolder)
        what = "is not a folder" if there else "does not exist (is its disk mounted?)"
        parser.error(f"--backupfolder {shown(options.backupfolder)} {what}")
    return options


# --- plan: which files, and their keys ---------------------------------------------


class Interruption:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag, and the second into the end."""

    def __init__(self) -> None:
        self.signum = 0

    def install(self) -> None:
        """Handle the signals; a SIGHUP that is ignored (nohup) stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)
            if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _frame: object) -> None:
        if self.signum:
            os._exit(self.exit_code)
        self.signum = signum

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
    """Finds what is to be sent, in sorted order, and says what cannot be.

    `own_names` are the names of the state file and its companions in the folder
    `own_folder`; they are left out wherever the walk meets that folder.
    """

    def __init__(
        self, options: Namespace, report: Report, interruption: Interruption, state: StateFile
    ) -> None:
        self._root = options.backupfolder
        self._bucket = sys.intern(options.bucketname)
        self._follow_symlinks = options.follow_symlinks
        self._excluded = re.compile("|".join(map(translate, options.exclude)) or r"(?!)").match
        self._whole_folders = [glob for glob in options.exclude if glob.endswith("*")]
        self._report = report
        self._interruption = interruption
        self._own_names = state.own_names
        self._own_folder = state.folder_identity()

    def folder(self, path: str, *, key_prefix: str) -> Iterator[Entry]:
        """Yield an entry for every file below `path`, and for all that cannot be sent.

        An entry with an `error` is one that cannot be sent; an unreadable folder is
        such an entry, whose `filename` is the prefix of the keys below it.
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

    def again(self, entry: Entry) -> Iterator[Entry]:
        """Yield what is now at the path of `entry`: a file, all below a folder, or why not."""
        if os.path.isdir(entry.filepath):
            key = entry.filename
            prefix = key if key.endswith("/") or not key else key + "/"
            if entry.filepath == self._root:
                prefix = key
            yield from self.folder(entry.filepath, key_prefix=prefix)
            return
        found = self._examine(entry.filepath, entry.filename.rstrip("/"), is_link=False)
        yield (
            found
            if isinstance(found, Entry)
            else self._failed(
                entry.filepath,
                entry.filename,
                "it is no longer a regular file; restore it or run without --crashrun",
            )
        )

    def _list(self, folder: Subfolder) -> Iterator[Entry | Subfolder]:
        self._interruption.check()
        try:
            status = os.stat(folder.path)
            # Names and not DirEntry objects: these cache a stat result each, which a
            # folder of a million files would keep in memory.
            with os.scandir(folder.path) as children:
                pairs = [(child.name, child.is_symlink()) for child in children]
        except OSError as error:
            yield self._failed(
                folder.path,
                folder.key_prefix,
                f"cannot read the folder: {reason(error)}; check its permissions",
            )
            return
        identity = (status.st_dev, status.st_ino)
        if identity in folder.ancestors:
            self._report.notice("link to a folder above it, not followed", folder.path)
            return
        own_names = self._own_names if identity == self._own_folder else ()
        ancestors = (*folder.ancestors, identity)
        pairs.sort()
        for name, is_link in pairs:
            self._interruption.check()
            path, key = os.path.join(folder.path, name), folder.key_prefix + name
            if name in own_names or self._excluded(self._relative(path)):
                continue
            found = self._examine(path, key, is_link=is_link)
            if isinstance(found, Subfolder):
                if self._excludes_all_below(path):
                    continue
                found.ancestors = ancestors
            if found is not None:
                yield found

    def _relative(self, path: str) -> str:
        return (
            os.path.relpath(path, self._root)
            if os.sep != "/"
            else path[len(self._root) :].lstrip("/")
        )

    def _excludes_all_below(self, path: str) -> bool:
        below = self._relative(path) + "/"
        return any(re.match(translate(glob), below) for glob in self._whole_folders)

    def _examine(self, path: str, key: str, *, is_link: bool) -> Entry | Subfolder | None:
        if is_link and not self._follow_symlinks:
            self._report.notice("symbolic link, skipped", path)
            return None
        try:
            status = os.stat(path)
        except OSError as error:
            what = "its link is broken" if os.path.islink(path) else "cannot read it"
            return self._failed(path, key, f"{what}: {reason(error)}")
        if stat.S_ISDIR(status.st_mode):
            return Subfolder(path, key + "/")
        if not stat.S_ISREG(status.st_mode):
            self._report.notice("socket, FIFO or device, skipped", path)
            return None
        if problem := key_problem(key):
            return self._failed(path, key, problem)
        return Entry(
            path, key, bucket=self._bucket, size=status.st_size, mtime_ns=status.st_mtime_ns
        )

    def _failed(self, path: str, key: str, error: str) -> Entry:
        return Entry(path, key, bucket=self._bucket, error=error)


def key_problem(key: str) -> str | None:
    """Return why S3 cannot have `key`, or None when it can."""
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        return "its name is not valid UTF-8, which S3 needs; rename it"
    if length > KEY_MAX_BYTES:
        return f"its key has {length} bytes and S3 takes {KEY_MAX_BYTES}; shorten the path"
    return None


def plan_crashrun(previous: list[Entry], walk: Walk) -> Iterator[Entry]:
    """Yield the entries of a crash run: uploaded ones as they are, the others found anew.

    An entry not uploaded whose path is a folder (one that was unreadable, or the
    whole backup folder after a kill during the walk) is walked again, and what the
    walk finds takes the place of the entries below it.
    """
    pending_folders = tuple(
        os.path.join(entry.filepath, "")
        for entry in previous
        if not entry.uploaded and os.path.isdir(entry.filepath)
    )
    for entry in previous:
        if pending_folders and entry.filepath.startswith(pending_folders):
            continue
        if entry.uploaded:
            yield entry
        else:
            yield from walk.again(entry)


def carry_uploads(entries: list[Entry], open_uploads: dict[tuple[str, str], Entry]) -> list[Entry]:
    """Hand each recorded multipart upload to the planned entry of the same, unchanged file.

    Returns the recorded entries whose upload nothing can go on with: it is to be aborted.
    """
    if not open_uploads:
        return []
    left = dict(open_uploads)
    for entry in entries:
        recorded = left.get((entry.filepath, entry.filename))
        if recorded is None or entry.uploaded:
            continue
        if recorded.part_size and (entry.error or same_file(recorded, entry)):
            entry.upload_id, entry.part_size = recorded.upload_id, recorded.part_size
            del left[entry.filepath, entry.filename]
    return list(left.values())


def same_file(recorded: Entry, found: Entry) -> bool:
    """Tell whether size and modification time are those that were recorded."""
    return (recorded.size, recorded.mtime_ns) == (found.size, found.mtime_ns)


# --- state ------------------------------------------------------------------------


class StateFile:
    """The JSON state file: read, replaced atomically, and locked for one run at a time."""

    def __init__(self, path: str) -> None:
        # os.replace would put a plain file in the place of a symbolic link.
        self.path = os.path.realpath(path)
        self._temporary = self.path + ".tmp"
        self._lock_path = self.path + ".lock"
        self._lock: IO[str] | None = None
        self.save_seconds = 0.0
        self.saved_at = -math.inf

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the state file, its temporary file and its lock."""
        return tuple(map(os.path.basename, (self.path, self._temporary, self._lock_path)))

    def folder_identity(self) -> tuple[int, int] | None:
        """Device and inode of the folder that holds the state file."""
        try:
            status = os.stat(os.path.dirname(self.path))
        except OSError:
            return None
        return (status.st_dev, status.st_ino)

    def lock(self) -> None:
        """Take the lock, which the operating system drops when this process ends.

        Raises StopRun when another run holds it or the folder takes no lock.
        """
        try:
            handle = open(self._lock_path, "a+", encoding="ascii", errors="replace")  # noqa: SIM115
        except OSError as error:
            raise StopRun(
                f"cannot write beside the state file {shown(self.path)}: {reason(error)}; "
                "choose another place with --statefile"
            ) from error
        try:
            lock_handle(handle)
        except OSError as error:
            handle.seek(0)
            holder = shown(handle.read(40).strip()) or "unknown"
            handle.close()
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise StopRun(
                    f"another run (process {holder}) is using {shown(self.path)}; "
                    "wait for it, or give this job its own --statefile"
                ) from error
            raise StopRun(
                f"cannot lock {shown(self._lock_path)}: {reason(error)}; keep the state on a "
                "local disk with --statefile"
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self._lock = handle
        # A killed run may have left it.
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)

    def read(self) -> list[Entry] | None:
        """Return the entries, or None when there is no state file or an empty one.

        Raises StopRun when it cannot be read or is no state file.
        """
        try:
            with open(self.path, encoding="utf-8") as handle:
                text = handle.read()
            if not text:
                return None
            entries = json.loads(text, object_hook=Entry.from_json)
            if not (isinstance(entries, list) and all(type(e) is Entry for e in entries)):
                raise ValueError("it is not a list of entries")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StopRun(
                f"cannot read the state file {shown(self.path)}: {reason(error)}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise StopRun(
                f"the state file {shown(self.path)} is damaged or is something else: {error}; "
                "move it away, or choose another with --statefile"
            ) from error
        return entries

    def save(self, entries: Iterable[Entry]) -> None:
        """Replace the state file with `entries`; a reader sees the old or the new one, whole.

        Raises OSError when that fails; the old state is then intact.
        """
        started = time.monotonic()
        try:
            self._write(entries)
            os.replace(self._temporary, self.path)
            sync_folder(os.path.dirname(self.path))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            raise
        finally:
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - started

    def _write(self, entries: Iterable[Entry]) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)
        # "x": in a folder that others may write, never through a link of theirs.
        with open(self._temporary, "x", encoding="utf-8", newline="\n") as handle:
            if hasattr(os, "fchmod") and os.path.exists(self.path):
                os.fchmod(handle.fileno(), stat.S_IMODE(os.stat(self.path).st_mode))
            handle.write("[")
            separator = "\n"
            for entry in entries:
                handle.write(separator + entry.to_json())
                separator = ",\n"
            handle.write("\n]\n" if separator == ",\n" else "]\n")
            handle.flush()
            os.fsync(handle.fileno())

    @property
    def has_saved(self) -> bool:
        """Whether this run has saved a state."""
        return self.saved_at > -math.inf

    def is_due(self) -> bool:
        """Tell whether a save now keeps saving below its share of the run's time."""
        pause = max(SAVE_INTERVAL_SECONDS, self.save_seconds / SAVE_SHARE)
        return time.monotonic() - self.saved_at >= pause


def lock_handle(handle: IO[str]) -> None:
    """Lock the open file for this process, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        handle.seek(1 << 30)  # a locked region cannot be read, and the text names the holder
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(path: str) -> None:
    """Make a rename in the folder `path` last through a power cut, where that can be done."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_previous(previous: list[Entry] | None, options: Namespace) -> None:
    """Refuse a run that would bury another job's failures, or a crash run of another job.

    Raises StopRun that names the ways out.
    """
    if options.crashrun and previous is None:
        raise StopRun(
            "--crashrun 1 needs the state file of an earlier run, and there is none; "
            "run without --crashrun, or name it with --statefile"
        )
    root = os.path.join(options.backupfolder, "")
    for entry in previous or ():
        if entry.uploaded and not options.crashrun:
            continue
        if entry.bucket not in (None, options.bucketname):
            job = f"bucket {shown(entry.bucket or '')}"
        elif entry.filepath != options.backupfolder and not entry.filepath.startswith(root):
            job = f"another folder, with {shown(entry.filepath)}"
        else:
            continue
        if options.crashrun:
            raise StopRun(
                f"the state file is of {job}; give the options of that job, or its "
                "own file with --statefile"
            )
        raise StopRun(
            f"the state file lists files not yet uploaded, of {job}; finish that job "
            "with --crashrun 1, or give this one its own --statefile"
        )


# --- upload -----------------------------------------------------------------------


def build_client(options: Namespace, region: str | None, *, patient: bool = True) -> S3Client:
    """Return boto3's S3 client for the run.

    Raises StopRun when boto3 is missing, or the profile, endpoint or credentials are
    not valid or not there. With `patient` false the timeouts are short, for the first request.
    """
    # botocore's CRT signer reads every body through Python: three times slower.
    os.environ.setdefault("BOTO_DISABLE_CRT", "true")
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise StopRun("boto3 is not installed; run: python3 -m pip install boto3") from error
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS if patient else 5,
        read_timeout=READ_TIMEOUT_SECONDS if patient else 8,
        # Retries is the one retry loop: botocore's own quota is per
        # client, and many threads spend it within a second on a dead endpoint.
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=options.max_concurrency + 2,
        # Content-MD5 is the checksum that every server understands.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        tcp_keepalive=True,
    )
    try:
        session = boto3.Session(profile_name=options.profile)
        if session.get_credentials() is None:
            raise StopRun(
                "no credentials found; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or run: aws configure"
            )
        region = region or options.region or session.region_name or DEFAULT_REGION
        client = session.client(
            "s3", region_name=region, endpoint_url=options.endpoint_url, config=config
        )
    except (BotoCoreError, ValueError) as error:
        raise StopRun(
            f"cannot start S3: {one_line(error)}; check profile, credentials and endpoint"
        ) from error
    client.meta.events.register_last("before-call.s3.PutObject", send_small_body_at_once)
    return client


def send_small_body_at_once(params: dict[str, Any], **_: object) -> None:
    """Spare small puts the `Expect: 100-continue` round trip (a botocore event handler).

    A body as bytes also leaves in the same packets as the headers.
    """
    if isinstance(params["body"], io.BytesIO):
        params["headers"].pop("Expect", None)
        params["body"] = params["body"].getvalue()


def one_line(error: BaseException) -> str:
    """Return the text of `error` as one printable line."""
    return shown(" ".join(str(error).split())) or type(error).__name__


@dataclass(slots=True)
class Trouble:
    """What an exception from a request means.

    `kind` is "passing" (try again), "damaged" (try again, a few times), "permanent"
    (of this file), "stops" (the run) or "stops at first" (unless something succeeded).
    """

    kind: str
    message: str
    code: str = ""


def trouble_of(error: Exception) -> Trouble:
    """Return what `error`, raised by boto3 or by a proof, means, as a sentence."""
    from botocore.exceptions import (
        ClientError,
        CredentialRetrievalError,
        HTTPClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        SSLError,
    )
    from botocore.exceptions import ConnectionError as Unreachable
    from botocore.parsers import ResponseParserError

    if isinstance(error, DigestMismatch):
        return Trouble("damaged", f"{error}; the network or the server damages data", "BadDigest")
    if isinstance(error, ClientError):
        return trouble_of_answer(error.response)
    text = one_line(error)
    if isinstance(error, SSLError) and "CERTIFICATE" in text.upper():
        return Trouble(
            "stops",
            f"the server's certificate is not trusted ({text}); set AWS_CA_BUNDLE to its CA file",
        )
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return Trouble("stops", f"{text}; check the credentials")
    if isinstance(error, Unreachable | HTTPClientError | ResponseParserError):
        return Trouble(
            "passing",
            f"the server could not be reached or broke off ({text}); check network and endpoint",
        )
    if isinstance(error, CredentialRetrievalError):
        return Trouble("passing", f"{text}; check the source of the credentials")
    if isinstance(error, ParamValidationError):
        return Trouble("permanent", text)
    return Trouble("stops", f"{type(error).__name__}: {text}")


def trouble_of_answer(response: Any) -> Trouble:
    """Return what an error answer of S3 means; the code decides, then the HTTP status.

    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    """
    status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    error = response.get("Error", {})
    code = str(error.get("Code") or status)
    said = f": {one_line(ValueError(error['Message']))}" if error.get("Message") else ""
    said = f"S3 answered {code}{said}"
    if code in STOPPING_CODES:
        return Trouble("stops", f"{said}; {STOPPING_CODES[code]}", code)
    if code in STOPPING_AT_FIRST_CODES:
        return Trouble("stops at first", f"{said}; {STOPPING_AT_FIRST_CODES[code]}", code)
    if code in DAMAGED_CODES:
        return Trouble("damaged", f"{said}; the network or the server damages data", code)
    if code in PASSING_CODES or status in PASSING_CODES:
        return Trouble("passing", f"{said}; try again later", code)
    return Trouble("permanent", said, code)


def is_md5_etag(answer: Any) -> bool:
    """Tell whether the ETag of an answer to PutObject is the MD5 of the bytes.

    It is not under SSE-KMS and SSE-C:
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    encryption = answer.get("ServerSideEncryption") or ""
    return not encryption.startswith("aws:kms") and not answer.get("SSECustomerAlgorithm")


def etag_of(answer: Any) -> str:
    """Return the ETag of an answer without its quotes, or an empty string."""
    return str(answer.get("ETag") or "").strip('"').lower()


def new_md5(data: bytes = b"") -> Any:
    """Return an MD5 hash object that FIPS systems allow too: it proves, it does not secure."""
    return hashlib.md5(data, usedforsecurity=False)


def base64_of(digest: bytes) -> str:
    """Return `digest` as S3's headers want it."""
    return base64.b64encode(digest).decode("ascii")


@dataclass(slots=True)
class Part:
    """The digests of one part, and the ETag under which S3 has it."""

    size: int
    md5: bytes
    crc32: bytes
    etag: str = ""

    def is_same_as(self, listed: Any) -> bool:
        """Tell whether the part that ListParts describes has the same bytes."""
        if listed["Size"] != self.size:
            return False
        if checksum := listed.get("ChecksumCRC32"):
            return base64_of(self.crc32) == str(checksum)
        return self.md5.hex() == etag_of(listed)


def read_part(body: Any, size: int) -> Part:
    """Read `size` bytes from `body` and return their digests.

    Raises FileChanged when there are fewer.
    """
    md5, crc32, left = new_md5(), 0, size
    while left and (data := body.read(min(left, READ_BYTES))):
        md5.update(data)
        crc32 = zlib.crc32(data, crc32)
        left -= len(data)
    if left:
        raise FileChanged
    return Part(size, md5.digest(), crc32.to_bytes(4, "big"))


def open_regular(path: str) -> BinaryIO:
    """Open the regular file `path` for reading; never hang on a FIFO put in its place.

    Raises OSError, or UploadError when it is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise UploadError("it is no longer a regular file")
    return handle


def part_size_for(size: int, wanted: int) -> int:
    """Return the part size in bytes for a file of `size`: `wanted`, or what 10,000 parts need."""
    needed = -(-size // PARTS_MAX)
    return max(wanted, -(-needed // MIB) * MIB)


class Retries:
    """The one retry loop around requests, shared by the threads of a client."""

    def __init__(self, *, slots: int = 1, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.stop = threading.Event()
        self._slots = threading.BoundedSemaphore(slots)
        self._patience_seconds = patience_seconds
        self._answered_at = -math.inf
        self._has_accepted = False

    def check_stopped(self) -> None:
        """Raise Stopped when the run is being stopped."""
        if self.stop.is_set():
            raise Stopped

    def run(self, attempt: Callable[[], T], *, may_stop_run: bool = True) -> T:
        """Return what `attempt` returns, trying again while the trouble is a passing one.

        Raises UploadError when this file cannot be sent, StopRun when no file can, and
        Stopped when the run is being stopped. With `may_stop_run` false, for requests
        that a tight policy may refuse, what would stop the run is an UploadError.
        """
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        started, give_up_at, damaged = time.monotonic(), math.inf, 0
        for tries in itertools.count():
            self.check_stopped()
            try:
                with self._slots:
                    answer = attempt()
            except (ClientError, BotoCoreError, ResponseParserError, DigestMismatch) as error:
                trouble = trouble_of(error)
            else:
                self._answered_at = time.monotonic()
                self._has_accepted |= may_stop_run
                return answer
            give_up_at = min(give_up_at, time.monotonic() + self._patience_seconds)
            damaged += trouble.kind == "damaged"
            is_passing = trouble.kind == "passing" or 0 < damaged < DAMAGED_TRIES
            if is_passing and time.monotonic() < give_up_at:
                self.stop.wait(backoff_seconds(tries))
            elif may_stop_run and self._meets_every_file(trouble, started):
                raise StopRun(trouble.message)
            else:
                raise UploadError(trouble.message, trouble.code)
        raise AssertionError("unreachable")

    def _meets_every_file(self, trouble: Trouble, started: float) -> bool:
        if trouble.kind == "stops at first":
            return not self._has_accepted
        # A server that has answered nobody since this request began is gone.
        return trouble.kind == "stops" or (
            trouble.kind == "passing" and self._answered_at < started
        )


class Uploader:
    """Sends one file per calling thread, and proves that S3 has its bytes.

    `tell(event)` hands an event to the main thread.
    """

    def __init__(
        self, client: S3Client, options: Namespace, tell: Callable[[UploadStarted], None]
    ) -> None:
        self.client = client
        self.options = options
        self._tell = tell
        self.retries = Retries(slots=options.max_concurrency)
        self.owner = owner_parameter(options)
        # Other servers may not know CRC32; Content-MD5 proves the parts everywhere.
        self.sends_crc32 = is_aws(client)

    def upload(self, task: Task) -> Result:
        """Send one file and return how that ended; raises only for a bug."""
        started = time.monotonic()
        try:
            result = self._upload(task)
        except FileChanged as error:
            result = Result(task, "changed", error=str(error))
        except UploadError as error:
            result = Result(task, "failed", error=str(error))
        except StopRun as error:
            result = Result(task, "fatal", error=str(error))
        except Stopped:
            result = Result(task, "stopped")
        except FileNotFoundError:
            result = Result(task, "failed", error="it vanished before it could be sent")
        except OSError as error:
            what = (
                "check its permissions" if isinstance(error, PermissionError) else "check the disk"
            )
            result = Result(task, "failed", error=f"cannot read it: {reason(error)}; {what}")
        result.seconds = time.monotonic() - started
        return result

    def _upload(self, task: Task) -> Result:
        self.retries.check_stopped()
        with open_regular(task.filepath) as handle:
            before = os.fstat(handle.fileno())
            if is_multipart(before.st_size, self.options):
                etag = MultipartUpload(self, task, before).send()
            else:
                if task.upload_id:
                    self.abort(task)
                etag = self._put(task, handle, before)
        return Result(task, "uploaded", before.st_size, before.st_mtime_ns, etag)

    def _put(self, task: Task, handle: BinaryIO, before: os.stat_result) -> str:
        """Send the file with PutObject and return the ETag."""
        from s3transfer.utils import ReadFileChunk

        size = before.st_size
        body: Any
        md5: bytes
        if size <= IN_MEMORY_BYTES:
            body = handle.read(size)
            if len(body) < size:
                raise FileChanged
            md5 = new_md5(body).digest()
        else:
            md5 = read_part(handle, size).md5
            handle.seek(0)
            body = ReadFileChunk(handle, chunk_size=size, full_file_size=size)

        def put() -> str:
            if size > IN_MEMORY_BYTES:
                body.seek(0)
            answer = self.client.put_object(
                Body=body,
                ContentMD5=base64_of(md5),
                **self.location(task),
                **self.object_parameters(task, before),
            )
            return proven_etag(answer, md5)

        def has_same_start() -> bool:
            handle.seek(0)
            return read_part(handle, size).md5 == md5

        try:
            etag = self.retries.run(put)
        except UploadError:
            check_unchanged(os.fstat(handle.fileno()), before, has_same_start)
            raise
        check_unchanged(os.fstat(handle.fileno()), before, has_same_start)
        return etag

    def location(self, task: Task) -> dict[str, Any]:
        """Return the parameters that every request for the object has."""
        return {"Bucket": self.options.bucketname, "Key": task.key, **self.owner}

    def object_parameters(self, task: Task, status: os.stat_result) -> dict[str, Any]:
        """Return the parameters that describe a new object."""
        content_type = mimetypes.guess_type(task.filepath)[0]
        wanted = {
            "ContentType": content_type,
            "StorageClass": self.options.storage_class,
            "ServerSideEncryption": self.options.sse,
            "SSEKMSKeyId": self.options.sse_kms_key_id,
            # Seconds since 1970: the form in which rclone keeps and restores it.
            "Metadata": {"mtime": f"{status.st_mtime_ns / 1e9:.9f}"},
        }
        return {name: value for name, value in wanted.items() if value}

    def announce(self, task: Task, before: os.stat_result) -> None:
        """Have the id of a new multipart upload saved, and return when it is.

        Raises Stopped when the run stops first.
        """
        started = UploadStarted(
            task, task.upload_id or "", task.part_size or 0, before.st_size, before.st_mtime_ns
        )
        self._tell(started)
        while not started.saved.wait(0.5):
            self.retries.check_stopped()

    def abort(self, task: Task) -> bool:
        """Abort the task's multipart upload, so that its parts are not paid for.

        Returns whether it is gone. https://docs.aws.amazon.com/AmazonS3/latest/API/API_AbortMultipartUpload.html
        """
        upload_id, task.upload_id, task.part_size = task.upload_id, None, None
        try:
            self.retries.run(
                lambda: self.client.abort_multipart_upload(
                    UploadId=upload_id or "", **self.location(task)
                ),
                may_stop_run=False,
            )
        except UploadError as error:
            return error.code in ("NoSuchUpload", "404")
        return True


def backoff_seconds(tries: int) -> float:
    """Return a pause that doubles with every try, with jitter so that threads spread out."""
    longest = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(tries, 10))
    return random.uniform(longest / 2, longest)


def proven_etag(answer: Any, md5: bytes) -> str:
    """Return the ETag of an answer to PutObject or UploadPart.

    Raises DigestMismatch when it should be the MD5 of the bytes and is not.
    """
    etag = etag_of(answer)
    if is_md5_etag(answer) and etag != md5.hex():
        raise DigestMismatch(f"the ETag is {etag or 'missing'} and the MD5 {md5.hex()}")
    return etag


def check_unchanged(
    after: os.stat_result, before: os.stat_result, has_same_start: Callable[[], bool]
) -> None:
    """Raise FileChanged unless the file is the same, or has only grown at its end."""
    if (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    ):
        return
    if after.st_ino != before.st_ino or after.st_size <= before.st_size or not has_same_start():
        raise FileChanged


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
        self._uploader = uploader
        self._client = uploader.client
        self._task = task
        self._before = before
        self._sends_crc32 = uploader.sends_crc32
        self._etags_are_md5 = True
        self._parts: dict[int, Part] = {}
        self._etag = ""

    def send(self) -> str:
        """Send the file and return the object's proven ETag.

        Raises UploadError, FileChanged, StopRun or Stopped; `task.upload_id` is then
        that of the multipart upload that a later run can go on with, if there is one.
        """
        if self._before.st_size > PARTS_MAX * PART_MAX_BYTES:
            raise UploadError("it is larger than the 48.8 TiB that S3 takes; split it")
        for tries in itertools.count(1):
            try:
                self._transfer(self._parts_on_s3())
                return self._etag
            except FileChanged:
                self._uploader.abort(self._task)
                raise
            except DigestMismatch as error:
                if tries == DAMAGED_TRIES:
                    raise UploadError(trouble_of(error).message) from error
            except UploadError as error:
                # Somebody else aborted it: there is nothing left to go on with.
                if error.code != "NoSuchUpload" or tries == DAMAGED_TRIES:
                    raise
                self._forget_upload()
        raise AssertionError("unreachable")

    def _transfer(self, on_s3: dict[int, Any]) -> None:
        """Run boto3's multipart transfer, but for the parts that are `on_s3`."""
        from boto3.s3.transfer import S3Transfer, TransferConfig
        from s3transfer.utils import OSUtils

        if self._etag:
            return
        task, options = self._task, self._uploader.options
        self._on_s3 = on_s3
        self._parts.clear()
        config = TransferConfig(
            multipart_threshold=1,
            multipart_chunksize=self._part_size(),
            max_concurrency=min(PART_THREADS, options.max_concurrency),
            # boto3's own "auto" may pick the CRT, which ignores --endpoint-url.
            preferred_transfer_client="classic",
        )
        files = OSUtils()
        # A file that grows is sent as long as it was at the start.
        files.get_file_size = lambda filename: self._before.st_size  # type: ignore[method-assign]
        extra_args = self._uploader.object_parameters(task, self._before) | self._uploader.owner
        if self._sends_crc32:
            extra_args["ChecksumAlgorithm"] = "CRC32"
        with S3Transfer(self, config, files) as transfer:  # type: ignore[arg-type]
            transfer.upload_file(task.filepath, options.bucketname, task.key, None, extra_args)

    def _part_size(self) -> int:
        return self._task.part_size or part_size_for(
            self._before.st_size, self._uploader.options.multipart_chunksize
        )

    def _forget_upload(self) -> None:
        self._task.upload_id = self._task.part_size = None

    # The requests of S3Transfer:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html

    def create_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        """Start the multipart upload, or answer with the one to go on with.

        Returns only when its id is in the state file: no kill then leaves parts behind
        that nobody knows of.
        """
        task = self._task
        if not task.upload_id:
            answer = self._uploader.retries.run(
                lambda: self._client.create_multipart_upload(**parameters)
            )
            task.upload_id, task.part_size = answer["UploadId"], self._part_size()
            self._uploader.announce(task, self._before)
        return {"UploadId": task.upload_id}

    def upload_part(self, *, PartNumber: int, Body: Any, **parameters: Any) -> dict[str, Any]:
        """Send one part and prove it, unless S3 has the same bytes under its number."""
        self._uploader.retries.check_stopped()
        part = read_part(Body, len(Body))
        parameters.pop("ChecksumAlgorithm", None)
        if self._sends_crc32:
            parameters["ChecksumCRC32"] = base64_of(part.crc32)

        def send() -> str:
            Body.seek(0)
            answer = self._client.upload_part(
                PartNumber=PartNumber, Body=Body, ContentMD5=base64_of(part.md5), **parameters
            )
            self._etags_are_md5 &= is_md5_etag(answer)
            proven_etag(answer, part.md5)
            return answer["ETag"]

        listed = self._on_s3.get(PartNumber)
        if listed and part.is_same_as(listed):
            part.etag = listed["ETag"]
        else:
            part.etag = self._uploader.retries.run(send)
        self._parts[PartNumber] = part
        return {"ETag": part.etag}

    def complete_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        """Make the parts one object, unless the file changed meanwhile, and prove it."""
        check_unchanged(os.stat(self._task.filepath), self._before, self._has_same_parts)
        parameters["MultipartUpload"] = {"Parts": self._completed_parts()}
        try:
            answer = self._uploader.retries.run(
                lambda: self._client.complete_multipart_upload(**parameters)
            )
        except UploadError as error:
            # Perhaps a first request did complete it, and only its answer was lost.
            if error.code != "NoSuchUpload" or not self._is_in_place():
                raise
        else:
            self._forget_upload()
            self._prove(answer)
        self._forget_upload()
        return {}

    def abort_multipart_upload(self, **_: Any) -> dict[str, Any]:
        """Do nothing: S3Transfer aborts after any failure, but the parts are of use."""
        return {}

    def _completed_parts(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, part in sorted(self._parts.items()):
            parts.append({"PartNumber": number, "ETag": part.etag})
            if self._sends_crc32:
                parts[-1]["ChecksumCRC32"] = base64_of(part.crc32)
        return parts

    def _has_same_parts(self) -> bool:
        again = self._read_parts()
        return all(part.md5 == again[number].md5 for number, part in self._parts.items())

    def _read_parts(self) -> dict[int, Part]:
        """Return the digests of all parts, read from the file anew."""
        size, part_size, parts = self._before.st_size, self._part_size(), {}
        with open_regular(self._task.filepath) as handle:
            for number, start in enumerate(range(0, size, part_size), start=1):
                self._uploader.retries.check_stopped()
                parts[number] = read_part(handle, min(part_size, size - start))
        return parts

    # What S3 has already.

    def _parts_on_s3(self) -> dict[int, Any]:
        """Return the parts of the recorded multipart upload, as ListParts describes them.

        An upload that cannot be gone on with is aborted. When it turns out to be
        complete, `_etag` is set.
        """
        task = self._task
        if not task.upload_id:
            return {}
        try:
            parts = self._uploader.retries.run(self._list_parts, may_stop_run=False)
        except UploadError as error:
            if error.code == "NoSuchUpload":
                self._parts = self._read_parts()
                self._is_in_place()
                self._forget_upload()
            else:
                self._uploader.abort(task)
            return {}
        if parts is None:
            self._uploader.abort(task)
        return parts or {}

    def _list_parts(self) -> dict[int, Any] | None:
        """Return the parts by number, or None when the upload is not as this run wants it."""
        parts: dict[int, Any] = {}
        pages = self._client.get_paginator("list_parts").paginate(
            UploadId=self._task.upload_id or "", **self._uploader.location(self._task)
        )
        wanted_class = self._uploader.options.storage_class
        for page in pages:
            if wanted_class and page.get("StorageClass", wanted_class) != wanted_class:
                return None
            self._sends_crc32 = page.get("ChecksumAlgorithm") == "CRC32"
            parts |= {part["PartNumber"]: part for part in page.get("Parts", ())}
        return parts

    # The proof: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html

    def _prove(self, answer: Any) -> None:
        """Set `_etag`; raise DigestMismatch when the object does not hold the bytes.

        Where neither the answer nor HeadObject says anything about the bytes, or a tight
        policy refuses HeadObject, the parts stand as proof: S3 has accepted each with its
        Content-MD5.
        """
        proven = self._compare(answer)
        if proven is None and (head := self._head()) is not None:
            answer = head
            proven = head["ContentLength"] == self._before.st_size and self._compare(head)
        if proven is False:
            raise DigestMismatch(
                f"the object's ETag is {etag_of(answer) or 'missing'} and should "
                f"be {self._expected_etag()}"
            )
        self._etag = etag_of(answer)

    def _is_in_place(self) -> bool:
        """Tell whether the object is there and provably holds the bytes; then set `_etag`."""
        head = self._head()
        if not head or head["ContentLength"] != self._before.st_size or not self._compare(head):
            return False
        self._etag = etag_of(head)
        return True

    def _compare(self, answer: Any) -> bool | None:
        """Tell whether the object in `answer` holds the bytes; None when it does not say."""
        etag, expected = etag_of(answer), self._expected_etag()
        if etag == expected or answer.get("ChecksumCRC32") == self._expected_crc32():
            return True
        if not self._etags_are_md5 or not is_md5_etag(answer):
            return None
        if re.fullmatch(r"[0-9a-f]{32}", etag):
            with open_regular(self._task.filepath) as handle:
                return etag == read_part(handle, self._before.st_size).md5.hex()
        # Another number of parts: the server has put them together in its own way.
        return False if re.fullmatch(rf"[0-9a-f]{{32}}-{len(self._parts)}", etag) else None

    def _expected_etag(self) -> str:
        md5s = b"".join(part.md5 for _, part in sorted(self._parts.items()))
        return f"{new_md5(md5s).hexdigest()}-{len(self._parts)}"

    def _expected_crc32(self) -> str:
        crc32s = b"".join(part.crc32 for _, part in sorted(self._parts.items()))
        return f"{base64_of(zlib.crc32(crc32s).to_bytes(4, 'big'))}-{len(self._parts)}"

    def _head(self) -> Any:
        try:
            return self._uploader.retries.run(
                lambda: self._client.head_object(**self._uploader.location(self._task)),
                may_stop_run=False,
            )
        except UploadError:
            return None


def is_multipart(size: int, options: Namespace) -> bool:
    """Decide how a file of `size` bytes is sent: in parts, or else in one."""
    return size >= options.multipart_threshold


# --- the bucket -------------------------------------------------------------------


def open_bucket(options: Namespace, interruption: Interruption) -> S3Client:
    """Return a client for the bucket's region; create the bucket where it is missing.

    Raises StopRun when it cannot be used. A 403 does not say so: a write-only
    credential may not look, and the first upload will tell.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadBucket.html
    """
    probe = build_client(options, None, patient=False)
    # A name server or a black hole may hang far longer than any timeout of ours.
    answer = ThreadPoolExecutor(max_workers=1).submit(look_at_bucket, probe, options)
    deadline = time.monotonic() + FIRST_REQUEST_SECONDS
    while not answer.done():
        interruption.check()
        if time.monotonic() > deadline:
            raise StopRun(f"no answer from {probe.meta.endpoint_url}; check network and endpoint")
        wait([answer], timeout=0.1)
    status, region = answer.result()
    if status == 404:
        region = create_bucket(probe, options)
    elif status == 401 or (status == 400 and not region):
        raise StopRun(
            "the server takes the request for a bad one; check credentials, session "
            "token and endpoint"
        )
    return build_client(options, region)


def look_at_bucket(client: S3Client, options: Namespace) -> tuple[int, str | None]:
    """Return the HTTP status that HeadBucket gives, and the region it names."""
    from botocore.exceptions import ClientError

    def head() -> tuple[int, str | None]:
        answer: Any
        try:
            answer = client.head_bucket(Bucket=options.bucketname, **owner_parameter(options))
        except ClientError as error:
            answer = error.response
            if trouble_of(error).kind == "passing":
                raise
        metadata = answer["ResponseMetadata"]
        return metadata["HTTPStatusCode"], metadata["HTTPHeaders"].get("x-amz-bucket-region")

    return Retries(patience_seconds=FIRST_REQUEST_SECONDS / 2).run(head)


def create_bucket(client: S3Client, options: Namespace) -> str | None:
    """Create the bucket, wait until it exists, and return the region to use, if it matters.

    Raises StopRun when that fails.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateBucket.html
    """
    from botocore.exceptions import WaiterError

    name, region = options.bucketname, options.region or DEFAULT_REGION
    if not re.fullmatch(r"(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9](?!.*\.\.)[a-z0-9.-]{1,61}[a-z0-9]", name):
        raise StopRun(
            f"there is no bucket {name}, and S3 creates none of that name: it takes 3 "
            "to 63 lower-case letters, digits, dots and hyphens"
        )
    aws = is_aws(client)
    if aws:
        client = build_client(options, region, patient=False)
    location: Any = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    retries = Retries()
    try:
        try:
            retries.run(
                lambda: client.create_bucket(
                    Bucket=name, **({} if region == "us-east-1" else location)
                ),
                may_stop_run=False,
            )
        except UploadError as error:
            # Other servers have regions of their own, or none.
            if aws or options.region or error.code not in LOCATION_CODES:
                raise
            retries.run(lambda: client.create_bucket(Bucket=name), may_stop_run=False)
    except UploadError as error:
        if error.code == "BucketAlreadyExists":
            raise StopRun(
                f"the bucket name {name} is taken by another account; choose another "
                "with --bucketname"
            ) from error
        if error.code != "BucketAlreadyOwnedByYou":
            raise StopRun(f"cannot create the bucket {name}: {error}") from error
    try:
        client.get_waiter("bucket_exists").wait(
            Bucket=name, WaiterConfig={"Delay": 1, "MaxAttempts": 30}
        )
    except WaiterError as error:
        raise StopRun(f"the bucket {name} was created but does not appear; try again") from error
    return region if aws else None


def is_aws(client: S3Client) -> bool:
    """Tell whether the client's server is AWS itself and not a compatible one."""
    return ".amazonaws." in client.meta.endpoint_url.split("/")[2]


def owner_parameter(options: Namespace) -> Any:
    """Return the parameter that makes S3 refuse another account's bucket, if it is wanted."""
    owner = options.expected_bucket_owner
    return {"ExpectedBucketOwner": owner} if owner else {}


# --- transfer: the main thread's side ---------------------------------------------


class Lane:
    """A queue of tasks and its threads: one for small files, one for large ones.

    Neither kind waits for the other, and large files do not multiply threads.
    """

    def __init__(
        self,
        tasks: Iterator[Task],
        uploader: Uploader,
        events: queue.SimpleQueue[Event],
        *,
        threads: int,
        queued: int,
    ) -> None:
        self._tasks = tasks
        self._uploader = uploader
        self._events = events
        self._threads_left = threads
        self._queued_max = queued
        self._ready: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._bytes = 0
        self._next = next(tasks, None)
        self.under_way = 0

    @property
    def is_done(self) -> bool:
        """Whether no task waits or is under way."""
        return self._next is None and not self.under_way

    def fill(self) -> None:
        """Hand out tasks while there is room for them."""
        while self._next is not None and self._has_room_for(self._next):
            self.submit(self._next)
            self._next = next(self._tasks, None)

    def _has_room_for(self, task: Task) -> bool:
        return self.under_way < min(ALWAYS_UNDER_WAY, self._queued_max) or (
            self.under_way < self._queued_max and self._bytes + task.size <= BYTES_UNDER_WAY
        )

    def submit(self, task: Task) -> None:
        """Hand out one task; its Result arrives among the events."""
        self.under_way += 1
        self._bytes += task.size
        self._ready.put(task)
        if self._threads_left:
            self._threads_left -= 1
            # Daemons: a thread that is stuck in a socket must not hold up the exit.
            threading.Thread(target=self._work, daemon=True).start()

    def end(self, task: Task) -> None:
        """Take note that the task's Result has arrived."""
        self.under_way -= 1
        self._bytes -= task.size

    def _work(self) -> None:
        task = None
        try:
            while True:
                task = self._ready.get()
                self._events.put(self._uploader.upload(task))
        finally:
            # Only a bug gets here, and its traceback follows: the run must not hang.
            if task:
                self._events.put(Result(task, "fatal", error="this is a bug; please report it"))


class Transfer:
    """Sends the pending entries: hands out tasks, records results, saves the state.

    All but the uploading runs in the main thread.
    """

    def __init__(
        self,
        entries: list[Entry],
        client: S3Client,
        options: Namespace,
        *,
        state: StateFile,
        report: Report,
        interruption: Interruption,
    ) -> None:
        self._entries = entries
        self._options = options
        self._state = state
        self._report = report
        self._interruption = interruption
        self._changed: deque[tuple[float, Task]] = deque()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._can_save = True
        self._stop_at = math.inf
        self.uploader = Uploader(client, options, self._events.put)
        threads = options.max_concurrency
        self._lanes = {
            False: Lane(
                self._tasks(large=False),
                self.uploader,
                self._events,
                threads=threads,
                queued=threads * QUEUED_PER_THREAD,
            ),
            True: Lane(
                self._tasks(large=True),
                self.uploader,
                self._events,
                threads=LARGE_FILES_AT_ONCE,
                queued=LARGE_FILES_AT_ONCE,
            ),
        }
        self.stop_message: str | None = None

    def run(self) -> None:
        """Send every pending entry, until all is done or the run must stop.

        After a signal or a stop, what is under way has a few seconds to end;
        `stop_message` says why the run stopped by itself, if it did.
        """
        while time.monotonic() < self._stop_at:
            if self._interruption.signum or self.stop_message:
                if not self.uploader.retries.stop.is_set():
                    self.uploader.retries.stop.set()
                    self._stop_at = time.monotonic() + SIGNAL_GRACE_SECONDS
            else:
                self._hand_out()
            under_way = any(lane.under_way for lane in self._lanes.values())
            if not under_way and (self.uploader.retries.stop.is_set() or self._is_done()):
                break
            self._take_events()

    def _tasks(self, *, large: bool) -> Iterator[Task]:
        for index, entry in enumerate(self._entries):
            size = entry.size or 0
            if (
                not entry.uploaded
                and not entry.error
                and is_multipart(size, self._options) == large
            ):
                yield Task(
                    index,
                    entry.filepath,
                    entry.filename,
                    size,
                    large,
                    upload_id=entry.upload_id,
                    part_size=entry.part_size,
                )

    def _is_done(self) -> bool:
        return not self._changed and all(lane.is_done for lane in self._lanes.values())

    def _hand_out(self) -> None:
        for lane in self._lanes.values():
            lane.fill()
        if self._changed and all(lane.is_done for lane in self._lanes.values()):
            due, task = self._changed[0]
            if time.monotonic() >= due:
                self._changed.popleft()
                self._lanes[task.large].submit(task)

    def _take_events(self) -> None:
        """Record what the threads report; wait a moment for it if there is nothing."""
        started: list[UploadStarted] = []
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=0.1)
            while True:
                if isinstance(event, Result):
                    self._record(event)
                else:
                    started.append(event)
                    entry = self._entries[event.task.index]
                    entry.upload_id, entry.part_size = event.upload_id, event.part_size
                    entry.size, entry.mtime_ns = event.size, event.mtime_ns
                event = self._events.get_nowait()
        if started or self._state.is_due():
            self.save()
        for event in started:
            event.saved.set()

    def _record(self, result: Result) -> None:
        task = result.task
        entry = self._entries[task.index]
        self._lanes[task.large].end(task)
        entry.upload_id, entry.part_size = task.upload_id, task.part_size
        if result.outcome == "uploaded":
            entry.uploaded = True
            entry.size, entry.mtime_ns, entry.etag = result.size, result.mtime_ns, result.etag
            self._report.uploaded(entry, result.seconds)
        elif result.outcome == "changed" and task.tries < CHANGED_TRIES:
            task.tries += 1
            self._changed.append((time.monotonic() + CHANGED_PAUSE_SECONDS, task))
        elif result.outcome == "fatal":
            self.stop_message = self.stop_message or result.error
        elif result.outcome != "stopped":
            entry.error = result.error
            self._report.failed(entry)

    def save(self) -> bool:
        """Save the state and tell whether it worked; a run goes on without, for the data's sake."""
        try:
            self._state.save(self._entries)
        except OSError as error:
            if self._can_save:
                self._report.error(
                    f"cannot save the state file {shown(self._state.path)}: "
                    f"{reason(error)}; make room"
                )
            self._can_save = False
            return False
        self._can_save = True
        return True


# --- report -----------------------------------------------------------------------


class Report:
    """What the user sees: failures and notices on stderr, the summary on stdout."""

    NOTICES_OF_A_KIND = 3

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._started = time.monotonic()
        self._notices: Counter[str] = Counter()
        self.uploaded_files = self.uploaded_bytes = self.failed_files = 0

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

    def failed(self, entry: Entry) -> None:
        """Say that an entry was not uploaded, and why."""
        self.failed_files += 1
        self._print(f"failed: {shown(entry.filepath)}: {entry.error}", sys.stderr)

    def uploaded(self, entry: Entry, seconds: float) -> None:
        """Count an uploaded file."""
        self.uploaded_files += 1
        self.uploaded_bytes += entry.size or 0
        if self._options.verbose:
            self._print(
                f"uploaded: {shown(entry.filepath)} -> {self.url(entry.filename)} "
                f"({human_size(entry.size or 0)}, {seconds:.1f} s)",
                sys.stderr,
            )

    def would_upload(self, entry: Entry) -> None:
        """List a file that a run without --dryrun would send."""
        self.uploaded_files += 1
        self.uploaded_bytes += entry.size or 0
        self._print(
            f"would upload: {shown(entry.filepath)} -> {self.url(entry.filename)} "
            f"({human_size(entry.size or 0)})",
            sys.stdout,
        )

    def url(self, key: str) -> str:
        """Return the object's S3 URI, fit for a terminal."""
        return shown(f"s3://{self._options.bucketname}/{key}")

    def summary(self, state_path: str, *, left: int = 0) -> None:
        """Say on stdout how the run went; `left` files were neither sent nor failed."""
        if self._options.quiet:
            return
        seconds = time.monotonic() - self._started
        what = f"{self.uploaded_files:,} files, {human_size(self.uploaded_bytes)}"
        failed = f"{self.failed_files:,} failed" + (f", {left:,} not yet sent" if left else "")
        if self._options.dryrun:
            self._print(f"dry run: would send {what}, {failed}", sys.stdout)
            return
        rate = human_size(self.uploaded_bytes / max(seconds, 0.001))
        self._print(
            f"sent {what} to {self.url(self._options.prefix)} in {seconds:.1f} s ({rate}/s); "
            f"{failed}; state: {shown(state_path)}",
            sys.stdout,
        )

    def _print(self, text: str, stream: TextIO) -> None:
        # A closed pipe or a full disk behind a stream must not end a backup.
        with contextlib.suppress(OSError, ValueError):
            print(text, file=stream, flush=stream is sys.stderr)


def human_size(size: float) -> str:
    """Return bytes in decimal units, as disks and `ls --si` count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


# --- main -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the program with the given arguments (default: the command line's).

    Returns the exit code, as the module's docstring lists them. Raises SystemExit for
    --help, --version and a command line that is not valid.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parse_arguments(argv)
    report, interruption, state = Report(options), Interruption(), StateFile(options.statefile)
    interruption.install()
    try:
        if options.dryrun:
            return show_plan(options, report, interruption, state)
        state.lock()
        return back_up(options, report, interruption, state)
    except StopRun as error:
        report.error(str(error))
        return 2
    except Stopped:
        what = INTERRUPTED if state.has_saved else "interrupted before anything was sent"
        report.error(what)
        return interruption.exit_code


def show_plan(
    options: Namespace, report: Report, interruption: Interruption, state: StateFile
) -> int:
    """List what a run would send and return the exit code; nothing is changed."""
    previous = state.read()
    check_previous(previous, options)
    for entry in find_files(options, Walk(options, report, interruption, state), previous):
        if entry.error:
            report.failed(entry)
        elif not entry.uploaded:
            report.would_upload(entry)
    report.end_of_notices()
    report.summary(state.path)
    return 1 if report.failed_files else 0


def back_up(
    options: Namespace, report: Report, interruption: Interruption, state: StateFile
) -> int:
    """Plan, send and record; return the exit code.

    Raises StopRun when the run cannot start, and Stopped when a signal comes before the plan.
    """
    previous = state.read()
    check_previous(previous, options)
    client = open_bucket(options, interruption)
    walk = Walk(options, report, interruption, state)
    entries, abandoned = plan(options, walk, previous, state, report)
    transfer = Transfer(
        entries, client, options, state=state, report=report, interruption=interruption
    )
    # Before the state forgets their ids.
    for entry in abandoned:
        abort_abandoned(entry, transfer.uploader, report)
    save_or_stop(state, entries)
    for entry in entries:
        if entry.error:
            report.failed(entry)
    transfer.run()
    saved = transfer.save()
    left = sum(not entry.uploaded for entry in entries) - report.failed_files
    report.summary(state.path, left=left)
    if transfer.stop_message:
        report.error(f"stopped: {transfer.stop_message}")
    if interruption.signum:
        report.error(INTERRUPTED)
        return interruption.exit_code
    if transfer.stop_message or not saved:
        return 2
    if report.failed_files:
        report.error("some files are not in the bucket; send them with --crashrun 1")
        return 1
    return 0


def plan(
    options: Namespace, walk: Walk, previous: list[Entry] | None, state: StateFile, report: Report
) -> tuple[list[Entry], list[Entry]]:
    """Find what is to be sent.

    Returns the entries, and the recorded ones whose multipart upload is to be aborted.
    Until the plan is complete, the state on disk lists the folder itself as not
    uploaded, so that a crash run after a kill walks it. Raises StopRun for an empty
    folder of which the state lists uploads.
    """
    found = find_files(options, walk, previous)
    open_uploads = {
        (entry.filepath, entry.filename): entry
        for entry in previous or ()
        if entry.upload_id and not entry.uploaded
    }
    if not options.crashrun:
        first = next(found, None)
        if first is None:
            check_not_vanished(previous, options)
            report.error(
                f"there is nothing to send in {shown(options.backupfolder)}; is its disk mounted?"
            )
        else:
            folder = Entry(options.backupfolder, options.prefix, bucket=options.bucketname)
            save_or_stop(state, [folder, *open_uploads.values()])
            found = itertools.chain([first], found)
    entries = list(found)
    report.end_of_notices()
    return entries, carry_uploads(entries, open_uploads)


def find_files(options: Namespace, walk: Walk, previous: list[Entry] | None) -> Iterator[Entry]:
    """Yield the entries of this run: of the whole folder, or of what a crash run retries."""
    if options.crashrun:
        return plan_crashrun(previous or [], walk)
    return walk.folder(options.backupfolder, key_prefix=options.prefix)


def check_not_vanished(previous: list[Entry] | None, options: Namespace) -> None:
    """Raise StopRun when files of the now empty folder were uploaded before."""
    root = os.path.join(options.backupfolder, "")
    count = sum(e.uploaded and e.filepath.startswith(root) for e in previous or ())
    if count:
        raise StopRun(
            f"{shown(options.backupfolder)} is empty, but the state lists {count:,} "
            "uploaded files of it; is its disk mounted?"
        )


def save_or_stop(state: StateFile, entries: list[Entry]) -> None:
    """Save the state; raise StopRun when that fails, since nothing has been sent yet."""
    try:
        state.save(entries)
    except OSError as error:
        raise StopRun(
            f"cannot save the state file {shown(state.path)}: {reason(error)}; make "
            "room, or choose another place with --statefile"
        ) from error


def abort_abandoned(entry: Entry, uploader: Uploader, report: Report) -> None:
    """Abort a recorded multipart upload that no file of this run can go on with."""
    task = Task(0, entry.filepath, entry.filename, 0, True, upload_id=entry.upload_id)
    if not uploader.abort(task):
        report.notice(f"multipart upload {entry.upload_id} could not be aborted", entry.filepath)


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Not sys.exit: threads stuck in a socket would hold it up, and freeing the
    # entries of a million files takes seconds.
    os._exit(code)
