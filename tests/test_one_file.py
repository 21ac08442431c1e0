"""How one file is sent in one part: what is read, hashed and sent, and what is taken as proof."""

from __future__ import annotations

import base64
import errno
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from conftest import NewJob
from support.checks import assert_clean, assert_failed
from support.faults import (
    Fault,
    answer,
    call,
    cut_before_etag,
    drop_after_forward,
    drop_mid_body,
    flip_byte,
    set_headers,
    slow,
    wrong_etag,
)
from support.files import (
    IN_MEMORY_BYTES,
    IN_PARTS,
    LARGE_BYTES,
    MIB,
    make_files,
    md5,
    small_files,
    some_bytes,
)
from support.inside import WITHOUT_DIR_FD, clock, run_first
from support.job import Job
from support.proxy import Action, Exchange, Request
from support.script import finish, prelude, wait_until
from support.servers import S3Server
from support.systems import needs_ctime, needs_leases, needs_proc, needs_signals

BODY = b"some bytes of a file"
FOREIGN_ETAG = '"0123456789abcdef0123456789abcdef"'
CHANGED = "changed while it was sent"
# Read into memory, streamed, and sent in parts.
SIZES_OF_WAYS = {"memory": 20, "streamed": IN_MEMORY_BYTES + MIB, "parts": LARGE_BYTES}
AS_WAYS = ("--multipart-threshold", str(LARGE_BYTES - 1000), "--multipart-chunksize", "5MiB")


@pytest.fixture
def small_job(new_job: NewJob, rclone_server: S3Server, each_client: tuple[str, ...]) -> Job:
    """A job by each of the clients, on a server that checks signatures and Content-MD5."""
    return new_job(rclone_server, *each_client)


def base64_md5(body: bytes) -> str:
    return base64.b64encode(bytes.fromhex(md5(body))).decode()


# --- What is sent ----------------------------------------------------------------------------

SIZES = [0, 1, 256 * 1024, 256 * 1024 + 1, IN_MEMORY_BYTES, IN_MEMORY_BYTES + 1]
CONTENT_TYPES = {
    "a.txt": "text/plain",
    "b.html": "text/html",
    "c.tar.gz": "application/x-tar",
    "d.jpg": "image/jpeg",
    "large.json": "application/json",
}


def test_a_file_is_sent_once_with_its_md5_and_nothing_else_to_prove_it(small_job: Job) -> None:
    job = small_job
    files = {str(size): some_bytes(size) for size in SIZES}
    job.write(files)
    assert_clean(job.run())
    job.check_all_is_there()
    puts = {put.key: put for put in job.requests("PutObject")}
    assert len(puts) == len(job.puts()) == len(files)
    for key, body in files.items():
        headers = puts[key].headers
        assert headers["Content-MD5"] == base64_md5(body)
        assert (job.entry(key)["etag"], job.entry(key)["size"]) == (md5(body), len(body))
        names = {name.lower() for name in headers}
        assert [n for n in names if "checksum" in n or "trailer" in n] == []
        assert "aws-chunked" not in headers.get("Content-Encoding", "")
        # To wait for leave to send costs a small file a whole round trip.
        assert ("expect" in names) <= (len(body) > IN_MEMORY_BYTES)


def test_an_object_has_the_type_and_the_time_of_its_file(
    new_job: NewJob, moto_server: S3Server, each_client: tuple[str, ...]
) -> None:
    job = new_job(moto_server, *each_client)
    large = {"large.json": some_bytes(IN_MEMORY_BYTES + 1)}
    job.write({**dict.fromkeys(CONTENT_TYPES, BODY), "no extension": BODY, **large})
    for path in job.folder.iterdir():
        os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    assert_clean(job.run())
    for key, content_type in CONTENT_TYPES.items():
        assert job.head(key)["ContentType"] == content_type
    untyped = {"binary/octet-stream", "application/octet-stream"}
    assert job.head("no extension")["ContentType"] in untyped
    for key in job.state():
        assert job.head(key)["Metadata"]["mtime"] == "1600000000.123456789"


# --- The proof -------------------------------------------------------------------------------

BOTH_SIZES = {"small": BODY, "streamed": some_bytes(IN_MEMORY_BYTES + 1)}


@pytest.mark.parametrize(
    ("action", "said"),
    [
        pytest.param(wrong_etag(), "ETag", id="wrong-etag"),
        pytest.param(flip_byte(), "BadDigest", id="flipped-byte"),
    ],
)
@pytest.mark.few(2)
def test_what_is_damaged_again_and_again_is_tried_three_times_and_fails(
    small_job: Job, action: Action, said: str
) -> None:
    job = small_job
    job.write({**BOTH_SIZES, "good": b"good"})
    job.proxy.add_fault(Fault(action, operation="PutObject", key=lambda key: key in BOTH_SIZES))
    job.check_failed(job.run(), *BOTH_SIZES, said=said)
    assert sorted(job.puts()) == sorted(["good", *BOTH_SIZES, *BOTH_SIZES, *BOTH_SIZES])
    if said == "BadDigest":
        assert set(job.in_bucket()) == {"good"}
        assert "damage" in job.errors()["small"]


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(wrong_etag(), id="wrong-etag"),
        pytest.param(flip_byte(), id="flipped-byte"),
        pytest.param(drop_after_forward(), id="lost-answer"),
        pytest.param(answer(400, "BadDigest"), id="refused"),
    ],
)
@pytest.mark.few(4)
def test_a_fault_once_is_mended_by_sending_again(small_job: Job, action: Action) -> None:
    job = small_job
    job.write(BOTH_SIZES)
    for key in BOTH_SIZES:
        job.proxy.add_fault(Fault(action, operation="PutObject", key=key, times=1))
    assert_clean(job.run())
    assert sorted(job.puts()) == ["small", "small", "streamed", "streamed"]
    job.check_all_is_there()


@pytest.mark.parametrize(
    "headers",
    [
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
    ids=lambda headers: next(iter(headers.values())),
)
def test_an_etag_that_is_no_md5_is_not_compared(small_job: Job, headers: dict[str, str]) -> None:
    small_job.write({"f": BODY})
    small_job.proxy.add_fault(Fault(set_headers({**headers, "ETag": FOREIGN_ETAG})))
    assert_clean(small_job.run())
    small_job.check_all_is_there()
    assert small_job.puts() == ["f"]
    encryption = headers.get("x-amz-server-side-encryption")
    assert encryption in (None, small_job.entry("f").get("sse"))


def test_an_etag_under_the_servers_own_keys_is_compared(small_job: Job) -> None:
    small_job.write({"f": BODY})
    headers = {"x-amz-server-side-encryption": "AES256", "ETag": FOREIGN_ETAG}
    small_job.proxy.add_fault(Fault(set_headers(headers), operation="PutObject"))
    small_job.check_failed(small_job.run(), "f", said="ETag")


# --- ETags as servers and proxies write them -------------------------------------------------

MADE_UP = {
    # Of a server that keeps what is sent in one part as an upload in parts.
    "one-part": f'{FOREIGN_ETAG[:-1]}-1"',
    "uuid": '"123E4567-E89B-12D3-A456-426614174000"',
    "none": "",
}


def rewriting_etags(change: Callable[[str], str]) -> Action:
    """Have the server write its ETags otherwise: in headers, and in listings."""

    def act(exchange: Exchange) -> None:
        said = exchange.forward()
        if etag := dict(said.headers).get("ETag"):
            said.set_header("ETag", change(etag))
        if exchange.request.operation == "ListObjectsV2":
            body = b"".join(said.body).decode()
            inside = re.compile("(?<=<ETag>)[^<]*(?=</ETag>)")
            said.set_body(inside.sub(lambda found: change(found[0]), body).encode())
        exchange.reply(said)

    return act


@pytest.fixture
def many_job(new_job: NewJob, moto_server: S3Server) -> Job:
    """A job of files for each way of sending, lanes among them."""
    job = new_job(moto_server, *AS_WAYS, "--preferred-transfer-client", "crt")
    job.write({key: some_bytes(size) for key, size in SIZES_OF_WAYS.items()} | small_files(20))
    return job


def test_an_etag_is_the_same_however_it_is_written(many_job: Job) -> None:
    job = many_job
    weak = Fault(rewriting_etags(lambda etag: f"W/{etag}"), operation="UploadPart")
    job.proxy.add_fault(weak)
    job.proxy.add_fault(Fault(rewriting_etags(lambda etag: f"W/{etag.upper()}")))
    assert_clean(job.run())
    job.check_all_is_there()
    sent = sorted(job.in_folder())
    assert job.sent() == sent
    assert all(re.fullmatch("[0-9a-f]{32}(-3)?", entry["etag"]) for entry in job.entries())
    assert_clean(job.run("--verify"))
    assert_clean(job.run("--skip-unchanged"))
    assert job.sent() == sent


@pytest.mark.parametrize("name", MADE_UP)
@pytest.mark.few(2)
def test_where_an_etag_is_no_md5_the_object_is_looked_at_and_nothing_is_sent_twice(
    many_job: Job, tmp_path: Path, name: str
) -> None:
    job, etag = many_job, MADE_UP[name]
    job.path("parts").unlink()
    job.proxy.add_fault(Fault(rewriting_etags(lambda _: etag), operation="PutObject"))
    if etag:  # a server that makes them up does so everywhere
        job.proxy.add_fault(Fault(rewriting_etags(lambda _: etag)))
    # Of a young file such an ETag could not tell later whether it has changed.
    assert_clean(job.run(env=run_first(tmp_path / "later", clock())))
    sent = sorted(job.in_folder())
    assert job.sent() == sorted(r.key for r in job.requests("HeadObject")) == sent
    assert job.state() == dict.fromkeys(sent, 1)
    if name == "one-part":  # that of an object in parts looks like it
        assert_clean(job.run("--verify", "folder"))
    assert_clean(job.run("--skip-unchanged"))
    assert job.sent() == sent
    job.proxy.clear_faults()
    assert job.in_bucket() == job.in_folder()


def test_parts_whose_etags_are_no_md5s_are_accepted(moto_job: Job) -> None:
    job = moto_job
    job.write({"large": some_bytes(LARGE_BYTES)})
    etags: dict[str, str] = {}

    def make_up(etag: str) -> str:
        return etags.setdefault(etag, etag.translate(str.maketrans("0123456789", "ghijklmnop")))

    def complete(exchange: Exchange) -> None:
        def as_known(body: Iterable[bytes]) -> Iterator[bytes]:
            text = b"".join(body).decode()
            for etag, other in etags.items():
                text = text.replace(other.strip('"'), etag.strip('"'))
            yield text.encode()

        exchange.reply(exchange.forward(as_known))

    job.proxy.add_fault(Fault(rewriting_etags(make_up), operation="UploadPart"))
    job.proxy.add_fault(Fault(complete, operation="CompleteMultipartUpload"))
    assert_clean(job.run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        pytest.param(set_headers({"Content-Length": "7"}), "is there", id="other-size"),
        pytest.param(set_headers({"ETag": FOREIGN_ETAG}), "its MD5", id="other-md5"),
        pytest.param(answer(404, "NoSuchKey"), "is there", id="not-there"),
    ],
)
@pytest.mark.few(3)
def test_an_object_that_does_not_prove_to_be_the_file_is_damage(
    small_job: Job, head: Action, said: str
) -> None:
    job = small_job
    job.write({**BOTH_SIZES, "good": b"good"})
    damaged = BOTH_SIZES.__contains__
    made_up = set_headers({"ETag": MADE_UP["uuid"]})
    job.proxy.add_fault(Fault(made_up, operation="PutObject", key=damaged))
    job.proxy.add_fault(Fault(head, operation="HeadObject", key=damaged))
    job.check_failed(job.run(), *BOTH_SIZES, said=said)
    assert sorted(job.puts()) == sorted(["good", *BOTH_SIZES, *BOTH_SIZES, *BOTH_SIZES])


@pytest.mark.parametrize("etag", [MADE_UP["uuid"], ""], ids=["made-up", "none"])
@pytest.mark.few(2)
def test_where_the_object_may_not_be_looked_at_an_etag_at_least_is_asked_for(
    small_job: Job, etag: str
) -> None:
    job = small_job
    job.write(BOTH_SIZES)
    job.proxy.add_fault(Fault(set_headers({"ETag": etag}), operation="PutObject"))
    job.proxy.add_fault(Fault(answer(403, "AccessDenied"), operation="HeadObject"))
    completed = job.run()
    if etag:
        assert_clean(completed)
        assert sorted(job.puts()) == sorted(BOTH_SIZES)
    else:
        job.check_failed(completed, *BOTH_SIZES, said="ETag is missing")


def test_an_answer_that_is_cut_before_its_etag_has_nothing_sent_again(rclone_job: Job) -> None:
    job = rclone_job
    job.write(BOTH_SIZES)
    job.proxy.add_fault(Fault(cut_before_etag(), operation="PutObject"))
    assert_clean(job.run("--preferred-transfer-client", "classic"))
    assert sorted(job.puts()) == sorted(BOTH_SIZES)
    job.check_all_is_there()


def test_a_file_that_changes_before_the_object_is_looked_at_is_sent_again(
    new_job: NewJob, rclone_server: S3Server
) -> None:
    job = new_job(rclone_server, "--preferred-transfer-client", "crt")
    job.write({"f": BODY})

    def act(exchange: Exchange) -> None:
        said = exchange.forward()
        said.set_header("ETag", MADE_UP["uuid"])
        exchange.reply(said)

    job.proxy.add_fault(Fault(act, operation="PutObject"))
    change = Fault(call(lambda _: rewrite(job.path("f"))), operation="HeadObject", times=1)
    job.proxy.add_fault(change)
    assert_clean(job.run())
    assert change.hits == 1
    job.check_all_is_there()


# --- Files that change -----------------------------------------------------------------------


def changing(job: Job, change: Callable[[Path], object], times: int | None = None) -> None:
    """Make a file for each way of sending, which changes when its bytes are under way."""
    job.write({key: some_bytes(size) for key, size in SIZES_OF_WAYS.items()} | {"good": b"good"})
    for key in SIZES_OF_WAYS:
        job.proxy.add_fault(
            Fault(
                call(lambda request: change(job.path(request.key))),
                operation=("PutObject", "UploadPart"),
                part_number=2 if key == "parts" else None,
                key=key,
                times=times,
            )
        )


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"one more line\n")


def rewrite(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def rewrite_with_old_time(path: Path) -> None:
    status = path.stat()
    rewrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def rewrite_longer(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size + 10))


def rewrite_start_and_append(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(8))
    append(path)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_a_growing_file_is_sent_as_long_as_it_was(job: Job) -> None:
    changing(job, append)
    at_first = job.in_folder()
    assert_clean(job.run(*AS_WAYS))
    now = job.in_folder()
    assert {key for key in at_first if now[key] != at_first[key]} == set(SIZES_OF_WAYS)
    assert job.in_bucket() == at_first
    assert {key: job.entry(key)["size"] for key in SIZES_OF_WAYS} == SIZES_OF_WAYS


def test_a_file_that_grows_in_the_middle_of_its_body_is_sent_as_long_as_it_was(job: Job) -> None:
    job.write({"f": some_bytes(IN_MEMORY_BYTES + MIB)})
    at_first = job.in_folder()
    job.proxy.add_fault(Fault(slow(10 * MIB), operation="PutObject"))
    process = job.start()
    job.wait_for("PutObject")
    while process.poll() is None and not job.requests("PutObject")[0].status:
        append(job.path("f"))
    assert_clean(finish(process))
    assert job.in_bucket() == at_first


def test_a_file_whose_time_alone_changes_is_sent_once(job: Job) -> None:
    changing(job, touch)
    assert_clean(job.run(*AS_WAYS))
    job.check_all_is_there()
    assert job.sent() == sorted([*SIZES_OF_WAYS, "good"])


@pytest.mark.parametrize(
    "change",
    [
        rewrite,
        pytest.param(rewrite_with_old_time, marks=needs_ctime),
        rewrite_longer,
        rewrite_start_and_append,
        shrink,
    ],
)
@pytest.mark.few(3)
def test_a_file_that_changes_once_is_sent_again(job: Job, change: Callable[[Path], None]) -> None:
    changing(job, change, times=1)
    assert_clean(job.run(*AS_WAYS))
    job.check_all_is_there()


@pytest.mark.parametrize("change", [rewrite, shrink])
@pytest.mark.few(1)
def test_a_file_that_changes_all_the_time_is_tried_three_times(
    job: Job, change: Callable[[Path], None]
) -> None:
    changing(job, change)
    job.check_failed(job.run(*AS_WAYS), *SIZES_OF_WAYS, said=CHANGED)
    tries = Counter(job.sent())
    assert (tries["memory"], tries["parts"], tries["good"]) == (3, 3, 1)
    assert job.open_uploads() == []


# --- Files that have become links ------------------------------------------------------------

# When the state has the plan, and nothing is sent yet.
LINK_AFTER_PLAN = """\
import os
real = os.replace
def replace(old, new):
    real(old, new)
    with open(new) as state:
        is_planned = {path!r} in state.read()
    if is_planned and not os.path.islink({path!r}):
        os.rename({path!r}, {away!r})
        os.symlink({target!r}, {path!r})
os.replace = replace
"""
AS_LINKS = {
    "thread": (20, ("--preferred-transfer-client", "classic")),
    "lane": (20, ("--preferred-transfer-client", "crt")),
    "streamed": (IN_MEMORY_BYTES + 1, ()),
    "parts": (LARGE_BYTES, IN_PARTS),
}


def link_after_plan(folder: Path, path: Path, target: Path, *codes: str) -> dict[str, str]:
    """The environment of a run in which a file or folder becomes a link after the walk."""
    away = folder / "away"
    code = LINK_AFTER_PLAN.format(path=str(path), away=str(away), target=str(target))
    return run_first(folder / "first", code, *codes)


@pytest.mark.parametrize("follows", [False, True], ids=["no-follow", "follow"])
@pytest.mark.parametrize("way", AS_LINKS)
@pytest.mark.few(4)
def test_a_file_that_becomes_a_link_after_the_walk_is_followed_only_where_links_are(
    job: Job, tmp_path: Path, way: str, follows: bool
) -> None:
    size, options = AS_LINKS[way]
    job.write({"f": some_bytes(size), "good": b"good"})
    secret = some_bytes(size, seed=1)
    (tmp_path / "secret").write_bytes(secret)
    env = link_after_plan(tmp_path, job.path("f"), tmp_path / "secret")
    if follows:
        assert_clean(job.run(*options, env=env))
        assert job.objects() == {"f": secret, "good": b"good"}
        return
    completed = job.run("--no-follow-symlinks", *options, env=env)
    job.check_failed(completed, "f", said="it has become a symbolic link; ")
    assert job.objects() == {"good": b"good"}
    assert job.path("f").is_symlink()


BY_NAME = [pytest.param(way, "", id=way) for way in AS_LINKS]
LOOKED_AT = [pytest.param(way, WITHOUT_DIR_FD, id=f"{way}-looked-at") for way in ("thread", "lane")]


@pytest.mark.parametrize(("way", "system"), [*BY_NAME, *LOOKED_AT])
@pytest.mark.few(3)
def test_a_folder_that_becomes_a_link_after_the_walk_is_not_followed(
    job: Job, tmp_path: Path, way: str, system: str
) -> None:
    size, options = AS_LINKS[way]
    job.write({"d/e/f": some_bytes(size), "good": b"good"})
    make_files(tmp_path / "secret", {"e/f": some_bytes(size, seed=1)})
    env = link_after_plan(tmp_path, job.path("d"), tmp_path / "secret", system)
    completed = job.run("--no-follow-symlinks", *options, env=env)
    job.check_failed(completed, "d/e/f", said="a folder above it has become a symbolic link; ")
    assert job.objects() == {"good": b"good"}


@pytest.mark.parametrize("system", ["", WITHOUT_DIR_FD], ids=["by-name", "looked-at"])
@pytest.mark.few(1)
def test_without_links_what_is_deep_below_is_opened(job: Job, tmp_path: Path, system: str) -> None:
    job.write({"a/b/c/f": BODY, "a/b/d/large": some_bytes(LARGE_BYTES), "good": b"good"})
    env = run_first(tmp_path / "first", system)
    assert_clean(job.run("--no-follow-symlinks", *AS_WAYS, env=env))
    job.check_all_is_there()


def test_a_file_that_becomes_a_link_between_parts_has_nothing_else_sent(
    job: Job, tmp_path: Path
) -> None:
    job.write({"f": some_bytes(LARGE_BYTES)})
    (tmp_path / "secret").write_bytes(some_bytes(LARGE_BYTES, seed=1))

    def link(_: Request) -> None:
        job.path("f").unlink()
        job.path("f").symlink_to(tmp_path / "secret")

    job.proxy.add_fault(Fault(call(link), operation="CreateMultipartUpload", times=1))
    completed = job.run("--no-follow-symlinks", *IN_PARTS)
    job.check_failed(completed, "f", said="it has become a symbolic link; ")
    assert job.sent_parts() == []
    assert job.open_uploads() == []


# --- Files that other processes have leases on -----------------------------------------------

# As Samba and nfsd do: it gives the lease up when the system asks it to.
HOLDER = """\
import fcntl, os, signal, sys
file = os.open(sys.argv[1], os.O_RDWR)
def give_up(*_):
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    print("asked", flush=True)
signal.signal(signal.SIGIO, give_up)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
while True:
    signal.pause()
"""


@needs_leases
@pytest.mark.parametrize("way", AS_LINKS)
@pytest.mark.few(2)
def test_a_file_with_a_lease_is_sent_once_the_lease_is_given_up(job: Job, way: str) -> None:
    size, options = AS_LINKS[way]
    job.write({"f": some_bytes(size), "good": b"good"})
    command = [sys.executable, "-c", HOLDER, str(job.path("f"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        completed = job.run(*options)
        holder.kill()
        assert holder.stdout.read() == "asked\n"
    assert_clean(completed)
    job.check_all_is_there()


LEASE = """\
import errno, os
real, real_read, left = os.open, os.read, {count}

def open_file(path, *args, **keywords):
    global left
    if os.fspath(path) == {path!r} and left:
        left -= 1
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return real(path, *args, **keywords)

def read(file, size):
    if not os.get_blocking(file):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return real_read(file, size)

os.open, os.read = open_file, read
"""


@needs_leases
def test_a_lease_that_lasts_is_waited_for_and_the_file_read_blocking(job: Job) -> None:
    job.write({"f": BODY, "good": b"good"})
    flags = prelude(LEASE.format(count=10, path=str(job.path("f"))))
    assert_clean(job.run(python_flags=flags))
    job.check_all_is_there()
    assert job.puts() == ["good", "f"]


@pytest.mark.long
@needs_leases
def test_a_lease_that_is_never_given_up_fails_its_file_alone(job: Job) -> None:
    job.write({"f": BODY, "good": b"good"})
    flags = prelude(LEASE.format(count=1000, path=str(job.path("f"))))
    why = f"{os.strerror(errno.EAGAIN).lower()}; close it in the program that has a lease on it"
    job.check_failed(job.run(python_flags=flags), "f", said=why)


# --- Files that cannot be read to their end --------------------------------------------------

# In the script's process: reads of a file named so fail where a condition is met.
BAD_DISK = """\
import errno, os

real_read, real_close, were_read = os.read, os.close, set()

def read(file, size):
    path = os.readlink(f"/proc/self/fd/{{file}}")
    if not os.path.basename(path).startswith("bad"):
        return real_read(file, size)
    at = os.lseek(file, 0, os.SEEK_CUR)
    if {condition}:
        raise OSError({errno}, os.strerror({errno}))
    data = real_read(file, size)
    if at + len(data) >= os.fstat(file).st_size:
        were_read.add(file)
    return data

def close(file):
    were_read.discard(file)
    real_close(file)

os.read, os.close = read, close
"""
BAD_WHEN = {
    "at-once": ("True", ["memory", "streamed", "parts"]),
    "in-the-middle": (f"at >= {MIB}", ["streamed", "parts"]),
    # Those are read a second time, to be sent.
    "after-hashing": ("file in were_read", ["streamed", "parts"]),
}


@needs_proc
@pytest.mark.parametrize("when", BAD_WHEN)
@pytest.mark.few(2)
def test_a_file_that_the_disk_cannot_read_fails_alone(job: Job, tmp_path: Path, when: str) -> None:
    condition, ways = BAD_WHEN[when]
    code = BAD_DISK.format(errno=errno.EIO, condition=condition)
    (tmp_path / "sitecustomize.py").write_text(code)
    bad = {f"bad-{way}": SIZES_OF_WAYS[way] for way in ways}
    job.write({key: some_bytes(size) for key, size in bad.items()} | {"good": b"good"})
    completed = job.run(*AS_WAYS, env={"PYTHONPATH": str(tmp_path)})
    job.check_failed(completed, *bad, said=f"{os.strerror(errno.EIO).lower()}; check the disk")
    assert set(job.in_bucket()) == {"good"}
    assert_clean(job.crash_run(*AS_WAYS))
    job.check_all_is_there()


@needs_proc
def test_a_file_that_holds_more_than_its_size_fails(job: Job) -> None:
    job.make("a.dat")
    (job.folder / "version").symlink_to("/proc/version")
    completed = job.run()
    assert_failed(completed, [job.folder / "version"])
    assert "more than its size" in job.errors()["version"]
    assert set(job.in_bucket()) == {"a.dat"}


# --- --max-bandwidth -------------------------------------------------------------------------

RATE_BYTES = 2_000_000
LIMIT = ("--max-bandwidth", "2MB/s")


def seconds_of(job: Job, *options: str) -> float:
    """Run to a good end; return the time from the first to the last byte, as the proxy saw it."""
    seen: list[float] = []
    job.proxy.on_bytes = seen.append
    assert_clean(job.run(*LIMIT, *options))
    return seen[-1] - seen[0]


def test_small_files_take_as_long_as_the_limit_says(small_job: Job) -> None:
    # By several processes: the limit is for all of them together.
    files = {f"{number:03}": os.urandom(20_000) for number in range(200)}
    small_job.write(files)
    total = sum(map(len, files.values()))
    # The first file may leave at once, and what was sent last is seen when it begins to arrive.
    assert seconds_of(small_job) > 0.9 * total / RATE_BYTES
    small_job.check_all_is_there()
    assert len(small_job.puts()) == len(files)


@pytest.mark.parametrize("way", ["memory", "streamed", "parts"])
@pytest.mark.few(2)
def test_a_large_file_takes_as_long_as_the_limit_says(job: Job, way: str) -> None:
    size = {"memory": 4 * MIB, "streamed": IN_MEMORY_BYTES + 1, "parts": LARGE_BYTES}[way]
    rate = ("--max-bandwidth", "5MB/s")
    job.write({"f": os.urandom(size)})
    assert seconds_of(job, *rate, *(IN_PARTS if way == "parts" else ())) > 0.8 * size / 5_000_000
    # Each byte once: a body is not read to be signed, and nothing is tried twice.
    assert sum(r.body_bytes for r in job.requests("PutObject", "UploadPart")) == size
    job.check_all_is_there()


@pytest.mark.parametrize("rate", ["10kB/s", "1TB/s", " 0.7 mb/s "])
@pytest.mark.few(2)
def test_rates_are_written_like_sizes(job: Job, rate: str) -> None:
    job.make(*(f"{number:03}" for number in range(100)))
    assert_clean(job.run("--max-bandwidth", rate))
    job.check_all_is_there()


@pytest.mark.parametrize(
    "action",
    [answer(503, "SlowDown"), drop_mid_body(), flip_byte()],
    ids=["throttled", "cut-off", "damaged"],
)
@pytest.mark.few(2)
def test_what_fails_once_is_sent_again_below_a_limit(job: Job, action: Action) -> None:
    job.write({key: some_bytes(size) for key, size in SIZES_OF_WAYS.items()})
    faults = [
        job.proxy.add_fault(Fault(action, operation=operation, times=2))
        for operation in ("PutObject", "UploadPart")
    ]
    assert_clean(job.run("--max-bandwidth", "100MB/s", *AS_WAYS))
    assert [fault.hits for fault in faults] == [2, 2]
    job.check_all_is_there()


@needs_signals
def test_a_signal_ends_a_run_that_waits_for_its_turn(job: Job) -> None:
    job.write({key: some_bytes(size) for key, size in SIZES_OF_WAYS.items()})
    process = job.start("--max-bandwidth", "100kB/s", *AS_WAYS)
    wait_until(lambda: job.requests("PutObject"), 60, "the first upload")
    process.send_signal(signal.SIGTERM)
    completed = finish(process, timeout=30)
    assert completed.returncode == 143
    assert "--crashrun 1" in completed.stderr
    assert 0 in job.state().values()
    assert_clean(job.crash_run(*AS_WAYS))
    job.check_all_is_there()
