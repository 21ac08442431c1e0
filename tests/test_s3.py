"""The client: credentials, the endpoint, and what S3's error codes mean for a run."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.parsers
import pytest
from conftest import NewJob
from support.checks import assert_clean, assert_stopped
from support.faults import Fault, answer, call, redirect
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.job import Job
from support.proxy import Answer, Exchange, Request
from support.script import Completed, program
from support.servers import S3Server
from support.systems import needs_cores

SECRET = "a-very-secret-key"


@pytest.fixture
def small_job(new_job: NewJob, moto_server: S3Server, each_client: tuple[str, ...]) -> Job:
    """A job by each of the clients, on a server that takes any credentials."""
    return new_job(moto_server, *each_client)


def environment_without(server: S3Server, *names: str) -> dict[str, str]:
    """The variables of a server but for some."""
    return {name: v for name, v in server.environment().items() if name not in names}


def assert_not_begun(job: Job) -> None:
    """Check that a run asked nothing of the server and left no state."""
    assert job.proxy.requests == []
    assert not job.state_path.exists()


# --- Credentials -----------------------------------------------------------------------------

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("missing", [KEYS, KEYS[1:]], ids=["none", "half"])
def test_without_credentials_nothing_is_begun(job: Job, missing: tuple[str, ...]) -> None:
    job.make("a.dat")
    env = environment_without(job.endpoint, *missing)
    assert_stopped(job.run(server=None, env=env), "credentials")
    assert_not_begun(job)


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
)
@pytest.mark.parametrize("odd", [f"{SECRET}\n", f"{SECRET}ü"], ids=ascii)
def test_credentials_with_odd_characters_are_refused_and_not_shown(
    job: Job, name: str, odd: str
) -> None:
    job.make("a.dat")
    completed = job.run(env={name: odd})
    assert_stopped(completed, "credentials", "white space")
    assert SECRET not in completed.stdout + completed.stderr
    assert_not_begun(job)


def test_an_unknown_profile_is_refused(job: Job) -> None:
    job.make("a.dat")
    assert_stopped(job.run("--profile", "no-such"), "no-such", "profile")
    assert_not_begun(job)


NO_SOURCE = {
    "process-missing": "credential_process = /nonexistent/program",
    "process-fails": "credential_process = false",
    "token-file-missing": "role_arn = arn:aws:iam::123456789012:role/r\n"
    "web_identity_token_file = /nonexistent/token",
}


@pytest.mark.parametrize("source", NO_SOURCE)
def test_credentials_that_cannot_be_had_are_said_in_a_sentence(
    job: Job, tmp_path: Path, source: str
) -> None:
    job.make("a.dat")
    (tmp_path / "config").write_text(f"[profile p]\n{NO_SOURCE[source]}\n")
    env = environment_without(job.endpoint, *KEYS, "AWS_CONFIG_FILE")
    env["AWS_CONFIG_FILE"] = str(tmp_path / "config")
    assert_stopped(job.run("--profile", "p", server=None, env=env), "credential")
    assert_not_begun(job)


def test_a_role_that_is_refused_is_said_in_a_sentence(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    (tmp_path / "config").write_text(
        "[profile p]\nregion = eu-west-1\nrole_arn = arn:aws:iam::123456789012:role/r\n"
        "source_profile = base\n"
        "[profile base]\naws_access_key_id = k\naws_secret_access_key = s\n"
    )
    env = environment_without(job.endpoint, *KEYS, "AWS_CONFIG_FILE")
    env |= {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    env["AWS_ENDPOINT_URL_STS"] = job.proxy.url
    job.proxy.add_fault(Fault(answer(403, "AccessDenied")))
    assert_stopped(job.run("--profile", "p", server=None, env=env), "credentials", "AssumeRole")
    assert not job.state_path.exists()


@pytest.mark.parametrize("operation", ["AssumeRole", "AssumeRoleWithSAML", "GetRoleCredentials"])
def test_a_source_of_credentials_that_refuses_is_no_trouble_of_one_file(operation: str) -> None:
    module = program()
    module.import_boto3()
    answer: Any = {"Error": {"Code": "ForbiddenException", "Message": "No access"}}
    error = module.error_of(botocore.exceptions.ClientError(answer, operation))
    assert error.trouble is module.Trouble.OF_ALL
    assert "check the source of the credentials" in str(error)


def errors_of_botocore() -> list[Exception]:
    """One of each error that botocore knows, with its words."""
    kinds = [kind for kind in vars(botocore.exceptions).values() if hasattr(kind, "fmt")]
    words = (dict.fromkeys(re.findall(r"{(\w+)", kind.fmt), "name") for kind in kinds)
    return [kind(last_response=None, **names) for kind, names in zip(kinds, words, strict=True)]


def test_no_text_of_botocore_ends_in_a_stop_or_gives_an_advice_beside_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = program()
    monkeypatch.setattr(module, "botocore", botocore, raising=False)
    at_start = [str(module.configuration_error(error)) for error in errors_of_botocore()]
    said = at_start + [str(module.error_of(error)) for error in errors_of_botocore()]
    assert len(said) > 100
    assert [text for text in said if re.search(r"\.;|\.\)|\.$", text)] == []
    assert any("run aws sso login" in text for text in at_start)
    assert [text for text in at_start if re.search("aws (sso )?login.*; ", text)] == []


def test_a_text_with_a_stop_of_its_own_has_one_stop(job: Job) -> None:
    job.make("a.dat")
    completed = job.run(env={"AWS_DEFAULT_REGION": "no_region!"})
    assert_stopped(completed, "doesn't match a supported format; check profile")


@pytest.mark.few(1)
def test_a_credential_process_runs_once_a_run(small_job: Job, tmp_path: Path) -> None:
    job, record = small_job, tmp_path / "record"
    said = {"Version": 1, "AccessKeyId": "key", "SecretAccessKey": SECRET}
    (tmp_path / "said").write_text(json.dumps(said))
    command = f"sh -c 'echo run >> {record}; cat {tmp_path}/said'"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {command}\n")
    env = environment_without(job.endpoint, *KEYS, "AWS_CONFIG_FILE")
    env["AWS_CONFIG_FILE"] = str(tmp_path / "config")
    job.write(small_files(130))
    assert_clean(job.run(server=None, env=env))
    assert record.read_text() == "run\n"


def test_a_profile_is_used(rclone_job: Job, tmp_path: Path) -> None:
    job, server = rclone_job, rclone_job.endpoint
    job.make("a.dat")
    (tmp_path / "credentials").write_text(
        f"[backup]\naws_access_key_id={server.access_key}\n"
        f"aws_secret_access_key={server.secret_key}\n"
    )
    env = environment_without(server, *KEYS, "AWS_SHARED_CREDENTIALS_FILE")
    env["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "credentials")
    assert_clean(job.run("--profile", "backup", server=None, env=env))
    job.check_all_is_there()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"secret_key": "entirely-wrong"}, "SignatureDoesNotMatch"),
        ({"access_key": "unknown"}, "InvalidAccessKeyId"),
    ],
)
@pytest.mark.few(1)
def test_wrong_credentials_are_said_once(
    rclone_job: Job, changes: dict[str, Any], code: str
) -> None:
    job = rclone_job
    files = small_files(60)
    job.write(files)
    wrong = replace(job.endpoint, **changes)
    completed = job.run(server=wrong)
    assert_stopped(completed, code, "check the credentials")
    assert wrong.secret_key not in completed.stdout + completed.stderr
    assert job.state() == dict.fromkeys(files, 0)
    assert job.in_bucket() == {}
    assert_clean(job.crash_run())
    job.check_all_is_there()


def test_a_session_token_is_sent_with_every_request(small_job: Job) -> None:
    job = small_job
    job.write({"small": b"small", "large": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(*IN_PARTS, env={"AWS_SESSION_TOKEN": "a/session+token=="}))
    operations = {request.operation for request in job.proxy.requests}
    assert operations >= {"HeadBucket", "PutObject", "UploadPart", "CompleteMultipartUpload"}
    tokens = {request.headers["x-amz-security-token"] for request in job.proxy.requests}
    assert tokens == {"a/session+token=="}
    for put in job.requests("PutObject"):
        assert "x-amz-security-token" in str(put.headers["Authorization"])


def signer(request: Request) -> tuple[str, str]:
    """The access key and the session token that a request was signed with."""
    match = re.search("Credential=(.*?)/", str(request.headers["Authorization"]))
    assert match
    return match[1], str(request.headers["x-amz-security-token"])


def give_credentials(path: Path, name: str) -> None:
    """Write what a `credential_process` says: a key and a token of that name."""
    # So soon that they are asked for anew whenever they are used.
    expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=2)
    credentials = {
        "Version": 1,
        "AccessKeyId": f"key-{name}",
        "SecretAccessKey": SECRET,
        "SessionToken": f"token-{name}",
        "Expiration": expires.isoformat(),
    }
    path.with_suffix(".new").write_text(json.dumps(credentials))
    path.with_suffix(".new").replace(path)


def environment_with_process(job: Job, path: Path) -> dict[str, str]:
    """An environment whose credentials are those that the file has at the time."""
    config = path.with_name("config")
    config.write_text(f"[default]\ncredential_process = cat '{path}'\n")
    env = environment_without(job.endpoint, *KEYS, "AWS_CONFIG_FILE")
    return {**env, "AWS_CONFIG_FILE": str(config)}


@pytest.mark.few(1)
def test_credentials_that_are_refreshed_in_the_middle_of_a_run_are_used(
    small_job: Job, tmp_path: Path
) -> None:
    job, path = small_job, tmp_path / "credentials.json"
    give_credentials(path, "first")
    env = environment_with_process(job, path)
    job.write(small_files(30))
    job.write({"large": some_bytes(LARGE_BYTES)})
    give = functools.partial(give_credentials, path, "second")
    renew = Fault(call(lambda _: give()), operation="PutObject", after=10, times=1)
    job.proxy.add_fault(renew)
    assert_clean(job.run("--max-concurrency", "2", server=None, env=env))
    job.check_all_is_there()
    signers = [signer(request) for request in job.requests("PutObject")]
    old, new = ("key-first", "token-first"), ("key-second", "token-second")
    assert set(signers) == {old, new}
    assert set(signers[:10]) == {old}
    assert set(signers[20:]) == {new}  # those before may have been signed before they came


@needs_cores
def test_lanes_sign_with_credentials_as_they_are_renewed(moto_job: Job, tmp_path: Path) -> None:
    job, path, under_way = moto_job, tmp_path / "credentials.json", 8
    numbers, lock = itertools.count(1), threading.Lock()

    def renew(_: Request) -> None:  # with each put
        with lock:
            give_credentials(path, str(next(numbers)))

    give_credentials(path, "0")
    job.proxy.add_fault(Fault(call(renew), operation="PutObject"))
    job.write(small_files(130))
    env = environment_with_process(job, path)
    assert_clean(job.run("--max-concurrency", str(under_way), server=None, env=env))
    job.check_all_is_there()
    ages = []
    for come, (key, token) in enumerate(map(signer, job.requests("PutObject"))):
        name = key.removeprefix("key-")
        assert token == f"token-{name}"
        ages.append(come - int(name))
    # A lane that waits for the processor sends late what it has signed, but only a few.
    assert sum(age > 2 * under_way for age in ages) < len(ages) / 4


@pytest.mark.few(1)
def test_credentials_that_cannot_be_renewed_stop_the_run(small_job: Job, tmp_path: Path) -> None:
    job, path = small_job, tmp_path / "credentials.json"
    give_credentials(path, "only")
    env = environment_with_process(job, path)
    job.write(small_files(60))
    lose = Fault(call(lambda _: path.unlink()), operation="PutObject", after=20, times=1)
    job.proxy.add_fault(lose)
    completed = job.run("--max-concurrency", "2", server=None, env=env)
    assert_stopped(completed, "check the source of the credentials")
    assert SECRET not in completed.stdout + completed.stderr
    assert 20 <= len(job.uploaded()) < 60
    job.check_state_is_true()


@needs_cores
@pytest.mark.few(1)
def test_credentials_that_are_lost_before_the_lanes_begin_are_said_in_a_sentence(
    small_job: Job, tmp_path: Path
) -> None:
    job, path = small_job, tmp_path / "credentials.json"
    give_credentials(path, "only")
    env = environment_with_process(job, path)
    files = small_files(130)
    job.write(files)
    job.proxy.add_fault(Fault(call(lambda _: path.unlink()), operation="HeadBucket", times=1))
    completed = job.run(server=None, env=env)
    assert_stopped(completed, "check the source of the credentials")
    assert job.state() == dict.fromkeys(files, 0)


# --- The endpoint ----------------------------------------------------------------------------


def test_endpoint_url_is_used(job: Job, closed_port: int) -> None:
    job.make("a.dat")
    elsewhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port}"}
    assert_clean(job.run("--endpoint-url", job.endpoint.endpoint_url, env=elsewhere))
    job.check_all_is_there()


# Should a request of a test go to AWS after all, it gets as far as this port.
NO_WAY_OUT = {"HTTPS_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "url",
    [
        "not a url",
        "localhost:9000",
        "http://",
        "http://[::1",
        "http://a b",
        "http://127.0.0.1:99999",
        "ftp://127.0.0.1:1",
    ],
)
def test_what_is_no_endpoint_is_refused(job: Job, url: str) -> None:
    job.make("a.dat")
    env = environment_without(job.endpoint, "AWS_ENDPOINT_URL") | NO_WAY_OUT
    assert_stopped(job.run("--endpoint-url", url, server=None, env=env), "endpoint")
    assert_not_begun(job)


@pytest.mark.parametrize("url", ["127.0.0.1:9000", "localhost:9000", "s3.example"])
def test_an_endpoint_without_a_scheme_is_told_so(job: Job, url: str) -> None:
    job.make("a.dat")
    env = environment_without(job.endpoint, "AWS_ENDPOINT_URL") | NO_WAY_OUT
    completed = job.run(server=None, env=env | {"AWS_ENDPOINT_URL": url})
    assert_stopped(completed, url, "it needs http:// or https://")
    assert_not_begun(job)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("operation", [None, "PutObject"], ids=["at-once", "in-mid-run"])
@pytest.mark.few(4)
def test_where_the_endpoint_redirects_to_is_said(
    job: Job, status: int, operation: str | None
) -> None:
    files = job.make("a.dat", "b.dat")
    elsewhere = f"https://user:{SECRET}@login.example/portal"
    job.proxy.add_fault(Fault(redirect(status, elsewhere), operation=operation))
    completed = job.run()
    assert_stopped(completed, "redirects to https://login.example/portal; check", "endpoint")
    assert job.state_path.exists() is bool(operation)
    if operation:
        assert job.state() == dict.fromkeys(files, 0)


URLS_WITH_PASSWORD = [
    f"http://gate-user:{SECRET}@127.0.0.1:1",
    f"http://gate-user:{SECRET}@[::1",
    f"http://gate-user:{SECRET}@127.0.0.1:99999",
    f"ftp://gate-user:{SECRET}@127.0.0.1:1",
    f"gate-user:{SECRET}@127.0.0.1:1",
    f"http://gate-user:{SECRET}@a b",
    f"http://gate-user:{SECRET}@",
    f"http://gate-user:{SECRET}/more@127.0.0.1:1",
    f"http://gate-user:more/{SECRET}@127.0.0.1:1",
    f"http://gate-user:12/{SECRET}@127.0.0.1:1",
    f"http://gate-user:more {SECRET}@127.0.0.1:1",
    f"http://gate-user:more@{SECRET}@127.0.0.1:1",
]


@pytest.mark.parametrize("source", ["option", "environment"])
@pytest.mark.parametrize("url", URLS_WITH_PASSWORD)
@pytest.mark.few(8)
def test_the_password_of_an_endpoint_is_never_shown(job: Job, url: str, source: str) -> None:
    job.make("a.dat")
    env = environment_without(job.endpoint, "AWS_ENDPOINT_URL") | NO_WAY_OUT
    where = ["--endpoint-url", url] if source == "option" else []
    if source == "environment":
        env["AWS_ENDPOINT_URL"] = url
    completed = job.run(*where, "--verbose", server=None, env=env)
    assert completed.returncode == 2
    said = completed.stdout + completed.stderr
    assert "endpoint" in said
    assert SECRET not in said
    assert "gate-user" not in said


@pytest.mark.parametrize("url", [*URLS_WITH_PASSWORD[1:3], *URLS_WITH_PASSWORD[-4:]])
def test_the_password_of_a_proxy_is_never_shown(job: Job, url: str) -> None:
    job.make("a.dat")
    completed = job.run("--verbose", env={"HTTP_PROXY": url, "HTTPS_PROXY": url})
    assert completed.returncode == 2
    said = completed.stdout + completed.stderr
    assert SECRET not in said
    assert "gate-user" not in said


def test_the_password_of_an_endpoint_is_not_shown_when_files_fail(job: Job) -> None:
    job.make("a.dat", "b.dat")
    url = job.endpoint.endpoint_url.replace("://", f"://gate-user:{SECRET}@")

    def hang_up(_: object) -> None:
        raise ConnectionResetError

    job.proxy.add_fault(Fault(call(hang_up), operation="PutObject"))
    completed = job.run("--endpoint-url", url, "--verbose")
    assert completed.returncode in (1, 2)
    assert job.requests("PutObject")
    texts = completed.stdout, completed.stderr, job.state_path.read_text()
    assert [text for text in texts if SECRET in text or "gate-user" in text] == []


@pytest.mark.parametrize(
    "text",
    [
        "User: arn:aws:sts::123456789012:assumed-role/backup/alice@example.com is not authorized",
        "connect to http://127.0.0.1:9000/a@b failed",
    ],
)
def test_what_is_no_password_is_shown(text: str) -> None:
    assert program().one_line(text) == text


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield listening.getsockname()[1]


# Each run is hasty; the real time of 20 seconds is for the long tests.
GIVEN_UP = pytest.mark.parametrize(
    ("real_time", "within_seconds"),
    [(False, 15), pytest.param(True, 22, marks=pytest.mark.long)],
    ids=["hasty", "real"],
)


def assert_given_up(job: Job, run: Callable[[], Completed], within_seconds: float) -> None:
    started = time.monotonic()
    assert_stopped(run(), "endpoint")
    assert time.monotonic() - started < within_seconds
    assert not job.state_path.exists()


@GIVEN_UP
def test_a_closed_port_is_given_up(
    job: Job, closed_port: int, real_time: bool, within_seconds: float
) -> None:
    job.make("a.dat")
    where = ("--endpoint-url", f"http://127.0.0.1:{closed_port}")
    assert_given_up(job, lambda: job.run(*where, real_time=real_time), within_seconds)


def test_a_name_that_does_not_resolve_is_given_up(job: Job) -> None:
    job.make("a.dat")
    assert_given_up(job, lambda: job.run("--endpoint-url", "http://s3.invalid:9000"), 15)


@GIVEN_UP
def test_a_server_that_says_nothing_is_given_up(
    job: Job, silent_port: int, real_time: bool, within_seconds: float
) -> None:
    job.make("a.dat")
    where = ("--endpoint-url", f"http://127.0.0.1:{silent_port}")
    assert_given_up(job, lambda: job.run(*where, real_time=real_time), within_seconds)


@GIVEN_UP
def test_a_server_that_only_fails_is_given_up(
    job: Job, real_time: bool, within_seconds: float
) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(503, "SlowDown")))
    started = time.monotonic()
    assert_stopped(job.run(real_time=real_time), "503")
    assert time.monotonic() - started < within_seconds
    assert len(job.requests("HeadBucket")) > 1


def say_yes(exchange: Exchange) -> None:
    """Answer 200 and nothing more, as a web server may that is no S3 server."""
    exchange.discard_body()
    exchange.reply(Answer(200, "OK", [("Content-Length", "0")], [], 0))


def test_a_server_that_says_yes_to_everything_proves_nothing(job: Job) -> None:
    job.write({"small": b"small", "large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(say_yes))
    completed = job.run(*IN_PARTS)
    assert completed.returncode == 1
    assert job.state() == {"small": 0, "large": 0}
    assert "ETag" in job.errors()["small"]
    assert "UploadId" in job.errors()["large"]


# --- S3's error codes ------------------------------------------------------------------------

# What every upload would meet, and what its one sentence has to name.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
STOPPING = [
    (400, "ExpiredToken", "renew"),
    (400, "InvalidToken", "token"),
    (400, "TokenRefreshRequired", "token"),
    (403, "RequestTimeTooSkewed", "clock"),
    (404, "NoSuchBucket", "--bucketname"),
    (403, "AllAccessDisabled", "owner"),
    (403, "AccountProblem", "owner"),
    (400, "AuthorizationHeaderMalformed", "--region"),
    (301, "PermanentRedirect", "--region"),
    (400, "InvalidStorageClass", "--storage-class"),
    (400, "InvalidEncryptionAlgorithmError", "--sse"),
    (400, "KMS.NotFoundException", "--sse-kms-key-id"),
    (400, "KMS.DisabledException", "--sse-kms-key-id"),
    (501, "NotImplemented", "--storage-class"),
    (403, "QuotaExceeded", "room"),
    (507, "XMinioStorageFull", "room"),
    (403, "AccessDenied", "s3:PutObject"),
    (403, "InvalidAccessKeyId", "credentials"),
    (403, "SignatureDoesNotMatch", "credentials"),
]


@pytest.mark.parametrize(("status", "code", "advice"), STOPPING)
@pytest.mark.few(7)
def test_what_every_file_would_meet_stops_the_run_with_one_message(
    job: Job, client: tuple[str, ...], status: int, code: str, advice: str
) -> None:
    files = small_files(40)
    job.write(files)
    job.proxy.add_fault(Fault(answer(status, code), operation="PutObject"))
    completed = job.run("--max-concurrency", "4", *client)
    assert_stopped(completed, f"S3 answered {code}; ", advice)
    assert "40 not yet sent" in completed.stdout
    assert job.state() == dict.fromkeys(files, 0)
    assert len(set(job.puts())) < 20


@pytest.mark.few(1)
def test_a_refusal_of_everything_is_said_once(small_job: Job) -> None:
    files = small_files(120)
    small_job.write(files)
    small_job.proxy.add_fault(Fault(answer(403, "AccessDenied")))
    assert_stopped(small_job.run(), "AccessDenied", "s3:PutObject")
    assert small_job.state() == dict.fromkeys(files, 0)


@pytest.mark.parametrize(
    ("denied", "code"), [("d0/0000.dat", "403"), ("d6/0020.dat", "AccessDenied")]
)
@pytest.mark.few(2)
def test_a_key_that_is_denied_is_one_failure(small_job: Job, denied: str, code: str) -> None:
    job = small_job
    job.write(small_files(30))
    job.proxy.add_fault(Fault(answer(403, code), operation="PutObject", key=denied))
    job.check_failed(job.run(), denied, said=code)
    assert set(job.in_bucket()) == job.uploaded()


@pytest.mark.parametrize("code", ["EntityTooLarge", "InvalidRequest", "SomethingNew"])
def test_what_one_file_meets_is_its_failure_alone(job: Job, code: str) -> None:
    job.make("a.dat", "b.dat", "c.dat")
    job.proxy.add_fault(Fault(answer(400, code), operation="PutObject", key="b.dat"))
    job.check_failed(job.run(), "b.dat", said=code)
    assert job.puts().count("b.dat") == 1


def test_of_what_a_server_says_only_the_beginning_is_looked_at(
    job: Job, client: tuple[str, ...]
) -> None:
    files = small_files(8)
    job.write(files)
    words = "a:" * 150_000
    job.proxy.add_fault(Fault(answer(400, "SomethingNew" * 9_000, words), operation="PutObject"))
    started = time.monotonic()
    completed = job.run(*client)
    assert completed.returncode == 1
    assert time.monotonic() - started < 10
    assert "SomethingNew" in completed.stderr
    texts = completed.stderr, job.state_path.read_text()
    assert [len(text) < 4_000 * len(files) for text in texts] == [True, True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("No such thing.", "S3 answered SomethingNew (No such thing)"),
        ("", "S3 answered SomethingNew"),
        ("Something new", "S3 answered SomethingNew"),
    ],
)
def test_the_words_of_the_server_are_said_where_they_tell_more(
    job: Job, client: tuple[str, ...], words: str, said: str
) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(answer(400, "SomethingNew", words), operation="PutObject"))
    job.check_failed(job.run(*client), "a.dat", said=said)
    assert job.errors()["a.dat"] == said
