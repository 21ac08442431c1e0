"""Which files are sent, under which keys, and what is said of the others."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checks import assert_clean, assert_failed, assert_stopped, lines_with
from support.faults import Fault, call
from support.job import NOBODY, Job
from support.systems import needs_byte_names, needs_fifos, needs_long_paths, needs_permissions

HUNG_SECONDS = 60


# --- Keys ------------------------------------------------------------------------------------


def test_nested_folders_become_keys(job: Job) -> None:
    files = job.make("a.dat", "sub/a.dat", "sub/deep/er/b.dat", "sub.dat", ".hidden/.c")
    assert_clean(job.run())
    assert job.objects() == files
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
    assert job.objects() == files


def test_walk_is_sorted(job: Job) -> None:
    names = ["b", "a.dat", "a/z", "a/y/x", "c/1", "10", "9"]
    if sys.platform == "linux":  # elsewhere it may be the same name as "b"
        names.append("B")
    job.make(*names)
    assert_clean(job.run())
    assert [e["filename"] for e in job.entries()] == sorted(names, key=lambda n: n.split("/"))


@pytest.mark.parametrize("prefix", ["daily/", "daily-", "a b/ä/"])
def test_prefix_is_put_in_front(job: Job, prefix: str) -> None:
    files = job.make("a.dat", "sub/b.dat")
    assert_clean(job.run("--prefix", prefix))
    assert job.objects() == {prefix + key: content for key, content in files.items()}
    assert set(job.state()) == set(job.objects())


def name_of_key(length: int) -> str:
    """A path of so many bytes, each of its names allowed by file systems."""
    return ("x" * 199 + "/") * (length // 200) + "y" * (length % 200)


@needs_long_paths
def test_key_of_1024_bytes_is_sent_and_longer_ones_fail(job: Job) -> None:
    fits, too_long = name_of_key(1024), name_of_key(1025)
    job.make(fits, too_long)
    assert_failed(job.run(), [job.folder / too_long])
    assert list(job.objects()) == [fits]
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
    assert set(job.objects()) == {"a.dat", "z.dat"}


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
    assert_clean(job.crash_run(user=NOBODY))
    assert sorted(job.puts()) == ["secret/b.dat", "secret/deep/c.dat"]
    assert job.state() == dict.fromkeys(files, 1)
    assert job.objects() == files


@needs_permissions
def test_folder_that_may_be_listed_but_not_entered_fails(job: Job) -> None:
    job.make("a.dat", "secret/b.dat")
    (job.folder / "secret").chmod(0o644)
    assert_failed(job.run(user=NOBODY), [job.folder / "secret/b.dat"])
    assert job.state() == {"a.dat": 1, "secret/b.dat": 0}


@needs_permissions
@pytest.mark.parametrize("prefix", ["", "daily-"])
def test_unreadable_backup_folder_fails_and_the_crash_run_walks_it(job: Job, prefix: str) -> None:
    job.make("a.dat", "sub/b.dat")
    job.folder.chmod(0)
    assert_failed(job.run("--prefix", prefix, user=NOBODY), [job.folder])
    assert [e["uploadedSuccess"] for e in job.entries()] == [0]
    job.folder.chmod(0o755)
    assert_clean(job.crash_run("--prefix", prefix, user=NOBODY))
    assert set(job.objects()) == {prefix + "a.dat", prefix + "sub/b.dat"}
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


@pytest.mark.parametrize("target", [".", "..", "../..", "../../sub", "../../../backup"])
def test_link_back_to_a_folder_above_is_a_notice(job: Job, target: str) -> None:
    files = job.make("a.dat", "sub/b.dat", "sub/deep/c.dat")
    link = job.folder / "sub" / "deep" / "loop"
    link.symlink_to(Path(target))
    completed = job.run(timeout=HUNG_SECONDS)
    assert completed.returncode == 0
    (notice,) = lines_with(completed.stderr, "notice: ")
    assert str(link) in notice
    assert job.state() == dict.fromkeys(files, 1)
    assert job.objects() == files


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
    assert job.objects() == files
    assert job.state() == dict.fromkeys(files, 1)


def test_no_follow_symlinks_follows_the_backup_folder_itself(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat")
    (tmp_path / "link").symlink_to(job.folder)
    assert_clean(job.run("--no-follow-symlinks", "--backupfolder", "link"))
    assert job.objects() == files


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
    assert f"{20 - len(listed)} more" in counted
    assert len(listed) < 20


# --- The script's own files ------------------------------------------------------------------


def test_own_files_in_the_folder_are_left_out(job: Job) -> None:
    files = job.make("a.dat", "sub/state.json", "state.json.bak", "zz/state.json.lock")
    state = job.folder / "state.json"
    for _ in range(2):  # the second run finds all of them there
        assert_clean(job.run("--statefile", state))
        assert state.exists()
        (job.folder / "state.json.tmp").write_text("left by a kill")
    assert_clean(job.run("--statefile", state, "--crashrun", "1"))
    assert job.objects() == files


def test_default_state_file_in_the_folder_is_left_out(job: Job) -> None:
    files = job.make("a.dat")
    arguments = ["--bucketname", job.bucket, "--backupfolder", "."]
    for _ in range(2):
        assert_clean(job._run(*arguments, server=job.server, cwd=job.folder))
    assert (job.folder / "stateFile.json").exists()
    assert job.objects() == files


def test_own_files_are_left_out_where_a_link_leads_to_them(job: Job, tmp_path: Path) -> None:
    job.make("a.dat")
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "other.txt").touch()
    (job.folder / "link").symlink_to(tmp_path / "states")
    for _ in range(2):
        assert_clean(job.run("--statefile", tmp_path / "states" / "state.json"))
    assert set(job.objects()) == {"a.dat", "link/other.txt"}


def test_own_files_are_left_out_when_named_through_a_link(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat")
    (tmp_path / "link").symlink_to(job.folder)
    for _ in range(2):
        assert_clean(job.run("--statefile", tmp_path / "link" / "state.json"))
    assert job.objects() == files


def test_link_in_the_folder_that_is_the_state_file_is_left_out(job: Job, tmp_path: Path) -> None:
    files = job.make("a.dat")
    (tmp_path / "kept.json").write_text("[]")
    (job.folder / "state.json").symlink_to(tmp_path / "kept.json")
    assert_clean(job.run("--statefile", job.folder / "state.json"))
    assert job.objects() == files


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
    listed = job.run("--dryrun", *(word for glob in globs for word in ("--exclude", glob)))
    assert (listed.returncode, listed.stderr) == (0, "")
    assert {name for name in TREE if f" {job.folder / name} " not in listed.stdout} == left_out


def test_excluded_files_are_neither_sent_nor_in_the_state(job: Job) -> None:
    job.make(*TREE)
    assert_clean(job.run("--exclude", "*.tmp"))
    kept = set(TREE) - {"a.tmp", "conf.d/b.tmp"}
    assert set(job.objects()) == set(job.state()) == kept


@needs_permissions
def test_exclude_of_all_below_a_folder_spares_a_look_into_it(job: Job) -> None:
    files = job.make("a.dat", "lost+found/b.dat")
    (job.folder / "lost+found").chmod(0)
    assert_clean(job.run("--exclude", "lost+found/*", user=NOBODY))
    assert set(job.objects()) == {"a.dat"} < set(files)


@needs_permissions
@pytest.mark.parametrize("name", ["secret.dat", "broken", "fifo"])
def test_excluded_trouble_is_no_trouble(job: Job, name: str) -> None:
    job.make("a.dat", "secret.dat")
    (job.folder / "secret.dat").chmod(0)
    (job.folder / "broken").symlink_to("missing")
    os.mkfifo(job.folder / "fifo")
    others = {"secret.dat", "broken", "fifo"} - {name}
    completed = job.run("--exclude", name, user=NOBODY)
    assert name not in completed.stderr
    assert [other for other in others if other not in completed.stderr] == []


@needs_permissions
def test_exclude_holds_for_a_folder_that_a_crash_run_walks(job: Job) -> None:
    job.make("a.dat", "secret/b.dat", "secret/c.tmp")
    (job.folder / "secret").chmod(0)
    assert job.run("--exclude", "*.tmp", user=NOBODY).returncode == 1
    (job.folder / "secret").chmod(0o755)
    assert_clean(job.crash_run("--exclude", "*.tmp", user=NOBODY))
    assert set(job.objects()) == {"a.dat", "secret/b.dat"}


@needs_permissions
def test_exclude_holds_for_the_files_of_a_crash_run(job: Job) -> None:
    job.make("a.dat", "b.dat")
    (job.folder / "b.dat").chmod(0)
    assert job.run(user=NOBODY).returncode == 1
    (job.folder / "b.dat").chmod(0o644)
    job.crash_run("--exclude", "b.*", user=NOBODY)
    assert set(job.objects()) == {"a.dat"}


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


def test_folder_that_was_walked_when_the_run_was_killed_and_is_empty_now_is_said(job: Job) -> None:
    job.folder.mkdir()
    folder = {"filepath": str(job.folder), "uploadedSuccess": 0, "filename": ""}
    job.state_path.write_text(json.dumps([folder]))
    completed = job.crash_run()
    assert re.search(r"nothing|empty", completed.stderr)
    assert str(job.folder) in completed.stderr
