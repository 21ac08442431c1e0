"""--shard I/N: N runs that share a folder, each with a state of its own."""

from __future__ import annotations

import json
import re
import subprocess
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import Fault, answer, delay
from jobs import NOBODY, Job, assert_clean, assert_failed, assert_stopped
from script_runner import finish, make_files, wait_until
from systems import needs_permissions, needs_signals
from test_crash import killing_call

pytest_plugins = ["job_fixtures"]

NAMES = """
    100% a+b a.dat b.dat c.dat d.dat sub/a.dat sub/b.dat sub/deep/c.dat ümlaut.dat 日本語/x
""".split()
NAMES = sorted([*NAMES, "with space"])

# CRC-32 (as in zlib and PNG) of the key in UTF-8, modulo N: its rest is I - 1.
SPLIT_IN_3 = {
    "1/3": ["a+b", "a.dat", "ümlaut.dat"],
    "2/3": ["100%", "b.dat", "d.dat", "sub/b.dat", "sub/deep/c.dat"],
    "3/3": ["c.dat", "sub/a.dat", "with space", "日本語/x"],
}


def keys_of(shard: str, names: list[str]) -> list[str]:
    """The keys that a shard has to take."""
    part, parts = map(int, shard.split("/"))
    return [name for name in names if zlib.crc32(name.encode("utf-8")) % parts == part - 1]


@pytest.fixture
def job(job: Job) -> Job:
    """A job that is seen through the proxy from its first run."""
    job.proxy  # noqa: B018
    return job


def shard_of(job: Job, shard: str) -> Job:
    """The same job with a state file for one shard."""
    name = f"state-{shard.replace('/', '-of-')}.json"
    return replace(job, state_path=job.state_path.with_name(name))


def shards_of(job: Job, count: int) -> dict[str, Job]:
    """A job for each of so many shards, by its name."""
    names = [f"{number}/{count}" for number in range(1, count + 1)]
    return {name: shard_of(job, name) for name in names}


def fail(job: Job, *keys: str) -> None:
    """Have the server refuse these keys until the faults are cleared."""
    for key in keys:
        job.proxy.add_fault(Fault(answer(400, "EntityTooLarge"), operation="PutObject", key=key))


def puts_since(job: Job, before: int) -> list[str]:
    """The keys that were sent after so many puts, sorted."""
    return sorted(job.puts()[before:])


# --- The split -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_together_are_the_folder(job: Job, count: int) -> None:
    files = job.make(*NAMES)
    sent: Counter[str] = Counter()
    for shard, part in shards_of(job, count).items():
        before = len(job.puts())
        assert_clean(part("--shard", shard))
        keys = puts_since(job, before)
        assert part.state() == dict.fromkeys(keys, 1)
        assert {entry["shard"] for entry in part.entries()} <= {shard}
        sent.update(keys)
    assert sent == Counter(NAMES)
    assert job.objects() == files


def test_the_split_is_by_crc32_of_the_key(job: Job) -> None:
    assert {shard: keys_of(shard, NAMES) for shard in SPLIT_IN_3} == SPLIT_IN_3
    job.make(*NAMES)
    for shard, part in shards_of(job, 3).items():
        assert_clean(part("--shard", shard))
        assert sorted(part.state()) == SPLIT_IN_3[shard]


def test_the_split_is_that_of_the_same_folder_elsewhere(job: Job, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another" / "mount point"
    make_files(elsewhere, dict.fromkeys(NAMES, b"bytes"))
    for shard, part in shards_of(job, 3).items():
        assert_clean(part("--shard", shard, "--backupfolder", elsewhere))
        assert sorted(part.state()) == SPLIT_IN_3[shard]


def test_the_split_does_not_depend_on_the_other_files(job: Job) -> None:
    job.make("sub/a.dat", "b.dat")
    part = shard_of(job, "3/3")
    assert_clean(part("--shard", "3/3"))
    assert part.state() == {"sub/a.dat": 1}


def test_a_dry_run_lists_the_files_of_the_shard(job: Job) -> None:
    job.make(*NAMES)
    for shard, keys in SPLIT_IN_3.items():
        completed = job("--dryrun", "--shard", shard)
        assert (completed.returncode, completed.stderr) == (0, "")
        *listed, _ = completed.stdout.splitlines()
        assert len(listed) == len(keys)
        for line, key in zip(listed, keys, strict=True):
            assert f" s3://{job.bucket}/{key} (" in line
    assert job.proxy.requests == []


def test_many_files_in_worker_processes_are_split_too(job: Job) -> None:
    names = [f"{number:04}" for number in range(2000)]
    make_files(job.folder, dict.fromkeys(names, b"bytes"))
    part = shard_of(job, "2/2")
    assert_clean(part("--shard", "2/2", "--preferred-transfer-client", "classic"))
    assert sorted(part.state()) == keys_of("2/2", names)
    assert puts_since(job, 0) == keys_of("2/2", names)


# --- A shard with nothing in it --------------------------------------------------------------


def test_a_shard_without_files_is_fine(job: Job) -> None:
    job.make(*NAMES)
    assert keys_of("3/7", NAMES) == []
    assert_clean(job("--shard", "3/7"))
    assert job.puts() == []
    assert job.state() == {}
    assert_clean(job.crash_run("--shard", "3/7"))
    assert_clean(job("--verify", "--shard", "3/7"))
    assert_clean(job("--shard", "3/7"))


def test_a_shard_whose_last_file_is_gone_is_fine(job: Job) -> None:
    job.make("a.dat", "b.dat")
    assert_clean(job("--shard", "1/3"))
    assert job.state() == {"a.dat": 1}
    (job.folder / "a.dat").unlink()
    assert_clean(job("--shard", "1/3"))
    assert job.state() == {}


def test_an_empty_folder_is_said_by_a_shard_too(job: Job) -> None:
    job.folder.mkdir()
    completed = job("--shard", "1/2")
    assert completed.returncode == 0
    (said,) = completed.stderr.splitlines()
    assert "nothing" in said


# --- Crash runs and other options ------------------------------------------------------------


def test_a_crash_run_sends_what_is_missing_of_its_shard(job: Job) -> None:
    job.make(*NAMES)
    mine = SPLIT_IN_3["2/3"]
    missing = mine[::2]
    fail(job, *missing)
    assert_failed(job("--shard", "2/3"), [job.folder / key for key in missing])
    assert {entry["shard"] for entry in job.entries()} == {"2/3"}
    job.proxy.clear_faults()
    before = len(job.puts())
    assert_clean(job.crash_run("--shard", "2/3"))
    assert puts_since(job, before) == missing
    assert job.state() == dict.fromkeys(mine, 1)
    assert {entry["shard"] for entry in job.entries()} == {"2/3"}


@needs_signals
@pytest.mark.parametrize("options", [(), ("--skip-unchanged",)], ids=["plain", "skip"])
def test_a_crash_run_after_a_kill_during_the_walk_sends_its_shard(
    job: Job, tmp_path: Path, options: tuple[str, ...]
) -> None:
    job.make(*NAMES)
    # In the walk for the plan, which the state precedes.
    walked = f"(os.path.basename(args[0]) == 'sub' and os.path.exists({str(job.state_path)!r}))"
    env = killing_call(tmp_path / "killer", "scandir", count=1, condition=walked)
    assert job.start("--shard", "2/3", *options, env=env).wait(60) == -9
    (folder,) = job.entries()
    assert (folder["filepath"], folder["shard"]) == (str(job.folder), "2/3")
    assert_clean(job.crash_run("--shard", "2/3", *options))
    assert puts_since(job, 0) == SPLIT_IN_3["2/3"]
    assert job.state() == dict.fromkeys(SPLIT_IN_3["2/3"], 1)


@needs_permissions
def test_a_folder_that_cannot_be_read_is_of_every_shard(job: Job) -> None:
    job.make(*NAMES)
    sub = job.folder / "sub"
    readable = [name for name in NAMES if not name.startswith("sub/")]
    sub.chmod(0)
    shards = shards_of(job, 3)
    for shard, part in shards.items():
        assert_failed(part("--shard", shard, user=NOBODY), [sub])
        expected = {**dict.fromkeys(keys_of(shard, readable), 1), "sub/": 0}
        assert part.state() == expected
        assert {entry["shard"] for entry in part.entries()} == {shard}
    sub.chmod(0o755)
    for shard, part in shards.items():
        before = len(job.puts())
        assert_clean(part.crash_run("--shard", shard, user=NOBODY))
        assert puts_since(job, before) == [k for k in SPLIT_IN_3[shard] if k.startswith("sub/")]
        assert part.state() == dict.fromkeys(SPLIT_IN_3[shard], 1)


@needs_permissions
@pytest.mark.parametrize("prefix", ["", "daily/", "daily-"])
def test_a_backup_folder_that_cannot_be_read_is_of_every_shard(job: Job, prefix: str) -> None:
    names = [f"{prefix}{name}" for name in NAMES]
    job.make(*NAMES)
    job.folder.chmod(0)
    shards = shards_of(job, 3)
    for shard, part in shards.items():
        options = ("--shard", shard, "--prefix", prefix)
        assert_failed(part(*options, user=NOBODY), [job.folder])
    job.folder.chmod(0o755)
    for shard, part in shards.items():
        assert_clean(part.crash_run("--shard", shard, "--prefix", prefix, user=NOBODY))
        assert part.state() == dict.fromkeys(keys_of(shard, names), 1)
    assert sorted(job.objects()) == names


def test_a_broken_link_that_leads_to_a_folder_later_is_of_every_shard(job: Job) -> None:
    job.make("other.dat")
    disk = job.folder.parent / "disk"
    (job.folder / "sub").symlink_to(disk)
    shards = shards_of(job, 3)
    for shard, part in shards.items():
        assert_failed(part("--shard", shard), [job.folder / "sub"])
    names = [name for name in NAMES if name.startswith("sub/")]
    make_files(disk, {name.removeprefix("sub/"): name.encode() for name in names})
    for shard, part in shards.items():
        assert_clean(part.crash_run("--shard", shard))
        assert part.state() == dict.fromkeys(keys_of(shard, [*names, "other.dat"]), 1)
    assert sorted(job.objects()) == sorted([*names, "other.dat"])


@needs_permissions
def test_a_file_that_cannot_be_read_is_of_one_shard(job: Job) -> None:
    job.make(*NAMES)
    (job.folder / "c.dat").chmod(0)
    for shard, part in shards_of(job, 3).items():
        completed = part("--shard", shard, user=NOBODY)
        if shard == "3/3":
            assert_failed(completed, [job.folder / "c.dat"])
        else:
            assert_clean(completed)


def test_an_unchanged_shard_is_skipped_and_is_right(job: Job) -> None:
    job.make(*NAMES)
    assert_clean(job("--shard", "2/3"))
    before = len(job.puts())
    completed = job("--shard", "2/3", "--skip-unchanged")
    assert_clean(completed)
    assert re.search(r"\b5 unchanged", completed.stdout)
    assert puts_since(job, before) == []
    completed = job("--shard", "2/3", "--verify")
    assert_clean(completed)
    assert re.search(r"\b5 files right", completed.stdout)
    job.server.client().delete_object(Bucket=job.bucket, Key="d.dat")
    assert job("--shard", "2/3", "--verify").returncode == 1
    assert_clean(job.crash_run("--shard", "2/3"))
    assert puts_since(job, before) == ["d.dat"]


# --- Whose state it is -----------------------------------------------------------------------

OTHERS = [("--shard", "2/2"), ("--shard", "1/3"), ()]


def assert_refused(job: Job, *arguments: str, words: tuple[str, ...]) -> None:
    """Check that a run stops with these words, asks the server nothing and keeps the state."""
    state, before = job.state_path.read_bytes(), len(job.proxy.requests)
    assert_stopped(job(*arguments), *words)
    assert len(job.proxy.requests) == before
    assert job.state_path.read_bytes() == state


@pytest.mark.parametrize("other", OTHERS, ids=["other", "other-count", "whole"])
def test_files_that_a_shard_has_yet_to_send_are_not_buried(
    job: Job, other: tuple[str, ...]
) -> None:
    job.make(*NAMES)
    fail(job, "a.dat")
    assert job("--shard", "1/2").returncode == 1
    for arguments in (other, (*other, "--dryrun"), (*other, "--skip-unchanged")):
        assert_refused(job, *arguments, words=("shard 1/2", "--crashrun 1", "--statefile"))
    assert_refused(job, *other, "--crashrun", "1", words=("shard 1/2", "--statefile"))
    assert_refused(job, *other, "--verify", words=("shard 1/2", "--statefile"))


def test_files_that_a_whole_run_has_yet_to_send_are_not_buried_by_a_shard(job: Job) -> None:
    job.make(*NAMES)
    fail(job, "a.dat")
    assert job().returncode == 1
    assert_refused(job, "--shard", "1/2", words=("no shard", "--crashrun 1", "--statefile"))
    assert_refused(job, "--shard", "1/2", "--crashrun", "1", words=("no shard", "--statefile"))


@pytest.mark.parametrize("other", OTHERS, ids=["other", "other-count", "whole"])
def test_a_shard_that_is_done_may_be_replaced_but_not_gone_on_with(
    job: Job, other: tuple[str, ...]
) -> None:
    job.make(*NAMES)
    assert_clean(job("--shard", "1/2"))
    assert_refused(job, *other, "--crashrun", "1", words=("shard 1/2", "--statefile"))
    assert_clean(job(*other))
    expected = keys_of(other[1], NAMES) if other else NAMES
    assert job.state() == dict.fromkeys(expected, 1)
    assert {entry.get("shard") for entry in job.entries()} == {other[1] if other else None}


@needs_signals
def test_a_kill_during_the_walk_of_another_shard_leaves_a_state_for_that_one(
    job: Job, tmp_path: Path
) -> None:
    job.make(*NAMES)
    assert_clean(job("--shard", "1/3"))
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


# --- Side by side ----------------------------------------------------------------------------


def test_shards_may_run_at_the_same_time(job: Job) -> None:
    files = job.make(*NAMES)
    job.create_bucket()
    held = Fault(delay(600), operation="PutObject", times=2, key=lambda key: key in HELD)
    job.proxy.add_fault(held)
    running: list[tuple[Job, subprocess.Popen[str]]] = []
    for shard in ("1/3", "3/3"):
        part = shard_of(job, shard)
        running.append((part, part.start("--shard", shard)))
    wait_until(lambda: held.hits == 2, 60, "a held upload of each")
    assert_clean(shard_of(job, "2/3")("--shard", "2/3"))  # while both others are at work
    for part, process in running:
        assert process.poll() is None
        process.kill()
        process.communicate()
        shard = part.entries()[0]["shard"]
        assert_clean(part.crash_run("--shard", shard))
    assert job.objects() == files


HELD = {"a.dat", "c.dat"}


def test_shards_that_create_the_bucket_at_the_same_time(job: Job) -> None:
    files = job.make(*NAMES)
    # Each is told that there is no bucket before any has created it.
    arrived = job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), method="HEAD", times=3))
    parts = shards_of(job, 3)
    running = [part.start("--shard", shard) for shard, part in parts.items()]
    for process in running:
        assert_clean(finish(process))
    assert arrived.hits == 3
    assert job.objects() == files


# --- Usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["0/2", "3/2", "x", "1/0", "1", "0/0", "1/2/3", "", "/", "1/", "/2", "-1/2", "1/-2", "1.0/2"],
)
def test_what_is_no_shard_is_refused(job: Job, value: str) -> None:
    job.make("a.dat")
    completed = job(f"--shard={value}")
    assert (completed.returncode, completed.stdout) == (2, "")
    sentence = completed.stderr.splitlines()[-1]
    assert re.match(r"s3FileTransfer\.py: error: argument --shard: .", sentence)
    assert "I/N" in sentence
    assert job.proxy.requests == []
    assert not job.state_path.exists()
