"""The README's recipes, run as cron, systemd, Slurm, Kubernetes, Batch and AWS would run them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore import xform_name
from botocore.validate import validate_parameters
from conftest import NewJob
from support.checks import assert_clean
from support.faults import Fault, answer, stall
from support.files import IN_PARTS, LARGE_BYTES, some_bytes
from support.job import Job, kill
from support.kills import killed_in_parts
from support.readme import blocks, crontab, section, units
from support.script import base_environment, hasty_script, wait_until
from support.servers import S3Server
from support.shards import keys_of
from support.systems import needs_shell

NIGHTLY = "Every night: cron or a systemd timer"
MACHINES = "More than one machine"
LOCKED = "Backups that an intruder cannot delete"

# In place of a command: it notes its arguments, a line each run.
NOTING = """\
import json, os, sys
with open({notes!r}, "a") as notes:
    print(json.dumps(sys.argv[1:]), file=notes)
"""


class Machine:
    """A machine on which a recipe runs: its commands, and where the README's paths lead."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.bin, self.states = job, folder / "bin", folder / "states"
        self.bin.mkdir()
        self.states.mkdir()
        self.command("python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        self.notes = folder / "notes"
        self._here = {
            "/opt/s3FileTransfer/bin/python3": str(self.bin / "python3"),
            "/opt/s3FileTransfer/s3FileTransfer.py": str(hasty_script()),
            "/shared/s3FileTransfer.py": str(hasty_script()),
            "/usr/bin/curl": str(self.bin / "curl"),
            "/srv/backup": str(job.folder),
            "/shared/data": str(job.folder),
            "/var/lib/s3FileTransfer": str(self.states),
            "/shared/state": str(self.states),
            "my-backup": job.bucket,
        }
        self.environment = {
            **base_environment(folder),
            **job.endpoint.environment(),
            "PATH": os.pathsep.join([str(self.bin), "/usr/bin", "/bin"]),
        }

    def command(self, name: str, text: str) -> None:
        """Make a command of that name the first that is found."""
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def note(self, name: str) -> None:
        """Have a command note its arguments and do nothing else."""
        noting = self.bin / f"{name}.py"
        noting.write_text(NOTING.format(notes=str(self.notes)), encoding="utf-8")
        # Not its own interpreter line, in which no path may have a space.
        words = shlex.join([sys.executable, str(noting)])
        self.command(name, f'#!/bin/sh\nexec {words} "$@"\n')

    def noted(self) -> list[list[str]]:
        """The arguments of each run of such commands since the last look."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def here(self, text: str) -> str:
        """The text with this machine's paths, and the job's bucket."""
        for there, here in self._here.items():
            text = text.replace(there, here)
        return text

    def start(self, words: list[str], **variables: str) -> subprocess.Popen[str]:
        """Start a command, in a process group of its own."""
        return subprocess.Popen(
            [self.here(word) for word in words],
            env={**self.environment, **variables},
            cwd=self.states,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, words: list[str], **variables: str) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it said."""
        process = self.start(words, **variables)
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr


@pytest.fixture
def machine(job: Job, tmp_path: Path) -> Machine:
    return Machine(job, tmp_path)


# --- Every night -----------------------------------------------------------------------------


@needs_shell
def test_the_crontab_sends_mails_failures_only_and_pings_after_success(machine: Machine) -> None:
    job = machine.job
    machine.note("curl")
    variables, jobs = crontab(*blocks(NIGHTLY, "crontab"))
    ((schedule, night),) = jobs
    assert schedule == "0 2,6 * * *"
    here = {name: machine.here(value) for name, value in variables.items()}

    def cron(command: str) -> tuple[int, str]:
        """Run a command; return its exit code, and what cron would mail."""
        code, stdout, stderr = machine.run(["/bin/sh", "-c", command], **here)
        return code, stdout + stderr

    job.make("a.dat", "sub/b.dat")
    job.path("c.dat").symlink_to("missing")
    code, mail = cron(night)
    assert (code, machine.noted()) == (1, [])
    assert f"failed: {job.path('c.dat')}: " in mail
    assert job.sent() == ["srv/a.dat", "srv/sub/b.dat"]
    job.path("c.dat").unlink()
    job.make("c.dat")
    since = job.seen()
    assert cron(night) == (0, "")
    assert job.sent(since) == ["srv/c.dat"]
    (ping,) = machine.noted()
    assert ping[-1].startswith("https://")
    since = job.seen()
    assert cron(night) == (0, "")
    assert job.sent(since) == []
    assert machine.noted() == [ping]


@needs_shell
def test_the_systemd_units_do_what_the_crontab_does(machine: Machine, tmp_path: Path) -> None:
    (text,) = blocks(NIGHTLY, "ini")
    found = units(text)
    timer, service = found["backup.timer"], found["backup.service"]
    assert set(timer["Timer"]) == {"OnCalendar", "Persistent"}
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert service["Service"]["Type"] == "oneshot"
    assert service["Unit"]["OnFailure"] in found
    # systemd reads words as a shell does, but for what neither of these has.
    _, _, *words = shlex.split(service["Service"]["ExecStart"])
    variables, _ = crontab(*blocks(NIGHTLY, "crontab"))
    of_cron = shlex.split(" ".join(variables[name] for name in ("SEND", "SRV")))[2:]
    assert sorted([*words, "--quiet"]) == sorted([*of_cron, "--skip-unchanged"])
    assert service["Service"]["ExecStartPost"] == "-" + variables["PING"].replace(
        "curl", "/usr/bin/curl"
    )
    tells = shlex.split(found["backup-failed.service"]["Service"]["ExecStart"])
    assert tells[:2] == ["/bin/sh", "-c"]
    subprocess.run(["/bin/sh", "-n"], input=tells[2], text=True, check=True)
    # Where systemd is installed it reads them itself.
    if systemd := shutil.which("systemd-analyze"):
        parts = re.split(r"^# (.+)\n", machine.here(text), flags=re.MULTILINE)[1:]
        machine.note("curl")
        for name, lines in zip(parts[::2], parts[1::2], strict=True):
            (tmp_path / name).write_text(lines)
        paths = [str(tmp_path / name) for name in found]
        said = subprocess.run(
            [systemd, "verify", *paths], stderr=subprocess.PIPE, text=True, check=True
        ).stderr
        assert [line for line in said.splitlines() if str(tmp_path) in line] == []


@needs_shell
def test_a_state_that_nothing_writes_and_missing_files_are_seen(machine: Machine) -> None:
    find, grep = re.findall(r"`((?:find|grep) [^`]+)`", section("How you hear of a failure"))
    job = machine.job
    job.make("a.dat")
    job.path("b.dat").symlink_to("missing")
    for name in ("old", "new"):
        job.run("--statefile", machine.states / f"{name}.json")
    now = datetime.datetime.now().timestamp()
    os.utime(machine.states / "old.json", (now, now - 27 * 3600))
    os.utime(machine.states / "new.json", (now, now - 25 * 3600))
    assert machine.run(["sh", "-c", find])[1].split() == [str(machine.states / "old.json")]
    counted = machine.run(["sh", "-c", grep])[1].splitlines()
    assert counted == [f"{machine.states / name}.json:1" for name in ("new", "old")]


# --- Array jobs ------------------------------------------------------------------------------

Task = tuple[list[str], dict[str, str]]


def slurm(folder: Path) -> list[Task]:
    """The tasks of the batch script, which Slurm starts by its first line."""
    (script,) = blocks(MACHINES, "sh")
    assert script.startswith("#!/bin/sh\n")
    low, high = map(int, re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script, re.MULTILINE)[0])
    path = folder / "backup.sbatch"
    path.write_text(script)
    return [(["/bin/sh", str(path)], {"SLURM_ARRAY_TASK_ID": str(n)}) for n in range(low, high + 1)]


def kubernetes(_: Path) -> list[Task]:
    """The pods of the Indexed Job."""
    job = yaml.safe_load(blocks(MACHINES, "yaml")[0])["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    # $(NAME) of a variable that is not in the pod's specification stays as it is.
    assert "env" not in container
    indexes = range(job["completions"])
    return [(container["command"], {"JOB_COMPLETION_INDEX": str(n)}) for n in indexes]


def batch(_: Path) -> list[Task]:
    """The children of the array job."""
    definition = yaml.safe_load(blocks(MACHINES, "yaml")[1])
    size = int(re.findall(r"--array-properties size=(\d+)", section(MACHINES))[0])
    command = definition["containerProperties"]["command"]
    return [(command, {"AWS_BATCH_JOB_ARRAY_INDEX": str(n)}) for n in range(size)]


EACH_ENGINE = pytest.mark.parametrize("tasks_of", [slurm, kubernetes, batch])
# They differ in how a task gets its number, which the first test of each shows.
AN_ENGINE = pytest.mark.parametrize(
    "tasks_of",
    [slurm, *(pytest.param(other, marks=pytest.mark.long) for other in (kubernetes, batch))],
)


def in_folder(words: list[str], machine: Machine) -> list[str]:
    """The words of a task, with the batch script, if there is one, as the machine has it."""
    if words[-1].endswith(".sbatch"):
        path = Path(words[-1])
        path.write_text(machine.here(path.read_text()))
    return words


@needs_shell
@EACH_ENGINE
def test_the_tasks_of_an_array_job_are_the_whole_folder(
    tasks_of: Callable[[Path], list[Task]], machine: Machine, tmp_path: Path
) -> None:
    machine.note("python3")
    for words, variables in tasks_of(tmp_path):
        assert machine.run(in_folder(words, machine), **variables) == (0, "", "")
    noted = machine.noted()
    options = [dict(zip(words[2::2], words[3::2], strict=True)) for words in _paired(noted)]
    assert [option.pop("--shard") for option in options] == ["1/4", "2/4", "3/4", "4/4"]
    assert len({option.pop("--statefile") for option in options}) == 4
    assert {len(words) for words in noted} == {10}
    assert all(option == options[0] for option in options)


def _paired(noted: list[list[str]]) -> list[list[str]]:
    """The commands, each option followed by its value."""
    for words in noted:
        assert words.count("--skip-unchanged") == 1
    return [["python3", *(word for word in words if word != "--skip-unchanged")] for words in noted]


@needs_shell
@AN_ENGINE
def test_a_task_that_is_killed_and_started_again_sends_the_rest(
    tasks_of: Callable[[Path], list[Task]], machine: Machine, tmp_path: Path
) -> None:
    job = machine.job
    names = [f"{number:02}.dat" for number in range(40)]
    job.make(*names)
    *others, last = keys_of("3/4", names)
    words, variables = tasks_of(tmp_path)[2]
    words = in_folder(words, machine)
    job.proxy.add_fault(Fault(stall(600), operation="PutObject", key=last))
    process = machine.start(words, **variables)
    wait_until(lambda: len(recorded(machine.states)) == len(others), 60, "the others' entries")
    kill(process)
    job.proxy.clear_faults()

    since = job.seen()
    code, said, errors = machine.run(words, **variables)
    assert (code, errors) == (0, "")
    assert f"; {len(others)} unchanged, 0 failed; " in said
    assert job.sent(since) == [last]
    assert set(job.in_bucket()) == {*others, last}

    job.path(others[0]).write_bytes(b"changed since")
    since = job.seen()
    code, _, errors = machine.run(words, **variables)
    assert (code, errors) == (0, "")
    assert job.sent(since) == [others[0]]


def recorded(folder: Path) -> set[str]:
    """The files that a state says are uploaded, or what has happened since it was saved."""
    found: set[str] = set()
    for path in (*folder.glob("*.json"), *folder.glob("*.json.journal")):
        with contextlib.suppress(FileNotFoundError):  # another has just taken its place
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r'"filepath": "([^"]+)", "uploadedSuccess": 1', text))
    return found


# --- A week of nights ------------------------------------------------------------------------


@dataclass
class Week:
    """The nights of a job: `tasks` are commands of the README, with their variables."""

    machine: Machine
    prefix: str
    tasks: list[Task]
    bucket: dict[str, str] = field(default_factory=dict)  # what it must hold: MD5s by key

    def run(self) -> tuple[set[int], str]:
        """Run the commands; return their exit codes, and all that they say."""
        ended = [self.machine.run(words, **variables) for words, variables in self.tasks]
        return {code for code, _, _ in ended}, "".join(said + errors for _, said, errors in ended)

    def pass_by(self, *changed: str, after_kill: bool = False) -> None:
        """Have a night pass on which all goes well, and these files, no others, are sent.

        After a kill, the proxy may only now read what the killed run has sent of them.
        """
        since = self.machine.job.seen()
        codes, said = self.run()
        assert codes == {0}, said
        assert "failed: " not in said
        job = self.machine.job
        sent = job.sent(since)
        assert (sorted(set(sent)) if after_kill else sent) == sorted(
            map(self.prefix.__add__, changed)
        )
        self.bucket |= {self.prefix + key: value for key, value in job.in_folder().items()}
        assert job.in_bucket() == self.bucket


def of_cron(machine: Machine, _: Path) -> Week:
    machine.note("curl")
    variables, [(_schedule, command)] = crontab(*blocks(NIGHTLY, "crontab"))
    here = {name: machine.here(value) for name, value in variables.items()}
    return Week(machine, "srv/", [(["/bin/sh", "-c", command], here)])


def of_slurm(machine: Machine, folder: Path) -> Week:
    tasks = [(in_folder(words, machine), variables) for words, variables in slurm(folder)]
    return Week(machine, "", tasks)


@needs_shell
@pytest.mark.long
@pytest.mark.parametrize("week_of", [of_cron, of_slurm])
def test_seven_nights_of_a_recipe(
    week_of: Callable[[Machine, Path], Week], machine: Machine, tmp_path: Path
) -> None:
    job, week = machine.job, week_of(machine, tmp_path)
    names = [f"docs/{number:02}" for number in range(20)] + ["photos/a b.jpg", "mnt/film"]
    job.make(*names)
    week.pass_by(*names)

    # The second: one is new, one has changed, one is renamed, one is gone.
    job.make("docs/new")
    job.path("docs/01").write_bytes(b"changed")
    job.path("docs/02").rename(job.path("docs/two"))
    job.path("docs/03").unlink()
    week.pass_by("docs/new", "docs/01", "docs/two")

    # The third: killed before its files are answered.
    late = [f"late/{number}" for number in range(8)]
    job.make(*late)
    job.proxy.add_fault(Fault(stall(600), operation="PutObject"))
    for words, variables in week.tasks:
        seen = job.seen()
        process = machine.start(words, **variables)
        wait_until(functools.partial(job.sent, seen), 60, "an upload")
        kill(process)
    job.proxy.clear_faults()
    week.pass_by(*late, after_kill=True)

    # The fourth: a file cannot be read until the next morning.
    job.path("docs/00").unlink()
    job.path("docs/00").symlink_to("missing")
    codes, said = week.run()
    assert 0 not in codes
    # What could not be looked at may be a folder, with files of each shard.
    assert said.count(f"failed: {job.path('docs/00')}: ") == len(week.tasks)
    job.path("docs/00").unlink()
    job.path("docs/00").write_bytes(b"mended")
    week.pass_by("docs/00")

    # The fifth: a file system below the folder is not mounted; the sixth: it is again.
    shutil.move(job.path("mnt"), tmp_path / "away")
    week.pass_by()
    shutil.move(tmp_path / "away", job.path("mnt"))
    week.pass_by("mnt/film")

    # The seventh: the bucket has lost an object, and nothing of the folder has changed.
    job.delete(f"{week.prefix}docs/05")
    week.pass_by("docs/05")
    week.pass_by()


def test_kubernetes_and_batch_take_their_files() -> None:
    cron_job, definition = map(yaml.safe_load, blocks(MACHINES, "yaml"))
    assert (cron_job["apiVersion"], cron_job["kind"]) == ("batch/v1", "CronJob")
    spec = cron_job["spec"]
    assert len(spec["schedule"].split()) == 5
    job = spec["jobTemplate"]["spec"]
    assert set(job) == {
        *("completionMode", "completions", "parallelism", "backoffLimitPerIndex", "template")
    }
    pod = job["template"]["spec"]
    # https://kubernetes.io/docs/concepts/workloads/controllers/job/#backoff-limit-per-index
    assert (job["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert job["parallelism"] == job["completions"]
    (container,) = pod["containers"]
    (volume,) = pod["volumes"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]

    validate("batch", "RegisterJobDefinition", definition)
    properties = definition["containerProperties"]
    assert {need["type"] for need in properties["resourceRequirements"]} == {"VCPU", "MEMORY"}
    (mount,), (volume,) = properties["mountPoints"], properties["volumes"]
    assert mount == {"sourceVolume": volume["name"], "containerPath": "/shared"}
    commands = re.findall(r"^# aws (batch .+)$", section(MACHINES), re.MULTILINE)
    register, submit = (request_of(shlex.split(command)) for command in commands)
    assert register == ("batch", "RegisterJobDefinition", {"cli_input_yaml": "file://backup.yaml"})
    validate(*submit)
    assert submit[2]["jobDefinition"] == definition["jobDefinitionName"]


# --- The AWS command line ---------------------------------------------------------------------


def shape_of(service: str, operation: str) -> Any:
    """What AWS takes as the parameters of an operation."""
    model = botocore.session.get_session().get_service_model(service)
    return model.operation_model(operation).input_shape


def validate(service: str, operation: str, parameters: Mapping[str, Any]) -> None:
    """Check that AWS would take these parameters."""
    validate_parameters(parameters, shape_of(service, operation))


def request_of(words: list[str]) -> tuple[str, str, dict[str, Any]]:
    """The service, the operation and the parameters of the arguments of `aws`."""
    service = {"s3api": "s3"}.get(words[0], words[0])
    names = botocore.session.get_session().get_service_model(service).operation_names
    (operation,) = (name for name in names if xform_name(name, "-") == words[1])
    shape = shape_of(service, operation)
    members = {f"--{xform_name(name, '-')}": name for name in shape.members}
    parameters: dict[str, Any] = {}
    rest = iter(words[2:])
    for option in rest:
        if option == "--cli-input-yaml":
            parameters["cli_input_yaml"] = next(rest)
        elif option == "--region":
            assert next(rest) == "eu-west-1"
        else:
            name = members[option]
            member = shape.members[name]
            is_flag = member.type_name == "boolean"
            parameters[name] = True if is_flag else value_of(next(rest), member)
    return service, operation, parameters


def value_of(text: str, shape: Any) -> Any:
    """The value of an option: JSON, pairs, or plain text."""
    if text.startswith("{"):
        return json.loads(text)
    if shape.type_name == "structure":
        pairs = dict(pair.split("=") for pair in text.split(","))
        return {name: value_of(value, shape.members[name]) for name, value in pairs.items()}
    return int(text) if shape.type_name == "integer" else text


@needs_shell
def test_what_is_locked_stays_and_what_is_old_goes(
    new_job: NewJob, moto_server: S3Server, tmp_path: Path
) -> None:
    job = new_job(moto_server, has_bucket=False)
    machine = Machine(job, tmp_path)
    machine.note("aws")
    assert machine.run(["sh", "-ec", *blocks(LOCKED, "sh")]) == (0, "", "")
    client: Any = job.server.client()
    for words in machine.noted():
        _, operation, parameters = request_of(words)
        getattr(client, xform_name(operation))(**parameters)
        lifecycle = parameters.get("LifecycleConfiguration", {})

    # Of an object that was sent in parts, moto forgets the lock.
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    job.path("a.dat").write_bytes(b"by an intruder")
    assert_clean(job.run("--skip-unchanged"))
    versions = client.list_object_versions(Bucket=job.bucket)["Versions"]
    assert sorted(version["Key"] for version in versions) == ["a.dat", "a.dat", "b.dat"]
    month = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=30)
    for version in versions:
        which = {"Bucket": job.bucket, "Key": version["Key"], "VersionId": version["VersionId"]}
        head = client.head_object(**which)
        assert head["ObjectLockMode"] == "COMPLIANCE"
        assert abs(head["ObjectLockRetainUntilDate"] - month) < datetime.timedelta(hours=1)
        with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
            client.delete_object(**which)
    # S3 refuses such a put without Content-MD5 or a checksum.
    assert all(
        "Content-MD5" in request.headers for request in job.requests("PutObject", "UploadPart")
    )
    rules = client.get_bucket_lifecycle_configuration(Bucket=job.bucket)["Rules"]
    assert rules == lifecycle["Rules"]


# --- Policies --------------------------------------------------------------------------------

# https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
ACTIONS = {
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "CreateBucket": "s3:CreateBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListParts": "s3:ListMultipartUploadParts",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetBucketLocation": "s3:GetBucketLocation",
}


def allow_only(job: Job, actions: set[str]) -> None:
    """Have the server refuse what a policy does not allow."""
    assert actions <= set(ACTIONS.values())
    refused = tuple(name for name, action in ACTIONS.items() if action not in actions)
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation=refused))


def test_the_whole_policy_allows_all_that_is_done(new_job: NewJob, moto_server: S3Server) -> None:
    (policy,) = (json.loads(block) for block in blocks("Policies", "json"))
    assert policy["Version"] == "2012-10-17"
    actions: set[str] = set()
    for statement in policy["Statement"]:
        assert set(statement) == {"Effect", "Action", "Resource"}
        actions |= set(statement["Action"])
        is_of_bucket = {action.endswith("Bucket") for action in statement["Action"]}
        name = "arn:aws:s3:::my-backup"
        assert statement["Resource"] == (name if is_of_bucket == {True} else f"{name}/*")
    job = new_job(moto_server, has_bucket=False)
    allow_only(job, actions)
    job.make("a.dat")
    assert_clean(job.run())
    killed_in_parts(job, kept=[1])
    allow_only(job, actions)
    assert_clean(job.crash_run(*IN_PARTS))
    assert_clean(job.run(*IN_PARTS, "--skip-unchanged"))
    assert_clean(job.run("--verify"))
    job.check_all_is_there()
    # Without a permission it may come to the same end by a longer way.
    assert [request for request in job.proxy.requests if request.status == 403] == []


def test_a_credential_that_writes_and_lists_is_enough_every_night(job: Job) -> None:
    actions = set(re.findall(r"`(s3:\w+)`", section(LOCKED)))
    assert actions == {"s3:PutObject", "s3:ListBucket"}
    allow_only(job, actions)
    job.write({"a.dat": b"a", "large": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(*IN_PARTS))
    job.path("a.dat").write_bytes(b"changed")
    since = job.seen()
    assert_clean(job.run(*IN_PARTS, "--skip-unchanged"))
    assert job.sent(since) == ["a.dat"]
    job.check_all_is_there()
