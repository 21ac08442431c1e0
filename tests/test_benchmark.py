"""The benchmark's null server lists what it got as S3 does: else its second nights say nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

import boto3
import pytest
from support.files import make_files, md5

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

if sys.platform == "win32":
    pytest.skip("the null server asks asyncio for what Windows lacks", allow_module_level=True)

NULL_S3 = Path(__file__).with_name("benchmark") / "null_s3.py"
BUCKET = "bench"
KEYS = ["a", "a b", "a!", "a+b", "a&<b>", "a%41", "a/b", "a/c/d", "a/c/e", "a0", "b\ttab", "b\r\n"]
KEYS += ["n\u0301", "\u0144", "\uffee", "\U0001f600", "z~_.-"]
Operation = Literal["list_objects", "list_objects_v2"]


@contextlib.contextmanager
def null_server(*options: str) -> Iterator[S3Client]:
    """A client of a null server that runs as long as the context lasts."""
    command = [sys.executable, str(NULL_S3), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            endpoint = process.stdout.readline().split()[-1]
            yield boto3.client(
                "s3",
                endpoint_url=endpoint,
                region_name="us-east-1",
                aws_access_key_id="any",
                aws_secret_access_key="any",
            )
        finally:
            process.terminate()
            process.communicate()


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Client]:
    """A client of a null server that has got an object for each key, in disorder."""
    with null_server() as client:
        for key in sorted(KEYS, key=md5_of):
            client.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
        client.put_object(Bucket=f"{BUCKET}-too", Key="another", Body=b"")
        yield client


def md5_of(key: str) -> str:
    """What stands for no order at all."""
    return md5(key.encode())


def in_order(keys: Iterable[str]) -> list[str]:
    """As S3 lists them: by their bytes."""
    return sorted(keys, key=str.encode)


def listed(
    client: S3Client,
    operation: Operation = "list_objects_v2",
    *,
    page_size: int = 10,
    prefix: str = "",
    delimiter: str = "",
) -> list[str]:
    """The keys and, with a delimiter, the common prefixes of a listing, page by page."""
    pages = client.get_paginator(operation).paginate(
        Bucket=BUCKET, Prefix=prefix, Delimiter=delimiter, PaginationConfig={"PageSize": page_size}
    )
    found: list[str] = []
    for page in pages:
        here = [each["Key"] for each in page.get("Contents", [])]
        here += [each["Prefix"] for each in page.get("CommonPrefixes", [])]
        assert len(here) <= page_size
        found += in_order(here)
    return found


@pytest.mark.parametrize("page_size", [1, 2, 5, 1000])
@pytest.mark.parametrize("operation", ["list_objects_v2", "list_objects"])
def test_a_listing_has_all_keys_in_the_order_of_their_bytes(
    bucket: S3Client, operation: Operation, page_size: int
) -> None:
    look = functools.partial(listed, bucket, operation, page_size=page_size)
    assert look() == in_order(KEYS)
    below_a = [key for key in in_order(KEYS) if key.startswith("a/")]
    assert look(prefix="a/") == below_a
    grouped = {"a/" if key in below_a else key for key in KEYS}
    assert look(delimiter="/") == in_order(grouped)
    assert look(prefix="a/", delimiter="/") == ["a/b", "a/c/"]


def test_a_listing_that_is_not_url_encoded_has_the_same_keys(bucket: S3Client) -> None:
    with urllib.request.urlopen(f"{bucket.meta.endpoint_url}/{BUCKET}?list-type=2") as answer:
        root = ElementTree.fromstring(answer.read())
    assert [each.text for each in root.iterfind("{*}Contents/{*}Key")] == in_order(KEYS)


def test_a_listing_starts_after_any_key_whether_it_is_there_or_not(bucket: S3Client) -> None:
    for start in [*KEYS, "a/bb", "zzz"]:
        page = bucket.list_objects_v2(Bucket=BUCKET, StartAfter=start)
        later = [key for key in in_order(KEYS) if key.encode() > start.encode()]
        assert [each["Key"] for each in page.get("Contents", [])] == later


def test_a_listing_is_that_of_now_whatever_was_put_or_deleted_since_the_last() -> None:
    with null_server() as client:
        assert listed(client) == []
        for key in ("b", "c", "a"):
            client.put_object(Bucket=BUCKET, Key=key, Body=b"1")
        assert listed(client) == ["a", "b", "c"]
        client.delete_object(Bucket=BUCKET, Key="b")
        client.put_object(Bucket=BUCKET, Key="c", Body=b"22")
        client.put_object(Bucket=BUCKET, Key="d", Body=b"1")
        page = client.list_objects_v2(Bucket=BUCKET)
        assert [(each["Key"], each["Size"]) for each in page["Contents"]] == [
            ("a", 1),
            ("c", 2),
            ("d", 1),
        ]


def test_a_bucket_can_begin_with_the_files_of_a_folder(tmp_path: Path) -> None:
    files = {"one": b"1", "below/a b+c": b"22", "below/more/three": b"333"}
    make_files(tmp_path, files)
    os.utime(tmp_path / "one", ns=(0, 1_234_567_890_000_000_005))
    with null_server("--fill", f"{BUCKET}={tmp_path}") as client:
        page = client.list_objects_v2(Bucket=BUCKET)
        assert [(each["Key"], each["Size"], each["ETag"]) for each in page["Contents"]] == [
            (key, len(files[key]), f'"{md5(files[key])}"') for key in in_order(files)
        ]
        one = client.head_object(Bucket=BUCKET, Key="one")
        assert one["Metadata"] == {"mtime": "1234567890.000000005"}
        assert one["LastModified"] == page["Contents"][-1]["LastModified"]
