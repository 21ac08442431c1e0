"""The state file: what is in it when, that it is never damaged, and whose it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import NewJob
from support.checks import assert_clean, assert_failed, assert_replaced, assert_stopped, lines_with
from support.faults import Fault, answer, call, delay, stall
from support.files import WINDOWS_FORBIDS, digests, small_files
from support.inside import clock, run_first
from support.job import NOBODY, Job, kill, named
from support.kills import killing_call
from support.proxy import Exchange
from support.script import PROJECT, finish, is_root, journal_of, prelude, wait_until
from support.servers import S3Server
from support.shards import NAMES, SPLIT_IN_3, keys_of
from support.systems import (
    needs_byte_names,
    needs_fifos,
    needs_limits,
    needs_limits_of_others,
    needs_odd_names,
    needs_permissions,
    needs_proc,
    needs_replace_of_open_files,
    needs_root,
    needs_signals,
)

if sys.platform != "win32":
    import resource


@pytest.fixture
def small_job(new_job: NewJob, rclone_server: S3Server, each_client: tuple[str, ...]) -> Job:
    """A job by each of the clients that send small files."""
    return new_job(rclone_server, *each_client)


def assert_refused(job: Job, *arguments: str, words: Iterable[str]) -> None:
    """Check that a run stops with these words, asks the server nothing and keeps the state."""
    state, seen = job.state_path.read_bytes(), job.seen()
    assert_stopped(job.run(*arguments), *words)
    assert job.seen() == seen
    assert job.state_path.read_bytes() == state


# --- What is in it ---------------------------------------------------------------------------


def test_fields_of_an_uploaded_file(small_job: Job, tmp_path: Path) -> None:
    job = small_job
    (content,) = job.make("sub/a.dat").values()
    path = job.folder / "sub/a.dat"
    assert_clean(job.run(env=run_first(tmp_path / "later", clock())))
    (entry,) = job.entries()
    expected = {
        "filepath": str(path),
        "uploadedSuccess": 1,
        "filename": "sub/a.dat",
        "bucket": job.bucket,
        "endpoint": job.endpoint_name,
        "size": len(content),
        "mtime_ns": path.stat().st_mtime_ns,
        "ctime_ns": path.stat().st_ctime_ns,
        "etag": hashlib.md5(content, usedforsecurity=False).hexdigest(),
    }
    if sys.platform == "win32":
        del expected["ctime_ns"]
    assert list(entry.items()) == list(expected.items())


def test_fields_of_a_failed_file(job: Job) -> None:
    job.make("a.dat")
    (job.folder / "b.dat").symlink_to("missing")
    assert job.run().returncode == 1
    failed = job.entries()[1]
    assert failed.pop("error")
    assert failed == {
        "filepath": str(job.folder / "b.dat"),
        "uploadedSuccess": 0,
        "filename": "b.dat",
        "bucket": job.bucket,
        "endpoint": job.endpoint_name,
    }


def test_one_entry_a_line(rclone_job: Job) -> None:
    job = rclone_job  # moto takes no name with a line break
    names = ["a.dat", "line\nbreak", 'quo"te', "ä", "back\\slash"]
    if sys.platform == "win32":
        names = [name for name in names if not re.search(WINDOWS_FORBIDS, name)]
    job.make(*names)
    (job.folder / "z-broken").symlink_to("missing")
    assert job.run().returncode == 1
    lines = job.state_path.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    entries = [json.loads(line.rstrip(",")) for line in lines[1:-1]]
    assert {entry["filename"] for entry in entries} == {*names, "z-broken"}
    for line in lines[1:-1]:
        assert line.startswith('{"filepath": "')
    missing = [line for line in lines if '"uploadedSuccess": 0' in line]
    assert [json.loads(line.rstrip(","))["filename"] for line in missing] == ["z-broken"]


def test_names_are_readable_in_it(job: Job) -> None:
    job.make("Ünïcode 日本.dat")
    assert_clean(job.run())
    assert "Ünïcode 日本.dat" in job.state_path.read_text(encoding="utf-8")


# --- How it is written -----------------------------------------------------------------------

RECORDER = """
import os
def recorded(name, real):
    def call(*args):
        paths = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else a for a in args[:2]]
        with open(__RECORD__, "a") as record:
            print(name, *map(os.path.basename, paths), file=record)
        return real(*args)
    return call
os.fsync, os.replace = recorded("fsync", os.fsync), recorded("replace", os.replace)
"""


@needs_proc
def test_every_save_is_on_the_disk_before_it_is_the_state(job: Job, tmp_path: Path) -> None:
    job.make("a.dat", "b.dat")
    record = tmp_path / "record"
    flags = prelude(RECORDER.replace("__RECORD__", repr(str(record))))
    assert_clean(job.run(python_flags=flags))
    name, folder = job.state_path.name, job.state_path.parent.name
    one_save = [f"fsync {name}.tmp", f"replace {name}.tmp {name}", f"fsync {folder}"]
    calls = record.read_text().splitlines()
    saves = [n for n, call in enumerate(calls) if call == one_save[1]]
    assert len(saves) >= 3  # at the walk, of the plan, at the end
    assert [calls[n - 1 : n + 2] for n in saves] == [one_save] * len(saves)
    assert {call for call in calls if call not in one_save} <= {f"fsync {name}.journal"}


UNLINKS = """
def unlink(path, *, real=os.unlink, record=recorded("unlink", lambda path: None)):
    real(path)
    record(path)
os.unlink = unlink
"""


@needs_proc
@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_a_journal_is_gone_for_good_before_it_could_be_read_over_another_save(
    job: Job, tmp_path: Path, same: bool
) -> None:
    claims = [job.uploaded_entry(key) for key in job.make("a.dat")]
    state = job.write_state(*claims)
    assert job.run("--verify").returncode == 1  # the bucket has nothing
    job.write_journal(*claims, state=None if same else state)
    if not same:
        job.state_path.write_bytes(state)
    record = tmp_path / "record"
    flags = prelude((RECORDER + UNLINKS).replace("__RECORD__", repr(str(record))))
    assert job.run("--verify", python_flags=flags).returncode == 1
    name, folder = job.state_path.name, job.state_path.parent.name
    unlinked = [f"unlink {name}.journal", f"fsync {folder}"]
    replaced = [f"replace {name}.tmp {name}", f"fsync {folder}"]
    order = [*unlinked, *replaced] if same else [*replaced, *unlinked]
    assert record.read_text().splitlines()[-5:] == [f"fsync {name}.tmp", *order]


# --- When it is written ----------------------------------------------------------------------


def test_it_is_complete_before_the_first_upload(job: Job) -> None:
    files = job.make(*(f"{number:03}" for number in range(100)), "sub/last")
    seen: list[dict[str, int]] = []
    job.proxy.add_fault(
        Fault(call(lambda _: seen.append(job.state())), operation="PutObject", times=1)
    )
    assert_clean(job.run())
    assert seen == [dict.fromkeys(files, 0)]


def test_it_lists_the_folder_itself_during_the_walk(job: Job, tmp_path: Path) -> None:
    job.make("a.dat", "sub/b.dat")
    copy = tmp_path / "copy.json"
    # The copy is made when the walk enters the folder `sub`.
    watch = f"""
import os, shutil
scandir = os.scandir
def watched(path="."):
    if os.path.basename(path) == "sub":
        shutil.copy({str(job.state_path)!r}, {str(copy)!r})
    return scandir(path)
os.scandir = watched
"""
    assert_clean(job.run(python_flags=prelude(watch)))
    (entry,) = json.loads(copy.read_text(encoding="utf-8"))
    assert (entry["filepath"], entry["uploadedSuccess"]) == (str(job.folder), 0)
    # What a kill at that moment would have left is enough for a crash run.
    copy.replace(job.state_path)
    assert_clean(job.crash_run())
    assert job.state() == {"a.dat": 1, "sub/b.dat": 1}


@needs_replace_of_open_files
def test_it_is_saved_as_often_as_is_said(job: Job) -> None:
    job.write(small_files(30))
    job.proxy.add_fault(Fault(delay(0.1), operation="PutObject"))
    process = job.start("--max-concurrency", "1")
    seen: set[int] = set()

    def look() -> bool:
        if job.state_path.exists():
            seen.add(sum(job.state().values()))
        return process.poll() is not None

    wait_until(look, 60, "the end of the run")
    assert_clean(finish(process))
    # It is written down at least every second, in which ten files are sent.
    assert len(seen & set(range(1, 30))) > 1


@needs_replace_of_open_files
def test_it_never_says_uploaded_before_the_server_has(small_job: Job) -> None:
    job = small_job
    files = small_files(30)
    job.write(files)
    held = {key for number, key in enumerate(sorted(files)) if number % 3 == 1}
    leave = threading.Event()

    def hold(exchange: Exchange) -> None:
        answer = exchange.forward()  # the server has it now, and the script does not know
        leave.wait(60)
        exchange.reply(answer)

    job.proxy.add_fault(Fault(hold, operation="PutObject", key=lambda key: key in held))
    process = job.start("--max-concurrency", "30")
    try:
        wait_until(
            lambda: job.state_path.exists() and sum(job.state().values()) == 20,
            60,
            "a state with all that has been answered",
        )
        assert job.uploaded() == set(files) - held
        # A save writes all entries down, those that are under way too.
        uploaded = re.compile(r'"uploadedSuccess": 1, "filename": "([^"]*)"')
        saved = wait_until(
            lambda: (keys := uploaded.findall(job.state_path.read_text()))[19:] and keys,
            60,
            "a save with all that has been answered",
        )
        assert set(saved) == set(files) - held
    finally:
        leave.set()
    assert_clean(finish(process))
    assert job.uploaded() == set(files)


@needs_replace_of_open_files
def test_a_reader_never_sees_half_of_it(job: Job) -> None:
    job.make(*(f"{number:03}" for number in range(60)))
    assert_clean(job.run())
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    ended = threading.Event()
    sizes: set[int] = set()
    broken: list[bytes] = []

    def read() -> None:
        while not ended.is_set():
            content = job.state_path.read_bytes()
            try:
                sizes.add(len(json.loads(content)))
            except ValueError:
                broken.append(content)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        completed = job.run("--max-concurrency", "2")
    finally:
        ended.set()
        reader.join()
    assert_clean(completed)
    # All of its files, and during the walk the folder too.
    assert (broken, sizes | {61}) == ([], {60, 61})


@needs_replace_of_open_files
def test_an_open_state_stays_as_it_was(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    assert_clean(job.run())
    before = job.state_path.read_bytes()
    with job.state_path.open("rb") as held:
        job.make("c.dat")
        assert_clean(job.run())
        assert held.read() == before
    assert job.state() == dict.fromkeys([*files, "c.dat"], 1)


def test_nothing_is_left_beside_it_but_the_lock(job: Job) -> None:
    job.make("a.dat")
    job.state_path.with_name("state.json.tmp").write_text('[\n{"filepath": "/left by a kill')
    assert_clean(job.run())
    job.check_no_leftovers()


def test_a_link_to_the_state_stays_a_link(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    target = tmp_path / "kept.json"
    job.state_path.symlink_to(target)
    for _ in range(2):
        assert_clean(job.run())
    assert job.state_path.is_symlink()
    assert job.state() == {"a.dat": 1}
    assert not target.is_symlink()


@needs_root
@pytest.mark.parametrize("through", [False, True], ids=["itself", "through"])
def test_a_link_of_another_user_is_not_followed(job: Job, tmp_path: Path, through: bool) -> None:
    job.make("a.dat")
    target = tmp_path / "target"
    link = tmp_path / "theirs" if through else job.state_path
    link.symlink_to(target)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    if through:
        job.state_path.symlink_to(link)
    assert_stopped(job.run(), str(link), "is a link of another user")
    assert job.proxy.requests == []
    assert sorted(path.name for path in tmp_path.glob("target*")) == []
    # Whose own it is may have it followed.
    os.chown(link, 0, 0, follow_symlinks=False)
    assert_clean(job.run())
    assert target.exists()


@needs_permissions
def test_its_mode_stays(job: Job) -> None:
    job.make("a.dat")
    job.state_path.write_text("[]")
    job.state_path.chmod(0o640)
    assert_clean(job.run())
    assert job.state_path.stat().st_mode & 0o777 == 0o640


def modes(folder: Path) -> dict[str, int]:
    """The mode of each file in a folder."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


# With it a file has the mode with which it was made.
NO_CHMOD = """
import os
os.umask(0)
os.chmod = os.fchmod = lambda *args, **keywords: None
"""


@needs_permissions
def test_all_that_is_new_is_for_its_owner_alone_from_the_first_byte(job: Job) -> None:
    files = job.make(*(f"{number:02}" for number in range(10)))
    seen: list[dict[str, int]] = []
    job.proxy.add_fault(Fault(stall(600), operation="PutObject", after=9))
    process = job.start("--max-concurrency", "1", python_flags=prelude(NO_CHMOD))
    wait_until(journal_of(job.state_path).exists, 20, "the journal")
    seen.append(modes(job.state_path.parent))
    kill(process)
    name = job.state_path.name
    assert set(seen[0]) >= {name, f"{name}.lock", f"{name}.journal"}
    assert set(seen[0].values()) == {0o600}
    job.proxy.clear_faults()
    assert_clean(job.crash_run(python_flags=prelude(NO_CHMOD)))
    assert set(modes(job.state_path.parent).values()) == {0o600}
    assert job.state() == dict.fromkeys(files, 1)


MODE_OF_TEMPORARY = """
import os
real = os.replace
def replace(old, new):
    with open({record!r}, "a") as record:
        print(oct(os.stat(old).st_mode & 0o777), file=record)
    return real(old, new)
os.replace = replace
"""


@needs_permissions
def test_the_temporary_file_is_for_its_owner_alone(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    record = tmp_path / "record"
    code = NO_CHMOD + MODE_OF_TEMPORARY.format(record=str(record))
    assert_clean(job.run(python_flags=prelude(code)))
    assert set(record.read_text().split()) == {"0o600"}


# --- The journal -----------------------------------------------------------------------------


@needs_replace_of_open_files
@pytest.mark.few(1)
def test_between_two_saves_what_happens_is_in_the_journal(small_job: Job) -> None:
    job, files = small_job, small_files(40)
    job.write(files)
    held = max(files)
    job.proxy.add_fault(Fault(stall(600), operation="PutObject", key=held))
    # In real time a save comes ten seconds after the last at the soonest.
    process = job.start(real_time=True)
    others = set(files) - {held}
    wait_until(
        lambda: job.state_path.exists() and job.uploaded() == others, 20, "all that was answered"
    )
    state, journal = job.state_path.read_bytes(), journal_of(job.state_path)
    assert {entry["uploadedSuccess"] for entry in json.loads(state)} == {0}
    first, *lines, rest = journal.read_text(encoding="utf-8").split("\n")
    assert json.loads(first) == {"crc32": zlib.crc32(state)}
    assert rest == ""
    kill(process)
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run())
    assert job.sent(since) == [held]
    # A line of the journal is one of the state, but for its number and the comma.
    of_state = job.state_path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        number = json.loads(line)["line"]
        assert line.replace(f'"line": {number}, ', "") == of_state[number - 1].removesuffix(",")
    assert len(lines) == len(others)
    job.check_all_is_there()
    job.check_no_leftovers()


UMLAUT = json.dumps({"filepath": "ü"}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"filepath": "', UMLAUT[:15], b"\0" * 50, b'{"crc32"', b"\xff"],
    ids=["whole", "text", "character", "zeros", "head", "byte"],
)
@pytest.mark.parametrize(
    "again", [("--crashrun", "1"), ("--skip-unchanged",)], ids=["crash", "skip"]
)
@pytest.mark.few(6)
def test_a_journal_is_read_over_the_state(job: Job, again: tuple[str, ...], torn: bytes) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(job.uploaded_entry("a.dat"), torn=torn)
    assert_clean(job.run(*again))
    assert job.sent() == ["b.dat"]
    job.check_all_is_there()
    job.check_no_leftovers()


# After the first folder: that a walk has begun is on the disk then.
DIES_IN_SUB = """
import os
scandir = os.scandir
os.scandir = lambda path: os._exit(9) if str(path).endswith("sub") else scandir(path)
"""


def test_a_kill_during_the_walk_of_a_run_with_another_prefix_is_no_damage(job: Job) -> None:
    job.back_up("a.dat", "sub/b.dat")
    died = job.run("--prefix", "z/", python_flags=prelude(DIES_IN_SUB))
    assert died.returncode == 9
    # The entry of the walk has a key behind those of the last run.
    assert_clean(job.crash_run("--prefix", "z/"))
    keys = {"a.dat", "sub/b.dat", "z/a.dat", "z/sub/b.dat"}
    assert job.state() == dict.fromkeys(keys, 1)
    assert set(job.in_bucket()) == keys


def test_a_torn_end_is_cut_off_before_more_is_written(job: Job) -> None:
    job.back_up("a.dat", "sub/b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("sub/b.dat"))
    job.write_journal(job.uploaded_entry("a.dat"), torn=b"x" * 5000)
    job.run(python_flags=prelude(DIES_IN_SUB))
    lines = journal_of(job.state_path).read_text(encoding="utf-8").splitlines()
    _head, sent, folder = map(json.loads, lines)
    assert (sent["filename"], folder["filepath"]) == ("a.dat", str(job.folder))
    assert_clean(job.crash_run())
    job.check_all_is_there()
    job.check_no_leftovers()


OF_ANOTHER_ORDER = {"filepath": "/x", "uploadedSuccess": 1, "filename": "x", "line": 3}


@pytest.mark.parametrize("odd", [1, "x", None, [], OF_ANOTHER_ORDER], ids=json.dumps)
def test_a_line_of_the_journal_that_is_no_entry_is_ignored_as_if_torn(
    job: Job, odd: object
) -> None:
    keys = ["a.dat", "b.dat", "c.dat"]
    job.back_up(*keys)
    job.write_state(*map(job.pending_entry, keys))
    before, after = job.uploaded_entry("a.dat"), job.uploaded_entry("c.dat")
    job.write_journal({"line": 2, **before}, odd, {"line": 4, **after})
    assert_clean(job.crash_run())
    assert job.sent() == ["b.dat"]
    job.check_all_is_there()
    job.check_no_leftovers()


def test_a_torn_line_that_lacks_no_more_than_its_line_feed_is_not_believed_or_right(
    job: Job,
) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(torn=json.dumps(job.uploaded_entry("a.dat")).encode())
    assert_clean(job.crash_run())
    assert job.sent() in (["b.dat"], ["a.dat", "b.dat"])
    job.check_all_is_there()


def test_of_two_lines_of_a_file_the_later_counts(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.uploaded_entry("a.dat"), job.pending_entry("b.dat"))
    failed = job.pending_entry("a.dat", error="the disk failed")
    job.write_journal(
        failed, job.pending_entry("b.dat"), job.uploaded_entry("b.dat"), job.uploaded_entry("a.dat")
    )
    assert_clean(job.crash_run())
    assert job.sent() == []
    job.write_journal(job.uploaded_entry("b.dat"), failed)
    assert_clean(job.crash_run())
    assert job.sent() == ["a.dat"]


def test_a_dry_run_reads_the_journal_and_leaves_it(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    state = job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    journal = job.write_journal(job.uploaded_entry("a.dat"))
    before = journal.read_bytes()
    completed = job.crash_run("--dryrun")
    assert completed.returncode == 0
    assert len(lines_with(completed.stdout, "would upload")) == 1
    assert (journal.read_bytes(), job.state_path.read_bytes()) == (before, state)


def test_verify_reads_the_journal(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.uploaded_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(job.uploaded_entry("b.dat"))
    completed = job.run("--verify")
    assert_clean(completed)
    assert "2 files right" in completed.stdout
    job.check_no_leftovers()
    assert job.uploaded() == {"a.dat", "b.dat"}


def with_journal(job: Job, content: bytes) -> None:
    """Leave a state with two files to send, and a journal with this content."""
    job.back_up("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    journal_of(job.state_path).write_bytes(content)


def line(entry: object) -> bytes:
    return f"{json.dumps(entry)}\n".encode()


NOT_OF_THIS_STATE: dict[str, Callable[[Job], bytes]] = {
    "of-an-older-state": lambda job: line({"crc32": zlib.crc32(b"[]\n")}),
    "empty": lambda job: b"",
    "torn-head": lambda job: line({"crc32": zlib.crc32(job.state_path.read_bytes())})[:12],
    "torn-at-once": lambda job: b"{",
    "torn-in-its-name": lambda job: b'{"crc3',
    "torn-before-its-number": lambda job: b'{"crc32":',
    "zeros": lambda job: b"\0" * 100,
    "headless": lambda job: b"",
}


@pytest.mark.parametrize("what", NOT_OF_THIS_STATE)
def test_a_journal_that_is_not_of_this_state_is_ignored(job: Job, what: str) -> None:
    with_journal(job, b"")
    head = NOT_OF_THIS_STATE[what](job)
    has_more = what in ("of-an-older-state", "headless")
    rest = b"" if not has_more else line(job.uploaded_entry("a.dat"))
    journal_of(job.state_path).write_bytes(head + rest)
    assert_clean(job.crash_run())
    assert job.sent() == ["a.dat", "b.dat"]
    job.check_no_leftovers()
    assert job.uploaded() == {"a.dat", "b.dat"}


@pytest.mark.parametrize("crashrun", ["0", "1"])
def test_a_journal_of_another_run_is_ignored(job: Job, crashrun: str) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(other_bucket(job), other_folder(job), state=b"[]\n")
    assert_clean(job.run("--crashrun", crashrun))
    assert job.sent() == ["a.dat", "b.dat"]
    job.check_all_is_there()
    job.check_no_leftovers()


def test_a_journal_without_a_state_is_no_state(job: Job) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_journal(job.uploaded_entry("a.dat"))
    job.state_path.unlink()
    assert_stopped(job.crash_run(), "--crashrun", f"{job.state_path} is missing or empty")
    assert not job.state_path.exists()
    assert_clean(job.run("--skip-unchanged"))
    assert job.sent() == ["a.dat", "b.dat"]
    job.check_all_is_there()
    job.check_no_leftovers()


@needs_signals
@pytest.mark.parametrize("older", [False, True], ids=["last", "older"])
@pytest.mark.few(1)
def test_a_journal_is_not_read_over_a_later_save_that_holds_the_same(
    job: Job, tmp_path: Path, older: bool
) -> None:
    claims = [job.uploaded_entry(key) for key in job.make("a.dat", "b.dat")]
    state = job.write_state(*claims)
    assert job.run("--verify").returncode == 1  # the bucket has nothing
    lost = job.state_path.read_bytes()
    # By what a run wrote down after it had saved those very bytes, all was sent once.
    job.write_journal(*claims)
    if older:  # and the save that came next was killed before it had deleted that
        job.state_path.write_bytes(state)
    env = killing_call(tmp_path / "killer", "replace", before=False)
    assert job.start("--verify", env=env).wait(60) == -signal.SIGKILL
    assert job.state_path.read_bytes() == lost
    assert job.uploaded() == set()
    assert_clean(job.crash_run())
    job.check_all_is_there()
    job.check_no_leftovers()


LINKED: dict[str, Callable[[Path, Path], None]] = {
    "file": lambda path, target: path.symlink_to(target),
    "nowhere": lambda path, target: path.symlink_to(target.with_name("new")),
    "folder": lambda path, target: path.mkdir(),
    "fifo": lambda path, target: os.mkfifo(path),
}


@needs_fifos
@pytest.mark.parametrize("what", LINKED)
@pytest.mark.parametrize("again", [(), ("--crashrun", "1"), ("--verify",)], ids=" ".join)
def test_a_journal_that_is_no_regular_file_is_refused(
    job: Job, tmp_path: Path, what: str, again: tuple[str, ...]
) -> None:
    job.back_up("a.dat")
    target, journal = tmp_path / "target", journal_of(job.state_path)
    # What is behind the link would even be a journal of this state.
    job.write_journal(job.pending_entry("a.dat")).rename(target)
    before = target.read_bytes()
    LINKED[what](journal, target)
    assert_refused(
        job, *again, words=(f"the journal {journal} is not a regular file; move it away",)
    )
    assert os.path.lexists(journal)
    assert target.read_bytes() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("status", "code", "exit_code"), [(400, "EntityTooLarge", 1), (404, "NoSuchBucket", 2)]
)
def test_a_run_that_ends_by_itself_leaves_no_journal(
    job: Job, status: int, code: str, exit_code: int
) -> None:
    job.make("a.dat", "b.dat", "c.dat")

    def refuse_late(exchange: Exchange) -> None:
        wait_until(journal_of(job.state_path).exists, 10, "the journal")
        answer(status, code)(exchange)

    job.proxy.add_fault(Fault(refuse_late, operation="PutObject", key="b.dat"))
    process = job.start("--max-concurrency", "2")
    assert finish(process).returncode == exit_code
    job.check_no_leftovers()
    assert job.uploaded() >= {"a.dat"}
    job.check_state_is_true()


@pytest.mark.parametrize("again", [(), ("--crashrun", "1"), ("--verify",)], ids=" ".join)
def test_a_run_that_cannot_start_does_not_lose_what_the_journal_says(
    job: Job, again: tuple[str, ...]
) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(job.uploaded_entry("a.dat"))
    job.proxy.add_fault(Fault(answer(401, "InvalidAccessKeyId")))
    assert_stopped(job.run(*again), "credentials")
    assert job.state() == {"a.dat": 1, "b.dat": 0}
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    assert job.sent() == ["b.dat"]


# --- The lock --------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_is_gone(job: Job) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    first = job.start()
    wait_until(lambda: job.proxy.count("PutObject"), 60, "the first run's upload")
    before, requests = job.state_path.read_bytes(), len(job.proxy.requests)
    for arguments in ((), ("--crashrun", "1")):
        assert_stopped(job.run(*arguments), named(first), "--statefile")
    assert job.state_path.read_bytes() == before
    assert len(job.proxy.requests) == requests

    first.kill()
    first.wait()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    assert job.state() == {"a.dat": 1}


def test_a_lock_left_by_a_dead_run_is_no_lock(job: Job) -> None:
    job.make("a.dat")
    (job.state_path.parent / "state.json.lock").write_text(str(os.getpid()))
    assert_clean(job.run())


def test_two_links_to_one_state_are_one_lock(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    link = tmp_path / "link.json"
    link.symlink_to(job.state_path)
    first = job.start()
    wait_until(lambda: job.proxy.count("PutObject"), 60, "the first run's upload")
    assert_stopped(job.run("--statefile", link, timeout=60), named(first))


def test_runs_with_states_of_their_own_go_side_by_side(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    held = job.proxy.add_fault(Fault(delay(600), operation="PutObject", times=1))
    job.start()
    wait_until(lambda: held.hits, 60, "the first run's upload")
    assert_clean(job.run("--statefile", tmp_path / "other.json"))


@needs_fifos
@pytest.mark.parametrize("what", [("--dryrun",), ("--verify", "folder"), ()], ids=" ".join)
def test_a_state_that_is_a_fifo_is_refused(job: Job, what: tuple[str, ...]) -> None:
    job.make("a.dat")
    os.mkfifo(job.state_path)
    completed = job.run(*what, timeout=20)
    assert_stopped(completed, f"the state file {job.state_path} is not a regular file")
    assert job.puts() == []


@needs_fifos
@pytest.mark.parametrize("what", LINKED)
def test_a_lock_that_is_no_regular_file_is_refused(job: Job, tmp_path: Path, what: str) -> None:
    job.back_up("a.dat")
    lock, target = job.state_path.with_name("state.json.lock"), tmp_path / "target"
    target.write_bytes(b"precious")
    LINKED[what](lock, target)
    assert_refused(job, words=(str(lock), "is not a regular file"))
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "new").exists()


def test_a_lock_that_has_another_name_is_not_written(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    target = tmp_path / "target"
    target.write_bytes(b"123456789")
    os.link(target, job.state_path.with_name("state.json.lock"))
    assert_clean(job.run())
    assert target.read_bytes() == b"123456789"


# After more than a second, the last result goes to the journal, which the second run has deleted.
@pytest.mark.parametrize("seconds", [0, 1.5], ids=["at-once", "with-a-journal"])
def test_a_lock_that_is_deleted_in_mid_run_is_noticed(job: Job, seconds: float) -> None:
    files = job.make("a.dat", "b.dat")
    lock = job.state_path.with_name("state.json.lock")
    after: list[bytes] = []

    def meddle(_: object) -> None:
        lock.unlink()
        assert_clean(job.run())  # a second run, which nothing holds up now
        after.append(job.state_path.read_bytes())
        time.sleep(seconds)

    job.proxy.add_fault(Fault(call(meddle), operation="PutObject", key="b.dat", times=1))
    completed = job.run("--max-concurrency", "1")  # so that a.dat is in the journal by then
    assert completed.returncode == 2
    (said,) = completed.stderr.splitlines()
    assert f"the lock {lock} was deleted" in said
    assert "--crashrun 1" in said
    assert [job.state_path.read_bytes()] == after  # the second run's
    assert job.in_bucket() == digests(files)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda state: state[: len(state) // 2],
    "another": lambda _: b"Dear diary\n",
    "a line less": lambda state: state.replace(state.splitlines(keepends=True)[2], b""),
}


@needs_replace_of_open_files
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("is_replaced", [False, True], ids=["written", "replaced"])
@pytest.mark.few(3)
def test_a_state_that_another_changes_in_mid_run_is_left_to_it(
    job: Job, change: Callable[[bytes], bytes], is_replaced: bool
) -> None:
    job.make(*"abcdefgh")
    changed: list[bytes] = []

    def meddle(_: object) -> None:
        changed.append(change(job.state_path.read_bytes()))
        other = job.state_path.with_name("other") if is_replaced else job.state_path
        other.write_bytes(changed[0])
        other.replace(job.state_path)

    job.proxy.add_fault(Fault(call(meddle), operation="PutObject", times=1))
    completed = job.run("--max-concurrency", "1")
    assert_stopped(completed, f"the state file {job.state_path}")
    assert "8 files" in completed.stdout or "not yet sent" in completed.stdout
    assert [job.state_path.read_bytes()] == changed


def test_a_dry_run_beside_a_run_that_ends_has_a_sentence(job: Job) -> None:
    job.back_up("a.dat")
    entry = job.uploaded_entry("a.dat")
    job.state_path.write_text(f"[\n{json.dumps(entry)}\n]\n")
    journal = job.write_journal({"line": 2, **entry})
    job.proxy.add_fault(Fault(call(lambda _: journal.unlink()), operation="HeadBucket"))
    completed = job.run("--dryrun", "--skip-unchanged")
    assert_stopped(completed, "cannot read the state file", "no such file")


# --- Files of others -------------------------------------------------------------------------

OF_OTHERS = [
    ("lock", b"# This file is generated: do not edit it.\n"),
    ("lock", b"2026 was a good year.\n"),
    ("tmp", b"a report"),
    ("tmp", b'["a", "list"]'),
    ("journal", b"Dear diary,\n"),
    ("journal", b'{"date": "2026-11-29"}\n'),
]


@pytest.mark.parametrize(("name", "content"), OF_OTHERS)
@pytest.mark.parametrize("again", [(), ("--crashrun", "1"), ("--verify",)], ids=" ".join)
def test_what_others_have_under_the_name_of_a_companion_is_left_alone(
    job: Job, name: str, content: bytes, again: tuple[str, ...]
) -> None:
    job.back_up("a.dat")
    path = job.state_path.with_name(f"state.json.{name}")
    path.write_bytes(content)
    assert_refused(job, *again, words=(f"{path} is not a ", "move it away"))
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["lock", "tmp", "journal"])
@pytest.mark.parametrize("content", [b"", b"\0" * 50], ids=["empty", "zeros"])
def test_what_a_power_cut_leaves_of_a_companion_holds_up_nothing(
    job: Job, name: str, content: bytes
) -> None:
    job.make("a.dat")
    job.state_path.with_name(f"state.json.{name}").write_bytes(content)
    assert_clean(job.run())
    job.check_all_is_there()
    job.check_no_leftovers()


OPEN_TO_OTHERS: dict[str, Callable[[Path], None]] = {
    "theirs": lambda path: os.chown(path, NOBODY, NOBODY),
    "for-all": lambda path: path.chmod(0o646),
    "for-a-group": lambda path: path.chmod(0o664),
}


@needs_root
@pytest.mark.parametrize("how", OPEN_TO_OTHERS)
@pytest.mark.parametrize("name", ["state.json", "state.json.journal"])
@pytest.mark.few(3)
def test_root_does_not_act_on_what_another_user_can_write(job: Job, name: str, how: str) -> None:
    job.back_up("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("b.dat"))
    job.write_journal(job.uploaded_entry("a.dat"))
    path = job.state_path.with_name(name)
    OPEN_TO_OTHERS[how](path)
    for again in ((), ("--crashrun", "1"), ("--verify",)):
        assert_refused(job, *again, words=(str(path), "another user can write", "chown"))
    os.chown(path, 0, 0)
    path.chmod(0o600)
    assert_clean(job.crash_run())
    assert job.sent() == ["b.dat"]


# A network file system that gives all files to one user, with one mode.
ONE_OWNER = """
import os
real, chmod = os.open, os.fchmod
def opened(path, flags, *rest, **keywords):
    descriptor = real(path, flags, *rest, **keywords)
    if flags & os.O_CREAT and "state.json" in os.fspath(path):
        os.fchown(descriptor, __USER__, __USER__)
        chmod(descriptor, 0o777)
    return descriptor
os.open, os.fchmod = opened, lambda *args: None
"""


@needs_root
def test_root_acts_on_its_own_files_where_all_have_another_owner(job: Job) -> None:
    job.make("a.dat")
    flags = prelude(ONE_OWNER.replace("__USER__", str(NOBODY)))
    assert_clean(job.run(python_flags=flags))
    status = job.state_path.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o777)
    assert_clean(job.crash_run(python_flags=flags))
    assert_clean(job.run("--verify", python_flags=flags))


# --- Whose it is -----------------------------------------------------------------------------


def other_bucket(job: Job) -> dict[str, object]:
    return job.pending_entry("b.dat", bucket="another-bucket")


def other_folder(job: Job) -> dict[str, object]:
    path = str(job.folder.parent / "elsewhere" / "b.dat")
    return job.pending_entry("b.dat", filepath=path, bucket=job.bucket)


def folder_with_the_same_start(job: Job) -> dict[str, object]:
    return job.pending_entry("b.dat", filepath=f"{job.folder}-2/b.dat", bucket=job.bucket)


OTHER_JOBS = [other_bucket, other_folder, folder_with_the_same_start]


@pytest.mark.parametrize("other", OTHER_JOBS)
def test_failures_of_another_job_are_not_buried(job: Job, other: Any) -> None:
    job.make("a.dat")
    entry = other(job)
    job.write_state({**entry, "uploadedSuccess": 1}, entry)
    assert_refused(job, words=("--crashrun 1", "--statefile"))


@pytest.mark.parametrize("other", OTHER_JOBS)
def test_a_crash_run_of_another_job_is_refused(job: Job, other: Any) -> None:
    job.make("a.dat", "b.dat")
    job.write_state(job.pending_entry("a.dat", bucket=job.bucket), other(job))
    assert_refused(job, "--crashrun", "1", words=("--statefile",))


@pytest.mark.parametrize("other", OTHER_JOBS)
def test_another_job_that_is_done_may_be_replaced(job: Job, other: Any) -> None:
    job.make("a.dat")
    job.write_state({**other(job), "uploadedSuccess": 1})
    assert_replaced(job.run(), "")
    assert job.state() == {"a.dat": 1}
    assert_clean(job.run())


@pytest.mark.parametrize(
    ("key", "arguments"),
    [("gone.dat", ()), ("a.tmp", ("--exclude", "*.tmp")), ("old-prefix/a.dat", ())],
)
def test_own_failures_do_not_stop_the_next_run(
    job: Job, key: str, arguments: tuple[str, ...]
) -> None:
    job.make("a.dat", "a.tmp")
    job.write_state(job.pending_entry(key, bucket=job.bucket))
    completed = job.run(*arguments)
    assert completed.returncode == 0
    assert job.state()["a.dat"] == 1


# --- Whose shard it is -----------------------------------------------------------------------

OTHERS = [("--shard", "2/2"), ("--shard", "1/3"), ()]


@pytest.mark.parametrize("other", OTHERS, ids=["other", "other-count", "whole"])
@pytest.mark.few(2)
def test_files_that_a_shard_has_yet_to_send_are_not_buried(
    job: Job, other: tuple[str, ...]
) -> None:
    job.make(*NAMES)
    job.refuse("a.dat")
    assert job.run("--shard", "1/2").returncode == 1
    for arguments in (other, (*other, "--dryrun"), (*other, "--skip-unchanged")):
        assert_refused(job, *arguments, words=("shard 1/2", "--crashrun 1", "--statefile"))
    assert_refused(job, *other, "--crashrun", "1", words=("shard 1/2", "--statefile"))
    assert_refused(job, *other, "--verify", words=("shard 1/2", "--statefile"))


def test_files_that_a_whole_run_has_yet_to_send_are_not_buried_by_a_shard(job: Job) -> None:
    job.make(*NAMES)
    job.refuse("a.dat")
    assert job.run().returncode == 1
    assert_refused(job, "--shard", "1/2", words=("no shard", "--crashrun 1", "--statefile"))
    assert_refused(job, "--shard", "1/2", "--crashrun", "1", words=("no shard", "--statefile"))


@pytest.mark.parametrize("other", OTHERS, ids=["other", "other-count", "whole"])
@pytest.mark.few(2)
def test_a_shard_that_is_done_may_be_replaced_but_not_gone_on_with(
    job: Job, other: tuple[str, ...]
) -> None:
    job.make(*NAMES)
    assert_clean(job.run("--shard", "1/2"))
    assert_refused(job, *other, "--crashrun", "1", words=("shard 1/2", "--statefile"))
    assert_replaced(job.run(*other), "shard 1/2")
    expected = keys_of(other[1], NAMES) if other else NAMES
    assert job.state() == dict.fromkeys(expected, 1)
    assert {entry.get("shard") for entry in job.entries()} == {other[1] if other else None}


@needs_signals
def test_a_kill_during_the_walk_of_another_shard_leaves_a_state_for_that_one(
    job: Job, tmp_path: Path
) -> None:
    job.make(*NAMES)
    assert_clean(job.run("--shard", "1/3"))
    walked = "os.path.basename(os.fspath(args[0])) == 'sub'"
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    process = job.start("--shard", "2/3", "--skip-unchanged", env=env)
    assert process.wait(60) == -9
    assert_clean(job.crash_run("--shard", "2/3"))
    assert job.state() == dict.fromkeys(SPLIT_IN_3["2/3"], 1)


def test_a_shard_in_the_state_that_is_no_text_is_damage(job: Job) -> None:
    job.make("a.dat")
    job.state_path.write_text(json.dumps([job.pending_entry("a.dat", shard=1)]))
    assert_refused(job, "--shard", "1/2", words=(str(job.state_path), "damaged"))


# --- Crash runs ------------------------------------------------------------------------------


def test_crash_run_sends_what_is_marked_as_missing(job: Job) -> None:
    files = job.make("a.dat", "b.dat", "sub/c.dat", "new.dat")
    job.put("a.dat", b"sent before")
    job.write_state(
        job.pending_entry("a.dat", uploadedSuccess=1),
        job.pending_entry("b.dat"),
        job.pending_entry("sub/c.dat"),
    )
    assert_clean(job.crash_run())
    sent = {key: files[key] for key in ("b.dat", "sub/c.dat")}
    assert job.objects() == {"a.dat": b"sent before", **sent}
    assert job.state() == {"a.dat": 1, "b.dat": 1, "sub/c.dat": 1}


def test_crash_run_sends_all_again_when_the_bucket_is_gone(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.server.remove_bucket(job.bucket)
    job.write_state(job.pending_entry("a.dat", uploadedSuccess=1), job.pending_entry("b.dat"))
    completed = job.crash_run()
    assert completed.returncode == 0
    assert "was gone" in completed.stderr
    assert job.in_bucket() == digests(files)
    assert job.state() == {"a.dat": 1, "b.dat": 1}


def test_crash_run_keeps_the_keys_of_the_state(job: Job) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat", filename="daily/a.dat"))
    assert_clean(job.crash_run())
    assert set(job.objects()) == {"daily/a.dat"}


def test_crash_run_says_of_a_file_that_it_is_gone(job: Job) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry("gone.dat"))
    assert_failed(job.crash_run(), [job.folder / "gone.dat"])
    assert job.state() == {"a.dat": 1, "gone.dat": 0}
    assert "no such file" in job.errors()["gone.dat"]


def test_crash_run_sends_a_file_as_it_is_now(job: Job) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat", size=1, mtime_ns=1, error="an old reason"))
    (job.folder / "a.dat").write_bytes(b"changed since")
    assert_clean(job.crash_run())
    assert job.objects() == {"a.dat": b"changed since"}
    (entry,) = job.entries()
    assert (entry["size"], entry["uploadedSuccess"]) == (len(b"changed since"), 1)
    assert "error" not in entry


def test_crash_run_with_nothing_to_do(job: Job) -> None:
    files = job.make("a.dat")
    assert_clean(job.run())
    before, since = job.state_path.read_bytes(), job.seen()
    assert_clean(job.crash_run())
    assert job.puts(since) == []
    assert job.in_bucket() == digests(files)
    assert job.state_path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b""])
def test_crash_run_without_a_state_is_refused(job: Job, content: bytes | None) -> None:
    job.make("a.dat")
    if content is not None:
        job.state_path.write_bytes(content)
    assert_stopped(job.crash_run(), "--crashrun", f"{job.state_path} is missing or empty")
    assert job.proxy.requests == []
    assert content is None or job.state_path.read_bytes() == content


def test_crash_run_with_an_empty_list_is_refused(job: Job) -> None:
    job.make("a.dat")
    job.state_path.write_bytes((PROJECT / "stateFile.json").read_bytes())
    words = f"the state file {job.state_path} lists nothing; run without --crashrun"
    assert_refused(job, "--crashrun", "1", words=(words,))
    assert_refused(job, "--crashrun", "1", "--dryrun", words=(words,))
    assert_clean(job.run())
    job.check_all_is_there()


# --- Damaged states --------------------------------------------------------------------------

FIELDS = '"filepath": "/backup/a", "filename": "a", "uploadedSuccess": 0'
DAMAGED = [
    b"[",
    b"[\n{" + FIELDS.encode() + b"},\n{",
    b"not JSON",
    b"\xff\xfe[]",
    b"\x00" * 100,
    b"null",
    b"1",
    b'"text"',
    b"{}",
    b"{" + FIELDS.encode() + b"}",
    b"[1]",
    b"[[]]",
    b"[null]",
    b"[{}]",
    b'[{"filepath": "/backup/a", "uploadedSuccess": 0}]',
    b'[{"filename": "a", "uploadedSuccess": 0}]',
    b'[{"filepath": "/backup/a", "filename": "a"}]',
    b'[{"filepath": "", "filename": "a", "uploadedSuccess": 0}]',
    b'[{"filepath": 1, "filename": "a", "uploadedSuccess": 0}]',
    b'[{"filepath": "/backup/a", "filename": 1, "uploadedSuccess": 0}]',
    b'[{"filepath": "/backup/a", "filename": "a", "uploadedSuccess": 2}]',
    b'[{"filepath": "/backup/a", "filename": "a", "uploadedSuccess": "0"}]',
    b'[{"filepath": "/backup/a", "filename": "a", "uploadedSuccess": null}]',
    b"[{" + FIELDS.encode() + b', "bucket": 1}]',
    b'[{"filepath": "/backup/a", "filename": "\\udc80", "uploadedSuccess": 1}]',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:60].decode("latin-1"))
def test_damaged_state_is_refused(job: Job, content: bytes) -> None:
    job.make("a.dat")
    job.state_path.write_bytes(content)
    assert_refused(job, words=(str(job.state_path), "--statefile"))


def test_damaged_state_is_refused_by_a_crash_run(job: Job) -> None:
    job.make("a.dat")
    content = DAMAGED[1]
    job.state_path.write_bytes(content)
    assert_refused(job, "--crashrun", "1", words=(str(job.state_path),))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"], ids=ascii)
def test_a_path_that_no_system_can_have_is_damage(job: Job, name: str) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry(name))
    assert_refused(job, "--crashrun", "1", words=("damaged",))


@needs_byte_names
def test_a_path_of_bytes_that_are_no_text_is_found_again(job: Job) -> None:
    job.make("a.dat")
    name = "caf\udce9.dat"
    (job.folder / name).write_bytes(b"bytes")
    job.write_state(job.pending_entry("a.dat"), job.pending_entry(name))
    completed = job.crash_run()
    assert completed.returncode == 1
    assert job.state() == {"a.dat": 1, name: 0}
    assert "UTF-8" in job.errors()[name]


def test_state_that_is_a_folder_is_refused(job: Job) -> None:
    job.make("a.dat")
    job.state_path.mkdir()
    assert_stopped(job.run(), str(job.state_path))
    assert job.proxy.requests == []


@needs_permissions
def test_unreadable_state_is_refused(job: Job) -> None:
    job.make("a.dat")
    state = job.write_state()
    job.state_path.chmod(0)
    assert_stopped(job.run(user=NOBODY), str(job.state_path), "permission denied", "owner")
    assert job.proxy.requests == []
    job.state_path.chmod(0o600)
    assert job.state_path.read_bytes() == state


# --- Where it cannot be written --------------------------------------------------------------


@pytest.fixture
def old_state(job: Job) -> bytes:
    """The state of an earlier run of the job, after which a file came."""
    job.make(*(f"{number:03}" for number in range(50)))
    assert_clean(job.run())
    job.make("new.dat")
    return job.state_path.read_bytes()


def file_size_limit(size_bytes: int) -> list[str]:
    """Python flags under which a file of the script cannot grow further: a full disk."""
    limit = f"({size_bytes}, {size_bytes})"
    return prelude(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, {limit})")


@needs_limits
@pytest.mark.parametrize("size_bytes", [0, 100])  # no room for the lock's text, or for an entry
@pytest.mark.few(1)
def test_full_disk_keeps_the_old_state(job: Job, old_state: bytes, size_bytes: int) -> None:
    since = job.seen()
    completed = job.run(python_flags=file_size_limit(size_bytes))
    assert_stopped(completed, str(job.state_path), "make room")
    assert job.state_path.read_bytes() == old_state
    assert job.puts(since) == []
    assert not Path(f"{job.state_path}.tmp").exists()


@needs_limits
def test_full_disk_keeps_the_old_state_in_a_crash_run(job: Job) -> None:
    job.make("a.dat")
    state = job.write_state(job.pending_entry("a.dat", error="a long reason" * 10))
    assert_stopped(job.crash_run(python_flags=file_size_limit(100)), str(job.state_path))
    assert job.state_path.read_bytes() == state


@needs_limits
def test_disk_that_is_full_after_the_walk_leaves_enough_for_a_crash_run(job: Job) -> None:
    files = job.make(*(f"{number:03}" for number in range(50)))
    # Room for the folder's entry, and not for those of its files.
    assert_stopped(job.run(python_flags=file_size_limit(1000)), str(job.state_path))
    assert_clean(job.crash_run())
    assert job.in_bucket() == digests(files)


@needs_limits_of_others
def test_disk_that_fills_during_the_run_keeps_the_last_state(job: Job) -> None:
    files = job.make(*(f"{number:03}" for number in range(50)))
    pids: list[int] = []
    at_first: list[bytes] = []

    def fill(_: object) -> None:
        wait_until(lambda: pids, 60, "the process")
        resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (100, 100))
        at_first.append(job.state_path.read_bytes())

    job.proxy.add_fault(Fault(call(fill), operation="PutObject", times=1))
    process = job.start("--max-concurrency", "1")
    pids.append(process.pid)
    completed = finish(process)
    assert completed.returncode == 2
    assert len([line for line in completed.stderr.splitlines() if "cannot save" in line]) == 1
    assert str(job.state_path) in completed.stderr
    assert job.state_path.read_bytes() == at_first[0]
    job.check_state_is_true()
    assert job.in_bucket() == digests(files)
    # It lags behind, and that is all: the crash run sends again what it knows nothing of.
    assert_clean(job.crash_run())
    assert job.state() == dict.fromkeys(files, 1)


@needs_limits_of_others
def test_a_disk_that_is_full_for_a_while_spoils_no_journal(job: Job) -> None:
    files = job.make(*(f"{number:03}" for number in range(60)))
    journal, pids, written_ns = journal_of(job.state_path), list[int](), list[int]()

    def limit(size_bytes: int) -> None:
        resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

    def fill(_: object) -> None:
        # All that was sent is in it; of the next line it has room for a piece.
        wait_until(lambda: pids and len(job.uploaded()) == 5, 60, "a journal of all so far")
        written_ns.append(journal.stat().st_mtime_ns)
        limit(journal.stat().st_size + 10)

    def make_room(_: object) -> None:
        wait_until(lambda: journal.stat().st_mtime_ns != written_ns[0], 60, "a torn line")
        limit(resource.RLIM_INFINITY)

    job.proxy.add_fault(Fault(call(fill), operation="PutObject", key="005"))
    job.proxy.add_fault(Fault(call(make_room), operation="PutObject", key="035"))
    job.proxy.add_fault(Fault(stall(600), operation="PutObject", key="059"))
    # In real time, no save of the whole comes between.
    process = job.start("--max-concurrency", "1", real_time=True)
    pids.append(process.pid)
    wait_until(lambda: written_ns and len(job.uploaded()) >= 50, 60, "what was sent meanwhile")
    kill(process)
    job.check_state_is_true()
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run())
    assert len(job.sent(since)) <= 10
    assert job.in_bucket() == digests(files)
    job.check_no_leftovers()


# The first two saves, before and after the walk, succeed.
NO_MORE_SAVES = """
import os
real, calls = os.replace, 0
def replace(*args):
    global calls
    calls += 1
    if calls > 2:
        raise OSError(28, "No space left on device")
    return real(*args)
os.replace = replace
"""


def test_where_the_whole_has_no_room_the_last_files_are_in_the_journal(job: Job) -> None:
    files = job.make(*(f"{number:02}" for number in range(20)))
    assert job.run(python_flags=prelude(NO_MORE_SAVES)).returncode == 2
    assert job.uploaded() == set(files)
    since = job.seen()
    assert_clean(job.crash_run())
    assert job.sent(since) == []
    job.check_no_leftovers()


@needs_limits_of_others
def test_an_interrupted_run_does_not_say_that_it_saved_what_it_could_not(job: Job) -> None:
    files = job.make(*(f"{number:03}" for number in range(20)))
    pids: list[int] = []

    def fill(_: object) -> None:
        wait_until(lambda: pids, 60, "the process")
        resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (100, 100))

    job.proxy.add_fault(Fault(call(fill), operation="PutObject", times=1))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    process = job.start("--max-concurrency", "1")
    pids.append(process.pid)
    job.wait_for("PutObject", 3)
    process.send_signal(signal.SIGTERM)
    completed = finish(process)
    assert completed.returncode == 143
    assert "the state is saved" not in completed.stderr
    (sentence,) = lines_with(completed.stderr, "interrupted; ")
    assert "interrupted; the state could not be saved; " in sentence
    job.check_state_is_true()
    assert_clean(job.crash_run())
    assert job.in_bucket() == digests(files)


@needs_permissions
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("locked/state.json", "choose"),
        ("missing/state.json", "make its folder first"),
        ("a.dat/state.json", "choose"),
    ],
)
def test_folder_of_the_state_that_cannot_be_written(job: Job, name: str, advice: str) -> None:
    job.make("a.dat")
    (job.folder / "locked").mkdir(mode=0o555)
    completed = job.run("--statefile", job.folder / name, user=NOBODY)
    assert_stopped(completed, str(job.folder / name), advice, "--statefile")
    assert job.proxy.requests == []


def test_first_run_keeps_what_it_knows_when_the_bucket_refuses(job: Job) -> None:
    files = job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(answer(403, "AccessDenied")))
    assert job.run().returncode == 2
    assert job.state() == dict.fromkeys(files, 0)
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    assert job.in_bucket() == digests(files)


@pytest.mark.skipif(not is_root(), reason="only root may make a device")
def test_device_is_no_state_file(job: Job) -> None:
    job.make("a.dat")
    os.mknod(job.state_path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    assert_stopped(job.run(), "regular file")
    assert stat.S_ISCHR(job.state_path.stat().st_mode)


# --- Paths that JSON escapes, and lines that somebody has edited ------------------------------


@needs_odd_names
@pytest.mark.parametrize("name", ["ba\\ck", 'ba"ck', "ba\tck", "ba\nck", ".hidden"])
@pytest.mark.few(2)
def test_a_folder_whose_name_json_escapes_is_sent_once(job: Job, tmp_path: Path, name: str) -> None:
    job.folder = job.folder / name
    job.make("a.dat", ".b/c.dat", "d/e.dat")
    assert_clean(job.run(env=run_first(tmp_path / "later", clock())))
    since = job.seen()
    assert_clean(job.run("--skip-unchanged"))
    assert_clean(job.crash_run())
    assert job.sent(since) == []
    job.check_all_is_there()


@pytest.mark.parametrize("path", ["../secret", "sub/../../secret", "/../../secret", "./../secret"])
@pytest.mark.parametrize("arguments", [("--crashrun", "1"), ("--skip-unchanged",)], ids=" ".join)
@pytest.mark.few(4)
def test_an_uploaded_line_that_leads_out_of_the_folder_sends_nothing_from_there(
    job: Job, path: str, arguments: tuple[str, ...]
) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    (job.folder.parent / "secret").write_bytes(b"secret")
    text = job.state_path.read_text(encoding="utf-8")
    line = text.splitlines()[1].replace(f"{job.folder}/a.dat", f"{job.folder}/{path}")
    job.state_path.write_text(f"[\n{line}\n{text.splitlines()[2]}\n]\n", encoding="utf-8")
    job.delete("a.dat")
    job.delete("b.dat")
    job.run(*arguments)
    assert digests({"": b"secret"})[""] not in job.in_bucket().values()


@pytest.mark.parametrize(
    "odd", ["# {}", "x{}", "{}x", ' "{}"'], ids=["comment", "x", "end", "text"]
)
def test_a_line_that_is_no_entry_is_damage(job: Job, odd: str) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    lines = job.state_path.read_text(encoding="utf-8").splitlines()
    lines[1] = odd.format(lines[1])
    job.state_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = job.state_path.read_bytes()
    for arguments in (("--crashrun", "1"), ("--skip-unchanged",), ("--verify",)):
        assert_stopped(job.run(*arguments), "is damaged")
        assert job.state_path.read_bytes() == before


@pytest.mark.parametrize("odd", ["\0", "\t", "\x1f"], ids=["NUL", "tab", "control"])
def test_a_raw_control_character_in_a_line_is_damage(job: Job, odd: str) -> None:
    job.make("a.dat")
    assert_clean(job.run())
    text = job.state_path.read_text(encoding="utf-8").replace("a.dat", f"a{odd}.dat")
    job.state_path.write_text(text, encoding="utf-8")
    for arguments in (("--crashrun", "1"), ("--skip-unchanged",), ("--verify",)):
        assert_stopped(job.run(*arguments), "is damaged")
        assert job.state_path.read_text(encoding="utf-8") == text
