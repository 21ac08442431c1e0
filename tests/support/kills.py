"""Runs that are killed: at a chosen call of the operating system, or in the middle of parts."""

from __future__ import annotations

import signal
from pathlib import Path

from .faults import Fault, stall
from .files import IN_PARTS, LARGE_BYTES, PART_BYTES, some_bytes
from .job import Job, kill
from .script import journal_of

KILLER = """\
import os, signal

real = os.{name}
calls = 0

def killing(*args, **keywords):
    global calls
    if not {condition}:
        return real(*args, **keywords)
    calls += 1
    if calls == {count} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **keywords)
    if calls == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

os.{name} = killing
"""


def killing_call(
    folder: Path, name: str, *, count: int = 1, before: bool = True, condition: str = "True"
) -> dict[str, str]:
    """The environment in which a run is killed at its n-th call of that function of `os`.

    `condition` is an expression that says of `args` whether a call counts.
    """
    folder.mkdir()
    code = KILLER.format(name=name, condition=condition, count=count, before=before)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def walks(name: str, job: Job) -> str:
    """A condition for `killing_call`: the walk is at that folder, and the state says so."""
    # A first look at the folder may come before.
    paths = [str(job.state_path), str(journal_of(job.state_path))]
    state = f"''.join(open(path).read() for path in {paths!r} if os.path.exists(path))"
    begun = f"""'"filepath": "{job.folder}", "uploadedSuccess": 0' in {state}"""
    is_there = f"os.path.basename(os.fspath(args[0])) == {name!r}"
    return f"({is_there} and {begun})"


def kill_in_walk(job: Job, folder: Path, name: str, *options: str) -> None:
    """Have a run killed when its walk comes to the folder of that name."""
    env = killing_call(folder, "scandir", condition=walks(name, job))
    assert job.start(*options, env=env).wait(60) == -signal.SIGKILL


def killed_in_parts(
    job: Job, *options: str, kept: list[int], size: int = LARGE_BYTES, user: int | None = None
) -> str:
    """Kill a run when the server has just these parts of `large`; return its upload's id."""
    count = -(-size // PART_BYTES)
    job.write({"large": some_bytes(size)})
    job.proxy.add_fault(Fault(stall(600), part_number=lambda number: 0 < number not in kept))
    process = job.start(*IN_PARTS, *options, user=user)
    job.wait_for("UploadPart", count)
    job.wait_for("UploadPart", len(kept), answered=True)
    kill(process)
    job.proxy.clear_faults()
    entry = job.entry("large")
    assert job.open_uploads() == [("large", entry["upload_id"], len(kept))]
    assert entry["uploadedSuccess"] == 0
    return str(entry["upload_id"])


def left_in_parts(job: Job, *, kept: list[int], size: int = LARGE_BYTES) -> str:
    """Leave what `killed_in_parts` does, without a run; return the upload's id."""
    body = some_bytes(size)
    job.write({"large": body})
    client, bucket = job.server.client(), job.bucket
    upload_id = client.create_multipart_upload(Bucket=bucket, Key="large")["UploadId"]
    for number in kept:
        part = body[(number - 1) * PART_BYTES : number * PART_BYTES]
        client.upload_part(
            Bucket=bucket, Key="large", UploadId=upload_id, PartNumber=number, Body=part
        )
    status = job.path("large").stat()
    others = [job.pending_entry(key, bucket=bucket) for key in job.in_folder() if key != "large"]
    large = job.pending_entry(
        "large",
        bucket=bucket,
        size=size,
        mtime_ns=status.st_mtime_ns,
        upload_id=upload_id,
        part_size=PART_BYTES,
    )
    job.write_state(*others, large)
    return upload_id
