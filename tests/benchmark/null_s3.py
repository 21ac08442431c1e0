"""A null S3 server: it answers uploads as S3 does, lists what it got, and keeps no body.

It exists to measure S3 clients. Whatever it costs is taken from the client's own machine, so it is
as cheap as plain Python can be: bodies are counted and dropped, on Linux without even being copied
from the kernel, and of a request's head no more is looked at than the answer needs.

    python null_s3.py --port 9000 --latency-ms 30 --fill BUCKET=FOLDER

Once it listens it prints `listening on http://127.0.0.1:PORT`. What it has seen (requests by
operation, objects, bytes, its own CPU seconds) is JSON at `/_stats`, and on stdout when SIGTERM or
SIGINT ends it. `/_settle?latency-ms=30` makes it ready for the next client: what is listed is
sorted and rendered now and not at that client's cost, and new connections get that latency.

It lists, in both versions, in the byte order of keys, page by page; each object is rendered once.
What decides whether a client sends an object again is all there: size, ETag, the second in which
it came, and rclone's `x-amz-meta-mtime`. With --fill a bucket begins with the files of a folder as
though a client had sent them: with their MD5 and that header.

ETags are those of S3 where the client's Content-MD5 tells the MD5: of an object, of a part, and of
a multipart upload all of whose parts had one. Nothing is hashed, so any other ETag is made up. It
ends in `-1` (or `-N` for N parts), which no client takes for the MD5 of an object. What creates,
fills, completes or describes a multipart object says `aws:kms` as well: under that encryption no
ETag is an MD5.

Only the path style of addressing (`/bucket/key`) is known, signatures are not looked at, and every
bucket exists. A key is known by its spelling in the URL; a listing has it as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import email.utils
import functools
import gc
import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote, unquote_plus
from xml.sax.saxutils import escape

REGION = "us-east-1"
# What is received at once: of a body, which is mostly dropped unseen, and where a head may be.
BUFFER_BYTES = 1024 * 1024
HEAD_BUFFER_BYTES = 64 * 1024
# With it, Linux drops what was received from a TCP connection instead of copying it.
DISCARD_FLAG = socket.MSG_TRUNC if sys.platform == "linux" else 0
# s5cmd opens 256 connections at once; a full backlog would make some of them wait a second.
BACKLOG = 1024

XML_HEADER = '<?xml version="1.0" encoding="UTF-8"?>'
XML_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
PAGE_KEYS = 1000  # of a listing, at most
KMS_HEADER = "x-amz-server-side-encryption: aws:kms\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

BUCKET_OPERATIONS = {"HEAD": "HeadBucket", "PUT": "CreateBucket", "GET": "ListObjectsV2"}
OBJECT_OPERATIONS = {
    "HEAD": "HeadObject",
    "PUT": "PutObject",
    "GET": "GetObject",
    "DELETE": "DeleteObject",
}
UPLOAD_OPERATIONS = {
    "PUT": "UploadPart",
    "POST": "CompleteMultipartUpload",
    "GET": "ListParts",
    "DELETE": "AbortMultipartUpload",
}


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then print the statistics; returns the exit code."""
    args = parse_arguments(argv)
    # The server makes no cycles worth collecting, and every collection would walk all its records.
    gc.disable()
    try:
        asyncio.run(serve(port=args.port, latency_s=args.latency_ms / 1000, fill=args.fill))
    except KeyboardInterrupt:  # only before serve() has set its own signal handlers
        return 130
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the latency is in milliseconds."""
    parser = argparse.ArgumentParser(
        description="A null S3 server on the loopback address: answers uploads, keeps no body."
    )
    parser.add_argument("--port", type=int, default=0, help="TCP port (default: a free one)")
    parser.add_argument(
        "--latency-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="time between the end of a request and its answer, 100 Continue included (default: 0)",
    )
    parser.add_argument(
        "--fill",
        action="append",
        default=[],
        type=bucket_with_folder,
        metavar="BUCKET=FOLDER",
        help="begin with the files of a folder in a bucket (repeatable)",
    )
    return parser.parse_args(argv)


def bucket_with_folder(value: str) -> tuple[str, str]:
    """The two of `BUCKET=FOLDER`; ValueError if they are not."""
    bucket, folder = value.split("=", 1)
    return bucket, folder


async def serve(*, port: int, latency_s: float, fill: Iterable[tuple[str, str]]) -> None:
    """Listen on the loopback address until a signal asks to end, then print the statistics."""
    loop = asyncio.get_running_loop()
    line = DelayLine(loop, latency_s)
    service = NullS3(line)
    for bucket, folder in fill:
        service.fill(bucket, folder)
    end = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, end.set)
    with socket.create_server(("127.0.0.1", port), backlog=BACKLOG) as listener:
        listener.setblocking(False)
        # Accepted connections inherit it. Without it an answer might wait for the client's
        # acknowledgement of the 100 Continue before it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add_reader(listener, accept, listener, loop, service, line)
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await end.wait()
        loop.remove_reader(listener)
    print(json.dumps(service.statistics()), flush=True)


def accept(
    listener: socket.socket, loop: asyncio.AbstractEventLoop, service: NullS3, line: DelayLine
) -> None:
    """Take all connections that wait to be taken."""
    send = line.send if line.delay_s else Connection.write
    with contextlib.suppress(BlockingIOError):
        while True:
            client, _ = listener.accept()
            client.setblocking(False)
            Connection(loop, client, service, send)


class DelayLine:
    """Writes every answer a fixed time, `delay_s`, after it was ready.

    With one delay for all, answers fall due in the order in which they came. So one queue and one
    timer serve all connections; a timer for each answer would cost several times as much.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, delay_s: float) -> None:
        self.delay_s = delay_s
        self._loop = loop
        self._queue: collections.deque[tuple[float, Connection, bytes, bool]] = collections.deque()

    def send(self, connection: Connection, answer: bytes, close: bool) -> None:
        """Do what Connection.write does, once the time has come."""
        due = self._loop.time() + self.delay_s
        self._queue.append((due, connection, answer, close))
        if len(self._queue) == 1:
            self._loop.call_later(self.delay_s, self._flush)

    def _flush(self) -> None:
        queue = self._queue
        now = self._loop.time()
        while queue and queue[0][0] <= now:
            _, connection, answer, close = queue.popleft()
            connection.write(answer, close)
        if queue:
            self._loop.call_at(queue[0][0], self._flush)


# Requests on their way in.


class Request:
    """What the server looks at in a request's head."""

    __slots__ = ("body_bytes", "chunked", "close", "content_md5", "expects", "method", "mtime",
                 "path", "query", "stored_bytes")  # fmt: skip

    def __init__(self, head: bytes) -> None:
        """Parse a head, which ends with the CRLF of its last header; ValueError if it is none."""
        method, target, _ = head.split(b" ", 2)
        self.method = method.decode("latin-1")
        path, _, self.query = target.decode("latin-1").partition("?")
        self.path = path

        lower = head.lower()
        self.body_bytes = int(header(head, lower, b"\r\ncontent-length:") or 0)
        # In aws-chunked, checksums and signatures make the body longer than the object.
        decoded = header(head, lower, b"\r\nx-amz-decoded-content-length:")
        self.stored_bytes = int(decoded) if decoded else self.body_bytes
        self.content_md5 = header(head, lower, b"\r\ncontent-md5:")
        self.mtime = header(head, lower, b"\r\nx-amz-meta-mtime:")
        self.chunked = b"\r\ntransfer-encoding: chunked" in lower
        self.expects = b"\r\nexpect: 100-continue" in lower
        self.close = b"\r\nconnection: close" in lower


def header(head: bytes, lower: bytes, name: bytes) -> bytes:
    """The value of a header, empty when it is missing.

    `lower` is the head in lower case, and `name` the lower-case name with CRLF before it and a
    colon after it. Searching the whole head is much cheaper than splitting it into its headers.
    """
    start = lower.find(name)
    if start < 0:
        return b""
    start += len(name)
    return head[start : head.find(b"\r\n", start)].strip()


class ChunkedBody:
    """Finds the end of a body in `Transfer-Encoding: chunked`, dropping what it carries."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.done = False
        self._skip_bytes = 0
        self._line = b""
        self._in_trailer = False

    def feed(self, buffer: bytearray, start: int, end: int) -> int:
        """Take what belongs to the body from buffer[start:end]; returns where that stops."""
        while start < end and not self.done:
            if self._skip_bytes:
                step = min(self._skip_bytes, end - start)
                self._skip_bytes -= step
                start += step
                continue
            newline = buffer.find(b"\n", start, end)
            stop = newline + 1 or end
            self._line += buffer[start:stop]
            start = stop
            if newline >= 0:
                self._take_line(self._line.strip())
                self._line = b""
        return start

    def _take_line(self, line: bytes) -> None:
        if self._in_trailer:
            self.done = not line
            return
        chunk_bytes = int(line.partition(b";")[0], 16)
        self.size_bytes += chunk_bytes
        self._in_trailer = not chunk_bytes
        self._skip_bytes = chunk_bytes + len(b"\r\n") if chunk_bytes else 0


class Connection:
    """One client's connection: reads requests, one after the other, and has them answered.

    It works on the socket itself: a client that connects anew for each file (s5cmd does for most)
    would pay several times as much for a transport of asyncio's as for its request. All connections
    receive into one buffer, which none needs any more when its turn is over.
    """

    _buffer = bytearray(BUFFER_BYTES)
    _view = memoryview(_buffer)

    def __init__(
        self, loop: asyncio.AbstractEventLoop, client: socket.socket, service: NullS3, send: Send
    ) -> None:
        self._loop = loop
        self._socket = client
        self._service = service
        self._send = send
        self._partial_head = b""
        self._request: Request | None = None
        self._body_left = 0
        self._chunks: ChunkedBody | None = None
        self._rest: asyncio.Task[None] | None = None
        # By number: asyncio would call repr() on a socket, which asks the kernel for its addresses.
        self._fd = client.fileno()
        loop.add_reader(self._fd, self._readable)

    def write(self, answer: bytes, close: bool) -> None:
        """Send an answer, and close the connection behind it if it is the last."""
        try:
            sent = self._socket.send(answer)
        except BlockingIOError:
            sent = 0
        except OSError:  # the client is gone, or the connection is closed
            self._close()
            return
        if sent < len(answer):  # a long list of parts, for example
            self._rest = self._loop.create_task(self._write_rest(answer[sent:], close))
        elif close:
            self._close()

    async def _write_rest(self, answer: bytes, close: bool) -> None:
        with contextlib.suppress(OSError):
            await self._loop.sock_sendall(self._socket, answer)
        if close:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._socket.close()
            self._fd = -1

    def _readable(self) -> None:
        """Called by the event loop when there is something to receive."""
        try:
            received = self._discard() if self._body_left else self._receive()
        except BlockingIOError:
            return
        except OSError:  # the client is gone
            received = 0
        except ValueError:  # what came is no HTTP
            self._send(self, response(status="400 Bad Request"), True)
            return
        if not received:
            self._close()

    def _discard(self) -> int:
        """Drop what there is of a body, without copying it; returns how much was there."""
        received = self._socket.recv_into(
            self._buffer, min(self._body_left, BUFFER_BYTES), DISCARD_FLAG
        )
        self._skip_body(received)
        return received

    def _receive(self) -> int:
        """Receive and take a head with what may follow it, or chunks; returns how much came."""
        partial = self._partial_head
        self._buffer[: len(partial)] = partial
        received = self._socket.recv_into(self._view[len(partial) : HEAD_BUFFER_BYTES])
        if not received:
            return 0
        self._partial_head = b""
        start, end = 0, len(partial) + received
        while start < end:
            if self._chunks:
                start = self._take_chunks(start, end)
            elif self._body_left:
                start += self._skip_body(min(self._body_left, end - start))
            else:
                start = self._take_head(start, end)
        return received

    def _take_head(self, start: int, end: int) -> int:
        head_end = self._buffer.find(b"\r\n\r\n", start, end)
        if head_end < 0:
            self._partial_head = bytes(self._view[start:end])
            return end
        request = Request(bytes(self._view[start : head_end + 2]))
        self._request = request
        self._body_left = request.body_bytes
        self._chunks = ChunkedBody() if request.chunked else None
        if request.expects:
            self._send(self, CONTINUE, False)
        if not self._body_left and not self._chunks:
            self._answer(request)
        return head_end + 4

    def _skip_body(self, count: int) -> int:
        self._service.arrived_bytes += count
        self._body_left -= count
        if not self._body_left and self._request:
            self._answer(self._request)
        return count

    def _take_chunks(self, start: int, end: int) -> int:
        assert self._chunks
        assert self._request
        start = self._chunks.feed(self._buffer, start, end)
        if self._chunks.done:
            self._request.stored_bytes = self._request.stored_bytes or self._chunks.size_bytes
            self._chunks = None
            self._answer(self._request)
        return start

    def _answer(self, request: Request) -> None:
        self._request = None
        self._send(self, self._service.answer(request), request.close)


Send = Callable[[Connection, bytes, bool], None]


# S3.


class Record(NamedTuple):
    """What is kept of an object or a part; the MD5 only where the client's Content-MD5 told it.

    `modified_s` is a Unix time in whole seconds, as in S3's listings; `mtime` is rclone's header.
    """

    size_bytes: int
    etag: str
    md5: bytes | None
    modified_s: int
    mtime: bytes = b""
    multipart: bool = False


class Upload(NamedTuple):
    """A multipart upload that is under way, with its parts by number and rclone's header."""

    path: str
    mtime: bytes
    parts: dict[int, Record]


class Listing:
    """What is in all buckets, in the byte order of keys; names are `BUCKET/KEY`, unquoted.

    Each object is rendered once, plainly and with its key URL-encoded (mostly the same), so that a
    page is little more than a join.
    """

    def __init__(self) -> None:
        # Sorted as they are: the order of code points is that of their bytes in UTF-8.
        self._names: list[str] = []
        self._plain: dict[str, str] = {}
        self._encoded: dict[str, str] = {}

    def update(self, records: Iterable[tuple[str, Record | None]]) -> None:
        """Take what was put and, where the record is None, deleted."""
        for name, record in records:
            if record is None:
                self._plain.pop(name, None)
                continue
            if name not in self._plain:
                self._names.append(name)
            key = key_of(name)
            self._plain[name] = self._encoded[name] = contents(escaped(key), record)
            if quote(key) != key:
                self._encoded[name] = contents(quote(key), record)
        if len(self._names) > len(self._plain):
            self._names = [name for name in self._names if name in self._plain]
        self._names.sort()  # what was in order before costs next to nothing

    def page(self, bucket: str, query: dict[str, str]) -> str:
        """A page of ListObjectsV2, in which a client of ListObjects finds what it needs, too."""
        wanted = {name: unquote_plus(value) for name, value in query.items()}
        max_keys = min(int(wanted.get("max-keys", PAGE_KEYS)), PAGE_KEYS)
        is_encoded = wanted.get("encoding-type") == "url"
        spell, rendered = (quote, self._encoded) if is_encoded else (escaped, self._plain)

        below = f"{bucket}/{wanted.get('prefix', '')}"
        start = bisect_left(self._names, max(below, f"{bucket}/{first_key(wanted)}"))
        end = bisect_left(self._names, beyond(below))
        names, prefixes, stop = self._found(
            start, end, max_keys=max_keys, delimiter=wanted.get("delimiter", ""), skip=len(below)
        )

        fields = {"Name": bucket, "MaxKeys": f"{max_keys}"}
        fields |= {"KeyCount": f"{len(names) + len(prefixes)}", "IsTruncated": "false"}
        fields |= {name: spell(wanted.get(name.lower(), "")) for name in ("Prefix", "Delimiter")}
        if is_encoded:
            fields["EncodingType"] = "url"
        if start < stop < end:
            fields["IsTruncated"] = "true"
            fields["NextMarker"] = spell(key_of(max(names[-1:] + prefixes[-1:])))
            fields["NextContinuationToken"] = key_of(self._names[stop]).encode().hex()
        head = "".join(element(name, value) for name, value in fields.items())
        tail = (element("Prefix", spell(key_of(prefix))) for prefix in prefixes)
        return "".join(
            (head, *map(rendered.__getitem__, names), *(element("CommonPrefixes", e) for e in tail))
        )

    def _found(
        self, start: int, end: int, *, max_keys: int, delimiter: str, skip: int
    ) -> tuple[list[str], list[str], int]:
        """A page's names and its common prefixes, with `BUCKET/` too, and where the next begins.

        Delimiters count after the first `skip` characters.
        """
        if not delimiter:
            stop = min(start + max_keys, end)
            return self._names[start:stop], [], stop
        names: list[str] = []
        prefixes: list[str] = []
        while start < end and len(names) + len(prefixes) < max_keys:
            name = self._names[start]
            cut = name.find(delimiter, skip)
            if cut < 0:
                names.append(name)
                start += 1
            else:
                prefixes.append(name[: cut + len(delimiter)])
                start = bisect_left(self._names, beyond(prefixes[-1]))
        return names, prefixes, start


def first_key(wanted: dict[str, str]) -> str:
    """The least key that a page may begin with, by a listing's parameters."""
    if token := wanted.get("continuation-token"):
        return bytes.fromhex(token).decode()
    marker, delimiter = wanted.get("marker", ""), wanted.get("delimiter", "")
    if marker and delimiter and marker.endswith(delimiter):  # the last was a common prefix
        return beyond(marker)
    last = marker or wanted.get("start-after", "")
    return last and last + "\0"


def beyond(prefix: str) -> str:
    """The least string behind all that begin with a prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def key_of(name: str) -> str:
    """The key in a name with its bucket."""
    return name.partition("/")[2]


def escaped(key: str) -> str:
    """A key in XML that is not URL-encoded."""
    return escape(key, {"\r": "&#13;", "\n": "&#10;", "\t": "&#9;"})


def element(name: str, content: str) -> str:
    """An XML element."""
    return f"<{name}>{content}</{name}>"


def contents(key: str, record: Record) -> str:
    """An object in a listing; the key as it is to be spelled there."""
    return (
        f"<Contents><Key>{key}</Key><LastModified>{iso_time(record.modified_s)}</LastModified>"
        f"<ETag>&quot;{record.etag}&quot;</ETag><Size>{record.size_bytes}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


@functools.lru_cache(maxsize=1024)
def iso_time(seconds: int) -> str:
    """A Unix time as listings have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


@functools.lru_cache(maxsize=1024)
def http_time(seconds: int) -> str:
    """A Unix time as headers have it."""
    return email.utils.formatdate(seconds, usegmt=True)


def files_below(folder: str) -> Iterator[os.DirEntry[str]]:
    """All files of a folder and of those in it, in no order; links are not followed."""
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry


class NullS3:
    """The objects and uploads that were sent, without their bytes, and what to answer."""

    def __init__(self, line: DelayLine) -> None:
        self._line = line
        self._objects: dict[str, Record] = {}
        self._listing = Listing()
        self._unlisted: list[str] = []  # paths that were put or deleted since the last listing
        self._uploads: dict[str, Upload] = {}
        self._upload_numbers = itertools.count(1)
        self._requests: collections.Counter[str] = collections.Counter()
        self._body_bytes = 0
        self.arrived_bytes = 0  # as they come, where _body_bytes counts whole bodies
        self._operations: dict[str, Callable[[Request], bytes]] = {
            "ListBuckets": self._list_buckets,
            "HeadBucket": self._head_bucket,
            "CreateBucket": self._create_bucket,
            "GetBucketLocation": self._get_bucket_location,
            "ListObjectsV2": self._list_objects,
            "ListMultipartUploads": self._list_multipart_uploads,
            "PutObject": self._put_object,
            "HeadObject": self._head_object,
            "DeleteObject": self._delete_object,
            "CreateMultipartUpload": self._create_multipart_upload,
            "UploadPart": self._upload_part,
            "ListParts": self._list_parts,
            "CompleteMultipartUpload": self._complete_multipart_upload,
            "AbortMultipartUpload": self._abort_multipart_upload,
        }

    def answer(self, request: Request) -> bytes:
        """Do what the request asks for; returns the whole HTTP answer."""
        if request.path.startswith("/_"):  # as no bucket's name does
            return self._control(request)
        operation = operation_of(request)
        self._requests[operation] += 1
        self._body_bytes += request.stored_bytes
        handler = self._operations.get(operation)
        return handler(request) if handler else error(501, "NotImplemented", request=request)

    def fill(self, bucket: str, folder: str) -> None:
        """Put all files of a folder into a bucket, from now on in its listing."""
        now_s = int(time.time())
        for entry in files_below(folder):
            with open(entry.path, "rb") as file:
                content = file.read()
            md5 = hashlib.md5(content, usedforsecurity=False).digest()
            seconds, ns = divmod(entry.stat().st_mtime_ns, 10**9)
            mtime = b"%d.%09d" % (seconds, ns)
            path = f"/{bucket}/{quote(os.path.relpath(entry.path, folder))}"
            self._keep(path, Record(len(content), md5.hex(), md5, now_s, mtime))
        self._settle()

    def _keep(self, path: str, record: Record) -> None:
        self._objects[path] = record
        self._unlisted.append(path)

    def _control(self, request: Request) -> bytes:
        if request.path == "/_settle":
            self._settle()
            self._line.delay_s = float(parse_query(request.query)["latency-ms"]) / 1000
        return response(json.dumps(self.statistics()), content_type="application/json")

    def _settle(self) -> None:
        """Bring the listing up to date."""
        paths, self._unlisted = self._unlisted, []
        self._listing.update((unquote(path[1:]), self._objects.get(path)) for path in paths)

    def statistics(self) -> dict[str, object]:
        """Requests by S3 operation, what is stored, body bytes received, own CPU seconds.

        `arrived_bytes` are those of bodies that are still on their way, too.
        """
        return {
            "requests": dict(self._requests),
            "objects": len(self._objects),
            "object_bytes": sum(record.size_bytes for record in self._objects.values()),
            "open_uploads": len(self._uploads),
            "received_bytes": self._body_bytes,
            "arrived_bytes": self.arrived_bytes,
            "cpu_seconds": time.process_time(),
        }

    def _list_buckets(self, request: Request) -> bytes:
        return response(xml("ListAllMyBucketsResult", "<Buckets></Buckets>"))

    def _head_bucket(self, request: Request) -> bytes:
        return response(headers=f"x-amz-bucket-region: {REGION}\r\n")

    def _create_bucket(self, request: Request) -> bytes:
        return response(headers=f"Location: {request.path}\r\n")

    def _get_bucket_location(self, request: Request) -> bytes:
        return response(xml("LocationConstraint", ""))  # empty: us-east-1

    def _list_objects(self, request: Request) -> bytes:
        if self._unlisted:
            self._settle()
        bucket = unquote(request.path.strip("/"))
        page = self._listing.page(bucket, parse_query(request.query))
        return response(xml("ListBucketResult", page))

    def _list_multipart_uploads(self, request: Request) -> bytes:
        return response(xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>"))

    def _put_object(self, request: Request) -> bytes:
        record = record_of(request)
        self._keep(request.path, record)
        return response(headers=f'ETag: "{record.etag}"\r\n')

    def _head_object(self, request: Request) -> bytes:
        record = self._objects.get(request.path)
        if record is None:
            return error(404, "NoSuchKey", request=request)
        headers = f'ETag: "{record.etag}"\r\nLast-Modified: {http_time(record.modified_s)}\r\n'
        if record.mtime:
            headers += f"x-amz-meta-mtime: {record.mtime.decode('latin-1')}\r\n"
        return response(
            headers=headers + "Accept-Ranges: bytes\r\n" + (KMS_HEADER if record.multipart else ""),
            content_type="binary/octet-stream",
            content_length=record.size_bytes,
        )

    def _delete_object(self, request: Request) -> bytes:
        self._objects.pop(request.path, None)
        self._unlisted.append(request.path)
        return response(status="204 No Content")

    def _create_multipart_upload(self, request: Request) -> bytes:
        upload_id = f"null-upload-{next(self._upload_numbers)}"
        self._uploads[upload_id] = Upload(request.path, request.mtime, {})
        body = bucket_and_key(request) + f"<UploadId>{upload_id}</UploadId>"
        return response(xml("InitiateMultipartUploadResult", body), headers=KMS_HEADER)

    def _upload_part(self, request: Request) -> bytes:
        query = parse_query(request.query)
        upload = self._uploads.get(query["uploadId"])
        if upload is None:
            return error(404, "NoSuchUpload", request=request)
        part = record_of(request)
        upload.parts[int(query["partNumber"])] = part
        return response(headers=f'ETag: "{part.etag}"\r\n' + KMS_HEADER)

    def _list_parts(self, request: Request) -> bytes:
        upload = self._uploads.get(parse_query(request.query)["uploadId"])
        if upload is None:
            return error(404, "NoSuchUpload", request=request)
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{part.size_bytes}</Size>"
            f"<ETag>&quot;{part.etag}&quot;</ETag></Part>"
            for number, part in sorted(upload.parts.items())
        )
        body = bucket_and_key(request) + f"<IsTruncated>false</IsTruncated>{parts}"
        return response(xml("ListPartsResult", body))

    def _complete_multipart_upload(self, request: Request) -> bytes:
        # The list of parts in the body is not read: it names the parts that were sent.
        upload = self._uploads.pop(parse_query(request.query)["uploadId"], None)
        if upload is None:
            return error(404, "NoSuchUpload", request=request)
        record = record_of_parts(upload)
        self._keep(request.path, record)
        body = bucket_and_key(request) + f"<ETag>&quot;{record.etag}&quot;</ETag>"
        return response(xml("CompleteMultipartUploadResult", body), headers=KMS_HEADER)

    def _abort_multipart_upload(self, request: Request) -> bytes:
        self._uploads.pop(parse_query(request.query)["uploadId"], None)
        return response(status="204 No Content")


def operation_of(request: Request) -> str:
    """The name of the S3 operation that a request asks for."""
    method = request.method
    _, _, key = request.path[1:].partition("/")
    if key:
        if not request.query:
            return OBJECT_OPERATIONS.get(method, "unknown")
        query = parse_query(request.query)
        if "uploadId" in query:
            return UPLOAD_OPERATIONS.get(method, "unknown")
        if "uploads" in query:
            return "CreateMultipartUpload"
        return OBJECT_OPERATIONS.get(method, "unknown")
    if request.path == "/":
        return "ListBuckets" if method == "GET" else "unknown"
    query = parse_query(request.query)
    if method == "GET" and "location" in query:
        return "GetBucketLocation"
    if method == "GET" and "uploads" in query:
        return "ListMultipartUploads"
    return BUCKET_OPERATIONS.get(method, "unknown")


def parse_query(query: str) -> dict[str, str]:
    """The parameters of a query string, as they are spelled: only a listing's are ever escaped."""
    pairs = (parameter.partition("=") for parameter in query.split("&"))
    return {name: value for name, _, value in pairs}


def record_of(request: Request) -> Record:
    """What to keep of an object or a part that was sent in one request."""
    size_bytes, now_s = request.stored_bytes, int(time.time())
    if not request.content_md5:
        return Record(size_bytes, "0" * 32 + "-1", None, now_s, request.mtime)
    md5 = base64.b64decode(request.content_md5)
    return Record(size_bytes, md5.hex(), md5, now_s, request.mtime)


def record_of_parts(upload: Upload) -> Record:
    """What to keep of an object that was sent in parts; its ETag is that of S3 if it can be."""
    parts = upload.parts
    digests = [parts[number].md5 for number in sorted(parts)]
    known = [digest for digest in digests if digest is not None]
    if len(known) == len(parts):
        digest = hashlib.md5(b"".join(known), usedforsecurity=False).hexdigest()
    else:
        digest = "0" * 32
    size_bytes = sum(part.size_bytes for part in parts.values())
    etag = f"{digest}-{len(parts)}"
    return Record(size_bytes, etag, None, int(time.time()), upload.mtime, multipart=True)


def response(
    body: str = "",
    *,
    status: str = "200 OK",
    headers: str = "",
    content_type: str = "application/xml",
    content_length: int | None = None,
) -> bytes:
    """A whole HTTP answer; `headers` are whole lines. A length is given only to answer HEAD."""
    if not body and content_length is None:
        return f"HTTP/1.1 {status}\r\n{headers}Content-Length: 0\r\n\r\n".encode("latin-1")
    payload = body.encode()
    length = len(payload) if content_length is None else content_length
    head = (
        f"HTTP/1.1 {status}\r\n{headers}"
        f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode("latin-1") + payload


def error(status: int, code: str, *, request: Request) -> bytes:
    """An S3 error; without its body where the request is a HEAD."""
    reason = {404: "Not Found", 501: "Not Implemented"}[status]
    if request.method == "HEAD":
        return response(status=f"{status} {reason}")
    body = f"{XML_HEADER}<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return response(body, status=f"{status} {reason}")


def xml(root: str, body: str) -> str:
    """An XML document in the name space of S3."""
    return f"{XML_HEADER}<{root} {XML_NAMESPACE}>{body}</{root}>"


def bucket_and_key(request: Request) -> str:
    """The two XML elements that most answers about multipart uploads start with."""
    bucket, _, key = unquote(request.path[1:]).partition("/")
    return f"<Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key>"


if __name__ == "__main__":
    raise SystemExit(main())
