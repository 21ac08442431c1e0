"""What the README has for array jobs: its scripts start each task as they say, and are valid."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import Job
from readme import blocks
from script_runner import SCRIPT_PATH, base_environment, make_files
from systems import needs_shell

pytest_plugins = ["job_fixtures"]

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
    assert job.objects() == files
    os.utime(tmp_path / "state" / "1-of-4.json.job", (1, 1))  # for clocks of whole seconds
    job.proxy  # noqa: B018
    environment |= job.endpoint.environment()
    assert start(0) == 0  # all of its files are there
    assert job.puts() == []


def test_kubernetes_and_batch_read_their_files() -> None:
    yaml = pytest.importorskip("yaml")
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
