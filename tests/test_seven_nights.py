"""Seven nights of one job, whose folder changes as real ones do: all that is said is true.

What is true is computed from the folder itself, before the run: what it holds, what of it cannot
be read, and what the nights before have left in the bucket.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.checks import lines_with
from support.faults import Fault, stall
from support.files import IN_PARTS, LARGE_BYTES, md5, some_bytes
from support.inside import clock, run_first
from support.job import NOBODY, Job, kill
from support.script import Completed, wait_until

if sys.platform == "win32":
    pytest.skip("POSIX only: permissions, and ctime", allow_module_level=True)

DAY_SECONDS = 24 * 3600
OPTIONS = ("--skip-unchanged", *IN_PARTS)


@dataclass
class Nights:
    """The job, and what is true of it."""

    job: Job
    env_folder: Path
    bucket: dict[str, str] = field(default_factory=dict)  # the MD5s that it must hold, by key
    listed: set[str] = field(default_factory=set)  # what the last state called uploaded
    day: int = 0

    # --- The days ---

    def write(self, key: str, content: bytes) -> None:
        """Write a file of the folder."""
        self.job.write({key: content})

    def rewrite(self, key: str) -> None:
        """Write other bytes in place, as many, and put the old time back."""
        path, status = self.job.path(key), self.job.path(key).stat()
        path.write_bytes(bytes(byte ^ 0x55 for byte in path.read_bytes()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    # --- The nights ---

    def environment(self, clock_seconds: int) -> dict[str, str]:
        """The environment of this night's run, a day after the last or at another time."""
        folder = self.env_folder / f"{self.day} {clock_seconds}"
        return run_first(folder, clock(clock_seconds))

    def present(self, *away: str) -> dict[str, str]:
        """The MD5 of each file that can be read, by key; `away` are folders that cannot."""
        there = self.job.in_folder()
        return {key: value for key, value in there.items() if not key.startswith(away or ("\0",))}

    def to_send(self, there: dict[str, str]) -> dict[str, str]:
        """Those of the files that the bucket has otherwise, or that the last state did not list."""
        return {
            key: value
            for key, value in there.items()
            if key not in self.listed or self.bucket[key] != value
        }

    def run(self, *more: str, clock_seconds: int | None = None) -> Completed:
        """Have a night pass; return how its run ended."""
        self.day += 1
        if clock_seconds is None:
            clock_seconds = self.day * DAY_SECONDS
        return self.job.run(*OPTIONS, *more, user=NOBODY, env=self.environment(clock_seconds))

    def night(
        self, *more: str, unreadable: str | None = None, clock_seconds: int | None = None
    ) -> None:
        """Have a night pass, and compare all that it says with what is true.

        Args:
            more: options of this night's run.
            unreadable: a folder that cannot be read tonight.
            clock_seconds: how far the run's clock is ahead, where not by a day a night.
        """
        away = (f"{unreadable}/",) if unreadable else ()
        there = self.present(*away)
        to_send = self.to_send(there)
        kept = {key for key in self.listed if away and key.startswith(away)}
        gone = {key for key in self.listed - kept if not os.path.lexists(self.job.path(key))}
        since = self.job.seen()
        if unreadable:
            self.job.path(unreadable).chmod(0)
        try:
            completed = self.run(*more, clock_seconds=clock_seconds)
        finally:
            if unreadable:
                self.job.path(unreadable).chmod(0o755)

        # The bucket: what differed was sent, once, and nothing ever leaves it.
        assert self.job.sent(since) == sorted(to_send)
        self.bucket |= there
        assert self.job.in_bucket() == self.bucket
        # The state.
        uploaded = {**dict.fromkeys(there, 1), **dict.fromkeys(kept, 1)}
        failed = {f"{unreadable}/": 0} if unreadable else {}
        assert self.job.state() == {**uploaded, **failed}
        self.check_entries(there)
        self.job.check_no_leftovers()
        # What it says.
        assert completed.returncode == (1 if failed else 0), completed
        self.check_said(
            completed, sent=to_send, unchanged=len(there) - len(to_send), gone=len(gone)
        )
        named = [f"failed: {self.job.path(unreadable)}: "] if unreadable else []
        lines = lines_with(completed.stderr, "failed: ")
        assert len(lines) == len(named)
        assert all(line.startswith(start) for line, start in zip(lines, named, strict=True))
        self.listed = set(uploaded)

    def check_entries(self, there: dict[str, str]) -> None:
        """Check that the state has of each file what the file system has."""
        for entry in self.job.entries():
            if entry["filename"] in there:
                status = self.job.path(entry["filename"]).stat()
                assert entry["size"] == status.st_size
                assert entry["mtime_ns"] == status.st_mtime_ns
                assert entry["ctime_ns"] in (status.st_ctime_ns, 0)
                if "-" not in entry["etag"]:
                    assert entry["etag"] == there[entry["filename"]]

    def check_said(
        self, completed: Completed, *, sent: dict[str, str], unchanged: int, gone: int
    ) -> None:
        """Check the counts of the summary."""
        match = re.fullmatch(
            r"sent (\d+) files?, .*; (\d+) unchanged, (\d+) failed"
            r"(?:, (\d+) gone since the last run)?; state: .*\n",
            completed.stdout,
        )
        assert match, completed
        said = [int(number or 0) for number in match.groups()]
        failed = len(lines_with(completed.stderr, "failed: "))
        assert said == [len(sent), unchanged, failed, gone]

    def killed_night(self, *, answered: int) -> None:
        """Have a night's run killed when so many of its files have been answered."""
        self.day += 1
        since, there = self.job.seen(), self.present()
        to_send = self.to_send(there)
        self.job.proxy.add_fault(Fault(stall(600), operation="PutObject", after=answered))
        env = self.environment(self.day * DAY_SECONDS)
        process = self.job.start(*OPTIONS, "--max-concurrency", "2", user=NOBODY, env=env)
        written = len(there) - len(to_send) + answered

        def is_written_down() -> bool:
            return self.job.state_path.exists() and len(self.job.uploaded()) == written

        wait_until(is_written_down, 60, "what was answered, in state and journal")
        kill(process)
        self.job.proxy.clear_faults()
        sent = {r.key for r in self.job.requests("PutObject", since=since) if r.status == 200}
        assert len(sent) == answered
        assert sent <= to_send.keys()
        self.bucket |= {key: there[key] for key in sent}
        # The state on disk is true, and leads to all that is missing.
        assert self.job.state() == {key: int(self.bucket.get(key) == there[key]) for key in there}
        self.listed = self.job.uploaded()

    def crash_run(self) -> None:
        """Have the crash run after a killed night, which sends the rest and no more."""
        there = self.present()
        missing, since = self.to_send(there), self.job.seen()
        env = self.environment(self.day * DAY_SECONDS + 3600)
        completed = self.job.crash_run(*OPTIONS, user=NOBODY, env=env)
        assert (completed.returncode, completed.stderr) == (0, "")
        assert self.job.sent(since) == sorted(missing)
        self.bucket |= there
        assert self.job.in_bucket() == self.bucket
        assert self.job.state() == dict.fromkeys(there, 1)
        assert "gone" not in completed.stdout
        self.check_entries(there)
        self.job.check_no_leftovers()
        self.listed = set(there)

    def verify(self, *wrong: str) -> None:
        """Check that --verify finds the bucket as the state says, but for these keys."""
        completed = self.job.run("--verify", user=NOBODY)
        lines = lines_with(completed.stdout, "wrong: ")
        assert len(lines) == len(wrong), completed
        assert completed.returncode == (1 if wrong else 0), completed


def fill(nights: Nights) -> None:
    """Write the files of the first night."""
    for number in range(12):
        nights.write(f"docs/{number:02}.txt", f"text {number}".encode())
        nights.write(f"photos/2026/{number:02}.jpg", some_bytes(3000 + number, number))
    nights.write("mail/inbox", b"From: a\n")
    nights.write("mail/archive/2025", b"From: b\n" * 100)
    nights.write("mnt/disk/music.mp3", some_bytes(5000))
    nights.write("mnt/disk/deep/film.mkv", some_bytes(LARGE_BYTES))
    nights.write("empty", b"")


def change_all_kinds(nights: Nights) -> None:
    """Add files, have one grow, rename and remove some, and change bytes that no time shows."""
    path = nights.job.path
    nights.write("docs/new.txt", b"new")
    nights.write("mail/inbox", b"From: a\nFrom: c\n")
    path("docs/01.txt").rename(path("docs/one.txt"))
    path("mail/archive").rename(path("mail/old"))
    for key in ("docs/02.txt", "photos/2026/03.jpg", "empty"):
        path(key).unlink()
    nights.rewrite("docs/05.txt")
    nights.rewrite("mnt/disk/deep/film.mkv")
    # Its mode, and nothing that a backup keeps.
    path("docs/06.txt").chmod(0o604)


def test_seven_nights(rclone_job: Job, tmp_path: Path) -> None:
    job = rclone_job
    nights = Nights(job, tmp_path / "clocks")
    nights.env_folder.mkdir()

    fill(nights)
    nights.night()
    nights.verify()

    change_all_kinds(nights)
    nights.night()
    nights.verify()

    # The third: killed in the middle of what is new, and of what was rewritten.
    for number in range(30):
        nights.write(f"photos/new/{number:02}.jpg", some_bytes(2000, 100 + number))
    nights.rewrite("docs/07.txt")
    nights.killed_night(answered=15)
    nights.crash_run()
    nights.verify()

    # The fourth: a folder cannot be read, while others change.
    nights.write("docs/fourth.txt", b"fourth")
    nights.rewrite("mail/old/2025")
    job.path("docs/08.txt").unlink()
    nights.night(unreadable="photos")

    # The fifth: it can be read again, and a file system below is not mounted.
    disk, away = job.path("mnt/disk"), tmp_path / "away"
    shutil.move(disk, away)
    disk.mkdir()
    nights.rewrite("photos/2026/05.jpg")
    nights.night()
    nights.verify()

    # The sixth: it is mounted again, and the clock was set back by an hour: what was written in
    # that time is from the future.
    disk.rmdir()
    shutil.move(away, disk)
    nights.write("docs/future.txt", b"written at a quarter past")
    nights.night(clock_seconds=-3600)
    assert job.entry("docs/future.txt")["ctime_ns"] == 0
    nights.verify()

    # The seventh: that very file was rewritten before the clock had come to its time again.
    nights.rewrite("docs/future.txt")
    nights.rewrite("mnt/disk/music.mp3")
    shutil.rmtree(job.path("photos/new"))
    nights.night()
    nights.verify()
    assert job.run("--verify", "folder", user=NOBODY).returncode == 0

    # Nothing has ever left the bucket, and what it holds last of each file is what was there last.
    assert {key: job.in_bucket()[key] for key in job.in_folder()} == job.in_folder()
    assert md5(job.objects()["docs/02.txt"]) == md5(b"text 2")
