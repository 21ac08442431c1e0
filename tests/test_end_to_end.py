"""The whole job, end to end: every file arrives, or is said not to; what is restored is right."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import NewJob
from support.checks import assert_clean, assert_failed, assert_stopped
from support.faults import Fault, call, flip_byte, wrong_etag
from support.files import (
    IN_MEMORY_BYTES,
    IN_PARTS,
    LARGE_BYTES,
    PART_BYTES,
    digests,
    make_files,
    odd_names,
    relative_paths,
    small_files,
    some_bytes,
)
from support.job import NOBODY, Job
from support.proxy import Request
from support.readme import blocks
from support.script import SCRIPT_PATH, base_environment, shared_folder
from support.servers import RCLONE, S3Server
from support.systems import needs_permissions, needs_shell

# Files of 10 MiB and more in parts, so that there are streamed ones too.
PARTS = ("--multipart-threshold", "10MiB", "--multipart-chunksize", "5MiB")


# --- A folder --------------------------------------------------------------------------------


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
    assert {request.operation for request in job.proxy.requests[since:]} == {"HeadBucket"}


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

FROM_AWS, FROM_ANOTHER_SERVER, PROOF = blocks("Restoring", "sh")

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


def test_rclone_brings_back_bytes_and_modification_times(
    new_job: NewJob, each_server: S3Server, client: tuple[str, ...], tmp_path: Path
) -> None:
    job = new_job(each_server, *client)
    make_timed_files(job)
    assert_clean(job.run(*PARTS))
    for name, command in (("aws", FROM_AWS), ("other", FROM_ANOTHER_SERVER)):
        (tmp_path / name).mkdir()
        rclone_copy(job, command, tmp_path / name)
        assert contents(tmp_path / name / "restored") == contents(job.folder)


@needs_shell
def test_rclone_brings_back_what_has_a_prefix(job: Job, restored: Path) -> None:
    job.make("a.dat", "sub/b.dat")
    assert_clean(job.run("--prefix", "srv/"))
    job.put("other/c.dat", b"other")
    command = FROM_ANOTHER_SERVER.replace("my-backup restored", "my-backup/srv restored/srv")
    rclone_copy(job, command, restored.parent)
    assert contents(restored / "srv") == contents(job.folder)
    assert proof(job, restored) == (0, ["OK: 2"])


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


def summed_up(said: list[str]) -> tuple[list[str], set[str]]:
    """What the proof says of files, and its sums."""
    *named, summary = said
    return sorted(named), set(summary.split(", "))


@needs_shell
def test_a_restored_folder_is_proven_file_by_file(each_job: Job, restored: Path) -> None:
    job, count = each_job, len(TIMES)
    make_timed_files(job)
    assert_clean(job.run(*IN_PARTS))
    shutil.copytree(job.folder, restored)
    assert proof(job, restored, str(PART_BYTES)) == (0, [f"OK: {count}"])

    changed = bytearray((restored / "parts.dat").read_bytes())
    changed[-1] ^= 1
    (restored / "parts.dat").write_bytes(changed)
    (restored / "1999.dat").write_bytes(b"x" * 1000)
    os.truncate(restored / "1970.dat", 999)
    (restored / "empty").unlink()
    code, said = proof(job, restored, str(PART_BYTES))
    assert code == 1
    missing = "No such file or directory"
    wrong = ["other bytes: parts.dat", "other bytes: 1999.dat", "another size: 1970.dat"]
    sums = {f"OK: {count - 4}", "other bytes: 2", "another size: 1", f"{missing}: 1"}
    assert summed_up(said) == (sorted([*wrong, f"{missing}: empty"]), sums)

    # With ETags that are no MD5 nothing but the size can be compared.
    entries = [{**entry, "etag": "0123456789abcdef" * 2} for entry in job.entries()]
    job.write_state(*entries)
    named, _ = summed_up(proof(job, restored, "0")[1])
    assert named == sorted(["another size: 1970.dat", f"{missing}: empty"])


@needs_shell
def test_parts_of_the_default_size_are_proven_and_others_by_their_size(
    moto_job: Job, restored: Path
) -> None:
    job = moto_job
    job.write({"parts.dat": os.urandom(17 * 2**20)})
    (job.folder / "broken").symlink_to("missing")
    assert job.run("--multipart-threshold", "5MiB").returncode == 1
    assert job.entry("parts.dat")["etag"].endswith("-2")
    make_files(restored, {"broken": b"of an earlier backup"})
    shutil.copy(job.path("parts.dat"), restored)
    code, said = proof(job, restored)
    assert (code, summed_up(said)) == (1, (["not uploaded: broken"], {"OK: 1", "not uploaded: 1"}))
    (job.folder / "broken").unlink()
    (restored / "broken").unlink()
    assert_clean(job.run(*IN_PARTS))
    assert proof(job, restored) == (0, ["size only: 1"])


# --- Array jobs, as the README has them ------------------------------------------------------

HEADING = "More than one machine"
SHARD_SCRIPT, SBATCH_SCRIPT, _ = blocks(HEADING, "sh")


# In place of python3 and of scontrol: they note their arguments, and may save a state.
STAND_IN = """\
#!/bin/sh
echo "$(basename "$0") $*" >> "$NOTES"
[ -z "${SAVES-}" ] || echo "$SAVES" > "$SAVED"
exit "${EXITS-0}"
"""


class Cluster:
    """A shared folder, and the README's scripts as its machines run them."""

    def __init__(self, tmp_path: Path) -> None:
        self.shared = tmp_path
        (self.shared / "state").mkdir()
        self.state = self.shared / "state" / "3-of-4.json"
        self.notes = self.shared / "notes"
        self._write("backup-shard.sh", SHARD_SCRIPT)
        self._write("backup.sbatch", SBATCH_SCRIPT)
        for name in ("python3", "scontrol"):
            self._write(name, STAND_IN)

    def _write(self, name: str, script: str) -> None:
        path = self.shared / name
        path.write_text(script.replace("/shared/", f"{self.shared}/"))
        path.chmod(0o755)

    def run(self, *words: str, **variables: str) -> tuple[int, list[str]]:
        """Run a script; return its exit code, and what it started in a line each."""
        self.notes.write_text("")
        path = os.pathsep.join([str(self.shared), os.environ["PATH"]])
        environment = {"PATH": path, "NOTES": str(self.notes), "SAVED": str(self.state)}
        completed = subprocess.run(
            ["sh", *words], cwd=self.shared, env={**environment, **variables}, check=False
        )
        return completed.returncode, self.notes.read_text().splitlines()

    def start_task(self, job: str, *, saves: str = "", exits: int = 0) -> str:
        """Start task 2, whose run saves such a state; return the value of its --crashrun."""
        variables = {"SAVES": saves, "EXITS": str(exits)}
        code, (command,) = self.run("backup-shard.sh", job, "2", **variables)
        assert code == exits
        words = command.split()
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options["--shard"] == "3/4"
        assert options["--statefile"] == str(self.state)
        return options["--crashrun"]

    def was_saved_before(self) -> None:
        """Have the state be one of the night before."""
        os.utime(self.state, (1_700_000_000, 1_700_000_000))

    def was_noted_before(self) -> None:
        """Have the note of the job be older than what comes, for clocks of whole seconds."""
        os.utime(f"{self.state}.job", (1_700_000_001, 1_700_000_001))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@needs_shell
def test_a_task_that_is_started_again_does_a_crash_run(cluster: Cluster) -> None:
    assert cluster.start_task("job-1", saves="one is missing", exits=1) == "0"
    cluster.was_noted_before()
    assert cluster.start_task("job-1", saves="one is missing still", exits=1) == "1"
    assert cluster.start_task("job-1", saves="all is there") == "1"


@needs_shell
@pytest.mark.parametrize("state", ["all is there", "one is missing"])
def test_the_next_night_sends_all_again(cluster: Cluster, state: str) -> None:
    assert cluster.start_task("job-1", saves=state) == "0"
    cluster.was_saved_before()
    assert cluster.start_task("job-2") == "0"


@needs_shell
def test_a_task_that_came_to_no_state_starts_from_the_beginning(cluster: Cluster) -> None:
    for _ in range(2):
        assert cluster.start_task("job-1", exits=2) == "0"
    assert cluster.start_task("job-1", saves="all is there") == "0"
    cluster.was_saved_before()
    for _ in range(2):  # nor does the state of the night before count
        assert cluster.start_task("job-2", exits=2) == "0"


@needs_shell
def test_slurm_starts_a_failed_task_again_three_times(cluster: Cluster) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}
    code, (command,) = cluster.run("backup.sbatch", **task)
    assert (code, "--shard 3/4" in command) == (0, True)
    for count in ("", "1", "2"):
        restarts = {"SLURM_RESTART_COUNT": count} if count else {}
        code, (_, requeued) = cluster.run("backup.sbatch", **task, **restarts, EXITS="1")
        assert (code, requeued) == (1, "scontrol requeue 12_2")
    code, noted = cluster.run("backup.sbatch", **task, SLURM_RESTART_COUNT="3", EXITS="1")
    assert (code, len(noted)) == (1, 1)


@needs_shell
def test_the_tasks_send_the_whole_folder_and_start_again(job: Job, tmp_path: Path) -> None:
    """The script as it is, but for the names of its folder, its bucket and its command."""
    (tmp_path / "data").mkdir()
    files = {f"{number:02}.dat": os.urandom(100) for number in range(40)}
    make_files(tmp_path / "data", files)
    script = SHARD_SCRIPT.replace("/shared/s3FileTransfer.py", shlex.quote(str(SCRIPT_PATH)))
    script = script.replace("/shared/", f"{tmp_path}/").replace("my-backup", job.bucket)
    script = script.replace("exec python3", f"exec {shlex.quote(sys.executable)}")
    (tmp_path / "backup-shard.sh").write_text(script)
    environment = base_environment(tmp_path) | job.endpoint.environment()

    def start(index: int) -> int:
        words = ["sh", str(tmp_path / "backup-shard.sh"), "job-1", str(index)]
        return subprocess.run(words, env=environment, check=False).returncode

    for index in range(4):
        assert start(index) == 0
    job.check_holds(files)
    os.utime(tmp_path / "state" / "1-of-4.json.job", (1, 1))  # for clocks of whole seconds
    since = job.seen()
    assert start(0) == 0  # all of its files are there
    assert job.puts(since) == []


def test_kubernetes_and_batch_read_their_files() -> None:
    (text,) = blocks(HEADING, "yaml")
    job = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]
    (definition,) = (json.loads(block) for block in blocks(HEADING, "json"))
    assert job["completionMode"] == "Indexed"
    commands = [
        job["template"]["spec"]["containers"][0]["command"],
        definition["containerProperties"]["command"],
    ]
    for command, index in zip(
        commands, ("JOB_COMPLETION_INDEX", "AWS_BATCH_JOB_ARRAY_INDEX"), strict=True
    ):
        assert command[:2] == ["sh", "-c"]
        assert command[2].startswith("exec sh /shared/backup-shard.sh ")
        assert command[2].endswith(f'"${index}"')
