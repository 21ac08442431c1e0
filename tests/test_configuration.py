"""Credentials and settings of the user's own: renewed meanwhile, wrong, or other than ours."""

from __future__ import annotations

import base64
import datetime
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.checks import assert_clean, assert_stopped
from support.faults import Fault, answer, call
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job
from support.proxy import Answer, Exchange, pass_on
from support.script import prelude
from support.systems import needs_cores, needs_signals
from test_lanes import CLASSIC, MANY, by_lanes, is_by_lane
from test_s3 import KEYS, SECRET, environment_without, signer

# So soon that they are asked for anew whenever they are used.
EXPIRING = datetime.timedelta(minutes=2)


def with_config(job: Job, folder: Path, text: str) -> dict[str, str]:
    """The environment of a job that has no credentials but those of a configuration file."""
    (folder / "config").write_text(text)
    env = environment_without(job.endpoint, *KEYS, "AWS_CONFIG_FILE")
    return {**env, "AWS_CONFIG_FILE": str(folder / "config")}


def beside_keys(job: Job, folder: Path, text: str) -> dict[str, str]:
    """The environment of a job with its credentials, and settings of a configuration file."""
    path = folder / "config"
    path.write_text(f"[default]\n{text}\n")
    return {"AWS_CONFIG_FILE": str(path)}


def json_answer(said: object) -> Callable[[Exchange], None]:
    """Answer with JSON."""
    body = json.dumps(said).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]

    def act(exchange: Exchange) -> None:
        exchange.discard_body()
        exchange.reply(Answer(200, "OK", headers, [body], len(body)))

    return act


# --- What botocore does only with the AWS Common Runtime -------------------------------------

LOGIN = "arn:aws:iam::123456789012:user/backup"


def login_token(folder: Path) -> None:
    """Leave what `aws login` leaves, expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.TraditionalOpenSSL
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    access = {"accessKeyId": "key-old", "secretAccessKey": SECRET, "sessionToken": "token-old"}
    access |= {"accountId": "123456789012", "expiresAt": "2026-01-01T00:00:00Z"}
    token = {"accessToken": access, "refreshToken": "refresh", "clientId": "client"}
    name = f"{hashlib.sha256(LOGIN.encode()).hexdigest()}.json"
    (folder / name).write_text(json.dumps({**token, "dpopKey": pem.decode()}))


@needs_cores
def test_a_login_session_is_renewed_and_used(moto_job: Job, tmp_path: Path) -> None:
    job = moto_job
    login_token(tmp_path)
    job.write({**small_files(MANY), "large": some_bytes(LARGE_BYTES)})
    env = with_config(job, tmp_path, f"[default]\nregion = eu-west-1\nlogin_session = {LOGIN}\n")
    env |= {"AWS_LOGIN_CACHE_DIRECTORY": str(tmp_path), "AWS_ENDPOINT_URL_SIGNIN": job.proxy.url}
    new = {"accessKeyId": "key-new", "secretAccessKey": SECRET, "sessionToken": "token-new"}
    said = {"accessToken": new, "tokenType": "t", "expiresIn": 3600, "refreshToken": "refresh-2"}
    sign_in = Fault(json_answer(said), operation="POST object")
    job.proxy.add_fault(sign_in)
    # Not in a fork: whether botocore has the AWS Common Runtime is settled when it is imported.
    assert_clean(job.run(*IN_PARTS, server=None, env=env, python_flags=["-s"]))
    assert sign_in.hits == 1
    puts = job.requests("PutObject", "UploadPart")
    assert {signer(request) for request in puts} == {("key-new", "token-new")}
    assert len(by_lanes(job)) == MANY
    job.check_all_is_there()


def test_a_login_session_that_is_not_there_is_said_in_a_sentence(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    env = with_config(job, tmp_path, f"[default]\nlogin_session = {LOGIN}\n")
    env["AWS_LOGIN_CACHE_DIRECTORY"] = str(tmp_path / "none")
    assert_stopped(job.run(server=None, env=env), "aws login")
    (tmp_path / "awscrt.py").write_text("raise ImportError")
    env["PYTHONPATH"] = str(tmp_path)
    assert_stopped(job.run(server=None, env=env), "awscrt is missing", "boto3[crt]")
    assert job.proxy.requests == []


# --- Credentials that another program renews -------------------------------------------------


class Renewed:
    """Credentials that S3 calls expired from some request on, and their source by then."""

    def __init__(self, job: Job, folder: Path, *, source: str = "process") -> None:
        self.job, self.source, self.record = job, folder / "source", folder / "record"
        self.give("old")
        config = f"[default]\ncredential_process = sh -c 'echo >> {self.record}; cat {self.source}'"
        if source == "file":
            config = ""
        self.env = with_config(job, folder, f"{config}\n")
        if source == "file":
            self.env["AWS_SHARED_CREDENTIALS_FILE"] = str(self.source.with_suffix(".ini"))

    def give(self, name: str, **more: object) -> None:
        """Have the source give credentials of that name from now on."""
        said = {"Version": 1, "AccessKeyId": f"key-{name}", "SecretAccessKey": SECRET}
        self.source.write_text(json.dumps({**said, "SessionToken": f"token-{name}", **more}))
        keys = f"aws_access_key_id=key-{name}\naws_secret_access_key={SECRET}\n"
        text = f"[default]\n{keys}aws_session_token=token-{name}\n"
        self.source.with_suffix(".ini").write_text(text)

    def expire(self, operation: str, *, after: int, renew: bool = True) -> None:
        """Let those of now expire with such a request, before which the source gets others."""

        def act(exchange: Exchange) -> None:
            if renew:
                self.give("new")
            self.job.proxy.add_fault(Fault(refuse))
            refuse(exchange)

        def refuse(exchange: Exchange) -> None:
            is_old = signer(exchange.request) == ("key-old", "token-old")
            (answer(400, "ExpiredToken") if is_old else pass_on)(exchange)

        self.job.proxy.add_fault(Fault(act, operation=operation, after=after, times=1))

    def questions(self) -> int:
        """How often the source was asked."""
        return self.record.read_text().count("\n")


@pytest.mark.parametrize(("operation", "way"), [("PutObject", CLASSIC), ("UploadPart", ())])
@pytest.mark.few(1)
def test_a_token_that_another_program_renewed_is_taken(
    moto_job: Job, tmp_path: Path, operation: str, way: tuple[str, ...]
) -> None:
    job, renewed = moto_job, Renewed(moto_job, tmp_path)
    job.write({**small_files(60), "large": some_bytes(LARGE_BYTES)})
    renewed.expire(operation, after=20 if operation == "PutObject" else 1)
    assert_clean(job.run(*IN_PARTS, *way, "--max-concurrency", "8", server=None, env=renewed.env))
    job.check_all_is_there()
    assert renewed.questions() == 2  # at the start, and once for all that was under way
    assert len({part.query["uploadId"] for part in job.requests("UploadPart")}) == 1
    taken = [r for r in job.requests("PutObject", "UploadPart") if r.status == 200]
    assert {signer(request)[0] for request in taken} == {"key-old", "key-new"}


@needs_cores
def test_lanes_go_on_with_a_renewed_token(moto_job: Job, tmp_path: Path) -> None:
    job, renewed = moto_job, Renewed(moto_job, tmp_path, source="file")
    job.write(small_files(2 * MANY))
    renewed.expire("PutObject", after=20)
    assert_clean(job.run("--max-concurrency", "8", server=None, env=renewed.env))
    job.check_all_is_there()
    sent = [put for put in job.requests("PutObject") if put.status == 200]
    assert sum(signer(put)[0] == "key-new" and is_by_lane(put) for put in sent) > MANY


def test_a_token_that_nobody_renewed_stops_the_run(moto_job: Job, tmp_path: Path) -> None:
    job, renewed = moto_job, Renewed(moto_job, tmp_path)
    job.write({**small_files(60), "large": some_bytes(LARGE_BYTES)})
    renewed.expire("PutObject", after=20, renew=False)
    completed = job.run(*IN_PARTS, server=None, env=renewed.env)
    assert_stopped(completed, "ExpiredToken", "renew it")
    assert renewed.questions() == 2
    assert len(job.uploaded()) < 61
    job.check_state_is_true()


def test_tokens_that_are_new_and_always_refused_end_the_questions(job: Job, tmp_path: Path) -> None:
    renewed = Renewed(job, tmp_path)
    job.write(small_files(60))

    def act(exchange: Exchange) -> None:
        renewed.give(str(job.seen()))
        answer(400, "ExpiredToken")(exchange)

    job.proxy.add_fault(Fault(act, operation="PutObject"))
    assert_stopped(job.run(server=None, env=renewed.env), "ExpiredToken")
    assert renewed.questions() < 30


STS = """<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>key-{name}</AccessKeyId>
<SecretAccessKey>s</SecretAccessKey><SessionToken>token-{name}</SessionToken>
<Expiration>{until}</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"""
STS_EXPIRED = """<ErrorResponse><Error><Type>Sender</Type><Code>ExpiredToken</Code>
<Message>It has expired</Message></Error></ErrorResponse>"""


@needs_cores
def test_a_role_whose_source_another_program_renewed_is_taken_on(
    moto_job: Job, tmp_path: Path
) -> None:
    job, renewed = moto_job, Renewed(moto_job, tmp_path, source="file")
    text = f"[profile r]\nregion = eu-west-1\nsource_profile = default\nrole_arn = {LOGIN}\n"
    (tmp_path / "config").write_text(text)
    renewed.env["AWS_ENDPOINT_URL_STS"] = job.proxy.url
    expired = set[str]()

    def sts(exchange: Exchange) -> None:
        exchange.discard_body()
        key, _ = signer(exchange.request)
        until = datetime.datetime.now(datetime.timezone.utc) + EXPIRING
        said = STS.format(name=f"of-{key}", until=until.isoformat())
        body = (STS_EXPIRED if key in expired else said).encode()
        headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))]
        exchange.reply(Answer(400 if key in expired else 200, "", headers, [body], len(body)))

    def expire(_: object) -> None:
        renewed.give("new")
        expired.add("key-old")

    job.proxy.add_fault(Fault(sts, operation="POST service"))
    job.proxy.add_fault(Fault(call(expire), operation="PutObject", after=20, times=1))
    job.write({**small_files(MANY), "large": some_bytes(LARGE_BYTES)})
    arguments = ("--profile", "r", "--max-concurrency", "4", *IN_PARTS)
    assert_clean(job.run(*arguments, server=None, env=renewed.env))
    job.check_all_is_there()
    signers = {signer(put)[0] for put in job.requests("PutObject", "UploadPart")}
    assert signers == {"key-of-key-old", "key-of-key-new"}
    assert len(by_lanes(job)) > MANY - 20


WEB_STS = """<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>key-{number}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>
<SessionToken>t</SessionToken><Expiration>{until}</Expiration>
</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


def test_a_role_of_a_web_identity_is_assumed_once_and_again_when_it_is_expired(
    moto_job: Job, tmp_path: Path
) -> None:
    job = moto_job
    (tmp_path / "token").write_text("token")
    env = {
        **with_config(job, tmp_path, ""),
        "AWS_ENDPOINT_URL_STS": job.proxy.url,
        "AWS_ROLE_ARN": LOGIN,
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
    }
    answers = itertools.count(1)

    def sts(exchange: Exchange) -> None:
        exchange.discard_body()
        until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=2)
        body = WEB_STS.format(number=next(answers), until=until.isoformat()).encode()
        headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))]
        exchange.reply(Answer(200, "", headers, [body], len(body)))

    job.proxy.add_fault(Fault(sts, operation="POST service"))
    expired = answer(400, "ExpiredToken")
    job.proxy.add_fault(Fault(expired, operation="PutObject", after=20, times=1))
    job.write(small_files(40))
    assert_clean(job.run(*CLASSIC, "--max-concurrency", "1", server=None, env=env))
    signers = [signer(put)[0] for put in job.requests("PutObject")]
    assert signers == ["key-1"] * 21 + ["key-2"] * 20


# --- What is wrong, in a sentence ------------------------------------------------------------

WRONG_CONFIGURATION = {
    "one-line-section": "s3 = addressing_style=path",
    "addressing": "s3 =\n  addressing_style = sideways",
    "defaults-mode": "defaults_mode = odd",
    "region": "region = a b",
}


@pytest.mark.parametrize("name", WRONG_CONFIGURATION)
def test_a_wrong_configuration_is_said_in_a_sentence(job: Job, tmp_path: Path, name: str) -> None:
    job.make("a.dat")
    env = beside_keys(job, tmp_path, WRONG_CONFIGURATION[name])
    assert_stopped(job.run(env=env), "check profile")
    assert job.proxy.requests == []


def wrong(**changes: object) -> str:
    """What a `credential_process` says, with something wrong in it."""
    good = {"Version": 1, "AccessKeyId": "k", "SecretAccessKey": SECRET, "SessionToken": "t"}
    return json.dumps({**good, **changes})


WRONG_ANSWERS = {
    "list": "[]",
    "null": "null",
    "no-json": "x",
    "no-key": wrong(AccessKeyId=None, SecretAccessKey=None),
    "number": wrong(AccessKeyId=5, SecretAccessKey={"a": 1}),
    "expired": wrong(Expiration="2020-01-01T00:00:00Z"),
    "no-zone": wrong(Expiration="2100-01-01T00:00:00"),
    "bad-date": wrong(Expiration="soon"),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_a_wrong_answer_of_the_source_is_said_in_a_sentence(
    job: Job, tmp_path: Path, name: str
) -> None:
    job.make("a.dat")
    renewed = Renewed(job, tmp_path)
    renewed.source.write_text(WRONG_ANSWERS[name])
    completed = job.run(server=None, env=renewed.env)
    assert_stopped(completed, "credentials")
    assert SECRET not in completed.stderr
    assert job.proxy.requests == []


@needs_cores
@pytest.mark.parametrize(
    # The others are waited for, since they may pass.
    "name",
    ["no-key", *(pytest.param(n, marks=pytest.mark.long) for n in ("null", "expired"))],
)
def test_a_wrong_answer_in_the_middle_of_a_run_is_no_bug(
    moto_job: Job, tmp_path: Path, name: str
) -> None:
    job, renewed = moto_job, Renewed(moto_job, tmp_path)
    until = (datetime.datetime.now(datetime.timezone.utc) + EXPIRING).isoformat()
    renewed.give("old", Expiration=until)  # asked for anew with each use
    job.write({**small_files(MANY), "large": some_bytes(LARGE_BYTES)})
    spoil = Fault(
        call(lambda _: renewed.source.write_text(WRONG_ANSWERS[name])),
        operation="UploadPart" if name == "null" else "PutObject",
        after=1 if name == "null" else 20,
        times=1,
    )
    job.proxy.add_fault(spoil)
    completed = job.run(*IN_PARTS, "--max-concurrency", "4", server=None, env=renewed.env)
    assert_stopped(completed, "credentials")
    assert spoil.hits == 1
    assert set(job.state()) == set(job.in_folder())
    job.check_state_is_true()


def test_a_wrong_answer_that_passes_is_ridden_out(moto_job: Job, tmp_path: Path) -> None:
    job, renewed = moto_job, Renewed(moto_job, tmp_path)
    until = (datetime.datetime.now(datetime.timezone.utc) + EXPIRING).isoformat()
    good = json.loads(renewed.source.read_text()) | {"Expiration": until}
    once = tmp_path / "once"
    renewed.source.write_text(json.dumps(good))
    command = f"if [ -e {once} ]; then rm {once}; echo []; else cat {renewed.source}; fi"
    (tmp_path / "config").write_text(f'[default]\ncredential_process = sh -c "{command}"\n')
    job.write({**small_files(40), "large": some_bytes(LARGE_BYTES)})
    spoil = Fault(call(lambda _: once.touch()), operation="PutObject", after=10, times=3)
    job.proxy.add_fault(spoil)
    assert_clean(job.run(*IN_PARTS, "--max-concurrency", "2", server=None, env=renewed.env))
    assert spoil.hits == 3
    assert not once.exists()
    job.check_all_is_there()


@needs_signals
def test_a_current_directory_that_is_gone_is_said_in_a_sentence(job: Job) -> None:
    job.make("a.dat")
    gone = prelude("import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')")
    names = ("--bucketname", job.bucket, "--backupfolder", job.folder)
    completed = job.run_plainly(*names, python_flags=gone)
    assert completed.returncode == 2
    assert "the current directory no longer exists" in completed.stderr
    assert_clean(job.run(python_flags=gone))
    job.check_all_is_there()


FEW_THREADS = """\
import threading

real = threading.Thread.start

def start(thread):
    if threading.active_count() > {limit}:
        raise RuntimeError("can't start new thread")
    real(thread)

threading.Thread.start = start
"""


@needs_cores
@pytest.mark.parametrize("limit", [6, pytest.param(11, marks=pytest.mark.long)])
def test_with_few_threads_all_is_sent(job: Job, tmp_path: Path, limit: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(FEW_THREADS.format(limit=limit))
    job.write(
        {**small_files(MANY), "large": some_bytes(LARGE_BYTES), "huge": some_bytes(LARGE_BYTES)}
    )
    assert_clean(job.run(*IN_PARTS, env={"PYTHONPATH": str(tmp_path)}))
    job.check_all_is_there()
    (tmp_path / "sitecustomize.py").unlink()


def test_without_any_thread_the_run_stops(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    flags = prelude(FEW_THREADS.format(limit=0))
    assert_stopped(job.run(python_flags=flags), "thread", "ulimit")


# --- The user's settings win -----------------------------------------------------------------


def test_bodies_are_signed_where_the_configuration_says_so(job: Job, tmp_path: Path) -> None:
    files = {**small_files(MANY), "large": some_bytes(LARGE_BYTES)}
    job.write(files)
    env = beside_keys(job, tmp_path, "s3 =\n  payload_signing_enabled = true")
    assert_clean(job.run(*IN_PARTS, env=env))
    job.check_all_is_there()
    for put in job.requests("PutObject"):
        assert put.headers["x-amz-content-sha256"] == hashlib.sha256(files[put.key]).hexdigest()
    for part in job.requests("UploadPart"):
        assert len(part.headers["x-amz-content-sha256"]) == 64


@pytest.mark.parametrize("place", ["configuration", "environment"])
@pytest.mark.few(1)
def test_checksums_are_sent_where_the_configuration_says_so(
    moto_job: Job, tmp_path: Path, place: str
) -> None:
    job, name = moto_job, "request_checksum_calculation"
    job.write({**small_files(MANY), "large": some_bytes(LARGE_BYTES)})
    env = {f"AWS_{name.upper()}": "when_supported"}
    if place == "configuration":
        env = beside_keys(job, tmp_path, f"{name} = when_supported")
    assert_clean(job.run(*IN_PARTS, env=env))
    job.check_all_is_there()
    for put in job.requests("PutObject", "UploadPart"):
        assert len(base64.b64decode(str(put.headers["x-amz-checksum-crc32"]))) == 4
    (create,) = job.requests("CreateMultipartUpload")
    assert create.headers["x-amz-checksum-algorithm"] == "CRC32"


@needs_cores
def test_the_application_of_the_configuration_is_named(job: Job, tmp_path: Path) -> None:
    job.write({**small_files(MANY), "large": some_bytes(LARGE_BYTES)})
    env = beside_keys(job, tmp_path, "sdk_ua_app_id = nightly-backup")
    assert_clean(job.run(*IN_PARTS, env=env))
    agents = [str(request.headers["User-Agent"]) for request in job.proxy.requests]
    assert [a for a in agents if not ("app/nightly-backup" in a and "s3FileTransfer/" in a)] == []
    assert len(by_lanes(job)) == MANY


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "no such file"), (".", "is a directory"), ("config", "no cert")]
)
@pytest.mark.few(2)
def test_a_ca_bundle_that_is_none_is_said_at_once(
    tls_job: Job, tmp_path: Path, name: str, why: str
) -> None:
    tls_job.make("a.dat")
    (tmp_path / "config").write_text("")
    completed = tls_job.run(env={"AWS_CA_BUNDLE": str(tmp_path / name)}, real_time=True, timeout=9)
    assert_stopped(completed, why, "AWS_CA_BUNDLE")
    assert tls_job.proxy.requests == []


def test_a_ca_bundle_that_is_not_needed_is_not_looked_at(job: Job) -> None:
    job.make("a.dat")
    assert_clean(job.run(env={"AWS_CA_BUNDLE": "/nonexistent"}))


def test_an_empty_ca_bundle_does_not_mean_any_certificate(tls_job: Job) -> None:
    tls_job.make("a.dat")
    assert_stopped(tls_job.run(env={"AWS_CA_BUNDLE": ""}), "certificate")
    assert tls_job.puts() == []


@needs_cores
def test_a_proxy_for_another_scheme_turns_no_lane_off(job: Job) -> None:
    job.write(small_files(MANY))
    assert_clean(job.run(env={"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": ""}))
    assert len(by_lanes(job)) == MANY


@needs_cores
def test_the_password_of_an_endpoint_gets_into_no_header(moto_job: Job) -> None:
    job = moto_job
    job.write(small_files(MANY))
    url = job.endpoint.endpoint_url
    with_password = replace(job.endpoint, endpoint_url=url.replace("://", f"://user:{SECRET}@"))
    assert_clean(job.run(server=with_password))
    assert len(by_lanes(job)) == MANY
    headers: list[Any] = [list(request.headers.items()) for request in job.proxy.requests]
    assert SECRET not in str(headers)
