"""The lanes: many small files, sent by processes of their own with the AWS Common Runtime."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.checks import assert_clean, assert_stopped
from support.faults import Fault, answer, call, delay, trickle
from support.files import IN_PARTS, LARGE_BYTES, small_files, some_bytes
from support.inside import cgroups, run_first
from support.job import Job, named
from support.listing import Lister, objects_of
from support.proxy import Exchange, Request
from support.script import (
    SCRIPT_PATH,
    base_environment,
    finish,
    hasty_script,
    prelude,
    program,
    wait_until,
)
from support.systems import needs_cores, needs_limits, needs_proc

CLIENT_OPTION = "--preferred-transfer-client"
CLASSIC, CRT = (CLIENT_OPTION, "classic"), (CLIENT_OPTION, "crt")
# So many that the hasty script starts a lane for each of two cores.
MANY = 130
# In the User-Agent of what awscrt sends.
CRT_MARK = "CRTS3NativeClient"

as_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="has it all in reality")


def children_of(pid: int) -> list[int]:
    """The ids of the processes that a process has started: of a run, those of its lanes."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # by the thread that has started them
    found: list[int] = []
    for children in lists:
        with contextlib.suppress(OSError):  # that thread has ended
            found += map(int, children.read_text().split())
    return found


def kill_all(lanes: list[int]) -> None:
    """Kill processes, some of which may have ended meanwhile."""
    for pid in lanes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def is_by_lane(request: Request) -> bool:
    """Whether a lane sent the request: by awscrt."""
    return CRT_MARK in str(request.headers["User-Agent"])


def by_lanes(job: Job) -> list[str]:
    """The keys of the puts that lanes sent."""
    return [request.key for request in job.requests("PutObject") if is_by_lane(request)]


def start_with_lanes(
    job: Job, *, after_puts: int = 30, put_seconds: float = 0.05
) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run of so many files that it has lanes; return when they are at work."""
    job.write(small_files(MANY))
    job.proxy.add_fault(Fault(delay(put_seconds), operation="PutObject"))
    process = job.start("--max-concurrency", "16")
    wait_until(lambda: len(by_lanes(job)) >= after_puts, 60, "puts of the lanes")
    return process, children_of(process.pid)


# --- Processes -------------------------------------------------------------------------------


@needs_cores
@needs_proc
def test_many_files_are_spread_over_lanes_and_few_need_none(job: Job) -> None:
    job.proxy.add_fault(Fault(delay(0.02), operation="PutObject"))
    for count, lanes in ((MANY, 2), (10, 0)):
        files = small_files(count)
        job.folder = job.folder.with_name(f"{count} files")
        job.state_path = job.state_path.with_name(f"{count}.json")
        job.write(files)
        since = len(job.puts())
        process = job.start()
        job.wait_for("PutObject", since + 1)
        assert len(children_of(process.pid)) == lanes
        assert_clean(finish(process))
        assert job.state() == dict.fromkeys(files, 1)
        puts = job.requests("PutObject")[since:]
        assert [is_by_lane(request) for request in puts] == [lanes > 0] * count
    assert set(job.in_bucket()) == set(small_files(MANY))


@needs_cores
@needs_proc
def test_a_killed_lane_costs_no_file(job: Job) -> None:
    process, lanes = start_with_lanes(job)
    os.kill(lanes[0], signal.SIGKILL)
    assert_clean(finish(process))
    job.check_all_is_there()


@needs_cores
@needs_proc
def test_lanes_that_are_all_killed_leave_their_files_to_the_reliable_way(job: Job) -> None:
    job.write(small_files(MANY))

    def kill_lanes(_: Request) -> None:
        kill_all(children_of(process.pid))

    fault = job.proxy.add_fault(Fault(call(kill_lanes), operation="PutObject", after=5))
    process = job.start()
    assert_clean(finish(process))
    assert fault.hits
    assert 0 < len(by_lanes(job)) < len(job.puts())
    job.check_all_is_there()


@needs_cores
def test_lanes_that_cannot_start_leave_their_files_to_the_reliable_way(
    job: Job, tmp_path: Path
) -> None:
    (tmp_path / "awscrt.py").write_text("raise ImportError")
    job.write(small_files(MANY))
    assert_clean(job.run(env={"PYTHONPATH": str(tmp_path)}))
    job.check_all_is_there()
    assert by_lanes(job) == []


NO_PROCESSES = """\
import errno, subprocess
def start(*_, **__):
    raise OSError(errno.EAGAIN, "no more processes")
subprocess.Popen = start
"""


def test_a_system_that_starts_no_more_processes_sends_all(job: Job) -> None:
    job.write(small_files(MANY))
    assert_clean(job.run(python_flags=prelude(NO_PROCESSES)))
    job.check_all_is_there()


def run_from(
    job: Job, script: str | Path, *, cwd: Path, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script under another name, as from a shell in that folder."""
    return subprocess.run(
        [sys.executable, script, *map(str, job.arguments())],
        cwd=cwd,
        input=stdin,
        env={**base_environment(job.state_path.parent), **job.endpoint.environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_script_from_standard_input_sends_all(job: Job, tmp_path: Path) -> None:
    job.write(small_files(MANY))
    script = SCRIPT_PATH.read_text(encoding="utf-8")
    # A file of this name is not the script, whatever Python calls it.
    planted = tmp_path / "<stdin>"
    planted.write_text(f"open({str(tmp_path / 'was here')!r}, 'w')", encoding="utf-8")
    completed = run_from(job, "-", cwd=tmp_path, stdin=script)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert not (tmp_path / "was here").exists()
    completed = run_from(
        replace(job, options=("--preferred-transfer-client", "crt")),
        "-",
        cwd=tmp_path,
        stdin=script,
    )
    assert completed.returncode == 2
    assert "its processes need the script as a file" in completed.stderr
    assert not (tmp_path / "was here").exists()
    job.check_all_is_there()
    assert by_lanes(job) == []


@needs_cores
def test_a_lane_finds_the_script_under_any_name(job: Job, tmp_path: Path) -> None:
    job.write(small_files(MANY))
    place = tmp_path / "a folder"
    place.mkdir()
    (place / "back up").symlink_to(hasty_script())
    completed = run_from(job, "back up", cwd=place)
    assert (completed.returncode, completed.stderr) == (0, "")
    job.check_all_is_there()
    assert len(by_lanes(job)) == MANY


# Each of them is imported by every process that Python starts for a run, or by a lane.
PLANTED = ("multiprocessing", "awscrt", "json", "signal", "subprocess")


@pytest.mark.parametrize("flags", [[], ["-I"]], ids=["in-the-current-directory", "isolated"])
@pytest.mark.few(1)
def test_a_lane_trusts_the_modules_that_the_script_trusts(
    job: Job, tmp_path: Path, flags: list[str]
) -> None:
    ran, here = tmp_path / "ran", tmp_path / "here"
    here.mkdir()
    for name in PLANTED:
        (here / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})")
    files = job.make("a", "b")
    env = {"PYTHONPATH": str(here)} if flags else {}
    assert_clean(job.run(*CRT, cwd=here, env=env, python_flags=flags))
    assert not ran.exists()
    assert sorted(by_lanes(job)) == sorted(files)
    job.check_all_is_there()


# Of the folders with their files: those of cgroup v2, of one above, of v1, and none that counts.
QUOTAS = {
    "own": (1, {"cpu.max": "max 100000", "a/b/cpu.max": "100000 100000", "a/b/c/cpu.max": "max"}),
    "above": (1, {"a/cpu.max": "50000 100000", "a/b/cpu.max": "800000 100000"}),
    "version 1": (1, {"cpu/x/cpu.cfs_quota_us": "90000", "cpu/x/cpu.cfs_period_us": "90000"}),
    "none": (2, {"a/cpu.max": "150000 100000", "cpu/x/cpu.cfs_quota_us": "-1", "x/cpu.max": "1 9"}),
}
MEMBERSHIP = "11:memory:/x\n3:cpu,cpuacct:/x/y\n0::/a/b\n"


@needs_cores
@needs_proc
@pytest.mark.parametrize("name", QUOTAS)
@pytest.mark.few(2)
def test_the_quota_of_a_container_counts_as_its_cores(job: Job, tmp_path: Path, name: str) -> None:
    count, quotas = QUOTAS[name]
    files = {f"sys/fs/cgroup/{path}": f"{text}\n" for path, text in quotas.items()}
    files["proc/self/cgroup"] = MEMBERSHIP
    job.write(small_files(MANY))
    seen: list[int] = []

    def count_lanes(_: Request) -> None:
        seen.append(len(children_of(process.pid)))

    job.proxy.add_fault(Fault(call(count_lanes), operation="PutObject", times=1))
    process = job.start(python_flags=prelude(cgroups(tmp_path / "made up", files)))
    assert_clean(finish(process))
    assert seen == [count]
    job.check_all_is_there()


# As in a container whose first process waits for no child but its own.
IN_CONTAINER = """\
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
code = subprocess.call([sys.executable, *sys.argv[1:]])
with open(f"/proc/self/task/{os.getpid()}/children") as children:
    print("left:", children.read())
sys.exit(code)
"""
# Ends a run in its walk, when it has lanes.
ENDED_IN_WALK = """\
import os, signal
real = os.scandir
def scandir(path):
    if os.path.basename(path) == "zzz":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(path)
os.scandir = scandir
"""


@needs_cores
@needs_proc
@pytest.mark.parametrize("how", ["sent", "ended-in-walk", "lane-is-killed"])
@pytest.mark.few(2)
def test_a_run_leaves_no_process_behind(job: Job, tmp_path: Path, how: str) -> None:
    job.write(small_files(MANY) | {"zzz/last": b""})
    env = run_first(tmp_path / "first", ENDED_IN_WALK) if how == "ended-in-walk" else {}

    def kill_a_lane(_: Request) -> None:
        (run,) = children_of(process.pid)
        os.kill(children_of(run)[0], signal.SIGKILL)

    if how == "lane-is-killed":
        job.proxy.add_fault(Fault(call(kill_a_lane), operation="PutObject", after=5, times=1))
    process = job.start(env=env, python_flags=["-c", IN_CONTAINER])
    completed = finish(process)
    assert completed.returncode == (143 if how == "ended-in-walk" else 0)
    assert completed.stdout.splitlines()[-1] == "left: "


@needs_cores
@needs_proc
def test_lanes_end_with_a_killed_run_and_do_not_keep_the_lock(job: Job) -> None:
    process, lanes = start_with_lanes(job)
    assert lanes
    process.kill()
    wait_until(lambda: not any(map(is_alive, lanes)), 20, "the end of the lanes")
    process.communicate()
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


@needs_cores
@needs_proc
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.few(1)
def test_a_signal_to_the_whole_group_is_answered_once(job: Job, signum: int, code: int) -> None:
    process, lanes = start_with_lanes(job)
    os.killpg(process.pid, signum)
    completed = finish(process, timeout=30)
    assert completed.returncode == code
    (sentence,) = completed.stderr.splitlines()
    assert "--crashrun 1" in sentence
    wait_until(lambda: not any(map(is_alive, lanes)), 20, "the end of the lanes")
    job.check_state_is_true()
    job.proxy.clear_faults()
    assert_clean(job.crash_run())
    job.check_all_is_there()


@needs_cores
@needs_proc
def test_a_lane_that_is_stuck_is_ended_and_costs_no_file(job: Job) -> None:
    # Slow enough that the other lane cannot have sent all before this one is ready.
    process, lanes = start_with_lanes(job, put_seconds=0.3)
    files = Path(f"/proc/{lanes[0]}/fd")

    def is_stopped_with_files() -> bool:
        os.kill(lanes[0], signal.SIGSTOP)
        if any(file.readlink().is_relative_to(job.folder) for file in files.iterdir()):
            return True
        os.kill(lanes[0], signal.SIGCONT)
        return False

    wait_until(is_stopped_with_files, 30, "a lane that is stopped with files")
    # The other lane works on, until this one has said nothing for too long.
    assert_clean(finish(process, timeout=60))
    assert not is_alive(lanes[0])
    assert 0 < len(by_lanes(job)) < len(job.puts())
    job.check_all_is_there()


@needs_cores
@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("limit", [(), ("--max-bandwidth", "1GB/s")], ids=["no-limit", "limit"])
def test_lanes_that_are_stuck_at_their_start_cost_no_file(
    job: Job, tmp_path: Path, limit: tuple[str, ...]
) -> None:
    hang = 'import sys, time; "be-a-lane" in sys.orig_argv and time.sleep(600)'
    job.write(small_files(MANY))
    process = job.start(*limit, env=run_first(tmp_path / "first", hang))
    wait_until(lambda: children_of(process.pid), 30, "a lane")
    assert_clean(finish(process, timeout=60))
    job.check_all_is_there()
    assert by_lanes(job) == []


# --- Trouble ---------------------------------------------------------------------------------


@needs_proc
def test_an_answer_that_comes_byte_by_byte_costs_a_lane_one_try(job: Job) -> None:
    files, lanes = job.make("a", "b", "c"), list[int]()

    def note_lanes(_: Request) -> None:
        lanes.extend(children_of(process.pid))

    job.proxy.add_fault(Fault(trickle(0.5), operation="PutObject", key="b", times=1))
    job.proxy.add_fault(Fault(call(note_lanes), operation="PutObject", key="b"))
    process = job.start(*CRT)
    assert_clean(finish(process))
    assert sorted(by_lanes(job)) == sorted(files)
    assert sorted(job.puts()) == ["a", "b", "b", "c"]
    assert len(lanes) == 1  # it gave up the one put, and was not ended
    job.check_all_is_there()


@pytest.mark.long
def test_a_put_that_is_answered_late_is_tried_once_by_a_lane(rclone_job: Job) -> None:
    files = rclone_job.make("a", "b")
    rclone_job.proxy.add_fault(Fault(delay(35), operation="PutObject", key="a", times=1))
    assert_clean(rclone_job.run(*CRT, real_time=True))
    assert sorted(by_lanes(rclone_job)) == sorted(files)
    assert sorted(rclone_job.puts()) == ["a", "a", "b"]
    rclone_job.check_all_is_there()


@needs_cores
@pytest.mark.parametrize("code", ["ExpiredToken", "AccessDenied"])
@pytest.mark.few(1)
def test_what_every_file_would_meet_is_said_once(job: Job, code: str) -> None:
    job.write(small_files(MANY))
    job.proxy.add_fault(Fault(answer(403, code), operation="PutObject"))
    assert_stopped(job.run(), code)
    assert job.uploaded() == set()
    assert by_lanes(job)


@needs_cores
def test_lanes_and_the_reliable_way_ride_out_throttling(job: Job) -> None:
    job.write(small_files(MANY))
    job.proxy.add_fault(Fault(answer(503, "SlowDown"), operation="PutObject", one_in=5))
    assert_clean(job.run())
    assert 0 < len(by_lanes(job)) < len(job.puts())
    job.check_all_is_there()


@needs_cores
def test_a_file_that_has_grown_large_is_left_to_the_reliable_way(job: Job) -> None:
    job.make("a", "b")

    def grow(_: Request) -> None:
        job.write({"b": some_bytes(300_000)})

    job.proxy.add_fault(Fault(call(grow), operation="PutObject", key="a", times=1))
    assert_clean(job.run(*CRT, "--max-concurrency", "1"))
    assert by_lanes(job) == ["a"]
    job.check_all_is_there()


# A disk that fails once a file named so has been read: when it is looked at, or read, again.
FAILING_DISK = """\
import os, sys
bad, was_read = set(), set()
real_open, real_fstat, real_read, real_close = os.open, os.fstat, os.read, os.close
def fail_at(call, file):
    if call == {call!r} and file in was_read:
        raise OSError({errno}, os.strerror({errno}))
def open_file(path, *rest, **named):
    file = real_open(path, *rest, **named)
    (bad.add if os.path.basename(os.fspath(path)) == "bad" else bad.discard)(file)
    return file
def fstat(file):
    fail_at("fstat", file)
    return real_fstat(file)
def read(file, size):
    fail_at("read", file)
    if file in bad:
        was_read.add(file)
    return real_read(file, size)
def close(file):
    was_read.discard(file)
    real_close(file)
if {is_everywhere} or "be-a-lane" in sys.orig_argv:  # else in lanes alone
    os.open, os.fstat, os.read, os.close = open_file, fstat, read, close
"""


@pytest.mark.parametrize(("call_that_fails", "code"), [("fstat", "ESTALE"), ("read", "EIO")])
@pytest.mark.parametrize("is_everywhere", [False, True], ids=["in-lanes", "everywhere"])
@pytest.mark.few(2)
def test_a_disk_that_fails_after_the_put_of_a_lane_costs_that_file_alone(
    job: Job, tmp_path: Path, call_that_fails: str, code: str, is_everywhere: bool
) -> None:
    number = getattr(errno, code)
    disk = FAILING_DISK.format(call=call_that_fails, errno=number, is_everywhere=is_everywhere)
    (tmp_path / "sitecustomize.py").write_text(disk)
    others = small_files(30)
    job.write({"bad": b"bytes", **others})

    def grow(_: Request) -> None:
        with job.path("bad").open("ab") as file:  # so that it is read again
            file.write(b"and more")

    times = None if is_everywhere else 1
    job.proxy.add_fault(Fault(call(grow), operation="PutObject", key="bad", times=times))
    # Not to end with the lane that has it, the others are begun one by one.
    completed = job.run(*CRT, "--max-concurrency", "2", env={"PYTHONPATH": str(tmp_path)})
    if is_everywhere:
        job.check_failed(completed, "bad", said=f"{os.strerror(number).lower()}; check the disk")
    else:
        assert_clean(completed)
        job.check_all_is_there()
    # One try by a lane, which has gone on with the others.
    assert sorted(by_lanes(job)) == sorted(["bad", *others])
    assert sorted(job.puts()) == sorted(["bad", "bad", *others])


# Each process notes how many files it opens at once, at the most.
SLOW_DISK = """\
import os, threading, time
real, lock, opening = os.open, threading.Lock(), []
def slow(path, *args, **keywords):
    if str(path).endswith(".dat"):
        opening.append(path)
        with lock, open({record!r}, "a") as file:
            print(len(opening), file=file)
        time.sleep(0.02)
        opening.pop()
    return real(path, *args, **keywords)
os.open = slow
"""


@needs_cores
def test_a_slow_disk_is_read_by_many_threads(job: Job, tmp_path: Path) -> None:
    record = tmp_path / "record"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK.format(record=str(record)))
    job.write(small_files(MANY))
    assert_clean(job.run(env={"PYTHONPATH": str(tmp_path)}))
    assert len(by_lanes(job)) == MANY
    assert max(map(int, record.read_text().split())) > 8
    job.check_all_is_there()


@needs_cores
def test_lanes_trust_the_authorities_of_the_environment(tls_job: Job) -> None:
    tls_job.write(small_files(MANY))
    assert_clean(tls_job.run())
    assert len(by_lanes(tls_job)) == MANY
    tls_job.check_all_is_there()


@pytest.mark.parametrize(("name", "by_lane"), [("auto", False), ("crt", True), ("classic", False)])
@pytest.mark.few(2)
def test_preferred_transfer_client(job: Job, name: str, by_lane: bool) -> None:
    job.write({"a.txt": b"bytes", "large": some_bytes(LARGE_BYTES)})
    assert_clean(job.run(CLIENT_OPTION, name, *IN_PARTS))
    (put,) = job.requests("PutObject")
    assert is_by_lane(put) == by_lane
    assert not any(map(is_by_lane, job.requests("UploadPart")))
    job.check_all_is_there()


RUNTIME_CANNOT = {
    "proxy": {"HTTP_PROXY": "{url}", "http_proxy": "{url}", "NO_PROXY": "", "no_proxy": ""},
    "not-installed": {"PYTHONPATH": "{folder}"},
}


@pytest.mark.parametrize("why", RUNTIME_CANNOT)
def test_where_the_runtime_cannot_do_what_is_asked_boto3_sends(
    job: Job, tmp_path: Path, why: str
) -> None:
    (tmp_path / "awscrt.py").write_text("raise ImportError")
    places = {"url": job.endpoint.endpoint_url, "folder": str(tmp_path)}
    env = {name: value.format(**places) for name, value in RUNTIME_CANNOT[why].items()}
    job.write(small_files(MANY))
    assert_stopped(job.run(*CRT, env=env), "cannot use the AWS Common Runtime: ")
    assert_clean(job.run(env=env))
    job.check_all_is_there()
    assert by_lanes(job) == []


OF_ONE_REQUEST = {"authorization", "x-amz-date", "user-agent", "accept", "connection"}
OF_ONE_CLIENT = {"amz-sdk-invocation-id", "amz-sdk-request", "accept-encoding"}


def test_a_lane_sends_the_request_that_boto3_sends(job: Job) -> None:
    keys = ("plain.txt", "no extension", "sp ace+%&#?'\"ü~*()!$,;=:@.bin", "deep/er/file.html")
    job.write({key: key.encode() for key in keys})
    options = ["--storage-class", "STANDARD", "--sse", "AES256", "--prefix", "pre fix/"]
    options += ["--expected-bucket-owner", "123456789012"]
    sent = []
    for client in (CLASSIC, CRT):
        since = job.seen()
        assert_clean(job.run(*client, *options))
        puts = job.requests("PutObject", since=since)
        assert [is_by_lane(put) for put in puts] == [client == CRT] * len(keys)
        headers = [
            {name.lower(): value for name, value in request.headers.items()} for request in puts
        ]
        ignored = OF_ONE_REQUEST | OF_ONE_CLIENT
        kept = [{n: v for n, v in h.items() if n not in ignored} for h in headers]
        sent.append({put.path: header for put, header in zip(puts, kept, strict=True)})
    assert sent[0] == sent[1]


# --- The process that parses a long listing --------------------------------------------------


@needs_cores
@needs_proc
@pytest.mark.parametrize("is_killed", [False, True], ids=["at work", "killed"])
@pytest.mark.parametrize("arguments", [("--skip-unchanged",), ("--verify",)], ids=" ".join)
@pytest.mark.few(2)
def test_a_long_listing_is_parsed_beside_the_walk(
    job: Job, arguments: tuple[str, ...], is_killed: bool
) -> None:
    names = [f"{number:02}" for number in range(30)]
    job.back_up(*names)
    lister, children = Lister(objects_of(job.server, job.bucket), page=1), list[int]()

    def look_and_list(exchange: Exchange) -> None:
        if job.proxy.count("ListObjectsV2") == 20:
            children.extend(children_of(process.pid))
            kill_all(children if is_killed else [])
        lister(exchange)

    job.proxy.add_fault(Fault(look_and_list, operation="ListObjectsV2"))
    since = job.seen()
    process = job.start(*arguments)
    completed = finish(process)
    assert_clean(completed)
    assert "30 unchanged" in completed.stdout or "30 files right" in completed.stdout
    assert job.sent(since) == []
    assert len(children) == 1
    assert not is_alive(children[0])


@needs_cores
@pytest.mark.parametrize("text", ["some text", "\0" * 16, "\0" * 7 + "\3abc"])
@pytest.mark.few(1)
def test_text_that_a_module_prints_at_the_start_ends_a_child_and_nothing_else(
    job: Job, tmp_path: Path, text: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nif len(sys.orig_argv) < 5: sys.stdout.write({text!r}); sys.stdout.flush()\n"
    )
    job.write(small_files(MANY))
    completed = job.run(env={"PYTHONPATH": str(tmp_path)})
    assert_clean(completed)
    job.check_all_is_there()
    shutil.rmtree(job.folder)
    for key in small_files(MANY):
        job.delete(key)
    names = [f"{number:02}" for number in range(30)]
    job.back_up(*names)
    lister = Lister(objects_of(job.server, job.bucket), page=1)
    job.proxy.add_fault(Fault(lister, operation="ListObjectsV2"))
    since = job.seen()
    completed = job.run("--skip-unchanged", env={"PYTHONPATH": str(tmp_path)})
    assert_clean(completed)
    assert job.sent(since) == []


@needs_cores
def test_pages_are_the_same_whoever_parses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = program()
    module.import_boto3()
    namespace = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    objects = [("a&amp;b", 1, '"ABC"'), ("a%2Fb+c", 2, "&quot;def&quot;"), ("\U0001f389", 3, "")]
    contents = "".join(
        f"<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{size}</Size></Contents>"
        for key, size, etag in objects
    )
    pages = [
        f"<ListBucketResult {more}><EncodingType>{encoding}</EncodingType>{contents}"
        f"<IsTruncated>{is_truncated}</IsTruncated>{token}</ListBucketResult>"
        for more in (namespace, "")
        for encoding in ("url", "")
        for is_truncated, token in [
            ("false", ""),
            ("true", ""),
            ("true", "<NextContinuationToken>next</NextContinuationToken>"),
        ]
    ]
    others = ["<Other/>", pages[0][:-1], "text", "<ListBucketResult/>"]

    def parsed(parser: object) -> list[object]:
        found: list[object] = []
        for text in [*pages, *others]:
            answer, customized = {"status_code": 200, "body": text.encode()}, dict[str, object]()
            try:
                parser.parse(answer, customized)  # type: ignore[attr-defined]
            except module.botocore.parsers.ResponseParserError as error:
                customized["page"] = str(error)
            found.append(customized.get("page"))
        return found

    found = {}
    for first_page_of_child in (1000, 1):
        monkeypatch.setattr(module.PageParser, "FIRST_PAGE_OF_CHILD", first_page_of_child)
        parser = module.PageParser()
        found[first_page_of_child] = parsed(parser)
        assert (parser._child is None) == (first_page_of_child == 1000)
        parser.close()
    assert found[1] == found[1000]
    assert found[1][0] == ({"a&b": (1, "abc"), "a/b c": (2, "def"), "\U0001f389": (3, "")}, {})


# --- Systems that lack something -------------------------------------------------------------

TAKEN_AWAY = """\
import os, signal, sys
for name in {names!r}:
    module, _, attribute = name.partition(".")
    vars(sys.modules[module]).pop(attribute, None)
"""


def make_mixed(job: Job, count: int) -> None:
    """Write small files, an empty one and one that is sent in parts."""
    job.write(small_files(count) | {"empty": b"", "sub/parts": some_bytes(LARGE_BYTES)})


@pytest.mark.parametrize(
    "names", [("os.fchmod", "os.O_NONBLOCK"), ("os.sched_getaffinity", "signal.SIGHUP")], ids=str
)
@pytest.mark.few(1)
def test_a_system_that_lacks(job: Job, tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(TAKEN_AWAY.format(names=names))
    make_mixed(job, MANY)
    for _ in range(2):  # with and without an old state
        assert_clean(job.run(*IN_PARTS, env={"PYTHONPATH": str(tmp_path)}))
        job.check_all_is_there()


@needs_limits
def test_a_low_limit_of_open_files_is_raised(job: Job) -> None:
    job.write(small_files(140))
    job.proxy.add_fault(Fault(delay(0.5), operation="PutObject"))
    hard = "resource.getrlimit(resource.RLIMIT_NOFILE)[1]"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))"
    assert_clean(job.run(*CRT, "--max-concurrency", "200", python_flags=prelude(limit)))
    job.check_all_is_there()


# What the script meets on Windows, in its main process. All that looks at the system when it is
# imported is imported before.
WINDOWS = """\
import errno, fcntl, os, signal, subprocess, sys, types
import awscrt.s3, boto3.s3.transfer

real_open = os.open

def windows_open(path, flags, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    if not flags & os.O_BINARY:
        raise OSError(errno.EINVAL, "it would be read as text", path)
    return real_open(path, flags & ~os.O_BINARY, *rest, **named)

def locking(descriptor, mode, size):
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    if mode != msvcrt.LK_NBLCK or at < 1000:
        raise OSError(errno.EINVAL, "it would wait, or nobody could read the text")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, size, at)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK, msvcrt.locking = 2, locking
sys.modules.update(msvcrt=msvcrt, fcntl=None, resource=None)
for module, names in (
    (os, "fchmod sched_getaffinity O_NONBLOCK geteuid getuid"),
    (signal, "SIGHUP pthread_sigmask"),  # subprocess here needs SIGKILL
):
    for name in names.split():
        vars(module).pop(name, None)
os.O_BINARY, os.open = 1 << 30, windows_open
sys.platform = "win32"
"""


@as_on_windows
def test_backup_as_on_windows(job: Job) -> None:
    make_mixed(job, MANY)
    assert_clean(job.run(*IN_PARTS, python_flags=prelude(WINDOWS)))
    job.check_all_is_there()
    assert_clean(job.run(*IN_PARTS, *CRT, python_flags=prelude(WINDOWS)))
    job.check_all_is_there()
    assert_clean(job.run(*IN_PARTS, "--skip-unchanged", python_flags=prelude(WINDOWS)))
    # There it is the time at which the file was made. (Lanes are as on Linux here.)
    assert [entry for entry in job.entries() if "ctime_ns" in entry] == []
    job.check_no_leftovers()


@as_on_windows
def test_lock_as_on_windows(job: Job) -> None:
    job.make("a.dat", "b.dat")
    job.proxy.add_fault(Fault(delay(600), operation="PutObject"))
    first = job.start(python_flags=prelude(WINDOWS))
    job.wait_for("PutObject")
    before = job.state_path.read_bytes()
    second = job.run(python_flags=prelude(WINDOWS))
    assert_stopped(second, named(first), "--statefile")
    assert job.state_path.read_bytes() == before

    first.kill()
    first.wait()
    job.proxy.clear_faults()
    assert_clean(job.crash_run(python_flags=prelude(WINDOWS)))
    job.check_all_is_there()


# A file that this process has open can be neither replaced nor deleted, as on Windows.
OPEN_FILES_STAY = """
import errno, os

def is_open(path):
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.path.samestat(os.stat(f"/proc/self/fd/{descriptor}"), os.lstat(path)):
                return True
        except OSError:
            pass
    return False

def unless_open(real):
    def call(*paths, **keywords):
        if any(map(is_open, paths)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), *paths[:1])
        return real(*paths, **keywords)
    return call

os.replace, os.rename = unless_open(os.replace), unless_open(os.rename)
os.unlink, os.remove = unless_open(os.unlink), unless_open(os.remove)
"""
OFTEN = (("SAVE_INTERVAL_SECONDS = 2", "0.01"),)


@needs_proc
@pytest.mark.few(1)
def test_saves_in_mid_run_where_open_files_cannot_be_replaced(
    job: Job, each_client: tuple[str, ...]
) -> None:
    job.write(small_files(200) | {"parts": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    flags = prelude(WINDOWS + OPEN_FILES_STAY)
    few = ("--max-concurrency", "4")
    process = job.start(*IN_PARTS, *few, *each_client, python_flags=flags, constants=OFTEN)
    saved: set[int] = set()

    def look() -> bool:
        if job.state_path.exists():  # the state alone, without its journal
            entries = json.loads(job.state_path.read_bytes())
            saved.add(sum(entry["uploadedSuccess"] for entry in entries))
        return process.poll() is not None

    wait_until(look, 60, "the end of the run")
    assert_clean(finish(process))
    assert len(saved & set(range(1, 201))) > 1
    job.check_all_is_there()
    job.check_no_leftovers()
    # With an old state, too, and where there is nothing to send.
    job.make("new")
    for again in ("--skip-unchanged", "--verify"):
        assert_clean(job.run(*IN_PARTS, again, python_flags=flags, constants=OFTEN))
        job.check_no_leftovers()
    job.check_all_is_there()


@needs_proc
@pytest.mark.few(1)
def test_a_run_is_interrupted_where_open_files_cannot_be_replaced(
    job: Job, each_client: tuple[str, ...]
) -> None:
    job.write(small_files(200) | {"parts": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(delay(0.05), operation="PutObject"))
    flags = prelude(WINDOWS + OPEN_FILES_STAY)
    process = job.start(*IN_PARTS, "--max-concurrency", "4", *each_client, python_flags=flags)
    job.wait_for("PutObject", 40)
    process.send_signal(signal.SIGINT)
    completed = finish(process, timeout=30)
    assert completed.returncode == 130
    (said,) = completed.stderr.splitlines()
    assert "interrupted; the state is saved; " in said
    assert 0 < len(job.uploaded()) < 201
    job.check_state_is_true()
    job.check_no_leftovers()
    since, missing = job.seen(), sorted(set(job.in_folder()) - job.uploaded() - {"parts"})
    assert_clean(job.crash_run(*IN_PARTS, *each_client, python_flags=flags))
    assert sorted(set(job.puts(since))) == missing
    job.check_all_is_there()
    job.check_no_leftovers()
