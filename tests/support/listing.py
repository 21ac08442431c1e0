"""Servers that list a bucket in their own way: answers to ListObjectsV2 made in front of one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

from .proxy import Answer, Exchange
from .servers import S3Server

# How a server sorts its keys.
Order = Callable[[str], Any]


def by_bytes(key: str) -> bytes:
    """As S3 does."""
    return key.encode()


def by_names(key: str) -> list[str]:
    """Folder by folder, each by its bare name, as SeaweedFS does: a/b comes before a!."""
    return key.split("/")


def by_time(key: str) -> str:
    """In an order that has nothing to do with the keys, but stays."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class Lister:
    """Answers ListObjectsV2 (an action of a fault) with what a bucket has.

    Args:
        objects: size and ETag of each, by key.
        order: how the keys are sorted.
        page: how many of them an answer has.
        shuffles: whether each answer has its keys in another order.
        knows_start_after: whether StartAfter is heeded.
        has_empty_pages: whether every other answer has no key, but a token.
        has_tokens: whether an answer that is not the last has one, as version 1 has none.
    """

    objects: Mapping[str, tuple[int, str]]
    order: Order = by_bytes
    page: int = 1000
    shuffles: bool = False
    knows_start_after: bool = True
    has_empty_pages: bool = False
    has_tokens: bool = True
    _random: random.Random = field(default_factory=lambda: random.Random(1))

    def __call__(self, exchange: Exchange) -> None:
        exchange.discard_body()
        query = exchange.request.query
        token = query.get("continuation-token", "")
        position = bytes.fromhex(token.removeprefix("empty")).decode()
        if not token and self.knows_start_after:
            position = query.get("start-after", "")
        prefix = query.get("prefix", "")
        keys = sorted((k for k in self.objects if k.startswith(prefix)), key=self.order)
        left = [k for k in keys if not position or self.order(k) > self.order(position)]
        is_empty = self.has_empty_pages and not token.startswith("empty") and bool(left)
        shown = [] if is_empty else left[: self.page]
        more = ""
        if len(shown) < len(left):
            next_token = ("empty" * is_empty) + (shown[-1] if shown else position).encode().hex()
            more = f"<NextContinuationToken>{next_token}</NextContinuationToken>" * self.has_tokens
        if self.shuffles:
            self._random.shuffle(shown)
        is_encoded = query.get("encoding-type") == "url"
        encode = quote_plus if is_encoded else str
        items = "".join(_item(encode(key), *self.objects[key]) for key in shown)
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>{str(len(shown) < len(left)).lower()}</IsTruncated>{more}"
            f"{'<EncodingType>url</EncodingType>' * is_encoded}{items}</ListBucketResult>"
        ).encode()
        answer = Answer(200, "OK", [("Content-Type", "application/xml")], [body], len(body))
        answer.set_header("Content-Length", str(len(body)))
        exchange.reply(answer)


def objects_of(server: S3Server, bucket: str) -> dict[str, tuple[int, str]]:
    """Size and ETag of each object that a bucket has now, by key."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    found = (entry for page in pages for entry in page.get("Contents", []))
    return {entry["Key"]: (entry["Size"], entry["ETag"]) for entry in found}


def _item(key: str, size: int, etag: str) -> str:
    when = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    return (
        f"<Contents><Key>{escape(key)}</Key>{when}<ETag>{escape(etag)}</ETag>"
        f"<Size>{size}</Size></Contents>"
    )
