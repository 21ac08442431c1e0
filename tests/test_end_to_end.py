"""The whole job, end to end: every file arrives, or is said not to; what is restored is right."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import NewJob
from support.checks import assert_clean, assert_failed, assert_stopped
from support.faults import Fault, call, flip_byte, wrong_etag
from support.files import (
    IN_MEMORY_BYTES,
    IN_PARTS,
    LARGE_BYTES,
    digests,
    odd_names,
    relative_paths,
    small_files,
    some_bytes,
)
from support.job import NOBODY, Job
from support.proxy import Request
from support.readme import blocks
from support.script import Completed, shared_folder
from support.servers import RCLONE, S3Server
from support.systems import needs_permissions

# Files of 10 MiB and more in parts, so that there are streamed ones too.
PARTS = ("--multipart-threshold", "10MiB", "--multipart-chunksize", "5MiB")


# --- A folder --------------------------------------------------------------------------------


@pytest.mark.few(1)
def test_every_file_arrives_and_a_crash_run_sends_nothing(
    new_job: NewJob, each_server: S3Server, client: tuple[str, ...]
) -> None:
    job = new_job(each_server, *client, has_bucket=False)
    files = {name: os.urandom(100) for name in odd_names(each_server.name)}
    files |= {f"folder {name}/{name}": name.encode() for name in odd_names(each_server.name)}
    files |= small_files(160)  # enough for more than one process
    files |= {"empty": b"", "streamed": some_bytes(IN_MEMORY_BYTES + 1)}
    files |= {"parts": some_bytes(LARGE_BYTES)}
    job.write(files)
    assert_clean(job.run(*PARTS))
    assert job.objects() == files
    assert job.state() == dict.fromkeys(relative_paths(job.folder), 1)
    assert {entry["filepath"] for entry in job.entries()} == {str(job.path(key)) for key in files}

    since = job.seen()
    assert_clean(job.crash_run(*PARTS))
    # The first, the middle and the last are looked up.
    asked = [request.operation for request in job.proxy.requests[since:]]
    assert asked == ["HeadBucket", *["ListObjectsV2"] * 3]


def test_a_second_run_sends_all_again(job: Job) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    job.path("a.dat").write_bytes(b"changed")
    since = job.seen()
    assert_clean(job.run())
    assert job.sent(since) == ["a.dat", "b.dat"]
    job.check_all_is_there()


# --- Several things that go wrong ------------------------------------------------------------


@needs_permissions
def test_exactly_the_troubled_files_fail_and_the_crash_run_sends_them(job: Job) -> None:
    good = job.make(*(f"good/{number:02}" for number in range(40)))
    troubled = job.make("unreadable", "vanished", "changed", "corrupted", "wrong-etag")
    job.path("unreadable").chmod(0)

    def change(_: Request) -> None:
        with job.path("changed").open("r+b") as file:
            file.write(os.urandom(8))

    def vanish(_: Request) -> None:
        job.path("vanished").unlink(missing_ok=True)

    # The walk is over when the first file is sent; the one that vanishes is the last of all.
    for fault in (
        Fault(flip_byte(), operation="PutObject", key="corrupted"),
        Fault(wrong_etag(), operation="PutObject", key="wrong-etag"),
        Fault(call(change), operation="PutObject", key="changed"),
        Fault(call(vanish), operation="PutObject", times=1),
    ):
        job.proxy.add_fault(fault)
    completed = job.run("--max-concurrency", "2", user=NOBODY)
    assert_failed(completed, [job.path(name) for name in troubled])
    assert "--crashrun 1" in completed.stderr
    assert job.state() == {**dict.fromkeys(good, 1), **dict.fromkeys(troubled, 0)}
    reasons = job.errors()
    assert set(reasons) == set(troubled)
    for name, word in (
        ("unreadable", "permission"),
        ("vanished", "vanished"),
        ("changed", "changed"),
        ("corrupted", "damage"),
        ("wrong-etag", "etag"),
    ):
        assert word in reasons[name].lower()
    in_bucket = job.in_bucket()
    assert {key: in_bucket.get(key) for key in good} == digests(good)

    job.proxy.clear_faults()
    job.path("unreadable").chmod(0o644)
    job.make("vanished", "changed")
    since = job.seen()
    assert_clean(job.crash_run(user=NOBODY))
    assert job.sent(since) == sorted(troubled)
    job.check_all_is_there()
    assert job.errors() == {}


# --- TLS -------------------------------------------------------------------------------------


def test_https(tls_job: Job, client: tuple[str, ...]) -> None:
    files = {"empty": b"", "small": b"small", "sub/streamed": some_bytes(IN_MEMORY_BYTES + 1)}
    tls_job.write({**files, "sub/parts": some_bytes(LARGE_BYTES)})
    assert_clean(tls_job.run(*PARTS))
    tls_job.check_all_is_there()


def test_a_certificate_that_is_not_trusted_stops_the_run(tls_job: Job) -> None:
    tls_job.make("a.dat")
    completed = tls_job.run(server=replace(tls_job.endpoint, ca_bundle=None))
    assert_stopped(completed, "certificate", "AWS_CA_BUNDLE")
    assert not tls_job.state_path.exists()


# --- Restoring, as the README says -----------------------------------------------------------

COPY, PROOF = (block.replace("\\\n", "") for block in blocks("Restoring", "sh"))
FROM_AWS, _, OTHER_OPTIONS = COPY.partition("# or ")
FROM_ANOTHER_SERVER = FROM_AWS[: FROM_AWS.index("--s3-provider")] + OTHER_OPTIONS
NIGHTLY = ("--prefix", "srv/")  # which its nightly job has

# Modification times in nanoseconds since 1970.
TIMES = {
    "nanoseconds.dat": 1_795_447_108_764_478_067,
    "1999.dat": 915_148_800_000_000_005,
    "1969.dat": -1_500_000_001,
    "shortly before 1970.dat": -1,
    "1970.dat": 0,
    "whole seconds.dat": 1_700_000_000_000_000_000,
    "empty": 1_600_000_000_100_000_000,
    "deep/er/a+b %41 ünïcode 日本 🎉.dat": 1_500_000_000_000_000_001,
    "parts.dat": 1_700_000_000_123_456_789,
}


def make_timed_files(job: Job) -> None:
    """Write files from all times."""
    files = {name: os.urandom(1000) for name in TIMES}
    job.write({**files, "empty": b"", "parts.dat": some_bytes(LARGE_BYTES)})
    for name, mtime_ns in TIMES.items():
        os.utime(job.path(name), ns=(mtime_ns, mtime_ns))


@pytest.fixture
def restored(tmp_path: Path) -> Path:
    """The folder that the README restores to."""
    return tmp_path / "restored"


def rclone_copy(job: Job, command: str, cwd: Path) -> None:
    """Run the README's rclone command for the job's bucket and server."""
    server = job.server
    command = command.replace("my-backup", job.bucket)
    command = command.replace("https://s3.example:8333", server.endpoint_url)
    words = shlex.split(command)
    assert words[0] == "rclone"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")},
        **server.environment(),
        "HOME": str(shared_folder() / "home"),
        # What the command says wins over these: they lead the one for AWS to this server.
        "RCLONE_S3_ENDPOINT": server.endpoint_url,
        "RCLONE_S3_FORCE_PATH_STYLE": "true",
        **({"RCLONE_CA_CERT": str(server.ca_bundle)} if server.ca_bundle else {}),
    }
    subprocess.run([RCLONE, *words[1:]], cwd=cwd, env=environment, check=True, timeout=60)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the modification time of each file of a folder."""
    paths = {key: folder / key for key in relative_paths(folder)}
    return {key: (path.read_bytes(), path.stat().st_mtime_ns) for key, path in paths.items()}


@pytest.mark.few(1)
def test_rclone_brings_back_bytes_and_modification_times(
    new_job: NewJob, each_server: S3Server, client: tuple[str, ...], tmp_path: Path
) -> None:
    job = new_job(each_server, *client)
    make_timed_files(job)
    assert_clean(job.run(*PARTS, *NIGHTLY))
    job.put("other/c.dat", b"of another job")
    for name, command in (("aws", FROM_AWS), ("other", FROM_ANOTHER_SERVER)):
        (tmp_path / name).mkdir()
        rclone_copy(job, command, tmp_path / name)
        assert contents(tmp_path / name / "restored") == contents(job.folder)


def proof(job: Job, restored: Path) -> Completed:
    """Run the README's proof, where there is no server."""
    python, script, *words = shlex.split(PROOF)
    assert (python, script) == ("python3", "s3FileTransfer.py")
    here = {"my-backup": job.bucket, "restored": str(restored)}
    here["/var/lib/s3FileTransfer/srv.json"] = str(job.state_path)
    return job.run_plainly(*(here.get(word, word) for word in words), server=None)


@pytest.mark.few(1)
def test_a_restored_folder_is_proven_file_by_file(each_job: Job, restored: Path) -> None:
    job, count = each_job, len(TIMES)
    make_timed_files(job)
    assert_clean(job.run(*IN_PARTS, *NIGHTLY))
    rclone_copy(job, FROM_ANOTHER_SERVER, restored.parent)
    completed = proof(job, restored)
    assert_clean(completed)
    size = sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())
    right = f"{count} files right, {size / 1e6:.1f} MB; 0 wrong, 0 not yet sent"
    assert completed.stdout.startswith(f"verified in {restored}: {right}; state: ")

    state = job.state_path.read_bytes()
    for name, place in {"parts.dat": size // 3, "1999.dat": -1}.items():
        changed = bytearray((restored / name).read_bytes())
        changed[place] ^= 1
        (restored / name).write_bytes(changed)
    os.truncate(restored / "1970.dat", 999)
    (restored / "empty").unlink()
    (restored / "added").write_bytes(b"of somebody else")
    completed = proof(job, restored)
    assert completed.returncode == 1
    *named, summary = completed.stdout.splitlines()
    assert f": {count - 4} files right, " in summary
    assert "; 4 wrong, 0 not yet sent; " in summary
    wrong = {"different": ["1970.dat", "1999.dat", "parts.dat"], "missing": ["empty"]}
    said = {f"{kind}: {restored / key} (of srv/{key})" for kind in wrong for key in wrong[kind]}
    assert {re.match(r"[^(]+\(of [^)]+\)", line)[0] for line in named} == said  # type: ignore[index]
    assert job.state_path.read_bytes() == state
