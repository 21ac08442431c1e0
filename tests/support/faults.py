"""Faults for the proxy: what it does to some of the requests in place of passing them on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from .proxy import Action, Answer, Exchange, Request, error_answer, pass_on

T = TypeVar("T")

# --- Actions ---------------------------------------------------------------------------------


def answer(status: int, code: str, message: str = "") -> Action:
    """Read the request's body, then answer with an S3 error instead of asking the server."""

    def act(exchange: Exchange) -> None:
        exchange.discard_body()
        exchange.reply(error_answer(status, code, message))

    return act


def redirect(status: int, location: str) -> Action:
    """Read the request's body, then say where else to ask, and nothing of S3's."""

    def act(exchange: Exchange) -> None:
        exchange.discard_body()
        body = f"<html><body>See {location}</body></html>".encode()
        headers = [("Location", location), ("Content-Length", str(len(body)))]
        exchange.reply(Answer(status, "Elsewhere", headers, [body], len(body)))

    return act


def drop() -> Action:
    """Reset the connection as soon as the head of the request is read."""
    return Exchange.reset


def drop_mid_body() -> Action:
    """Reset the connection when about half of the request's body is read."""

    def act(exchange: Exchange) -> None:
        half_bytes = exchange.content_length // 2
        exchange.chunk_bytes = max(1, half_bytes)
        for _ in exchange.body:
            if exchange.request.body_bytes >= half_bytes:
                break
        exchange.reset()

    return act


def drop_after_forward() -> Action:
    """Let the server do what is asked, then reset the connection instead of saying so."""

    def act(exchange: Exchange) -> None:
        for _ in exchange.forward().body:
            pass
        exchange.reset()

    return act


def flip_byte() -> Action:
    """Change the byte in the middle of the request's body; its headers stay as they are."""

    def act(exchange: Exchange) -> None:
        exchange.reply(exchange.forward(lambda body: _flip(body, exchange.content_length // 2)))

    return act


def wrong_etag() -> Action:
    """Change each ETag in the answer: the header's, and those in an XML body."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        for name, value in answer.headers:
            if name.lower() == "etag":
                answer.set_header(name, _other_digest(value))
        # An object's own bytes may be XML too, and are none of our business.
        if exchange.request.operation != "GetObject" and exchange.request.method != "HEAD":
            answer.set_body(_with_other_etags(b"".join(answer.body)))
        exchange.reply(answer)

    return act


def cut_answer() -> Action:
    """Close the connection after half of the answer's body, or of its head without a body.

    Python's HTTP client takes half of a head for a whole one that has fewer headers.
    """
    return lambda exchange: exchange.reply_half(exchange.forward())


def trickle(seconds: float) -> Action:
    """Forward the request, and answer a byte every so many seconds."""
    return lambda exchange: exchange.reply_slowly(exchange.forward(), seconds)


def stall(seconds: float) -> Action:
    """Say nothing for so long, then reset the connection."""

    def act(exchange: Exchange) -> None:
        exchange.pause(seconds)
        exchange.reset()

    return act


def delay(seconds: float) -> Action:
    """Wait, then forward the request."""

    def act(exchange: Exchange) -> None:
        exchange.pause(seconds)
        pass_on(exchange)

    return act


def slow(bytes_per_second: float) -> Action:
    """Forward the request, its bodies at no more than that rate."""

    def act(exchange: Exchange) -> None:
        exchange.limit_rate(bytes_per_second)
        pass_on(exchange)

    return act


def call(function: Callable[[Request], object]) -> Action:
    """Call a function before the request is forwarded; what it raises, `close` raises again."""

    def act(exchange: Exchange) -> None:
        function(exchange.request)
        pass_on(exchange)

    return act


def set_headers(headers: Mapping[str, str]) -> Action:
    """Set some headers of the server's answer."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        for name, value in headers.items():
            answer.set_header(name, value)
        exchange.reply(answer)

    return act


def replace_in_answer(change: Callable[[bytes], bytes]) -> Action:
    """Change the body of the server's answer."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        answer.set_body(change(b"".join(answer.body)))
        exchange.reply(answer)

    return act


def after_forward(function: Callable[[], object]) -> Action:
    """Let the server do what is asked, call a function, then reset the connection."""

    def act(exchange: Exchange) -> None:
        for _ in exchange.forward().body:
            pass
        function()
        exchange.reset()

    return act


def cut_before_etag() -> Action:
    """Close the connection in the middle of the answer's head, before its ETag."""

    def act(exchange: Exchange) -> None:
        answer = exchange.forward()
        (etag,) = (value for name, value in answer.headers if name.lower() == "etag")
        answer.set_header("ETag", etag)  # it is the last header now
        exchange.reply_half(answer)

    return act


def _flip(body: Iterator[bytes], position: int) -> Iterator[bytes]:
    start = 0
    for chunk in body:
        changed = bytearray(chunk)
        if start <= position < start + len(chunk):
            changed[position - start] ^= 0xFF
        start += len(chunk)
        yield bytes(changed)


def _other_digest(etag: str) -> str:
    """An ETag of the same form, every hexadecimal digit of its MD5 being another one."""
    shifted = str.maketrans("0123456789abcdef", "123456789abcdef0")
    return re.sub("[0-9a-f]{32}", lambda match: match[0].translate(shifted), etag)


def _with_other_etags(body: bytes) -> bytes:
    text = body.decode("utf-8", errors="surrogateescape")
    changed = re.sub("<ETag>[^<]*</ETag>", lambda match: _other_digest(match[0]), text)
    return changed.encode("utf-8", errors="surrogateescape")


# --- Faults ----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Filter:
    operation: str | tuple[str, ...] | None
    key: str | Callable[[str], bool] | None
    part_number: int | Callable[[int], bool] | None
    method: str | None

    def fits(self, request: Request) -> bool:
        names = (self.operation,) if isinstance(self.operation, str) else self.operation
        return (
            (names is None or request.operation in names)
            and (self.key is None or _is_or_fits(self.key, request.key))
            and (
                self.part_number is None or _is_or_fits(self.part_number, request.part_number or 0)
            )
            and self.method in (None, request.method)
        )


def _is_or_fits(wanted: T | Callable[[T], bool], value: T) -> bool:
    return wanted(value) if callable(wanted) else wanted == value


class Fault:
    """An action, and the requests that it is for.

    Args:
        action: what to do with such a request; see the functions above.
        operation: name of the S3 operation, or several names.
        key: the object's key, or a function that says of a key whether it is meant.
        part_number: number of the part, or a function that says of one whether it is meant.
        times: at most so many times.
        one_in: for one request in so many, at random.
        seed: of that randomness.
        after: let so many matching requests pass first.
        method: the HTTP method.

    `hits` counts the requests that it dealt with.
    """

    def __init__(
        self,
        action: Action,
        *,
        operation: str | tuple[str, ...] | None = None,
        key: str | Callable[[str], bool] | None = None,
        part_number: int | Callable[[int], bool] | None = None,
        times: int | None = None,
        one_in: int | None = None,
        seed: int = 0,
        after: int = 0,
        method: str | None = None,
    ) -> None:
        self.action = action
        self.hits = 0
        self._filter = _Filter(operation=operation, key=key, part_number=part_number, method=method)
        self._times = times
        self._one_in = one_in
        self._random = random.Random(seed)
        self._to_pass = after

    def claims(self, request: Request) -> bool:
        """Say whether this fault deals with the request, and count it; not thread-safe."""
        if self.hits == self._times or not self._filter.fits(request):
            return False
        if self._to_pass:
            self._to_pass -= 1
            return False
        if self._one_in is not None and self._random.randrange(self._one_in):
            return False
        self.hits += 1
        return True
