"""What the README says of restoring: its commands bring the files back, and prove it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import MIB, Job, assert_clean, relative_paths
from readme import blocks
from script_runner import make_files, shared_folder
from servers import RCLONE, S3Server
from systems import needs_shell

pytest_plugins = ["job_fixtures"]

FROM_AWS, FROM_ANOTHER_SERVER, PROOF = blocks("Restoring", "sh")
PART_BYTES = 5 * MIB
IN_PARTS = ("--multipart-threshold", "5MiB", "--multipart-chunksize", "5MiB")

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


@pytest.fixture
def files_job(s3: S3Server, new_job: Callable[[S3Server], Job]) -> Job:
    """A job of files from all times, on each of the servers."""
    job = new_job(s3)
    files = {name: os.urandom(1000) for name in TIMES}
    make_files(job.folder, {**files, "empty": b"", "parts.dat": os.urandom(11 * MIB)})
    for name, mtime_ns in TIMES.items():
        os.utime(job.folder / name, ns=(mtime_ns, mtime_ns))
    return job


@pytest.fixture
def restored(tmp_path: Path) -> Path:
    """The folder that the README restores to."""
    return tmp_path / "restored"


def rclone_copy(job: Job, command: str, cwd: Path) -> None:
    """Run the README's rclone command for the job's bucket and server."""
    server = job.server
    command = command.replace("my-backup", job.bucket)
    command = command.replace("https://minio.example:9000", server.endpoint_url)
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


# --- rclone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [FROM_AWS, FROM_ANOTHER_SERVER], ids=["aws", "other"])
def test_rclone_brings_back_bytes_and_modification_times(
    files_job: Job, restored: Path, command: str
) -> None:
    assert_clean(files_job(*IN_PARTS))
    rclone_copy(files_job, command, restored.parent)
    assert contents(restored) == contents(files_job.folder)


@needs_shell
def test_rclone_brings_back_what_has_a_prefix(job: Job, restored: Path) -> None:
    job.make("a.dat", "sub/b.dat")
    assert_clean(job("--prefix", "srv/"))
    job.server.client().put_object(Bucket=job.bucket, Key="other/c.dat", Body=b"other")
    command = FROM_ANOTHER_SERVER.replace("my-backup restored", "my-backup/srv restored/srv")
    rclone_copy(job, command, restored.parent)
    assert contents(restored / "srv") == contents(job.folder)
    assert proof(job, restored) == (0, ["OK: 2"])


# --- The proof -------------------------------------------------------------------------------


def proof(job: Job, restored: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run the README's proof, with more arguments; return its exit code and what it says."""
    names = "stateFile.json restored"
    assert PROOF.count(names) == 1
    shutil.copy(job.state_path, restored.with_name("stateFile.json"))
    python_folder = str(Path(sys.executable).parent)
    completed = subprocess.run(
        ["sh", "-c", PROOF.replace(names, " ".join([names, *arguments]))],
        cwd=restored.parent,
        env={**os.environ, "PATH": os.pathsep.join([python_folder, os.environ["PATH"]])},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert completed.stderr == ""
    return completed.returncode, completed.stdout.splitlines()


@pytest.fixture
def copied(files_job: Job, restored: Path) -> Job:
    """A job that is done, and whose files are restored."""
    assert_clean(files_job(*IN_PARTS))
    shutil.copytree(files_job.folder, restored)
    return files_job


@needs_shell
def test_a_good_restore_is_proven(copied: Job, restored: Path) -> None:
    assert proof(copied, restored, str(PART_BYTES)) == (0, [f"OK: {len(TIMES)}"])


@needs_shell
def test_parts_of_the_default_size_are_proven(moto_job: Job, restored: Path) -> None:
    make_files(moto_job.folder, {"parts.dat": os.urandom(17 * MIB)})
    assert_clean(moto_job("--multipart-threshold", "5MiB"))
    assert moto_job.entries()[0]["etag"].endswith("-2")
    shutil.copytree(moto_job.folder, restored)
    assert proof(moto_job, restored) == (0, ["OK: 1"])


@needs_shell
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", ["1999.dat", "parts.dat"])
def test_a_changed_byte_is_named(copied: Job, restored: Path, name: str, position: int) -> None:
    content = bytearray((restored / name).read_bytes())
    content[position] ^= 1
    (restored / name).write_bytes(content)
    code, (named, summary) = proof(copied, restored, str(PART_BYTES))
    assert (code, named) == (1, f"other bytes: {name}")
    assert set(summary.split(", ")) == {f"OK: {len(TIMES) - 1}", "other bytes: 1"}


@needs_shell
@pytest.mark.parametrize("name", ["empty", "deep/er/a+b %41 ünïcode 日本 🎉.dat", "parts.dat"])
def test_a_missing_file_is_named(copied: Job, restored: Path, name: str) -> None:
    (restored / name).unlink()
    code, (named, summary) = proof(copied, restored, str(PART_BYTES))
    missing = "No such file or directory"
    assert (code, named) == (1, f"{missing}: {name}")
    assert set(summary.split(", ")) == {f"OK: {len(TIMES) - 1}", f"{missing}: 1"}


# Even where nothing but the size can be compared.
@needs_shell
@pytest.mark.parametrize("part_size", [str(PART_BYTES), "0"])
@pytest.mark.parametrize("name", ["1999.dat", "parts.dat"])
def test_another_size_is_named(copied: Job, restored: Path, name: str, part_size: str) -> None:
    os.truncate(restored / name, 999)
    code, (named, _) = proof(copied, restored, part_size)
    assert (code, named) == (1, f"another size: {name}")


@needs_shell
def test_what_was_not_uploaded_is_named(job: Job, restored: Path) -> None:
    job.make("a.dat")
    (job.folder / "broken").symlink_to("missing")
    assert job().returncode == 1
    make_files(restored, {"a.dat": b"bytes of a.dat", "broken": b"of an earlier backup"})
    assert proof(job, restored) == (1, ["not uploaded: broken", "OK: 1, not uploaded: 1"])


@needs_shell
def test_parts_of_an_unknown_size_are_compared_by_size(moto_job: Job, restored: Path) -> None:
    moto_job.make("a.dat")
    make_files(moto_job.folder, {"parts.dat": os.urandom(11 * MIB)})
    assert_clean(moto_job(*IN_PARTS))
    shutil.copytree(moto_job.folder, restored)
    assert proof(moto_job, restored) == (0, ["OK: 1, size only: 1"])


@needs_shell
def test_etags_that_are_no_md5_can_be_left_out(copied: Job, restored: Path) -> None:
    entries = [{**entry, "etag": "0123456789abcdef" * 2} for entry in copied.entries()]
    copied.state_path.write_text(json.dumps(entries), encoding="utf-8")
    assert proof(copied, restored)[0] == 1
    assert proof(copied, restored, "0") == (0, [f"size only: {len(TIMES)}"])
