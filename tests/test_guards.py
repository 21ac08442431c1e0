"""Guards that only the last moment meets: what is put where the script opens, and a power cut."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.checks import assert_clean, assert_stopped
from support.faults import Fault, answer, call, replace_in_answer
from support.files import IN_PARTS, LARGE_BYTES, PART_BYTES, some_bytes
from support.job import NOBODY, Job, with_state
from support.kills import left_in_parts
from support.proxy import Request
from support.script import Prelude, is_root, journal_of, prelude
from support.systems import needs_fifos, needs_odd_names, needs_permissions, needs_proc

if sys.platform != "win32":
    import fcntl

# --- Between the look at a file and its opening ----------------------------------------------

# The event comes before a file is opened, or made.
PUT_IN_PLACE = """
import os, sys
put = []
def put_in_place(event, args):
    if event == "open" and isinstance(args[0], str) and os.path.basename(args[0]) == {name!r}:
        if not put:
            put.append(True)
            if os.path.lexists({path!r}):
                os.unlink({path!r})
            {make}
sys.addaudithook(put_in_place)
"""
MAKES = {
    "link": "os.symlink({target!r}, {path!r})",
    "link to nowhere": "os.symlink({target!r} + '-new', {path!r})",
    "other name": "os.link({target!r}, {path!r})",
    "fifo": "os.mkfifo({path!r})",
}
HUNG_SECONDS = 30


def putting(what: str, path: Path, target: Path) -> Prelude:
    """Python flags by which something lies at a path just when the script first opens it."""
    names = {"path": str(path), "target": str(target)}
    return prelude(PUT_IN_PLACE.format(name=path.name, make=MAKES[what].format(**names), **names))


@needs_fifos
@pytest.mark.parametrize(
    ("companion", "what"),
    [
        ("lock", "link"),
        ("lock", "link to nowhere"),
        ("lock", "other name"),
        ("tmp", "link"),
        ("tmp", "other name"),
        ("journal", "link"),
        ("journal", "other name"),
    ],
)
def test_nothing_is_written_into_what_is_put_in_place(
    job: Job, tmp_path: Path, companion: str, what: str
) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    target.chmod(0o604)
    path = job.state_path.with_name(f"{job.state_path.name}.{companion}")
    completed = job.run(*IN_PARTS, python_flags=putting(what, path, target), timeout=HUNG_SECONDS)
    assert completed.returncode in (0, 2)
    assert target.read_bytes() == b"precious"
    assert target.stat().st_mode & 0o777 == 0o604
    assert not target.with_name("target-new").exists()
    assert set(job.in_bucket()) == ({"large"} if completed.returncode == 0 else set())


@needs_fifos
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_no_journal_is_believed_that_is_put_in_place(job: Job, tmp_path: Path, what: str) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat"))
    target, journal = tmp_path / "target", journal_of(job.state_path)
    job.write_journal(job.uploaded_entry("a.dat")).rename(target)
    job.write_journal(job.pending_entry("a.dat"))
    flags = putting(what, journal, target)
    completed = job.crash_run(python_flags=flags, timeout=HUNG_SECONDS)
    if completed.returncode == 2:
        assert job.sent() == []
        assert '"uploadedSuccess": 0' in job.state_path.read_text()
    else:
        assert_clean(completed)
        assert set(job.in_bucket()) == {"a.dat"}


@needs_permissions
def test_a_link_of_ones_own_is_followed_by_another_user_than_root(job: Job) -> None:
    job.make("a.dat")
    job.state_path.symlink_to("target.json")
    if is_root():
        os.chown(job.state_path, NOBODY, NOBODY, follow_symlinks=False)
    assert_clean(job.run(user=NOBODY))
    assert job.state_path.is_symlink()
    assert job.state() == {"a.dat": 1}


@pytest.mark.parametrize("option", [(), ("--dryrun",), ("--crashrun", "1")], ids=" ".join)
def test_files_of_ones_own_that_a_kill_left_are_no_backup(
    job: Job, option: tuple[str, ...]
) -> None:
    job.make("a.dat")
    state = job.folder / "state.json"
    job = replace(job, state_path=state)
    job.write_state(job.pending_entry("", filepath=str(job.folder)))
    for companion in ("lock", "tmp", "journal"):
        state.with_name(f"state.json.{companion}").touch()
    completed = job.run(*option)
    assert completed.returncode == 0
    assert re.search(r"(sent|would send) 1 file, 14 B", completed.stdout)


@needs_permissions
def test_what_a_lock_of_another_says_does_not_reach_the_terminal(job: Job) -> None:
    job.make("a.dat")
    with job.state_path.with_name("state.json.lock").open("w") as lock:
        lock.write("\x1b[31m1\x07")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        completed = job.run()
    assert_stopped(completed, "state.json")
    assert not {"\x1b", "\x07"} & set(completed.stderr)


RED = "\x1b[31m\n\u202e"


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        ({}, ("--profile", RED)),
        ({"bucket": RED}, ()),
        ({"shard": RED}, ()),
        ({"filepath": f"/elsewhere/{RED}"}, ()),
        ({"filename": RED, "uploadedSuccess": 1}, ("--verify", "folder", "--prefix", "p/")),
    ],
    ids=["profile", "bucket", "shard", "folder", "key"],
)
def test_what_a_state_or_a_configuration_says_does_not_reach_the_terminal(
    job: Job, entry: dict[str, object], arguments: tuple[str, ...]
) -> None:
    job.make("a.dat")
    job.write_state(job.pending_entry("a.dat", **entry))
    completed = job.run(*arguments)
    assert_stopped(completed, r"\x1b[31m")
    assert completed.stderr.removesuffix("\n").isprintable()


@needs_odd_names
def test_no_summary_or_list_tells_a_name_as_it_is(rclone_job: Job) -> None:
    rclone_job.make(RED)  # moto lists such a name as it is, which is no XML
    job = with_state(rclone_job, f"state {RED}")
    job.write_state(job.uploaded_entry(RED))
    for arguments in (("--verify",), ()):  # the bucket has nothing, and takes nothing
        completed = job.run(*arguments)
        assert completed.returncode == 1
        lines = completed.stdout.splitlines()
        assert [line for line in lines if not line.isprintable()] == []
        assert completed.stdout.count(r"state \x1b[31m\n") == 1
        job.refuse(RED)


# --- What a power cut leaves -----------------------------------------------------------------

SIZES = """
import os, time
def noted(name, real):
    def call(*args):
        path = f"/proc/self/fd/{{args[0]}}" if name == "fsync" else args[0]
        line = f"{{name}} {{os.path.basename(os.path.realpath(path))}} {{os.stat(path).st_size}}"
        if ".journal" in line:  # what does not wait for it comes first
            until = time.monotonic() + 0.5
            while not os.path.exists({comes!r}) and time.monotonic() < until:
                time.sleep(0.01)
        result = real(*args)
        with open({record!r}, "a") as record:
            print(line, file=record)
        return result
    return call
os.fsync, os.replace = noted("fsync", os.fsync), noted("replace", os.replace)
"""


@needs_proc
def test_what_is_flushed_to_the_disk_is_whole_and_waited_for(job: Job, tmp_path: Path) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    record, comes, journal = tmp_path / "record", tmp_path / "comes", journal_of(job.state_path)
    seen: list[str] = []

    def look(_: Request) -> None:
        comes.touch()
        seen.append(f"fsync {journal.name} {journal.stat().st_size}")
        assert seen[0] in record.read_text().splitlines()

    job.proxy.add_fault(Fault(call(look), operation="UploadPart", times=1))
    code = SIZES.format(record=str(record), comes=str(comes))
    assert_clean(job.run(*IN_PARTS, python_flags=prelude(code)))
    assert len(seen) == 1
    calls = record.read_text().splitlines()
    saves = [n for n, line in enumerate(calls) if line.startswith("replace ")]
    assert len(saves) >= 3
    for n in saves:
        assert calls[n - 1] == calls[n].replace("replace ", "fsync ")


# --- What a server says of an upload ---------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (b"<Key>large</Key>", b"<Key>another</Key>"),
        (b"<Size>%d</Size>" % PART_BYTES, b"<Size>1</Size>"),
        (b"<PartNumber>1</PartNumber>", b"<PartNumber>2</PartNumber>"),
    ],
    ids=["another-key", "another-size", "another-number"],
)
@pytest.mark.few(2)
def test_parts_that_are_not_those_of_the_file_are_sent_again(
    moto_job: Job, said: bytes, instead: bytes
) -> None:
    job = moto_job
    left_in_parts(job, kept=[1])
    change = replace_in_answer(lambda body: body.replace(said, instead))
    job.proxy.add_fault(Fault(change, operation="ListParts"))
    assert_clean(job.crash_run(*IN_PARTS))
    assert job.sent_parts() == [1, 2, 3]
    job.check_all_is_there()
    assert job.open_uploads() == []


def abort(job: Job) -> None:
    """Abort the upload that the state knows of, as somebody else would."""
    upload_id = left_in_parts(job, kept=[1])
    client = job.server.client()
    client.abort_multipart_upload(Bucket=job.bucket, Key="large", UploadId=upload_id)


def lose(job: Job) -> None:
    """Have the server know nothing of an upload that is to be completed."""
    left_in_parts(job, kept=[1])
    gone = answer(404, "NoSuchUpload")
    job.proxy.add_fault(Fault(gone, operation="CompleteMultipartUpload", times=1))


@pytest.mark.parametrize("leave", [abort, lose])
@pytest.mark.few(1)
def test_an_older_object_is_not_taken_for_the_one_of_an_upload_that_is_gone(
    moto_job: Job, leave: Callable[[Job], None]
) -> None:
    job = moto_job
    job.put("large", some_bytes(LARGE_BYTES, seed=1))
    leave(job)
    assert_clean(job.crash_run(*IN_PARTS))
    job.check_all_is_there()
