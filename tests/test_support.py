"""What the tests stand on: the proxy does to requests what its actions say, and nothing else."""

from __future__ import annotations

import base64
import http.client
import json
import os
import py_compile
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import boto3
import pytest
import trustme
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError
from conftest import NewJob
from support import forks, script
from support.aws import AwsRules, crc32_of, signing_region
from support.faults import (
    Fault,
    answer,
    call,
    cut_answer,
    delay,
    drop,
    drop_after_forward,
    drop_mid_body,
    flip_byte,
    replace_in_answer,
    set_headers,
    slow,
    stall,
    wrong_etag,
)
from support.files import MIB, PART_BYTES, md5
from support.job import NOBODY, Job
from support.proxy import Action, FaultProxy, Request
from support.servers import S3Server
from support.systems import needs_permissions, needs_proc, needs_shell

BODY = bytes(range(256)) * 40


def client_of(job: Job) -> Any:
    """A client of the job's proxy that tries everything once."""
    config = Config(
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        read_timeout=5,
    )
    return boto3.client(
        "s3",
        endpoint_url=job.endpoint.endpoint_url,
        region_name="eu-west-1",
        aws_access_key_id=job.server.access_key,
        aws_secret_access_key=job.server.secret_key,
        verify=str(job.endpoint.ca_bundle) if job.endpoint.ca_bundle else None,
        config=config,
    )


def put(job: Job, body: bytes = BODY, key: str = "key") -> Any:
    return client_of(job).put_object(Bucket=job.bucket, Key=key, Body=body)


# --- The proxy -------------------------------------------------------------------------------


def test_requests_pass_unchanged_and_are_recorded(each_job: Job) -> None:
    job, key = each_job, "sub/odd +%&?ü"
    assert put(job, key=key)["ETag"].strip('"') == md5(BODY)
    assert client_of(job).get_object(Bucket=job.bucket, Key=key)["Body"].read() == BODY
    client_of(job).head_object(Bucket=job.bucket, Key=key)
    with pytest.raises(ClientError):
        client_of(job).head_object(Bucket=job.bucket, Key="no-such")
    seen = [(r.operation, r.bucket, r.key, r.status, r.body_bytes) for r in job.proxy.requests]
    assert seen == [
        ("PutObject", job.bucket, key, 200, len(BODY)),
        ("GetObject", job.bucket, key, 200, 0),
        ("HeadObject", job.bucket, key, 200, 0),
        ("HeadObject", job.bucket, "no-such", 404, 0),
    ]
    assert str(job.proxy.requests[0]) == f"PutObject {job.bucket}/{key}: 200, {len(BODY)} bytes"


def test_requests_of_an_upload_in_parts_are_named(moto_job: Job) -> None:
    client, where = client_of(moto_job), {"Bucket": moto_job.bucket, "Key": "large"}
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    etag = client.upload_part(**where, UploadId=upload_id, PartNumber=1, Body=BODY)["ETag"]
    client.list_parts(**where, UploadId=upload_id)
    assert moto_job.open_uploads() == [("large", upload_id, 1)]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    client.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload=parts)
    again = client.create_multipart_upload(**where)["UploadId"]
    client.abort_multipart_upload(**where, UploadId=again)
    client.list_objects_v2(Bucket=moto_job.bucket)
    client.list_multipart_uploads(Bucket=moto_job.bucket)
    assert [(r.operation, r.part_number) for r in moto_job.proxy.requests] == [
        ("CreateMultipartUpload", None),
        ("UploadPart", 1),
        ("ListParts", None),
        ("CompleteMultipartUpload", None),
        ("CreateMultipartUpload", None),
        ("AbortMultipartUpload", None),
        ("ListObjectsV2", None),
        ("ListMultipartUploads", None),
    ]


def test_bodies_are_streamed_and_their_rate_is_shared(job: Job) -> None:
    arrived: list[float] = []
    job.proxy.on_bytes = arrived.append
    job.proxy.limit_bandwidth(4 * MIB)
    threads = [
        threading.Thread(target=put, args=(job, os.urandom(MIB), str(number)))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arrived[-1] - arrived[0] > 0.4
    assert len(job.in_bucket()) == 2


def test_a_server_that_is_gone_is_a_502(closed_port: int) -> None:
    with FaultProxy(f"http://127.0.0.1:{closed_port}") as proxy:
        connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=30)
        connection.request("PUT", "/bucket/key", body=BODY)
        assert connection.getresponse().status == 502


# --- What the actions do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "error", "is_stored"),
    [
        (drop(), ConnectionClosedError, False),
        (drop_mid_body(), ConnectionClosedError, False),
        (drop_after_forward(), ConnectionClosedError, True),
        (stall(0.2), ConnectionClosedError, False),
        (answer(503, "SlowDown"), "SlowDown", False),
        (flip_byte(), "BadDigest", False),
    ],
)
def test_an_action_that_makes_a_request_fail(
    rclone_job: Job, action: Action, error: type[Exception] | str, is_stored: bool
) -> None:
    job = rclone_job
    job.proxy.add_fault(Fault(action, operation="PutObject", times=1))
    where = {"Bucket": job.bucket, "Key": "key", "Body": BODY}
    digest = md5(BODY)
    content_md5 = base64.b64encode(bytes.fromhex(digest)).decode()
    with pytest.raises(ClientError if isinstance(error, str) else error) as raised:
        client_of(job).put_object(**where, ContentMD5=content_md5)
    if isinstance(error, str):
        assert error in str(raised.value)
    assert job.in_bucket() == ({"key": digest} if is_stored else {})


def test_actions_that_change_an_answer(job: Job) -> None:
    cases: list[tuple[Action, Callable[[Any], object]]] = [
        (wrong_etag(), lambda said: said["ETag"].strip('"') != md5(BODY)),
        (set_headers({"ETag": '"x"'}), lambda said: said["ETag"] == '"x"'),
        (cut_answer(), lambda said: "ETag" not in said or said["ETag"].strip('"') == md5(BODY)),
    ]
    for action, is_so in cases:
        job.proxy.clear_faults()
        job.proxy.add_fault(Fault(action, operation="PutObject"))
        assert is_so(put(job))
    job.proxy.clear_faults()
    job.proxy.add_fault(
        Fault(replace_in_answer(lambda page: page.replace(b"<Key>key", b"<Key>other")))
    )
    listed = client_of(job).list_objects_v2(Bucket=job.bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["other"]


@pytest.mark.parametrize("action", [delay(0.3), slow(30_000)], ids=["delay", "slow"])
def test_actions_that_take_their_time(job: Job, action: Action) -> None:
    job.proxy.add_fault(Fault(action, operation="PutObject"))
    started = time.monotonic()
    put(job)
    assert time.monotonic() - started > 0.2
    assert job.in_bucket() == {"key": md5(BODY)}


def test_a_call_comes_before_the_request_and_its_errors_are_heard_of(
    new_job: NewJob, server: S3Server
) -> None:
    job = new_job(server)
    seen: list[dict[str, str]] = []
    job.proxy.add_fault(Fault(call(lambda _: seen.append(job.in_bucket())), times=1))
    put(job)
    assert seen == [{}]
    failing = server.proxy()
    with pytest.raises(ZeroDivisionError), failing:
        failing.add_fault(Fault(call(lambda _: 1 // 0)))
        connection = http.client.HTTPConnection(failing.url.removeprefix("http://"), timeout=30)
        connection.request("GET", "/")
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse()


def request_of(method: str, target: str, host: str = "127.0.0.1") -> Request:
    headers = Message()
    headers["Host"] = host
    return Request.parse(method=method, target=target, headers=headers)


def test_a_fault_claims_the_requests_it_is_for() -> None:
    puts = [request_of("PUT", f"/bucket/{key}") for key in "abcab"]
    parts = [request_of("PUT", f"/bucket/a?partNumber={n}&uploadId=u") for n in (1, 2, 3)]

    def claimed(requests: list[Request], **wanted: Any) -> list[int]:
        fault = Fault(drop(), **wanted)
        return [number for number, request in enumerate(requests) if fault.claims(request)]

    assert claimed(puts) == [0, 1, 2, 3, 4]
    assert claimed(puts, key="a") == [0, 3]
    assert claimed(puts, key=lambda key: key != "a", times=2) == [1, 2]
    assert claimed(puts, after=3) == [3, 4]
    assert claimed(puts, operation="UploadPart") == []
    assert claimed([*puts, *parts], operation=("UploadPart",)) == [5, 6, 7]
    assert claimed(parts, part_number=2) == [1]
    assert claimed(parts, part_number=lambda number: number > 1) == [1, 2]
    assert claimed(puts, method="GET") == []
    some = claimed(puts * 100, one_in=5, seed=1)
    assert 60 < len(some) < 140
    assert some == claimed(puts * 100, one_in=5, seed=1)


# --- TLS, and AWS's names --------------------------------------------------------------------


def test_a_bucket_in_the_host_is_a_bucket() -> None:
    for host, bucket in (
        ("my-bucket.s3.eu-west-1.amazonaws.com", "my-bucket"),
        ("my-bucket.s3.amazonaws.com", "my-bucket"),
        ("a.b.s3.us-west-2.amazonaws.com:443", "a.b"),
    ):
        request = request_of("PUT", "/some/key?partNumber=2&uploadId=u", host)
        assert (request.bucket, request.key, request.part_number) == (bucket, "some/key", 2)
        assert request.host == host.partition(":")[0]
    request = request_of("PUT", "/in-path/key", "s3.eu-west-1.amazonaws.com")
    assert (request.bucket, request.key) == ("in-path", "key")


def test_https_is_spoken_to_who_trusts_the_authority(tls_job: Job) -> None:
    put(tls_job)
    assert tls_job.in_bucket() == {"key": md5(BODY)}
    url = tls_job.proxy.url.removeprefix("https://")
    stranger = http.client.HTTPSConnection(url, context=ssl.create_default_context(), timeout=30)
    with pytest.raises(ssl.SSLCertVerificationError):
        stranger.request("GET", "/")


@pytest.fixture
def rules() -> AwsRules:
    return AwsRules()


def test_aws_rules_refuse_what_s3_would(
    moto_server: S3Server, ca: trustme.CA, ca_path: Path, rules: AwsRules
) -> None:
    with FaultProxy(moto_server.endpoint_url, ca=ca, ask=rules.ask) as proxy:
        client: Any = boto3.client(
            "s3",
            region_name="eu-west-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            verify=str(ca_path),
            config=Config(
                proxies={"https": proxy.url},
                retries={"total_max_attempts": 1},
                request_checksum_calculation="when_required",
            ),
        )
        where = {"Bucket": "rules", "Key": "large"}
        region = {"LocationConstraint": "eu-west-1"}
        client.create_bucket(Bucket="rules", CreateBucketConfiguration=region)
        with pytest.raises(ClientError, match="BadDigest"):  # it has no Content-MD5
            client.put_object(**where, Body=BODY)
        upload_id = client.create_multipart_upload(**where, ChecksumAlgorithm="CRC32")["UploadId"]
        body = os.urandom(PART_BYTES)
        part = {**where, "UploadId": upload_id, "PartNumber": 1, "Body": body}
        wrong = "AAAAAAAAAAAAAAAAAAAAAA=="
        with pytest.raises(ClientError, match="BadDigest"):
            client.upload_part(**part, ContentMD5=wrong, ChecksumCRC32=crc32_of(body))
        content_md5 = base64.b64encode(bytes.fromhex(md5(body))).decode()
        with pytest.raises(ClientError, match="BadDigest"):
            client.upload_part(**part, ContentMD5=content_md5, ChecksumCRC32="AAAAAA==")
        with pytest.raises(ClientError, match="InvalidRequest"):
            client.upload_part(**part, ContentMD5=content_md5)
        sent = client.upload_part(**part, ContentMD5=content_md5, ChecksumCRC32=crc32_of(body))
        listed = {"Parts": [{"PartNumber": 1, "ETag": sent["ETag"]}]}
        with pytest.raises(ClientError, match="InvalidPart"):
            client.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload=listed)
        assert len(rules.complaints) == 5
        assert {signing_region(request) for request in proxy.requests} == {"eu-west-1"}
        # A bucket that is elsewhere is asked for there, as boto3 does when S3 says so.
        rules.regions["rules"] = "ap-south-1"
        client.head_bucket(Bucket="rules")
        assert (proxy.requests[-1].status, signing_region(proxy.requests[-1])) == (
            200,
            "ap-south-1",
        )
        assert proxy.requests[-1].host.endswith("ap-south-1.amazonaws.com")


# --- The runner ------------------------------------------------------------------------------


def test_the_hasty_copy_differs_in_its_constants_alone() -> None:
    real = script.SCRIPT_PATH.read_text(encoding="utf-8").splitlines()
    hasty = script.hasty_text().splitlines()
    changed = [(a.strip(), b.strip()) for a, b in zip(real, hasty, strict=True) if a != b]
    names = {line: line.partition(" = ")[0] for line in script.HASTE}
    assert dict(changed) == {
        line: f"{names[line]} = {value}" for line, value in script.HASTE.items()
    }


def test_a_constant_that_is_gone_is_noticed() -> None:
    with pytest.raises(AssertionError, match="0 lines of the script are 'NO_SUCH_SECONDS = 1'"):
        script.with_haste("print()\n", {"NO_SUCH_SECONDS = 1": "2"})
    text = script.with_haste("class C:\n    PAUSE = 1\n", {"PAUSE = 1": "0.5"})
    assert text == "class C:\n    PAUSE = 0.5\n"


def test_a_traceback_is_a_failure(job: Job) -> None:
    job.make("a.dat")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        job.run(python_flags=["-c", "1 / 0"])


def test_a_run_gets_nothing_of_the_testers_own(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "RCLONE_CONFIG", "HTTPS_PROXY", "LC_ALL"):
        monkeypatch.setenv(name, "of the tester")
    tell = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:], os.getcwd()]))"
    said = json.loads(job.run("--prefix", "ü", python_flags=["-c", tell]).stdout)
    environment, arguments, cwd = said
    assert "of the tester" not in environment.values()
    assert set(environment) - {"HOME", "PATH", "LC_CTYPE"} == set(job.endpoint.environment())
    assert arguments[-2:] == ["--prefix", "ü"]
    assert cwd == str(tmp_path)


# What a run finds around it, as far as the script could tell.
TELL = """
import gc, json, os, signal, sys, threading
def stream(s):
    return [s.fileno(), s.encoding, s.errors, s.line_buffering, s.mode, s is getattr(
        sys, {0: '__stdin__', 1: '__stdout__', 2: '__stderr__'}[s.fileno()])]
print(json.dumps({
    'name': [__name__, __file__, __spec__, sys.modules['__main__'].__dict__ is globals()],
    'arguments': [sys.argv, sys.path, sys.executable, str(sys.flags)],
    'around': [os.getcwd(), dict(os.environ), os.umask(0o22), sorted(os.listdir('/proc/self/fd'))],
    'group': [os.getsid(0) == os.getpgid(0) == os.getpid(), os.getuid(), os.getgroups()],
    'signals': [str(signal.getsignal(n)) for n in range(1, 32)],
    'inside': [threading.active_count(), gc.isenabled(), gc.get_threshold()],
    'streams': [stream(s) for s in (sys.stdin, sys.stdout, sys.stderr)],
    'said': sys.stdin.read(),
}))
sys.stderr.write('to the end' + chr(0xdcff))
sys.exit(int(sys.argv[2]))
"""


@needs_proc
def test_a_fork_is_what_a_started_program_is(job: Job, tmp_path: Path) -> None:
    source, path = tmp_path / "source.py", tmp_path / "script.py"
    source.write_text(TELL)
    py_compile.compile(str(source), cfile=str(path), doraise=True)
    environment = {**script.base_environment(tmp_path), **job.endpoint.environment()}
    arguments = ["--prefix", "3", "ü", "\udcff"]
    fork = forks.start(Path(sys.executable), path, *arguments, cwd=tmp_path, env=environment)
    program = subprocess.Popen(
        [sys.executable, path, *arguments],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        **forks.TEXT_PIPES,
    )
    (said, error), (wanted, wanted_error) = (
        process.communicate("hello ü", timeout=60) for process in (fork, program)
    )
    assert json.loads(said) == json.loads(wanted)
    assert error == wanted_error == r"to the end\udcff"
    assert fork.returncode == program.returncode == 3


@needs_permissions
def test_another_user_gets_at_all_that_a_run_needs(job: Job) -> None:
    job.make("a.dat")
    # The standard library, the packages, and the interpreter, wherever they were at first.
    late = "import boto3, botocore, subprocess, sys, wave; open(botocore.__file__).close()"
    start = "subprocess.run([sys.executable, '-c', 'import boto3, wave'], check=True)"
    tell = "import os; print(os.getuid(), file=sys.stderr)"
    completed = job.run(user=NOBODY, python_flags=script.prelude(f"{late}; {start}; {tell}"))
    assert completed.returncode == 0, completed.stderr
    user = NOBODY if script.is_root() else os.getuid()
    assert completed.stderr.splitlines()[0] == str(user)


@needs_proc
def test_a_fork_is_killed_and_waited_for_like_a_program(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "is_wanted", True)
    job.make("a.dat")
    job.proxy.add_fault(Fault(stall(600)))
    process = job.start()
    job.wait_for("HeadBucket")
    assert isinstance(process, forks.Fork)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.kill()
    assert process.wait(10) == process.poll() == -signal.SIGKILL


# --- The scripts -----------------------------------------------------------------------------


@needs_shell
@pytest.mark.parametrize("name", ["run.sh", "try_it.sh"])
def test_a_python_without_venv_gets_a_sentence(tmp_path: Path, name: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    completed = subprocess.run(
        ["sh", script.PROJECT / "tests" / name],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stdout) == (2, "")
    (sentence,) = completed.stderr.splitlines()
    assert name in sentence
    assert f"{python} lacks pip and venv" in sentence
    assert "apt install python3-venv" in sentence


def test_what_the_tests_need_is_bounded() -> None:
    wanted = (script.PROJECT / "tests" / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in wanted.splitlines() if not line.startswith("#")]
    # The program's own library alone may be any newer one: so may it be at its users.
    unbounded = [line for line in lines if not re.fullmatch(r"[\w.\[\]-]+>=[\d.]+,<[\d.]+", line)]
    assert unbounded == ["boto3[crt]>=1.37"]
