"""A reverse proxy for tests, which puts faults between an S3 client and an S3 server.

It passes every request on unchanged, the Host header included, so that signatures stay valid.
A `Fault` picks some of the requests and lets an action deal with them instead:

    with FaultProxy("http://127.0.0.1:9000") as proxy:
        proxy.add_fault(Fault(answer(503, "SlowDown"), operation="PutObject", times=2))
        ...  # a client that uses proxy.url as its endpoint
        assert proxy.count("PutObject") == 3

Bodies are streamed, so their size does not matter. With a certificate authority of the tests
(`ca`) it also answers as an HTTP proxy does that looks into TLS: a client that is pointed at it by
HTTPS_PROXY, and trusts that authority, reaches the same server under every name, those of AWS among
them. With `tls` the proxy itself is an https server.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    import trustme

    from .faults import Fault

CHUNK_BYTES = 64 * 1024

# (kind of resource, method, a query parameter that must be there, operation): the first that
# fits names the operation, so the plain row of a method comes last.
_OPERATIONS = (
    ("object", "PUT", "partNumber", "UploadPart"),
    ("object", "PUT", "", "PutObject"),
    ("object", "POST", "uploads", "CreateMultipartUpload"),
    ("object", "POST", "uploadId", "CompleteMultipartUpload"),
    ("object", "GET", "uploadId", "ListParts"),
    ("object", "GET", "", "GetObject"),
    ("object", "HEAD", "", "HeadObject"),
    ("object", "DELETE", "uploadId", "AbortMultipartUpload"),
    ("object", "DELETE", "", "DeleteObject"),
    ("bucket", "PUT", "", "CreateBucket"),
    ("bucket", "GET", "location", "GetBucketLocation"),
    ("bucket", "GET", "uploads", "ListMultipartUploads"),
    ("bucket", "GET", "list-type", "ListObjectsV2"),
    ("bucket", "GET", "", "ListObjects"),
    ("bucket", "HEAD", "", "HeadBucket"),
    ("bucket", "DELETE", "", "DeleteBucket"),
    ("service", "GET", "", "ListBuckets"),
)
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/VirtualHosting.html
_AWS_HOST = re.compile(r"(?:(?P<bucket>.+)\.)?s3(?:[.-](?P<region>[a-z0-9-]+))?\.amazonaws\.com")


@dataclass
class Request:
    """One request as the proxy received it.

    `host` is the name that the client asked for, and `bucket` is from there or from the path.
    `headers` are looked up without regard to case. `status` is what the client was told, None while
    it was told nothing; `body_bytes` is how much of the body the proxy has read.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    host: str
    operation: str
    bucket: str
    key: str
    part_number: int | None
    status: int | None = None
    body_bytes: int = 0

    @classmethod
    def parse(cls, *, method: str, target: str, headers: Message) -> Request:
        """Name the S3 operation, bucket, key and part of a request."""
        path, _, query_string = target.partition("?")
        host = str(headers.get("Host", "")).partition(":")[0]
        if (named := _AWS_HOST.fullmatch(host)) and named["bucket"]:
            path = f"/{named['bucket']}{path}"
        query = dict(parse_qsl(query_string, keep_blank_values=True))
        raw_bucket, _, raw_key = path.removeprefix("/").partition("/")
        kind = "object" if raw_key else "bucket" if raw_bucket else "service"
        return cls(
            method=method,
            path=path,
            query=query,
            headers=headers,
            host=host,
            operation=_operation(kind, method=method, query=query),
            bucket=unquote(raw_bucket),
            key=unquote(raw_key, errors="surrogateescape"),
            part_number=int(query["partNumber"]) if "partNumber" in query else None,
        )

    def __str__(self) -> str:
        part = f" part {self.part_number}" if self.part_number else ""
        told = self.status or "no answer"
        return f"{self.operation} {self.bucket}/{self.key}{part}: {told}, {self.body_bytes} bytes"


def _operation(kind: str, *, method: str, query: dict[str, str]) -> str:
    for row_kind, row_method, parameter, operation in _OPERATIONS:
        if (row_kind, row_method) == (kind, method) and (not parameter or parameter in query):
            return operation
    return f"{method} {kind}"


@dataclass
class Answer:
    """An answer on its way to the client; `body` can be iterated once.

    `length` is the number of bytes in the body, None when only its end will tell.
    """

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: Iterable[bytes]
    length: int | None

    def set_header(self, name: str, value: str) -> None:
        """Set a header, in place of any of that name."""
        kept = [(n, v) for n, v in self.headers if n.lower() != name.lower()]
        self.headers = [*kept, (name, value)]

    def set_body(self, body: bytes) -> None:
        """Replace the body, and say its new length."""
        self.body, self.length = [body], len(body)
        self.set_header("Content-Length", str(len(body)))


class HungUp(ConnectionError):
    """The proxy itself ended the connection to the client."""


class Exchange:
    """One request and its answer: what an action has to work with.

    `request` is the record of it, `body` yields the chunks of the request's body as they arrive
    (and asks the client for them, where it waits with `Expect: 100-continue`).
    """

    def __init__(self, connection: _Connection, request: Request) -> None:
        self.request = request
        self.chunk_bytes = CHUNK_BYTES
        self.body_complete = False
        self.answered = False
        self._connection = connection
        self._proxy = connection.proxy
        self._limits = [self._proxy.bandwidth] if self._proxy.bandwidth else []
        self._chunked = "chunked" in str(request.headers.get("Transfer-Encoding", "")).lower()
        self.content_length = int(request.headers.get("Content-Length", 0))
        self.body = self._read_body()

    def ask_more(self, query: str) -> None:
        """Add to the query, such as `&max-keys=2`, for a server that checks no signature."""
        self._connection.path += query

    def limit_rate(self, bytes_per_second: float) -> None:
        """Let the bodies of this exchange pass at no more than that rate."""
        self._limits.append(RateLimit(bytes_per_second, self._proxy.closing))

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the proxy closes."""
        self._proxy.closing.wait(seconds)

    def discard_body(self) -> None:
        """Read the request's body to its end."""
        for _ in self.body:
            pass

    def forward(
        self, change_body: Callable[[Iterator[bytes]], Iterator[bytes]] | None = None
    ) -> Answer:
        """Return the server's answer to the request, of which only the head is read."""
        body = change_body(self.body) if change_body else self.body
        return self._proxy.ask(self, body)

    def ask_server(self, body: Iterable[bytes]) -> Answer:
        """Send the request with this body upstream; no more than the head of the answer is read."""
        try:
            upstream = self._connection.open_upstream()
            self._send_head(upstream)
        except (OSError, http.client.HTTPException) as error:
            return self._bad_gateway(error)
        self._send_body(upstream, body)
        try:
            response = upstream.getresponse()
        except (OSError, http.client.HTTPException) as error:
            upstream.close()
            return self._bad_gateway(error)
        length = None if response.chunked else response.length
        if length == 0:
            response.close()  # or the connection would wait for somebody to read the body
        headers = response.getheaders()
        return Answer(response.status, response.reason, headers, _chunks_of(response), length)

    def reply(self, answer: Answer) -> None:
        """Send an answer to the client."""
        chunked = answer.length is None and self._may_have_body(answer)
        self._write(self._head(answer, chunked=chunked), status=answer.status)
        if not self._may_have_body(answer):
            return
        for chunk in self._limited(answer.body):
            self._write(_framed(chunk) if chunked else chunk)
        if chunked:
            self._write(b"0\r\n\r\n")

    def reply_half(self, answer: Answer) -> None:
        """Send an answer but for the second half of its body, or of its head without a body."""
        body = b"".join(answer.body) if self._may_have_body(answer) else b""
        if body:
            answer.set_body(body)
        head = self._head(answer, chunked=False)
        cut = head + body[: len(body) // 2] if body else head[: len(head) // 2]
        self._write(cut, status=answer.status)
        self._connection.close_connection = True

    def reply_slowly(self, answer: Answer, seconds: float) -> None:
        """Send the head of an answer, a byte every so many seconds."""
        for byte in self._head(answer, chunked=False):
            self._write(bytes([byte]), status=answer.status)
            self.pause(seconds)

    def reset(self) -> None:
        """End the connection to the client with a TCP reset."""
        # A linger time of zero makes close() send RST rather than FIN.
        no_linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        self._connection.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        raise HungUp

    def _read_body(self) -> Iterator[bytes]:
        if str(self.request.headers.get("Expect", "")).lower() == "100-continue":
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        source = self._read_chunked() if self._chunked else self._read_sized(self.content_length)
        yield from self._limited(self._counted(source))
        self.body_complete = True

    def _counted(self, source: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in source:
            self.request.body_bytes += len(chunk)
            if self._proxy.on_bytes:
                self._proxy.on_bytes(time.monotonic())
            yield chunk

    def _read_sized(self, size_bytes: int) -> Iterator[bytes]:
        while size_bytes:
            chunk = self._connection.rfile.read1(min(self._step_bytes(), size_bytes))
            if not chunk:
                raise ConnectionResetError("the client went away in the middle of the body")
            size_bytes -= len(chunk)
            yield chunk

    def _read_chunked(self) -> Iterator[bytes]:
        rfile = self._connection.rfile
        while size_bytes := int(rfile.readline().partition(b";")[0], 16):
            yield from self._read_sized(size_bytes)
            rfile.readline()
        while rfile.readline().strip():  # trailers: none of the servers here needs them
            pass

    def _step_bytes(self) -> int:
        """Small enough to come about ten times a second at the rate in force."""
        rates = [limit.bytes_per_second for limit in self._limits]
        return max(1, min(self.chunk_bytes, *(int(rate / 10) for rate in rates), CHUNK_BYTES))

    def _limited(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            for limit in self._limits:
                limit.take(len(chunk))
            yield chunk

    def _send_head(self, upstream: http.client.HTTPConnection) -> None:
        upstream.putrequest(
            self.request.method, self._connection.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in self.request.headers.items():
            # The proxy has answered Expect itself, and its connections are its own.
            if name.lower() not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.endheaders()

    def _send_body(self, upstream: http.client.HTTPConnection, body: Iterable[bytes]) -> None:
        refused = False
        for chunk in body:
            if refused:
                continue
            try:
                upstream.send(_framed(chunk) if self._chunked else chunk)
            except OSError:
                refused = True  # an early answer: the client hears it after its whole body
        if self._chunked and not refused:
            with contextlib.suppress(OSError):
                upstream.send(b"0\r\n\r\n")

    def _bad_gateway(self, error: Exception) -> Answer:
        if self._proxy.closing.is_set():
            raise HungUp from error
        self.discard_body()
        return error_answer(502, "BadGateway", f"no answer from the server: {error!r}")

    def _may_have_body(self, answer: Answer) -> bool:
        return self.request.method != "HEAD" and answer.status not in (204, 304)

    def _head(self, answer: Answer, *, chunked: bool) -> bytes:
        hop_by_hop = ("connection", "keep-alive", "transfer-encoding")
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        lines += [f"{n}: {v}" for n, v in answer.headers if n.lower() not in hop_by_hop]
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _write(self, data: bytes, *, status: int | None = None) -> None:
        if status is not None:
            # Before the first byte leaves: the client may look at the record right after it.
            self.request.status = status
            self.answered = True
        self._connection.wfile.write(data)


def _chunks_of(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(CHUNK_BYTES):
            yield chunk
    except http.client.HTTPException as error:
        raise HungUp from error
    if response.length:
        raise HungUp  # the server went away: so does the proxy, or the client would wait on


def _framed(chunk: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(chunk), chunk)


def error_answer(status: int, code: str, message: str) -> Answer:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
        "<RequestId>fault-proxy</RequestId></Error>"
    ).encode()
    reason = http.client.responses.get(status, "Error")
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    return Answer(status, reason, headers, [body], len(body))


Action = Callable[[Exchange], None]


def pass_on(exchange: Exchange) -> None:
    """Forward the request and its answer unchanged: what happens without a fault."""
    exchange.reply(exchange.forward())


# --- The proxy -------------------------------------------------------------------------------


@dataclass
class RateLimit:
    """Lets bytes pass at a rate that all its users share."""

    bytes_per_second: float
    closing: threading.Event
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_at: float = 0.0

    def take(self, size_bytes: int) -> None:
        """Wait until so many more bytes may pass, or the proxy closes."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size_bytes / self.bytes_per_second
            wait_seconds = self._free_at - now
        self.closing.wait(wait_seconds)


class FaultProxy:
    """The proxy: a context manager that listens on a free port of 127.0.0.1.

    Args:
        upstream_url: the S3 server, `http://HOST:PORT`.
        ca: signs a certificate for every name that a client asks for with CONNECT.
        tls: whether its own address is one of https; that takes a `ca`.
        ask: how a request that is passed on gets its answer; by asking the server, without it.

    `bandwidth` may be set: the rate of all bodies, both ways, over all connections together.
    `on_bytes`, if set, is called with the time when some bytes of a request's body have come.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        ca: trustme.CA | None = None,
        tls: bool = False,
        ask: Callable[[Exchange, Iterable[bytes]], Answer] = Exchange.ask_server,
    ) -> None:
        upstream = urlsplit(upstream_url)
        if upstream.scheme != "http" or not upstream.hostname:
            raise ValueError(f"an http URL is needed, not {upstream_url!r}")
        self.upstream_address = (upstream.hostname, upstream.port or 80)
        self.closing = threading.Event()
        self.bandwidth: RateLimit | None = None
        self.errors: list[BaseException] = []
        self.on_bytes: Callable[[float], object] | None = None
        self.is_tls = tls
        self._ca = ca
        self._contexts: dict[str, ssl.SSLContext] = {}
        self.ask = ask
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._faults: list[Fault] = []
        self._connections: set[_Connection] = set()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}
        )
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if error is None and self.errors:
            raise self.errors[0]

    def close(self) -> None:
        """End all connections and threads, stalled ones too."""
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.hang_up()
        self._server.server_close()  # waits for the threads

    def limit_bandwidth(self, bytes_per_second: float) -> None:
        """Let all bodies together pass at no more than that rate, from the next request on."""
        self.bandwidth = RateLimit(bytes_per_second, self.closing)

    def tls_context(self, host: str) -> ssl.SSLContext:
        """Return what it takes to be the https server of that name."""
        assert self._ca, "this proxy was given no certificate authority"
        with self._lock:
            if host not in self._contexts:
                self._contexts[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self._ca.issue_cert(host).configure_cert(self._contexts[host])
            return self._contexts[host]

    @property
    def requests(self) -> list[Request]:
        """The requests so far, in the order of their arrival."""
        with self._lock:
            return list(self._requests)

    def count(self, operation: str, key: str | None = None) -> int:
        """Count the requests of an operation, optionally of one key."""
        return sum(r.operation == operation and key in (None, r.key) for r in self.requests)

    def add_fault(self, fault: Fault) -> Fault:
        """Add a fault; where several match a request, the one added first wins."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Pass on every request from now on."""
        with self._lock:
            self._faults.clear()

    def action_for(self, request: Request) -> Action:
        """Record the request and return what is to be done with it."""
        with self._lock:
            self._requests.append(request)
            claiming = (fault for fault in self._faults if fault.claims(request))
            fault = next(claiming, None)
        return fault.action if fault else pass_on

    def register(self, connection: _Connection) -> None:
        """Remember an open connection, so that `close` can end it."""
        with self._lock:
            self._connections.add(connection)

    def unregister(self, connection: _Connection) -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._connections.discard(connection)


class _Connection(BaseHTTPRequestHandler):
    """A client's connection, with a connection of its own to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        self.proxy = self.server.proxy
        if self.proxy.is_tls:
            self.request = self.proxy.tls_context("127.0.0.1").wrap_socket(
                self.request, server_side=True
            )
        super().setup()
        self._upstream = http.client.HTTPConnection(*self.proxy.upstream_address)
        self.proxy.register(self)
        # After register(): either this sees that the proxy closes, or close() sees this.
        if self.proxy.closing.is_set():
            self.hang_up()

    def finish(self) -> None:
        self.proxy.unregister(self)
        self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()
        if isinstance(
            self.connection, ssl.SSLSocket
        ):  # another than the one that the server closes
            self.connection.close()

    def handle_expect_100(self) -> bool:
        return True  # Exchange.body says it, once somebody wants the body

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the record is `FaultProxy.requests`."""

    def handle_exchange(self) -> None:
        """Deal with one request."""
        request = Request.parse(method=self.command, target=self.path, headers=self.headers)
        exchange = Exchange(self, request)
        self.proxy.action_for(request)(exchange)
        has_body = exchange.content_length or "Transfer-Encoding" in self.headers
        if not exchange.answered or (has_body and not exchange.body_complete):
            self.close_connection = True

    def do_CONNECT(self) -> None:
        """Be, from now on, the https server that the client asks for."""
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        context = self.proxy.tls_context(self.path.rpartition(":")[0])
        self.request = context.wrap_socket(self.connection, server_side=True)
        super().setup()  # reads and writes through TLS from here on
        self.close_connection = False

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = handle_exchange

    def open_upstream(self) -> http.client.HTTPConnection:
        """Return a connection to the server, the one of the last request if it still stands."""
        idle = self._upstream.sock
        # An idle connection that can be read was closed by the server.
        if idle is not None and select.select([idle], [], [], 0)[0]:
            self._upstream.close()
        if self._upstream.sock is None:
            self._upstream.connect()
        if self.proxy.closing.is_set():
            raise HungUp
        return self._upstream

    def hang_up(self) -> None:
        """End both connections from another thread."""
        for connected in (self.connection, self._upstream.sock):
            with contextlib.suppress(OSError):
                if connected is not None:
                    connected.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = False  # so that server_close() waits for them

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Connection)

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without shutdown(), which would send FIN in place of RST

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A client that does not trust the certificate goes away in the middle of the handshake.
        went_away = isinstance(error, (ConnectionError, ssl.SSLError))
        # What is cut off by the end of the test is no error; what a test's function raises is one.
        is_cut_off = self.proxy.closing.is_set() and isinstance(
            error, (OSError, ValueError, http.client.HTTPException)
        )
        if error is not None and not went_away and not is_cut_off:
            self.proxy.errors.append(error)
