"""The harness does what it says: proxy, faults, servers and the runner of the script."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import script_runner
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from conftest import Proxied
from fault_proxy import (
    Fault,
    FaultProxy,
    Request,
    answer,
    call,
    cut_answer,
    delay,
    drop,
    drop_after_forward,
    drop_mid_body,
    flip_byte,
    set_header,
    slow,
    stall,
    wrong_etag,
)
from script_runner import (
    Completed,
    base_environment,
    finish,
    is_root,
    make_files,
    read_state,
    wait_until,
)
from servers import S3Server
from systems import needs_signals

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

BODY = b"some bytes of a file"
MIB = 1024 * 1024
PART_BYTES = 5 * MIB


class Bench:
    """A bucket seen through a proxy, by a client that neither retries nor waits long."""

    def __init__(self, server: S3Server, bucket: str, proxied: Proxied) -> None:
        self.bucket = bucket
        self.direct = server
        self.proxy, self.server = proxied(server)
        self.client = self.server.client(retries={"total_max_attempts": 1}, read_timeout=20)
        server.client().create_bucket(
            Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )

    def put(self, key: str = "a.dat", body: bytes = BODY) -> str:
        """Put an object with its Content-MD5, and return the ETag."""
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        answer = self.client.put_object(Bucket=self.bucket, Key=key, Body=body, ContentMD5=digest)
        return answer["ETag"].strip('"')

    def objects(self) -> dict[str, bytes]:
        """What the bucket holds, asked for beside the proxy."""
        return self.direct.objects(self.bucket)


@pytest.fixture
def bench(s3: S3Server, bucket_name: str, proxied: Proxied) -> Bench:
    return Bench(s3, bucket_name, proxied)


def md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def error_code(error: pytest.ExceptionInfo[ClientError]) -> str:
    return error.value.response["Error"]["Code"]


# --- Passing on ------------------------------------------------------------------------------


def test_requests_pass_unchanged(bench: Bench) -> None:
    assert bench.put("folder/ä +%&?.dat") == md5(BODY)
    assert bench.objects() == {"folder/ä +%&?.dat": BODY}
    (request,) = bench.proxy.requests
    assert request.operation == "PutObject"
    assert (request.method, request.bucket, request.key) == (
        "PUT",
        bench.bucket,
        "folder/ä +%&?.dat",
    )
    assert (request.status, request.body_bytes, request.part_number) == (200, len(BODY), None)
    assert request.headers["content-md5"] == base64.b64encode(bytes.fromhex(md5(BODY))).decode()
    assert request.headers["Host"] == bench.proxy.url.removeprefix("http://")


def test_operations_are_named(bench: Bench) -> None:
    client: Any = bench.client  # the stubs check no **where
    where = {"Bucket": bench.bucket, "Key": "k"}
    client.head_bucket(Bucket=bench.bucket)
    client.get_bucket_location(Bucket=bench.bucket)
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(**where, UploadId=upload_id, PartNumber=1, Body=BODY)
    client.list_parts(**where, UploadId=upload_id)
    client.list_multipart_uploads(Bucket=bench.bucket)
    client.complete_multipart_upload(
        **where,
        UploadId=upload_id,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )
    client.head_object(**where)
    client.get_object(**where)["Body"].read()
    client.list_objects_v2(Bucket=bench.bucket)
    client.list_objects(Bucket=bench.bucket)
    second_id = client.create_multipart_upload(**where)["UploadId"]
    client.abort_multipart_upload(**where, UploadId=second_id)
    client.delete_object(**where)
    client.delete_bucket(Bucket=bench.bucket)
    client.create_bucket(
        Bucket=bench.bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    client.list_buckets()
    assert [request.operation for request in bench.proxy.requests] == [
        "HeadBucket",
        "GetBucketLocation",
        "CreateMultipartUpload",
        "UploadPart",
        "ListParts",
        "ListMultipartUploads",
        "CompleteMultipartUpload",
        "HeadObject",
        "GetObject",
        "ListObjectsV2",
        "ListObjects",
        "CreateMultipartUpload",
        "AbortMultipartUpload",
        "DeleteObject",
        "DeleteBucket",
        "CreateBucket",
        "ListBuckets",
    ]
    upload_part = bench.proxy.requests[3]
    assert (upload_part.part_number, upload_part.query["uploadId"]) == (1, upload_id)
    assert bench.proxy.count("CreateMultipartUpload") == 2
    assert bench.proxy.count("HeadObject", "k") == 1
    assert bench.proxy.count("HeadObject", "other") == 0


def test_statuses_are_recorded(bench: Bench) -> None:
    with pytest.raises(ClientError):
        bench.client.get_object(Bucket=bench.bucket, Key="missing")
    assert [request.status for request in bench.proxy.requests] == [404]


def test_large_bodies_are_streamed(bench: Bench, tmp_path: Path) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(MIB) * 64)
    tracemalloc.start()
    try:
        with sent.open("rb") as file:
            bench.client.put_object(Bucket=bench.bucket, Key="big", Body=file)
        body = bench.client.get_object(Bucket=bench.bucket, Key="big")["Body"]
        with received.open("wb") as file:
            for chunk in body.iter_chunks(MIB):
                file.write(chunk)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bench.proxy.requests[0].body_bytes == 64 * MIB
    assert received.read_bytes() == sent.read_bytes()
    assert peak_bytes < 16 * MIB  # client and proxy are both in this process


def test_many_connections_at_once(bench: Bench) -> None:
    keys = [f"{number:03}" for number in range(100)]
    with ThreadPoolExecutor(20) as pool:
        etags = list(pool.map(lambda key: bench.put(key, key.encode()), keys))
    assert etags == [md5(key.encode()) for key in keys]
    assert sorted(request.key for request in bench.proxy.requests) == keys


class CountingServer(http.server.ThreadingHTTPServer):
    """An upstream server that counts its connections and answers a PUT with its body."""

    daemon_threads = True

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server: CountingServer

        def setup(self) -> None:
            super().setup()
            self.server.connections += 1

        def do_PUT(self) -> None:
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            if self.path.endswith("chunked"):
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(self.body), self.body))
            else:
                self.send_header("Content-Length", str(len(self.body)))
                self.end_headers()
                self.wfile.write(self.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    def __init__(self) -> None:
        self.connections = 0
        super().__init__(("127.0.0.1", 0), self.Handler)


@pytest.fixture
def counting_server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def counting_proxy(counting_server: CountingServer) -> Iterator[FaultProxy]:
    with FaultProxy(f"http://127.0.0.1:{counting_server.server_address[1]}") as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=20)
    connection.connect()
    with contextlib.closing(connection):
        yield connection


def received_to_the_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1000), b""))


@pytest.mark.parametrize("path", ["/bucket/key", "/bucket/chunked"])
def test_connections_are_kept_alive_on_both_sides(
    counting_server: CountingServer, counting_proxy: FaultProxy, path: str
) -> None:
    with connected(counting_proxy) as connection:
        first_socket = connection.sock
        for body in (b"one", b"two"):
            connection.request("PUT", path, body)
            assert connection.getresponse().read() == body
        assert connection.sock is first_socket
    assert counting_server.connections == 1


def test_chunked_body_is_passed_on(counting_proxy: FaultProxy) -> None:
    counting_proxy.add_fault(Fault(answer(503, "SlowDown")))
    with FaultProxy(counting_proxy.url) as proxy, connected(proxy) as connection:
        for _ in range(2):  # a frame too many or too few would show in the second
            connection.request("PUT", "/bucket/key", iter([b"x" * 1000] * 3), encode_chunked=True)
            assert b"SlowDown" in connection.getresponse().read()
    received = counting_proxy.requests
    assert [request.headers["Transfer-Encoding"] for request in received] == ["chunked"] * 2
    assert [request.body_bytes for request in received] == [3000, 3000]


def test_expect_is_answered_before_the_body(counting_proxy: FaultProxy) -> None:
    with connected(counting_proxy) as connection:
        connection.sock.sendall(
            b"PUT /bucket/key HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sock.sendall(b"bytes")
        wait_until(lambda: counting_proxy.requests[0].status, 10, "the answer")
        assert connection.sock.recv(1000).startswith(b"HTTP/1.1 200")


def test_an_unreachable_server_is_a_502(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy, connected(proxy) as connection:
        connection.request("PUT", "/bucket/key", b"body")
        response = connection.getresponse()
        assert (response.status, b"BadGateway" in response.read()) == (502, True)
    assert capfd.readouterr().err == ""


# --- Faults ----------------------------------------------------------------------------------


def test_answer(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(answer(503, "SlowDown", "less, please"), times=1))
    with pytest.raises(ClientError, match="less, please") as error:
        bench.put()
    assert error_code(error) == "SlowDown"
    assert bench.objects() == {}
    assert bench.put() == md5(BODY)
    assert [r.status for r in bench.proxy.requests] == [503, 200]
    assert [r.body_bytes for r in bench.proxy.requests] == [len(BODY)] * 2


def test_answer_to_head_has_no_body(counting_proxy: FaultProxy) -> None:
    counting_proxy.add_fault(Fault(answer(403, "AccessDenied")))
    with connected(counting_proxy) as connection:
        connection.request("HEAD", "/bucket", headers={"Connection": "close"})
        received = received_to_the_end(connection.sock)
    assert received.startswith(b"HTTP/1.1 403 ")
    assert received.endswith(b"\r\n\r\n")


def test_drop(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(drop()))
    with pytest.raises(HTTPClientError):
        bench.put()
    (request,) = bench.proxy.requests
    assert (request.status, request.body_bytes) == (None, 0)


def test_drop_is_a_reset(counting_proxy: FaultProxy) -> None:
    counting_proxy.add_fault(Fault(drop()))
    with connected(counting_proxy) as connection:
        connection.request("GET", "/bucket")
        with pytest.raises(ConnectionResetError):
            connection.sock.recv(1)  # which is b"" after an orderly end


@pytest.mark.parametrize("body", [BODY, b"x" * MIB])
def test_drop_mid_body(bench: Bench, body: bytes) -> None:
    bench.proxy.add_fault(Fault(drop_mid_body()))
    with pytest.raises(HTTPClientError):
        bench.put(body=body)
    (request,) = bench.proxy.requests
    assert request.status is None
    assert 0.4 * len(body) <= request.body_bytes <= 0.6 * len(body)
    assert bench.objects() == {}


def test_drop_after_forward(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(drop_after_forward()))
    with pytest.raises(HTTPClientError):
        bench.put()
    assert bench.proxy.requests[0].status is None
    assert bench.objects() == {"a.dat": BODY}


def test_flip_byte_is_refused_with_content_md5(
    rclone_s3: S3Server, bucket_name: str, proxied: Proxied
) -> None:
    bench = Bench(rclone_s3, bucket_name, proxied)
    bench.proxy.add_fault(Fault(flip_byte()))
    with pytest.raises(ClientError) as error:
        bench.put()
    assert error_code(error) == "BadDigest"
    assert bench.objects() == {}


def test_flip_byte_shows_in_the_etag(moto_s3: S3Server, bucket_name: str, proxied: Proxied) -> None:
    bench = Bench(moto_s3, bucket_name, proxied)
    bench.proxy.add_fault(Fault(flip_byte()))
    etag = bench.put()  # moto does not look at Content-MD5
    assert etag != md5(BODY)
    assert etag == md5(bench.objects()["a.dat"])


def test_flip_byte_changes_one_byte(counting_proxy: FaultProxy) -> None:
    counting_proxy.add_fault(Fault(flip_byte()))
    sent = bytes(300_000)
    with connected(counting_proxy) as connection:
        connection.request("PUT", "/bucket/key", sent)
        received = connection.getresponse().read()
    assert len(received) == len(sent)
    assert [i for i, byte in enumerate(received) if byte] == [150_000]


def test_wrong_etag(bench: Bench) -> None:
    bench.put("before")
    bench.proxy.add_fault(Fault(wrong_etag()))
    etag = bench.put()
    assert (len(etag), etag != md5(BODY)) == (32, True)
    head = bench.client.head_object(Bucket=bench.bucket, Key="a.dat")
    assert head["ETag"] == f'"{etag}"'
    listed = bench.client.list_objects_v2(Bucket=bench.bucket)["Contents"]
    assert {entry["ETag"].strip('"') for entry in listed} == {etag}
    assert bench.client.get_object(Bucket=bench.bucket, Key="a.dat")["Body"].read() == BODY


def test_wrong_etag_of_complete(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(wrong_etag(), operation="CompleteMultipartUpload"))
    etag = upload_in_parts(bench.client, bench.bucket, [BODY])
    right_etag = bench.direct.client().head_object(Bucket=bench.bucket, Key="m")["ETag"]
    assert etag.strip('"') != right_etag.strip('"')
    assert len(etag.strip('"')) == len(right_etag.strip('"'))


def test_cut_answer(bench: Bench) -> None:
    bench.put(body=BODY * 1000)
    bench.proxy.add_fault(Fault(cut_answer()))
    body = bench.client.get_object(Bucket=bench.bucket, Key="a.dat")["Body"]
    with pytest.raises(ResponseStreamingError):
        body.read()
    assert [request.status for request in bench.proxy.requests] == [200, 200]


def test_cut_answer_without_a_body(counting_proxy: FaultProxy) -> None:
    counting_proxy.add_fault(Fault(cut_answer()))
    with connected(counting_proxy) as connection:
        connection.request("PUT", "/bucket/key", b"")
        received = received_to_the_end(connection.sock)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" not in received


def test_stall(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(stall(60)))
    client = bench.server.client(retries={"total_max_attempts": 1}, read_timeout=0.3)
    with pytest.raises(ReadTimeoutError):
        client.head_bucket(Bucket=bench.bucket)
    started = time.monotonic()
    bench.proxy.close()
    assert time.monotonic() - started < 5
    assert bench.proxy.requests[0].status is None


def test_stall_ends(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(stall(0.2)))
    with pytest.raises(ConnectionClosedError):
        bench.client.head_bucket(Bucket=bench.bucket)


def test_delay(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(delay(0.5)))
    started = time.monotonic()
    assert bench.put() == md5(BODY)
    assert time.monotonic() - started >= 0.5


def test_slow(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(slow(100_000), operation="PutObject"))
    started = time.monotonic()
    bench.put(body=b"x" * 100_000)
    assert 0.9 <= time.monotonic() - started < 10
    assert bench.objects() == {"a.dat": b"x" * 100_000}


def test_bandwidth_is_shared(s3: S3Server, bucket_name: str, proxied: Proxied) -> None:
    bench = Bench(s3, bucket_name, proxied)
    _, limited = proxied(s3, bytes_per_second=200_000)
    client = limited.client()
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        puts = [
            pool.submit(client.put_object, Bucket=bucket_name, Key=str(n), Body=b"x" * 50_000)
            for n in range(4)
        ]
    assert time.monotonic() - started >= 0.9
    assert [put.result()["ETag"] for put in puts] == [f'"{md5(b"x" * 50_000)}"'] * 4
    assert len(bench.objects()) == 4


def test_call(bench: Bench) -> None:
    before: list[tuple[str, dict[str, bytes]]] = []
    bench.proxy.add_fault(
        Fault(call(lambda request: before.append((request.key, bench.objects()))))
    )
    bench.put()
    assert before == [("a.dat", {})]
    assert bench.objects() == {"a.dat": BODY}


def test_call_that_raises_is_heard_of(
    counting_server: CountingServer, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(request: Request) -> None:
        raise FileNotFoundError(request.key)

    url = f"http://127.0.0.1:{counting_server.server_address[1]}"
    with pytest.raises(FileNotFoundError, match="key"), FaultProxy(url) as proxy:
        proxy.add_fault(Fault(call(refuse)))
        with connected(proxy) as connection:
            connection.request("PUT", "/bucket/key", b"body")
            with pytest.raises(ConnectionError):
                connection.getresponse()
    assert capfd.readouterr().err == ""


def test_set_header(bench: Bench) -> None:
    bench.proxy.add_fault(Fault(set_header("x-amz-server-side-encryption", "aws:kms")))
    answer = bench.client.put_object(Bucket=bench.bucket, Key="k", Body=BODY)
    assert answer["ServerSideEncryption"] == "aws:kms"


# --- Which requests a fault is for -----------------------------------------------------------


def request_of(method: str, target: str) -> Request:
    return Request.parse(method=method, target=target, headers=http.client.HTTPMessage())


PUT_A = request_of("PUT", "/bucket/a")
PUT_B = request_of("PUT", "/bucket/b")
PART_1 = request_of("PUT", "/bucket/a?partNumber=1&uploadId=u")
PART_2 = request_of("PUT", "/bucket/a?partNumber=2&uploadId=u")
HEAD_A = request_of("HEAD", "/bucket/a")


@pytest.mark.parametrize(
    ("fault", "claimed"),
    [
        (Fault(drop()), [PUT_A, PUT_B, PART_1, PART_2, HEAD_A]),
        (Fault(drop(), operation="PutObject"), [PUT_A, PUT_B]),
        (Fault(drop(), operation=("PutObject", "HeadObject")), [PUT_A, PUT_B, HEAD_A]),
        (Fault(drop(), key="b"), [PUT_B]),
        (Fault(drop(), key=lambda key: key > "a"), [PUT_B]),
        (Fault(drop(), part_number=2), [PART_2]),
        (Fault(drop(), method="HEAD"), [HEAD_A]),
        (Fault(drop(), times=2), [PUT_A, PUT_B]),
        (Fault(drop(), times=0), []),
        (Fault(drop(), after=3), [PART_2, HEAD_A]),
        (Fault(drop(), after=1, times=1, key="a"), [PART_1]),
    ],
)
def test_a_fault_claims_its_requests(fault: Fault, claimed: list[Request]) -> None:
    requests = [PUT_A, PUT_B, PART_1, PART_2, HEAD_A]
    assert [request for request in requests if fault.claims(request)] == claimed
    assert fault.hits == len(claimed)


def test_one_in_is_random_and_repeatable() -> None:
    def claims(seed: int) -> list[bool]:
        fault = Fault(drop(), one_in=4, seed=seed)
        return [fault.claims(PUT_A) for _ in range(1000)]

    assert claims(1) == claims(1) != claims(2)
    assert 200 < sum(claims(1)) < 300


def test_first_fault_wins_until_cleared(bench: Bench) -> None:
    first = bench.proxy.add_fault(Fault(answer(500, "InternalError"), key="a.dat"))
    second = bench.proxy.add_fault(Fault(answer(503, "SlowDown")))
    for key, code in (("a.dat", "InternalError"), ("b.dat", "SlowDown")):
        with pytest.raises(ClientError) as error:
            bench.put(key)
        assert error_code(error) == code
    assert (first.hits, second.hits) == (1, 1)
    bench.proxy.clear_faults()
    assert bench.put() == md5(BODY)


# --- Servers ---------------------------------------------------------------------------------


def upload_in_parts(client: S3Client, bucket: str, parts: list[bytes]) -> str:
    upload_id = client.create_multipart_upload(Bucket=bucket, Key="m")["UploadId"]
    etags = [
        client.upload_part(Bucket=bucket, Key="m", UploadId=upload_id, PartNumber=n, Body=part)
        for n, part in enumerate(parts, start=1)
    ]
    return client.complete_multipart_upload(
        Bucket=bucket,
        Key="m",
        UploadId=upload_id,
        MultipartUpload={
            "Parts": [{"PartNumber": n, "ETag": a["ETag"]} for n, a in enumerate(etags, start=1)]
        },
    )["ETag"]


def test_multipart_etag(bench: Bench) -> None:
    parts = [b"a" * PART_BYTES, b"b"]
    digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts)
    etag = upload_in_parts(bench.client, bench.bucket, parts).strip('"')
    # rclone gives the MD5 of the whole object.
    assert etag in (f"{md5(digests)}-2", md5(b"".join(parts)))
    assert bench.objects() == {"m": b"".join(parts)}


def test_open_uploads(bench: Bench) -> None:
    client: Any = bench.client  # the stubs check no **where
    where = {"Bucket": bench.bucket, "Key": "m"}
    assert bench.direct.open_uploads(bench.bucket) == []
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    assert bench.direct.open_uploads(bench.bucket) == [("m", upload_id, 0)]
    for number in (3, 1):
        client.upload_part(**where, UploadId=upload_id, PartNumber=number, Body=BODY)
    assert bench.direct.open_uploads(bench.bucket) == [("m", upload_id, 2)]
    client.abort_multipart_upload(**where, UploadId=upload_id)
    assert bench.direct.open_uploads(bench.bucket) == []


def test_remove_bucket(bench: Bench) -> None:
    bench.put()
    bench.client.create_multipart_upload(Bucket=bench.bucket, Key="m")
    for _ in range(2):
        bench.direct.remove_bucket(bench.bucket)
    with pytest.raises(ClientError):
        bench.client.head_bucket(Bucket=bench.bucket)


def test_tls_needs_the_ca_bundle(
    rclone_tls_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Buckets" in rclone_tls_server.client().list_buckets()
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    trusting_nobody = S3Server("tls", rclone_tls_server.endpoint_url, "key", "secret")
    with pytest.raises(SSLError):
        trusting_nobody.client(retries={"total_max_attempts": 1}).list_buckets()


def test_environment(rclone_tls_server: S3Server) -> None:
    variables = rclone_tls_server.environment()
    assert variables["AWS_ENDPOINT_URL"].startswith("https://127.0.0.1:")
    assert variables["AWS_CA_BUNDLE"] == str(rclone_tls_server.ca_bundle)
    assert not Path(variables["AWS_CONFIG_FILE"]).exists()
    assert "AWS_DEFAULT_REGION" not in variables


# --- The runner ------------------------------------------------------------------------------

STAND_IN = """\
import boto3, json, os, sys, time
if sys.argv[1] == "report":
    json.dump(
        {
            "args": sys.argv[2:],
            "cwd": os.getcwd(),
            "environment": dict(os.environ),
            "home": os.listdir(os.environ["HOME"]),
            "stdin": sys.stdin.read(),
            "uid": os.getuid() if hasattr(os, "getuid") else None,
            "groups": os.getgroups() if hasattr(os, "getgroups") else None,
            "optimized": sys.flags.optimize,
        },
        sys.stdout,
    )
    sys.exit(3)
if sys.argv[1] == "list":
    print([bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]])
if sys.argv[1] == "raise":
    raise ValueError
if sys.argv[1] == "sleep":
    print("ready", flush=True)
    time.sleep(600)
"""

Run = Callable[..., Completed]
Start = Callable[..., "subprocess.Popen[str]"]
needs_root = pytest.mark.skipif(not is_root(), reason="only root can be another user")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A script in place of the real one, which says how it was run."""
    path = tmp_path / "private" / "stand_in.py"
    path.parent.mkdir(mode=0o700)
    path.write_text(STAND_IN)
    monkeypatch.setattr(script_runner, "SCRIPT_PATH", path)
    with fresh_launches(monkeypatch, tmp_path):
        yield


@contextlib.contextmanager
def fresh_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep this test's copy of Python and the script apart from that of the other tests."""
    folder = tmp_path / "shared"
    (folder / "home").mkdir(parents=True)
    monkeypatch.setattr(script_runner, "shared_folder", lambda: folder)
    script_runner.launch_for.cache_clear()
    yield
    script_runner.launch_for.cache_clear()


def report(completed: Completed) -> dict[str, Any]:
    assert completed.returncode == 3, completed.stderr
    said = json.loads(completed.stdout)
    assert isinstance(said, dict)
    return said


@pytest.mark.usefixtures("stand_in")
def test_run_is_clean(run: Run, tmp_path: Path, rclone_s3: S3Server) -> None:
    said = report(run("report", "an argument", server=rclone_s3, env={"X": "1"}, stdin="text"))
    assert (said["args"], said["cwd"], said["stdin"]) == (["an argument"], str(tmp_path), "text")
    assert said["home"] == []
    expected = {*base_environment(tmp_path), "X", *rclone_s3.environment()}
    added_by_system = {"LC_CTYPE", "LD_LIBRARY_PATH", "__CF_USER_TEXT_ENCODING"}
    assert expected <= set(said["environment"]) <= expected | added_by_system


@pytest.mark.usefixtures("stand_in")
def test_run_elsewhere_with_flags(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    said = report(run("report", cwd=tmp_path / "elsewhere", python_flags=["-O"]))
    assert (said["cwd"], said["optimized"]) == (str(tmp_path / "elsewhere"), 1)


@pytest.mark.usefixtures("stand_in")
def test_run_reaches_the_server(run: Run, s3: S3Server, bench: Bench) -> None:
    completed = run("list", server=s3)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert bench.bucket in completed.stdout


@pytest.mark.usefixtures("stand_in")
def test_run_fails_on_a_traceback(run: Run) -> None:
    with pytest.raises(AssertionError, match="ValueError"):
        run("raise")


@pytest.mark.usefixtures("stand_in")
def test_run_has_a_timeout(run: Run) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run("sleep", timeout=0.5)


@needs_root
@pytest.mark.usefixtures("stand_in")
def test_run_as_another_user(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0o600)
    said = report(run("report", user=65534))
    assert (said["uid"], said["groups"]) == (65534, [])
    assert report(run("report"))["uid"] == 0


@needs_root
@pytest.mark.usefixtures("stand_in")
def test_another_user_reaches_the_server(run: Run, moto_s3: S3Server) -> None:
    completed = run("list", server=moto_s3, user=65534)
    assert (completed.returncode, completed.stderr) == (0, "")


@needs_signals
@pytest.mark.usefixtures("stand_in")
def test_start_and_signal(start: Start) -> None:
    process = start("sleep")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert os.getpgid(process.pid) == process.pid
    process.send_signal(signal.SIGTERM)
    assert finish(process, timeout=20).returncode == -signal.SIGTERM


def test_files_and_states(backup_folder: Path, tmp_path: Path) -> None:
    make_files(backup_folder, {"a": b"1", "sub/ä": b"2"})
    assert (backup_folder / "sub" / "ä").read_bytes() == b"2"
    state_path = tmp_path / "state.json"
    state_path.write_text('[\n{"uploadedSuccess": 1}\n]')
    assert read_state(state_path) == [{"uploadedSuccess": 1}]


def test_wait_until() -> None:
    values = iter([None, 0, "", "ready"])
    assert wait_until(lambda: next(values), 10, "readiness") == "ready"
    with pytest.raises(AssertionError, match="the impossible: not within"):
        wait_until(lambda: False, 0.1, "the impossible")
