"""Which files are sent, under which keys, and what is said of the others."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checks import assert_clean, assert_failed, assert_stopped, lines_with
from support.faults import Fault, call, delay
from support.files import digests, make_files
from support.inside import WITHOUT_DIR_FD, clock, run_first
from support.job import NOBODY, Job
from support.kills import killing_call
from support.proxy import Request
from support.script import Completed, finish, prelude, program, wait_until
from support.shards import NAMES, SPLIT_IN_3, keys_of, shards_of
from support.systems import (
    needs_byte_names,
    needs_fifos,
    needs_long_paths,
    needs_permissions,
    needs_signals,
)

HUNG_SECONDS = 60


# --- Keys ------------------------------------------------------------------------------------


def test_nested_folders_become_keys(job: Job) -> None:
    files = job.make("a.dat", "sub/a.dat", "sub/deep/er/b.dat", "sub.dat", ".hidden/.c")
    assert_clean(job.run())
    assert job.in_bucket() == digests(files)
    assert job.state() == dict.fromkeys(files, 1)


def test_filepath_is_absolute(job: Job) -> None:
    job.make("sub/a.dat")
    assert_clean(job.run("--backupfolder", "backup"))
    (entry,) = job.entries()
    assert (entry["filepath"], entry["filename"]) == (str(job.folder / "sub/a.dat"), "sub/a.dat")


@pytest.mark.parametrize("written", ["backup/", "./backup", "backup/sub/..", "link"])
def test_keys_do_not_depend_on_how_the_folder_is_written(
    job: Job, tmp_path: Path, written: str
) -> None:
    files = job.make("a.dat", "sub/b.dat")
    (tmp_path / "link").symlink_to(job.folder)
    assert_clean(job.run("--backupfolder", written))
    assert job.in_bucket() == digests(files)


def test_walk_is_sorted(job: Job) -> None:
    names = ["b", "a.dat", "a/z", "a/y/x", "a!", "c/1", "10", "9"]
    if sys.platform == "linux":  # elsewhere it may be the same name as "b"
        names.append("B")
    job.make(*names)
    assert_clean(job.run())
    assert [e["filename"] for e in job.entries()] == sorted(names)


@pytest.mark.parametrize("prefix", ["daily/", "daily-", "a b/ä/"])
def test_prefix_is_put_in_front(job: Job, prefix: str) -> None:
    files = job.make("a.dat", "sub/b.dat")
    assert_clean(job.run("--prefix", prefix))
    assert job.objects() == {prefix + key: content for key, content in files.items()}
    assert set(job.state()) == set(job.in_bucket())


def name_of_key(length: int) -> str:
    """A path of so many bytes, each of its names allowed by file systems."""
    return ("x" * 199 + "/") * (length // 200) + "y" * (length % 200)


@needs_long_paths
def test_key_of_1024_bytes_is_sent_and_longer_ones_fail(job: Job) -> None:
    fits, too_long = name_of_key(1024), name_of_key(1025)
    job.make(fits, too_long)
    assert_failed(job.run(), [job.folder / too_long])
    assert list(job.in_bucket()) == [fits]
    assert job.state() == {fits: 1, too_long: 0}
    assert "1025 bytes" in job.errors()[too_long]


@needs_long_paths
def test_prefix_and_bytes_count_in_the_length_of_a_key(job: Job) -> None:
    key = name_of_key(900) + "ä" * 60
    job.make(key, "a.dat")
    assert_failed(job.run("--prefix", "12345"), [job.folder / key])
    assert job.state() == {"12345a.dat": 1, "12345" + key: 0}


@needs_byte_names
@pytest.mark.parametrize("name", [b"caf\xe9.dat", b"folder-\xff/a.dat"])
def test_name_that_is_not_utf8_fails(job: Job, name: bytes) -> None:
    job.make("a.dat")
    path = os.path.join(os.fsencode(job.folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"bytes")
    completed = job.run()
    assert completed.returncode == 1
    assert len(lines_with(completed.stderr, "failed: ")) == 1
    assert completed.stderr.isascii()
    assert job.objects() == {"a.dat": b"bytes of a.dat"}
    (failed,) = (entry for entry in job.entries() if not entry["uploadedSuccess"])
    assert os.fsencode(failed["filepath"]) == path
    assert "UTF-8" in failed["error"]


# --- What cannot be read ---------------------------------------------------------------------


@needs_permissions
def test_unreadable_file_fails(job: Job) -> None:
    job.make("a.dat", "secret.dat", "z.dat")
    (job.folder / "secret.dat").chmod(0)
    assert_failed(job.run(user=NOBODY), [job.folder / "secret.dat"])
    assert job.state() == {"a.dat": 1, "secret.dat": 0, "z.dat": 1}
    assert "permission denied" in job.errors()["secret.dat"]
    assert set(job.in_bucket()) == {"a.dat", "z.dat"}


@needs_permissions
def test_unreadable_folder_fails_and_the_crash_run_walks_it(job: Job) -> None:
    files = job.make("a.dat", "secret/b.dat", "secret/deep/c.dat", "z.dat")
    secret = job.folder / "secret"
    secret.chmod(0)
    assert_failed(job.run(user=NOBODY), [secret])
    assert {e["filepath"]: e["uploadedSuccess"] for e in job.entries()} == {
        str(job.folder / "a.dat"): 1,
        str(secret): 0,
        str(job.folder / "z.dat"): 1,
    }
    assert_failed(job.crash_run(user=NOBODY), [secret])

    secret.chmod(0o755)
    since = job.seen()
    assert_clean(job.crash_run(user=NOBODY))
    assert job.sent(since) == ["secret/b.dat", "secret/deep/c.dat"]
    assert job.state() == dict.fromkeys(files, 1)
    assert job.in_bucket() == digests(files)


@needs_permissions
def test_crash_run_keeps_a_slash_at_the_start_of_keys(moto_job: Job) -> None:
    job, prefix = moto_job, ("--prefix", "/abs/")
    job.make("a.dat", "secret/b.dat", "secret/deep/c.dat")
    (job.folder / "secret").chmod(0)
    assert_failed(job.run(*prefix, user=NOBODY), [job.folder / "secret"])
    (job.folder / "secret").chmod(0o755)
    assert_clean(job.crash_run(*prefix, user=NOBODY))
    keys = {f"/abs/{name}" for name in ("a.dat", "secret/b.dat", "secret/deep/c.dat")}
    assert set(job.in_bucket()) == set(job.state()) == keys


# --- What could not be looked at is kept -----------------------------------------------------


@needs_permissions
@pytest.mark.parametrize(
    "again",
    [
        ("--skip-unchanged",),
        *(pytest.param(again, marks=pytest.mark.long) for again in ((), ("--crashrun", "1"))),
    ],
    ids=" ".join,
)
def test_what_is_below_an_unreadable_folder_stays_in_the_state(
    job: Job, again: tuple[str, ...]
) -> None:
    files = job.make("a.dat", "secret/b.dat", "secret/deep/c.dat", "z.dat")
    assert_clean(job.run(user=NOBODY))
    below = {key: job.entry(key) for key in files if key.startswith("secret/")}
    secret = job.folder / "secret"
    secret.chmod(0)
    completed = job.run("--skip-unchanged", user=NOBODY)
    for arguments in (again, again):  # once, and once more on what that has left
        assert_failed(completed, [secret])
        assert "gone" not in completed.stdout
        assert job.state() == {**dict.fromkeys(files, 1), "secret/": 0}
        assert {key: job.entry(key) for key in below} == below
        completed = job.run(*arguments, user=NOBODY)
    # Somebody deletes an object: that goes on being seen.
    job.delete("secret/b.dat")
    completed = job.run("--verify", user=NOBODY)
    assert completed.returncode == 1
    assert len(lines_with(completed.stdout, "wrong: ")) == 1
    assert job.state()["secret/b.dat"] == 0

    secret.chmod(0o755)
    since = job.seen()
    again = again or ("--skip-unchanged",)
    assert_clean(job.run(*again, user=NOBODY))
    assert job.sent(since) == ["secret/b.dat"]
    job.check_all_is_there()


def uploaded_entries(job: Job) -> dict[str, dict[str, Any]]:
    """The uploaded entries of the state, by key; none may be there twice."""
    found = [entry for entry in job.entries() if entry["uploadedSuccess"]]
    by_key = {entry["filename"]: entry for entry in found}
    assert len(by_key) == len(found)
    return by_key


@needs_permissions
@pytest.mark.parametrize(
    "again", ["--crashrun", pytest.param("--skip-unchanged", marks=pytest.mark.long)]
)
def test_what_is_below_an_unreadable_backup_folder_stays_in_the_state(job: Job, again: str) -> None:
    options = (again, "1") if again == "--crashrun" else (again,)
    files = job.make("a.dat", "sub/b.dat")
    assert_clean(job.run("--prefix", "daily-", user=NOBODY))
    before = uploaded_entries(job)
    job.folder.chmod(0)
    for arguments in (("--skip-unchanged",), options):
        completed = job.run("--prefix", "daily-", *arguments, user=NOBODY)
        assert_failed(completed, [job.folder])
        assert "gone" not in completed.stdout
        assert uploaded_entries(job) == before
    job.folder.chmod(0o755)
    job.make("new.dat")
    since = job.seen()
    assert_clean(job.run("--prefix", "daily-", *options, user=NOBODY))
    assert job.sent(since) == ["daily-new.dat"]
    assert job.state() == {f"daily-{key}": 1 for key in (*files, "new.dat")}


@pytest.mark.parametrize("again", ["--skip-unchanged", "--crashrun"])
@pytest.mark.few(1)
def test_what_is_below_a_link_to_a_disk_that_is_away_stays_in_the_state(
    job: Job, tmp_path: Path, again: str
) -> None:
    options = (again, "1") if again == "--crashrun" else (again,)
    disk = tmp_path / "disk"
    make_files(disk, {"b.dat": b"b", "deep/c.dat": b"c"})
    job.make("a.dat", "linked.dat")
    (job.folder / "link").symlink_to(disk)
    assert_clean(job.run(env=run_first(tmp_path / "later", clock())))
    before = uploaded_entries(job)
    disk.rename(tmp_path / "away")
    for arguments in (("--skip-unchanged",), options):
        completed = job.run(*arguments)
        assert_failed(completed, [job.folder / "link"])
        assert "gone" not in completed.stdout
        assert uploaded_entries(job) == before
    (tmp_path / "away").rename(disk)
    since = job.seen()
    assert_clean(job.run(*options))
    assert job.sent(since) == []
    assert job.state() == dict.fromkeys(("a.dat", "link/b.dat", "link/deep/c.dat", "linked.dat"), 1)


@needs_permissions
@pytest.mark.parametrize(
    "options", [("--storage-class", "STANDARD_IA"), ("--sse", "AES256")], ids=["class", "sse"]
)
@pytest.mark.few(1)
def test_what_could_not_be_looked_at_gets_its_storage_class_later(
    moto_job: Job, options: tuple[str, ...]
) -> None:
    job = moto_job
    job.make("d/a", "b")
    assert_clean(job.run(user=NOBODY))
    job.path("d").chmod(0o444)
    assert_failed(job.run(*options, user=NOBODY), [job.path("d/a")])
    job.path("d").chmod(0o755)
    since = job.seen()
    assert_clean(job.crash_run(*options, user=NOBODY))
    assert job.sent(since) == ["d/a"]


@needs_permissions
@pytest.mark.parametrize("was_sent", [True, False], ids=["sent", "never-sent"])
def test_no_glob_hides_that_a_folder_cannot_be_looked_at(job: Job, was_sent: bool) -> None:
    job.make("d/cache/a", "d/a-link", "b", "a-cache", "c-link")
    options = ("--exclude", "*cache", "--exclude", "*-link", "--skip-unchanged")
    if was_sent:
        assert_clean(job.run(*options, user=NOBODY))
        assert set(job.state()) == {"b", "d/cache/a"}
    job.path("d").chmod(0o444)
    completed = job.run(*options, user=NOBODY)
    assert_failed(completed, [job.path("d/a-link"), job.path("d/cache")])
    assert "gone" not in completed.stdout
    assert job.crash_run(*options[:-1], user=NOBODY).returncode == 1
    job.path("d").chmod(0o755)
    since = job.seen()
    assert_clean(job.crash_run(*options[:-1], user=NOBODY))
    assert job.sent(since) == ([] if was_sent else ["d/cache/a"])


@needs_permissions
def test_folder_that_may_be_listed_but_not_entered_fails(job: Job) -> None:
    job.make("a.dat", "secret/b.dat")
    (job.folder / "secret").chmod(0o644)
    assert_failed(job.run(user=NOBODY), [job.folder / "secret/b.dat"])
    assert job.state() == {"a.dat": 1, "secret/b.dat": 0}


@needs_permissions
@pytest.mark.parametrize("again", [("--skip-unchanged",), ("--crashrun", "1"), ()], ids=" ".join)
@pytest.mark.few(2)
def test_what_is_below_a_folder_that_may_be_listed_but_not_entered_stays_in_the_state(
    job: Job, again: tuple[str, ...]
) -> None:
    files = job.make("d/a.txt", "d/a/b.dat", "d/a/deep/c.dat", "z.dat")
    assert_clean(job.run(user=NOBODY))
    below = {key: job.entry(key) for key in files if key.startswith("d/a/")}
    folder = job.folder / "d"
    folder.chmod(0o444)
    completed = job.run("--skip-unchanged", user=NOBODY)
    for _ in range(2):  # once, and once more on what that has left
        assert_failed(completed, [folder / "a.txt", folder / "a"])
        assert "gone" not in completed.stdout
        # In the order of keys, in which the name of a folder ends in "/".
        keys = ["d/a.txt", "d/a/", "d/a/b.dat", "d/a/deep/c.dat", "z.dat"]
        assert [entry["filename"] for entry in job.entries()] == keys
        assert job.uploaded() == {*below, "z.dat"}
        assert {key: job.entry(key) for key in below} == below
        completed = job.run(*again, user=NOBODY)
    folder.chmod(0o755)
    since = job.seen()
    assert_clean(job.run(*(again or ("--skip-unchanged",)), user=NOBODY))
    assert job.sent(since) == []
    job.check_all_is_there()


@needs_permissions
@pytest.mark.parametrize("prefix", ["", "daily-"])
def test_unreadable_backup_folder_fails_and_the_crash_run_walks_it(job: Job, prefix: str) -> None:
    job.make("a.dat", "sub/b.dat")
    job.folder.chmod(0)
    assert_failed(job.run("--prefix", prefix, user=NOBODY), [job.folder])
    assert [e["uploadedSuccess"] for e in job.entries()] == [0]
    job.folder.chmod(0o755)
    assert_clean(job.crash_run("--prefix", prefix, user=NOBODY))
    assert set(job.in_bucket()) == {prefix + "a.dat", prefix + "sub/b.dat"}
    assert job.state() == dict.fromkeys(job.objects(), 1)


def test_broken_link_fails_until_it_is_mended(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    link = job.folder / "link.dat"
    link.symlink_to(tmp_path / "target.dat")
    assert_failed(job.run(), [link])
    assert job.state() == {"a.dat": 1, "link.dat": 0}
    assert "link" in job.errors()["link.dat"]
    (tmp_path / "target.dat").write_bytes(b"found")
    assert_clean(job.crash_run())
    assert job.objects() == {"a.dat": b"bytes of a.dat", "link.dat": b"found"}


def test_link_to_itself_fails(job: Job) -> None:
    job.make("a.dat")
    (job.folder / "self").symlink_to("self")
    assert_failed(job.run(), [job.folder / "self"])
    assert job.state() == {"a.dat": 1, "self": 0}


# What the calls with which the walk looks, and with which files are opened, do for such names.
TROUBLE = """
import errno, os
def failing(real):
    def call(path, *args, **keywords):
        name = os.path.basename(path) if isinstance(path, str) else ""
        if name.startswith(real.__name__ + "-"):
            number = getattr(errno, name.partition("-")[2])
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **keywords)
    return call
os.stat, os.open, os.scandir = map(failing, (os.stat, os.open, os.scandir))
"""
ADVICE = {
    "EACCES": "check its permissions",
    "EPERM": "check its permissions",
    "EIO": "check the disk",
    "ESTALE": "check the disk",
    "ENAMETOOLONG": "shorten its path",
    "ELOOP": "fix its link",
}


def test_what_cannot_be_read_comes_with_advice_that_fits(job: Job) -> None:
    names = [f"{call}-{code}" for call in ("stat", "open", "scandir") for code in ADVICE]
    job.make(*(f"{name}/a" if "scandir" in name else name for name in names))
    completed = job.run(python_flags=prelude(TROUBLE))
    assert_failed(completed, [job.folder / name for name in names])
    for key, error in job.errors().items():
        code = key.rstrip("/").partition("-")[2]
        said = os.strerror(getattr(errno, code)).lower()
        assert error == f"cannot read it: {said}; {ADVICE[code]}"


@needs_long_paths
def test_a_path_too_long_for_the_system_is_to_be_shortened(job: Job) -> None:
    job.make("a.dat")
    name, folder = "x" * 250, str(job.folder)
    above = os.open(folder, os.O_RDONLY)
    while len(folder) < 4096:  # Linux takes no longer path, but any by its last name
        folder = f"{folder}/{name}"
        os.mkdir(name, dir_fd=above)
        below = os.open(name, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)
    completed = job.run()
    assert_failed(completed, [folder])
    assert completed.stderr.splitlines()[0].endswith("; shorten its path")


def test_file_that_becomes_a_folder_after_the_walk_fails(job: Job) -> None:
    job.make("a.dat", "b.dat")

    def become_folder(_: Request) -> None:
        job.path("b.dat").unlink()
        job.path("b.dat").mkdir()

    job.proxy.add_fault(Fault(call(become_folder), operation="PutObject", key="a.dat"))
    completed = job.run("--max-concurrency", "1")
    job.check_failed(completed, "b.dat", said="it is no longer a regular file")


def test_file_that_vanishes_after_the_walk_fails(job: Job) -> None:
    job.make("a.dat", "b.dat", "c.dat")
    # One request at a time: they come in the order of the walk.
    job.proxy.add_fault(
        Fault(call(lambda _: (job.folder / "b.dat").unlink()), key="a.dat", operation="PutObject")
    )
    assert_failed(job.run("--max-concurrency", "1"), [job.folder / "b.dat"])
    assert job.state() == {"a.dat": 1, "b.dat": 0, "c.dat": 1}
    assert "vanished" in job.errors()["b.dat"]


# --- Links -----------------------------------------------------------------------------------


def test_links_are_followed_to_the_outside(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.dat").write_bytes(b"outside")
    (job.folder / "file-link").symlink_to(outside / "b.dat")
    (job.folder / "folder-link").symlink_to(outside)
    (job.folder / "same-again").symlink_to("folder-link")
    assert_clean(job.run())
    assert job.objects() == {
        "a.dat": b"bytes of a.dat",
        "file-link": b"outside",
        "folder-link/b.dat": b"outside",
        "same-again/b.dat": b"outside",
    }


@pytest.mark.parametrize("target", [".", "../..", "../../../backup"])
def test_link_back_to_a_folder_above_is_a_notice(job: Job, target: str) -> None:
    files = job.make("a.dat", "sub/b.dat", "sub/deep/c.dat")
    link = job.folder / "sub" / "deep" / "loop"
    link.symlink_to(Path(target))
    completed = job.run(timeout=HUNG_SECONDS)
    assert completed.returncode == 0
    (notice,) = lines_with(completed.stderr, "notice: ")
    assert str(link) in notice
    assert job.state() == dict.fromkeys(files, 1)
    assert job.in_bucket() == digests(files)


def test_links_between_two_folders_end(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.dat").write_bytes(b"bytes")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    (job.folder / "one").symlink_to(tmp_path / "one")
    completed = job.run(timeout=HUNG_SECONDS)
    assert completed.returncode == 0
    assert set(job.state()) == {"a.dat", "one/one.dat", "one/link/two.dat"}


NOT_FOLLOWED = "link to a folder above it, not followed"


# By their real names, and by those that the command line gives.
@pytest.mark.parametrize("target", ["a/b", "a", ".", "x"])
def test_link_to_what_is_above_the_backup_folder_is_a_notice(
    job: Job, tmp_path: Path, target: str
) -> None:
    job = replace(job, folder=tmp_path / "a/b/backup")
    files = job.make("a.dat", "sub/b.dat")
    make_files(tmp_path, {"a/b/secret/key.pem": b"", "x/key.pem": b"", "outside/c.dat": b"c"})
    (tmp_path / "x/link").symlink_to(job.folder)
    job.path("outside").symlink_to(tmp_path / "outside")
    for link in ("up", "sub/up", "outside/up"):
        job.path(link).symlink_to(tmp_path / target)
    completed = job.run("--backupfolder", tmp_path / "x/link", timeout=HUNG_SECONDS)
    assert completed.returncode == 0
    assert len(lines_with(completed.stderr, NOT_FOLLOWED)) == 3
    assert job.objects() == {**files, "outside/c.dat": b"c"}


# As after `mount --bind`: a folder is that other one.
BOUND = """
import os
real = os.stat
os.stat = lambda path, *args, **keywords: real(
    {other!r} if path == {folder!r} else path, *args, **keywords
)
"""


def test_what_is_above_is_sent_where_it_is_mounted_below(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat", "mounted/b.dat")
    flags = prelude(BOUND.format(folder=str(job.path("mounted")), other=str(tmp_path)))
    assert_clean(job.run(python_flags=flags))
    assert job.in_bucket() == digests(files)


@pytest.mark.parametrize("target", ["backup", "backup/sub", ".", "one"])
def test_crash_run_does_not_follow_a_link_to_what_is_above(
    job: Job, tmp_path: Path, target: str
) -> None:
    files = job.back_up("a.dat", "sub/b.dat")
    make_files(tmp_path, {"one/one.dat": b"", "two/two.dat": b""})
    job.path("sub/one").symlink_to(tmp_path / "one")
    (tmp_path / "one/two").symlink_to(tmp_path / "two")
    (tmp_path / "two/alias").symlink_to(tmp_path / target)
    # It was broken, or unreadable, when the last run came to it.
    job.write_state(*job.entries(), job.pending_entry("sub/one/two/alias"))
    for options in (("--dryrun",), ()):
        completed = job.crash_run(*options, timeout=HUNG_SECONDS)
        assert completed.returncode == 0
        assert len(lines_with(completed.stderr, NOT_FOLLOWED)) == 1
        assert "would upload" not in completed.stdout
    assert job.puts() == []
    assert job.state() == dict.fromkeys(files, 1)


SWAPPED = """
import os
real = os.stat
def stat(path, *args, **keywords):
    status = real(path, *args, **keywords)
    if path == {folder!r} and not os.path.islink(path):
        os.rename(path, {away!r})
        os.symlink({target!r}, path)
    return status
os.stat = stat
"""


@pytest.mark.parametrize("system", ["", WITHOUT_DIR_FD], ids=["by-name", "looked-at"])
def test_a_folder_that_becomes_a_link_in_the_walk_is_not_followed(
    job: Job, tmp_path: Path, system: str
) -> None:
    job.make("a.dat", "d/e/b.dat")
    make_files(tmp_path / "secret", {"key.pem": b"secret"})
    places = {"folder": job.path("d/e"), "away": tmp_path / "away", "target": tmp_path / "secret"}
    code = SWAPPED.format(**{name: str(path) for name, path in places.items()})
    completed = job.run("--no-follow-symlinks", python_flags=prelude(f"{system}\n{code}"))
    job.check_failed(completed, "d/e/", said="it has become a symbolic link; ")
    assert job.objects() == {"a.dat": b"bytes of a.dat"}


def test_crash_run_does_not_follow_a_folder_that_has_become_a_link(
    job: Job, tmp_path: Path
) -> None:
    job.make("a.dat", "d/e/b.dat", "d/unreadable/c.dat")
    job.write_state(*map(job.pending_entry, ("a.dat", "d/e/b.dat", "d/unreadable")))
    job.path("d").rename(tmp_path / "away")
    make_files(tmp_path / "secret", {"e/b.dat": b"secret", "unreadable/key.pem": b"secret"})
    job.path("d").symlink_to(tmp_path / "secret")
    completed = job.crash_run("--no-follow-symlinks", "--dryrun")
    assert len(lines_with(completed.stdout, "would upload")) == 1
    completed = job.crash_run("--no-follow-symlinks")
    said = "a folder above it has become a symbolic link; "
    job.check_failed(completed, "d/e/b.dat", "d/unreadable", said=said)
    assert job.objects() == {"a.dat": b"bytes of a.dat"}


def test_no_follow_symlinks_skips_every_link_with_a_notice(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat", "sub/b.dat")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "c.dat").touch()
    targets = {"broken": "missing", "file": "a.dat", "folder": str(tmp_path / "outside")}
    links = [job.folder / name for name in targets]
    for name, target in targets.items():
        (job.folder / name).symlink_to(target)
    completed = job.run("--no-follow-symlinks", "--verbose")
    assert completed.returncode == 0
    notices = lines_with(completed.stderr, "notice: ")
    assert len(notices) == len(links)
    assert [link for link in links if not lines_with("\n".join(notices), str(link))] == []
    assert job.in_bucket() == digests(files)
    assert job.state() == dict.fromkeys(files, 1)


def test_no_follow_symlinks_follows_the_backup_folder_itself(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat")
    (tmp_path / "link").symlink_to(job.folder)
    assert_clean(job.run("--no-follow-symlinks", "--backupfolder", "link"))
    assert job.in_bucket() == digests(files)


# --- Sockets, FIFOs and devices --------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def make_device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


@needs_fifos
@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device_link])
def test_special_file_is_a_notice(job: Job, make: Callable[[Path], None]) -> None:
    files = job.make("a.dat", "z.dat")
    make(job.folder / "special")
    completed = job.run(timeout=HUNG_SECONDS)
    assert completed.returncode == 0
    (notice,) = completed.stderr.splitlines()
    assert notice.startswith("notice: ")
    assert str(job.folder / "special") in notice
    assert job.state() == dict.fromkeys(files, 1)


@needs_fifos
def test_file_that_turns_into_a_fifo_after_the_walk_does_not_hang(job: Job) -> None:
    job.make("a.dat", "b.dat")

    def replace(_: object) -> None:
        (job.folder / "b.dat").unlink()
        os.mkfifo(job.folder / "b.dat")

    job.proxy.add_fault(Fault(call(replace), key="a.dat", operation="PutObject"))
    completed = job.run("--max-concurrency", "1", timeout=HUNG_SECONDS)
    assert_failed(completed, [job.folder / "b.dat"])
    assert job.state() == {"a.dat": 1, "b.dat": 0}


@needs_fifos
def test_many_notices_of_a_kind_are_counted(job: Job) -> None:
    job.make("a.dat")
    for number in range(20):
        os.mkfifo(job.folder / f"fifo-{number:02}")
    completed = job.run()
    assert completed.returncode == 0
    listed = lines_with(completed.stderr, str(job.folder))
    (counted,) = set(completed.stderr.splitlines()) - set(listed)
    assert f"{20 - len(listed)} more (--verbose names them)" in counted
    assert len(listed) < 20


# --- The script's own files ------------------------------------------------------------------


def test_own_files_in_the_folder_are_left_out(job: Job) -> None:
    others = ("sub/state.json", "state.json.bak", "zz/state.json.lock", "zz/state.json.journal")
    files = job.make("a.dat", *others)
    state = job.folder / "state.json"
    for _ in range(2):  # the second run finds all of them there
        assert_clean(job.run("--statefile", state))
        assert state.exists()
        # As a kill may leave them.
        (job.folder / "state.json.tmp").write_text('[\n{"filepath": "/')
        (job.folder / "state.json.journal").write_text('{"crc32": 1}\n')
    assert_clean(job.run("--statefile", state, "--crashrun", "1"))
    assert job.in_bucket() == digests(files)


def test_default_state_file_in_the_folder_is_left_out(job: Job) -> None:
    files = job.make("a.dat")
    arguments = ["--bucketname", job.bucket, "--backupfolder", "."]
    for _ in range(2):
        assert_clean(job.run_plainly(*arguments, cwd=job.folder))
    assert (job.folder / "stateFile.json").exists()
    assert job.in_bucket() == digests(files)


def test_own_files_are_left_out_where_a_link_leads_to_them(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "other.txt").touch()
    (job.folder / "link").symlink_to(tmp_path / "states")
    for _ in range(2):
        assert_clean(job.run("--statefile", tmp_path / "states" / "state.json"))
    assert set(job.in_bucket()) == {"a.dat", "link/other.txt"}


def test_own_files_are_left_out_when_named_through_a_link(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat")
    (tmp_path / "link").symlink_to(job.folder)
    for _ in range(2):
        assert_clean(job.run("--statefile", tmp_path / "link" / "state.json"))
    assert job.in_bucket() == digests(files)


def test_link_in_the_folder_that_is_the_state_file_is_left_out(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat")
    (tmp_path / "kept.json").write_text("[]")
    (job.folder / "state.json").symlink_to(tmp_path / "kept.json")
    assert_clean(job.run("--statefile", job.folder / "state.json"))
    assert job.in_bucket() == digests(files)


# As on file systems that have no number for each file: FUSE on Windows has 0 for all.
WITHOUT_INODES = """
import os

def blind(real):
    def look(*args, **keywords):
        status = real(*args, **keywords)
        names = "st_atime st_mtime st_ctime st_atime_ns st_mtime_ns st_ctime_ns".split()
        numbers = [*status[:1], 0, *status[2:10]]
        return os.stat_result(numbers, {name: getattr(status, name) for name in names})
    return look

os.stat, os.lstat, os.fstat = map(blind, (os.stat, os.lstat, os.fstat))
"""


def test_where_files_have_no_numbers_every_folder_is_entered_and_every_file_sent(job: Job) -> None:
    files = job.make("a.dat", "sub/b.dat", "sub/deep/er/c.dat", "sub/state.json", "z/z/z/z")
    state = job.folder / "state.json"
    for _ in range(2):
        assert_clean(job.run("--statefile", state, python_flags=prelude(WITHOUT_INODES)))
    assert job.in_bucket() == digests(files)


def test_where_files_have_no_numbers_a_loop_of_links_ends(job: Job) -> None:
    files = job.make("a.dat", "sub/b.dat")
    (job.folder / "sub" / "loop").symlink_to(job.folder)
    completed = job.run(python_flags=prelude(WITHOUT_INODES), timeout=HUNG_SECONDS)
    assert set(files) <= job.uploaded()
    assert completed.returncode in (0, 1)


# --- --exclude -------------------------------------------------------------------------------

TREE = (
    "a.dat",
    "a.tmp",
    "conf.d/b.dat",
    "conf.d/b.tmp",
    "sub/a.dat",
    "sub/deep/c.dat",
    "subway.dat",
    "x[1].dat",
    "x1.dat",
)


def excluding(*globs: str) -> list[str]:
    """The options that exclude what matches these globs."""
    return [word for glob in globs for word in ("--exclude", glob)]


def without_match(completed: Completed) -> list[str]:
    """The globs that a run says to have matched no file, when it says nothing else."""
    notice = "notice: --exclude matched no file; "
    how = "paths are relative to the backup folder; 'NAME/*' is all below NAME: "
    lines = completed.stderr.splitlines()
    assert all(line.startswith(notice + how) for line in lines), completed.stderr
    return [line.removeprefix(notice + how) for line in lines]


# As `aws s3 cp --recursive --exclude`: fnmatch of the whole relative path of each file, where `*`
# matches "/" too; a folder is no more than a part of its files' paths.
@pytest.mark.parametrize(
    ("globs", "left_out"),
    [
        (["*.tmp"], {"a.tmp", "conf.d/b.tmp"}),
        (["sub/*"], {"sub/a.dat", "sub/deep/c.dat"}),
        (["sub*"], {"sub/a.dat", "sub/deep/c.dat", "subway.dat"}),
        (["sub"], set()),
        (["sub/"], set()),
        (["*.d"], set()),
        (["*/deep"], set()),
        (["a.dat"], {"a.dat"}),
        (["*/a.dat"], {"sub/a.dat"}),
        (["x[[]1].dat"], {"x[1].dat"}),
        (["x[1].dat"], {"x1.dat"}),
        (["x?.dat"], {"x1.dat"}),
        (["[!a-w]*"], {"x1.dat", "x[1].dat"}),
        (["A.DAT"], set()),
        (["*.tmp", "sub/*"], {"a.tmp", "conf.d/b.tmp", "sub/a.dat", "sub/deep/c.dat"}),
        (["./a.dat"], set()),
    ],
)
def test_exclude(job: Job, globs: list[str], left_out: set[str]) -> None:
    job.make(*TREE)
    listed = job.run("--dryrun", *excluding(*globs))
    assert listed.returncode == 0
    assert without_match(listed) == ([] if left_out else globs)
    assert {name for name in TREE if f" {job.folder / name} " not in listed.stdout} == left_out


@pytest.mark.parametrize(
    ("globs", "idle"),
    [
        ([".ssh"], [".ssh"]),
        ([".ssh/"], [".ssh/"]),
        (["/.ssh/*"], ["/.ssh/*"]),
        (["*/deep"], ["*/deep"]),
        (["*.bak", "*.tmp"], ["*.bak"]),
        # All that match a file count, and not only the first of them.
        (["*.tmp", "a.*", "a.tmp", "[a]*"], []),
        # What is below a folder that is left out is not looked at, and may match.
        ([".ssh/*", "*.key", ".ssh/i*", ".ssh/sub/x"], []),
        ([".ssh/*", "sub/x.key", ".sshd"], ["sub/x.key", ".sshd"]),
    ],
    ids=" ".join,
)
@pytest.mark.few(4)
def test_a_glob_that_matches_no_file_is_told(job: Job, globs: list[str], idle: list[str]) -> None:
    job.make("a.dat", "a.tmp", ".ssh/id", "sub/deep/c.dat")
    assert without_match(job.run("--dryrun", *excluding(*globs))) == idle
    completed = job.run(*excluding(*globs))
    assert completed.returncode == 0
    assert without_match(completed) == idle
    assert job.run("--quiet", *excluding(*globs)).stderr == ""


def test_many_globs_that_match_no_file_are_counted(job: Job) -> None:
    job.make("a.dat")
    completed = job.run("--dryrun", *excluding(*"bcdefg"))
    *globs, more = without_match(completed)
    assert globs == ["b", "c", "d"]
    assert more.startswith("3 more")


def test_excluded_files_are_neither_sent_nor_in_the_state(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job.run("--exclude", "*.tmp"))
    kept = set(TREE) - {"a.tmp", "conf.d/b.tmp"}
    assert set(job.in_bucket()) == set(job.state()) == kept


@needs_permissions
def test_exclude_of_all_below_a_folder_spares_a_look_into_it(job: Job) -> None:
    job.make("a.dat", "lost+found/b.dat")
    (job.folder / "lost+found").chmod(0)
    assert_clean(job.run("--exclude", "lost+found/*", user=NOBODY))
    assert set(job.in_bucket()) == set(job.state()) == {"a.dat"}


@needs_permissions
def test_excluded_trouble_is_no_trouble(job: Job) -> None:
    job.make("a.dat", "secret.dat")
    (job.folder / "secret.dat").chmod(0)
    (job.folder / "broken").symlink_to("missing")
    os.mkfifo(job.folder / "fifo")
    assert_clean(job.run(*excluding("secret.dat", "broken", "fifo"), user=NOBODY))
    assert job.state() == {"a.dat": 1}


@needs_permissions
def test_exclude_holds_for_a_folder_that_a_crash_run_walks(job: Job) -> None:
    job.make("a.dat", "secret/b.dat", "secret/c.tmp")
    (job.folder / "secret").chmod(0)
    assert job.run("--exclude", "*.tmp", user=NOBODY).returncode == 1
    (job.folder / "secret").chmod(0o755)
    assert_clean(job.crash_run("--exclude", "*.tmp", user=NOBODY))
    assert set(job.in_bucket()) == {"a.dat", "secret/b.dat"}


@needs_permissions
@pytest.mark.parametrize("is_readable", [False, True], ids=["unreadable", "readable"])
def test_exclude_of_all_below_a_folder_holds_in_a_crash_run(job: Job, is_readable: bool) -> None:
    job.make("a.dat", "cache/b.dat", "cache/deep/c.dat")
    cache = job.folder / "cache"
    cache.chmod(0)
    assert_failed(job.run(user=NOBODY), [cache])
    if is_readable:
        cache.chmod(0o755)
    assert_clean(job.crash_run("--exclude", "cache/*", user=NOBODY))
    assert job.state() == {"a.dat": 1}
    assert set(job.in_bucket()) == {"a.dat"}


def test_exclude_holds_for_the_files_of_a_crash_run(job: Job) -> None:
    job.make("a.dat", "b.dat", "c.tmp", "d.dat")
    job.refuse("b.dat", "c.tmp")
    assert_failed(job.run(), [job.folder / "b.dat", job.folder / "c.tmp"])
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run("--exclude", "c.*"))
    assert job.puts(since) == ["b.dat"]
    # What is excluded now is no longer to be sent, and the next crash run has nothing to do.
    assert job.state() == {"a.dat": 1, "b.dat": 1, "d.dat": 1}


# --- --dryrun --------------------------------------------------------------------------------


def test_dry_run_lists_what_would_be_sent(job: Job) -> None:
    job.make("a.dat", "sub/b.dat")
    completed = job.run("--dryrun", "--prefix", "daily/")
    assert (completed.returncode, completed.stderr) == (0, "")
    *listed, summary = completed.stdout.splitlines()
    assert len(listed) == 2
    for line, name in zip(listed, ("a.dat", "sub/b.dat"), strict=True):
        assert f" {job.folder / name} " in line
        assert f" s3://{job.bucket}/daily/{name} " in line
    assert "2 files" in summary


def test_dry_run_touches_neither_bucket_nor_state(job: Job) -> None:
    job.make("a.dat")
    assert job.run("--dryrun").returncode == 0
    assert list(job.state_path.parent.iterdir()) == []
    assert job.proxy.requests == []


def test_dry_run_needs_no_credentials(job: Job) -> None:
    job.make("a.dat")
    assert job.run("--dryrun", server=None).returncode == 0


def test_dry_run_says_what_could_not_be_sent(job: Job) -> None:
    job.make("a.dat")
    (job.folder / "broken").symlink_to("missing")
    completed = job.run("--dryrun")
    assert_failed(completed, [job.folder / "broken"])
    assert len(lines_with(completed.stdout, "would upload")) == 1


def test_dry_run_of_a_crash_run_lists_what_is_missing(job: Job) -> None:
    job.make("a.dat", "b.dat", "c.tmp")
    (job.folder / "b.dat").unlink()
    (job.folder / "b.dat").symlink_to("target")
    assert job.run("--exclude", "*.tmp").returncode == 1
    (job.folder / "target").write_bytes(b"found")
    before = job.state_path.read_bytes()
    completed = job.crash_run("--dryrun")
    assert completed.returncode == 0
    (listed,) = lines_with(completed.stdout, "would upload")
    assert str(job.folder / "b.dat") in listed
    assert job.state_path.read_bytes() == before


# --- Interrupted -----------------------------------------------------------------------------

BLOCKED = """
import os, time
scandir = os.scandir
def blocked(path="."):
    if os.path.basename(os.fspath(path)) == "sub" and os.path.exists({state!r}):
        open({there!r}, "w").close()
        while not os.path.exists({leave!r}):
            time.sleep(0.01)
    return scandir(path)
os.scandir = blocked
"""


@needs_signals
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_walk_ends_the_run(
    job: Job, tmp_path: Path, signum: int, code: int
) -> None:
    job.make("a.dat", "sub/b.dat", "sub/c.dat", "z.dat")
    there, leave = tmp_path / "there", tmp_path / "leave"
    places = {"state": str(job.state_path), "there": str(there), "leave": str(leave)}
    process = job.start(python_flags=prelude(BLOCKED.format(**places)))
    wait_until(there.exists, 60, "the walk in the folder")
    process.send_signal(signum)
    leave.touch()
    completed = finish(process)
    assert (completed.returncode, completed.stdout) == (code, "")
    (sentence,) = completed.stderr.splitlines()
    assert "--crashrun 1" in sentence
    assert job.puts() == []
    assert [entry["filepath"] for entry in job.entries()] == [str(job.folder)]
    assert_clean(job.crash_run())
    job.check_all_is_there()


# --- Empty folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--dryrun"]])
def test_empty_folder_is_said(job: Job, arguments: list[str]) -> None:
    (job.folder / "empty" / "too").mkdir(parents=True)
    completed = job.run(*arguments)
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert str(job.folder) in said
    assert "nothing" in said


def test_empty_folder_of_which_files_were_uploaded_is_refused(job: Job) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job.run())
    before = job.state_path.read_bytes()
    for name in ("a.dat", "b.dat"):
        (job.folder / name).unlink()
    assert_stopped(job.run(), str(job.folder), "uploaded files")
    assert job.state_path.read_bytes() == before


def folder_entry(job: Job, prefix: str = "") -> dict[str, object]:
    """The fields of the folder's own entry that are the same in each version of the state."""
    return {"filepath": str(job.folder), "uploadedSuccess": 0, "filename": prefix}


@pytest.mark.parametrize("why", ["empty", "excluded"])
@pytest.mark.parametrize("skip", [(), ("--skip-unchanged",)], ids=["plain", "skip"])
@pytest.mark.few(2)
def test_a_run_with_nothing_to_send_leaves_an_entry_for_the_crash_run(
    job: Job, why: str, skip: tuple[str, ...]
) -> None:
    options = ("--prefix", "daily/", "--exclude", "*.tmp")
    job.folder.mkdir()
    if why == "excluded":
        job.make("a.tmp", "sub/b.tmp")
    for _ in range(2):
        completed = job.run(*options, *skip)
        assert completed.returncode == 0
        (said,) = completed.stderr.splitlines()
        assert "nothing" in said
        (entry,) = job.entries()
        assert entry.items() >= folder_entry(job, "daily/").items()
        assert entry["error"] == "there was nothing to send in it"
    # At three o'clock there is still nothing, at five there is.
    state = job.state_path.read_bytes()
    assert job.crash_run(*options).returncode == 0
    assert job.state_path.read_bytes() == state
    assert job.puts() == []
    job.make("sub/c.dat")
    assert_clean(job.crash_run(*options))
    assert job.state() == {"daily/sub/c.dat": 1}
    assert set(job.in_bucket()) == {"daily/sub/c.dat"}


def test_a_night_with_an_empty_folder_is_followed_by_one_that_sends(job: Job) -> None:
    job.folder.mkdir()
    assert job.run().returncode == 0
    job.make("a.dat")
    completed = job.run("--skip-unchanged")
    assert_clean(completed)
    assert "gone" not in completed.stdout
    job.check_all_is_there()


def test_a_folder_that_was_walked_at_a_kill_and_is_empty_now_is_not_forgotten(job: Job) -> None:
    job.folder.mkdir()
    job.write_state(folder_entry(job))
    assert job.crash_run().returncode == 0
    (entry,) = job.entries()
    assert entry.items() >= folder_entry(job).items()
    job.make("a.dat")
    assert_clean(job.crash_run())
    job.check_all_is_there()


def test_an_empty_folder_of_which_uploads_are_known_is_refused_in_a_crash_run(job: Job) -> None:
    job.back_up("a.dat")
    uploaded = job.uploaded_entry("a.dat")
    job.path("a.dat").unlink()
    # What a kill during the walk of an incremental run leaves.
    state = job.write_state(folder_entry(job), uploaded)
    assert_stopped(job.crash_run(), "nothing", str(job.folder), "mounted")
    assert job.state_path.read_bytes() == state


# --- --shard: the split ----------------------------------------------------------------------


def listed(completed: Completed) -> list[str]:
    """The keys that a dry run lists, in their order."""
    assert (completed.returncode, completed.stderr) == (0, "")
    return re.findall(r" -> s3://[^/]+/(.*) \(.*?\)$", completed.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_shards_together_are_the_folder(job: Job, count: int) -> None:
    job.make(*NAMES)
    names = [f"{index}/{count}" for index in range(1, count + 1)]
    sent = [key for name in names for key in listed(job.run("--dryrun", "--shard", name))]
    assert sorted(sent) == NAMES


def test_names_that_are_no_text_are_of_one_shard_each() -> None:
    module = program()
    arguments = ["--bucketname", "bucket", "--backupfolder", ".", "--shard"]
    shards = [module.parse_arguments([*arguments, f"{index}/2"]) for index in (1, 2)]
    # As Linux has a byte that is no UTF-8, and as Windows has half of a pair.
    for name in ("\udcff", "\ud800"):
        entry = module.Entry(f"/folder/{name}", name, error=module.key_problem(name))
        assert sum(module.is_in_shard(entry, options) for options in shards) == 1


def test_the_split_is_by_crc32_of_the_key_wherever_the_folder_is(job: Job, tmp_path: Path) -> None:
    assert {shard: keys_of(shard, NAMES) for shard in SPLIT_IN_3} == SPLIT_IN_3
    elsewhere = tmp_path / "another" / "mount point"
    make_files(elsewhere, dict.fromkeys(NAMES, b"bytes"))
    job.make(*NAMES)
    for shard, part in shards_of(job, 3).items():
        there = ("--dryrun", "--shard", shard, "--backupfolder", elsewhere)
        assert listed(part.run(*there)) == SPLIT_IN_3[shard]
        assert_clean(part.run("--shard", shard))
        assert part.state() == dict.fromkeys(SPLIT_IN_3[shard], 1)
        assert {entry["shard"] for entry in part.entries()} == {shard}
    assert job.in_bucket() == job.in_folder()
    assert len(job.puts()) == len(NAMES)


def test_the_split_does_not_depend_on_the_other_files(job: Job) -> None:
    job.make("sub/a.dat", "b.dat")
    part = shards_of(job, 3)["3/3"]
    assert_clean(part.run("--shard", "3/3"))
    assert part.state() == {"sub/a.dat": 1}


def test_many_files_in_lanes_are_split_too(job: Job) -> None:
    names = [f"{number:04}" for number in range(160)]
    job.write(dict.fromkeys(names, b"bytes"))
    part = shards_of(job, 2)["2/2"]
    assert_clean(part.run("--shard", "2/2"))
    assert sorted(part.state()) == keys_of("2/2", names)
    assert job.sent() == keys_of("2/2", names)


# --- A shard with nothing in it --------------------------------------------------------------


def test_a_shard_without_files_is_fine(job: Job) -> None:
    job.make(*NAMES)
    assert keys_of("3/7", NAMES) == []
    for _ in range(2):
        assert_clean(job.run("--shard", "3/7"))
        assert job.puts() == []
        (entry,) = job.entries()
        assert entry.items() >= {**folder_entry(job), "shard": "3/7"}.items()
        assert job.crash_run("--shard", "3/7").returncode == 0
    names = [f"{number}" for number in range(20)]
    job.make(*names)
    assert_clean(job.crash_run("--shard", "3/7"))
    assert job.sent() == sorted(keys_of("3/7", names)) != []


def test_a_shard_whose_last_file_is_gone_is_fine(job: Job) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job.run("--shard", "1/3"))
    assert job.state() == {"a.dat": 1}
    (job.folder / "a.dat").unlink()
    completed = job.run("--shard", "1/3")
    assert_clean(completed)
    assert "0 failed, 1 gone since the last run; state: " in completed.stdout
    assert [entry["filepath"] for entry in job.entries()] == [str(job.folder)]


def test_an_empty_folder_is_said_by_a_shard_too(job: Job) -> None:
    job.folder.mkdir()
    completed = job.run("--shard", "1/2")
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert "nothing" in said


# --- Shards in crash runs --------------------------------------------------------------------


def test_a_crash_run_sends_what_is_missing_of_its_shard(job: Job) -> None:
    job.make(*NAMES)
    mine = SPLIT_IN_3["2/3"]
    missing = mine[::2]
    job.refuse(*missing)
    assert_failed(job.run("--shard", "2/3"), [job.folder / key for key in missing])
    assert {entry["shard"] for entry in job.entries()} == {"2/3"}
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run("--shard", "2/3"))
    assert job.sent(since) == missing
    assert job.state() == dict.fromkeys(mine, 1)
    assert {entry["shard"] for entry in job.entries()} == {"2/3"}


@needs_signals
def test_a_crash_run_after_a_kill_during_the_walk_sends_its_shard(job: Job, tmp_path: Path) -> None:
    options = ("--skip-unchanged",)
    job.make(*NAMES)
    # In the walk for the plan, which the state precedes.
    walked = f"(os.path.basename(args[0]) == 'sub' and os.path.exists({str(job.state_path)!r}))"
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    assert job.start("--shard", "2/3", *options, env=env).wait(60) == -9
    (folder,) = job.entries()
    assert (folder["filepath"], folder["shard"]) == (str(job.folder), "2/3")
    assert_clean(job.crash_run("--shard", "2/3", *options))
    assert job.sent() == SPLIT_IN_3["2/3"]
    assert job.state() == dict.fromkeys(SPLIT_IN_3["2/3"], 1)


@needs_permissions
def test_a_folder_that_cannot_be_read_is_of_every_shard(job: Job) -> None:
    job.make(*NAMES)
    sub = job.folder / "sub"
    readable = [name for name in NAMES if not name.startswith("sub/")]
    sub.chmod(0)
    shards = shards_of(job, 3)
    for shard, part in shards.items():
        assert_failed(part.run("--shard", shard, user=NOBODY), [sub])
        expected = {**dict.fromkeys(keys_of(shard, readable), 1), "sub/": 0}
        assert part.state() == expected
        assert {entry["shard"] for entry in part.entries()} == {shard}
    sub.chmod(0o755)
    for shard, part in shards.items():
        since = job.seen()
        assert_clean(part.crash_run("--shard", shard, user=NOBODY))
        assert job.sent(since) == [k for k in SPLIT_IN_3[shard] if k.startswith("sub/")]
        assert part.state() == dict.fromkeys(SPLIT_IN_3[shard], 1)


@needs_permissions
def test_a_backup_folder_that_cannot_be_read_is_of_every_shard(job: Job) -> None:
    prefix = "daily-"
    names = [f"{prefix}{name}" for name in NAMES]
    job.make(*NAMES)
    job.folder.chmod(0)
    shards = shards_of(job, 3)
    for shard, part in shards.items():
        options = ("--shard", shard, "--prefix", prefix)
        assert_failed(part.run(*options, user=NOBODY), [job.folder])
    job.folder.chmod(0o755)
    for shard, part in shards.items():
        assert_clean(part.crash_run("--shard", shard, "--prefix", prefix, user=NOBODY))
        assert part.state() == dict.fromkeys(keys_of(shard, names), 1)
    assert sorted(job.in_bucket()) == names


def test_a_broken_link_that_leads_to_a_folder_later_is_of_every_shard(job: Job) -> None:
    job.make("other.dat")
    disk = job.folder.parent / "disk"
    (job.folder / "sub").symlink_to(disk)
    shards = shards_of(job, 3)
    for shard, part in shards.items():
        assert_failed(part.run("--shard", shard), [job.folder / "sub"])
    names = [name for name in NAMES if name.startswith("sub/")]
    make_files(disk, {name.removeprefix("sub/"): name.encode() for name in names})
    for shard, part in shards.items():
        assert_clean(part.crash_run("--shard", shard))
        keys = keys_of(shard, [*names, "other.dat"])
        # A shard without a file keeps the folder's own entry.
        assert part.state() == (dict.fromkeys(keys, 1) if keys else {"": 0})
    assert sorted(job.in_bucket()) == sorted([*names, "other.dat"])


@needs_permissions
def test_a_file_that_cannot_be_read_is_of_one_shard(job: Job) -> None:
    job.make("a.dat", "c.dat")
    (job.folder / "c.dat").chmod(0)
    shards = shards_of(job, 3)
    assert_clean(shards["1/3"].run("--shard", "1/3", user=NOBODY))
    assert_failed(shards["3/3"].run("--shard", "3/3", user=NOBODY), [job.folder / "c.dat"])


def test_an_unchanged_shard_is_skipped_and_is_right(job: Job) -> None:
    job.make(*NAMES)
    assert_clean(job.run("--shard", "2/3"))
    since = job.seen()
    completed = job.run("--shard", "2/3", "--skip-unchanged")
    assert_clean(completed)
    assert re.search(r"\b5 unchanged", completed.stdout)
    assert job.sent(since) == []
    completed = job.run("--shard", "2/3", "--verify")
    assert_clean(completed)
    assert re.search(r"\b5 files right", completed.stdout)
    job.server.client().delete_object(Bucket=job.bucket, Key="d.dat")
    assert job.run("--shard", "2/3", "--verify").returncode == 1
    assert_clean(job.crash_run("--shard", "2/3"))
    assert job.sent(since) == ["d.dat"]


# --- Shards side by side ---------------------------------------------------------------------


def test_shards_may_run_at_the_same_time(job: Job) -> None:
    files = job.make(*NAMES)
    held = Fault(
        delay(600), operation="PutObject", times=2, key=lambda key: key in ("a.dat", "c.dat")
    )
    job.proxy.add_fault(held)
    running: list[tuple[Job, subprocess.Popen[str]]] = []
    for shard in ("1/3", "3/3"):
        part = shards_of(job, 3)[shard]
        running.append((part, part.start("--shard", shard)))
    wait_until(lambda: held.hits == 2, 60, "a held upload of each")
    assert_clean(shards_of(job, 3)["2/3"].run("--shard", "2/3"))  # while both others are at work
    for part, process in running:
        assert process.poll() is None
        process.kill()
        process.communicate()
        shard = part.entries()[0]["shard"]
        assert_clean(part.crash_run("--shard", shard))
    assert job.in_bucket() == digests(files)
