"""How a run ends: what is handed out, what is recorded, and what a signal leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import NewJob
from support.checks import assert_clean, lines_with
from support.faults import Fault, answer, call, delay, slow, stall
from support.files import IN_PARTS, LARGE_BYTES, MIB, PART_BYTES, md5, small_files, some_bytes
from support.job import Job
from support.proxy import Exchange, Request, pass_on
from support.script import Completed, finish, journal_of, prelude, program, wait_until
from support.servers import S3Server
from support.systems import needs_limits

if sys.platform == "win32":
    pytest.skip("POSIX only: SIGTERM and SIGHUP as signals", allow_module_level=True)

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
# With the patience of the hasty script, on a machine with much else to do.
ENDS_WITHIN_SECONDS = 30


@pytest.fixture
def job(moto_job: Job) -> Job:
    """A job on moto, which lists open multipart uploads and their parts as S3 does."""
    return moto_job


@pytest.fixture
def small_job(new_job: NewJob, moto_server: S3Server, each_client: tuple[str, ...]) -> Job:
    """A job by each of the clients that send small files."""
    return new_job(moto_server, *each_client)


def ended_by(process: subprocess.Popen[str], signum: int) -> Completed:
    """Send the signal, and return how the run ended and what it said."""
    process.send_signal(signum)
    return finish(process, timeout=ENDS_WITHIN_SECONDS)


def assert_interrupted(completed: Completed, code: int) -> None:
    """Check that a run ended with this code, one sentence and its summary."""
    assert completed.returncode == code
    (sentence,) = completed.stderr.splitlines()
    assert "--crashrun 1" in sentence
    (summary,) = completed.stdout.splitlines()
    assert "not yet sent" in summary


# --- Signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "code", "way"),
    [
        (*SIGNALS[0], "crt"),
        pytest.param(*SIGNALS[1], "classic", marks=pytest.mark.long),
        (*SIGNALS[1], "crt"),
        (*SIGNALS[2], "classic"),
    ],
)
@pytest.mark.few(2)
def test_a_signal_among_small_files_leaves_what_was_answered(
    rclone_job: Job, signum: int, code: int, way: str
) -> None:
    job, files = rclone_job, small_files(60)
    job.write(files)
    # Some are sent, and the server has them, but its answer does not come before the end.
    held = set(sorted(files)[20:30])
    ended = threading.Event()

    def hold(exchange: Exchange) -> None:
        answer = exchange.forward()
        ended.wait(60)
        exchange.reply(answer)

    job.proxy.add_fault(Fault(hold, operation="PutObject", key=lambda key: key in held))
    job.proxy.add_fault(Fault(delay(0.1), operation="PutObject"))
    process = job.start("--max-concurrency", "12", "--preferred-transfer-client", way)
    wait_until(lambda: held <= set(job.puts()), 60, "all that are held")
    try:
        completed = ended_by(process, signum)
    finally:
        ended.set()
    assert_interrupted(completed, code)
    assert set(job.state()) == set(files)
    answered = {r.key for r in job.requests("PutObject") if r.status == 200}
    assert answered - held == job.uploaded()
    assert 0 < len(job.uploaded()) < 60
    job.check_state_is_true()
    job.check_no_leftovers()
    job.proxy.clear_faults()
    since = job.seen()
    missing = sorted(set(files) - job.uploaded())
    assert_clean(job.crash_run())
    assert job.sent(since) == missing
    job.check_all_is_there()


@pytest.mark.parametrize(("signum", "code"), SIGNALS[1:])
@pytest.mark.few(1)
def test_a_signal_during_a_multipart_upload_keeps_its_parts(
    job: Job, signum: int, code: int
) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(stall(600), part_number=2))
    process = job.start(*IN_PARTS)

    def has_two_parts() -> bool:
        parts = job.requests("UploadPart")
        return {1, 3} <= {part.part_number for part in parts if part.status == 200}

    wait_until(has_two_parts, 60, "parts 1 and 3")
    assert_interrupted(ended_by(process, signum), code)
    assert job.uploaded() == set()
    upload_id = job.entry("large")["upload_id"]
    assert job.open_uploads() == [("large", upload_id, 2)]
    job.proxy.clear_faults()
    since = job.seen()
    assert_clean(job.crash_run(*IN_PARTS))
    # On a busy machine a part may come to its timeout and be sent again, in either run.
    assert set(job.sent_parts(since)) == {2}
    job.check_all_is_there()


def test_no_new_file_starts_after_a_signal_and_those_in_flight_end(small_job: Job) -> None:
    job = small_job
    job.write(small_files(60))
    leave = threading.Event()

    def hold(exchange: Exchange) -> None:
        leave.wait(60)
        exchange.reply(exchange.forward())

    job.proxy.add_fault(Fault(hold, operation="PutObject"))
    process = job.start("--max-concurrency", "8")
    job.wait_for("PutObject", 8)
    process.send_signal(signal.SIGTERM)
    leave.set()
    assert_interrupted(finish(process, timeout=ENDS_WITHIN_SECONDS), 143)
    # Those that were handed out: no more than two for each request in flight.
    assert 8 <= len(job.puts()) <= 24
    assert job.uploaded() == set(job.puts())
    job.check_state_is_true()


def test_a_slow_upload_is_cut_off(job: Job) -> None:
    job.write({"slow": some_bytes(1_000_000), "fast": b"fast"})
    job.proxy.add_fault(Fault(slow(1000), key="slow"))
    process = job.start()
    job.wait_for("PutObject", 2)
    job.wait_for("PutObject", 1, answered=True)
    assert_interrupted(ended_by(process, signal.SIGTERM), 143)
    assert job.uploaded() == {"fast"}


def hang_up(_: object) -> None:
    raise ConnectionResetError


def test_a_signal_while_a_request_is_tried_again_ends_the_run(job: Job) -> None:
    job.write({"f": b"f"})
    fault = job.proxy.add_fault(Fault(call(hang_up), operation="PutObject"))
    process = job.start()
    wait_until(lambda: fault.hits >= 3, 60, "some tries")
    assert_interrupted(ended_by(process, signal.SIGTERM), 143)
    assert job.uploaded() == set()


SLOW_HANDLERS = """
import signal, time
set_handler = signal.signal
def slow(handler):
    return lambda *caught: (time.sleep(0.3), handler(*caught))
signal.signal = lambda signum, handler: set_handler(
    signum, slow(handler) if callable(handler) else handler
)
"""


def test_a_signal_that_is_handled_late_ends_the_run(job: Job) -> None:
    # On a busy machine, what waits for news is waked after its time is over.
    job.write({"f": b"f"})
    job.proxy.add_fault(Fault(stall(600), operation="PutObject"))
    process = job.start(python_flags=prelude(SLOW_HANDLERS))
    job.wait_for("PutObject")
    assert_interrupted(ended_by(process, signal.SIGTERM), 143)
    job.check_state_is_true()


def test_a_second_signal_ends_the_run_at_once(job: Job) -> None:
    job.write({"large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(stall(600), operation="UploadPart"))
    process = job.start(*IN_PARTS, real_time=True)
    job.wait_for("UploadPart")
    process.send_signal(signal.SIGINT)
    started = time.monotonic()

    def again() -> bool:
        process.send_signal(signal.SIGTERM)
        return process.poll() is not None

    # Again and again, since one that comes at once with the first does not count as a second.
    wait_until(again, ENDS_WITHIN_SECONDS, "the end of the run")
    assert finish(process).returncode == 130
    assert time.monotonic() - started < 6  # after one signal, what is in flight has 8 seconds
    job.check_state_is_true()


def test_two_signals_at_once_are_one(job: Job) -> None:
    job.write(small_files(60))
    job.proxy.add_fault(Fault(delay(0.3), operation="PutObject"))
    process = job.start("--max-concurrency", "10")
    job.wait_for("PutObject", 10)
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # as timeout(1) does
    assert_interrupted(finish(process, timeout=ENDS_WITHIN_SECONDS), 143)
    job.check_no_leftovers()


@contextlib.contextmanager
def ignored(signum: int) -> Iterator[None]:
    """Ignore a signal, here and in the processes that are started meanwhile."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signum, before)


def test_a_hangup_ignored_at_the_start_stays_ignored(job: Job) -> None:
    job.write(small_files(40))
    job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    with ignored(signal.SIGHUP):
        process = job.start("--max-concurrency", "8")
    job.wait_for("PutObject", 10)
    assert_clean(ended_by(process, signal.SIGHUP))
    job.check_all_is_there()


@pytest.mark.parametrize(("signum", "code"), SIGNALS[:1])
def test_a_signal_during_the_first_request_ends_the_run(job: Job, signum: int, code: int) -> None:
    job.write({"f": b"f"})
    job.proxy.add_fault(Fault(stall(600)))
    process = job.start()
    job.wait_for("HeadBucket", 1)
    completed = ended_by(process, signum)
    assert (completed.returncode, completed.stdout) == (code, "")
    assert len(completed.stderr.splitlines()) == 1
    assert not job.state_path.exists()


def test_a_signal_while_the_credentials_are_waited_for_ends_the_run(
    job: Job, tmp_path: Path
) -> None:
    job.write({"f": b"f"})
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat '{fifo}'\n")
    env = {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    process = job.start(server=None, env=env)
    source: list[int] = []

    def is_asked() -> bool:  # only what somebody reads can be opened so
        with contextlib.suppress(OSError):
            source.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(source)

    wait_until(is_asked, 20, "the program that has the credentials")
    try:
        completed = ended_by(process, signal.SIGTERM)
    finally:
        os.close(source[0])
    assert (completed.returncode, completed.stdout) == (143, "")
    assert len(completed.stderr.splitlines()) == 1
    assert not job.state_path.exists()


# The run gets a signal when it looks at its fifth file, and writes down each.
SIGNAL_AT_STAT = """
import os, signal
real, calls = os.stat, 0
def counted(path, *args, **keywords):
    global calls
    if isinstance(path, str) and path.startswith({folder!r}):
        calls += 1
        with open({record!r}, "a") as record:
            print(path, file=record)
        if calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    return real(path, *args, **keywords)
os.stat = counted
"""


def test_a_signal_while_a_crash_run_looks_at_its_files_ends_it(job: Job, tmp_path: Path) -> None:
    files, record = small_files(50), tmp_path / "record"
    job.write(files)
    state = job.write_state(*(job.pending_entry(key) for key in files))
    folder = f"{job.folder}{os.sep}"
    flags = prelude(SIGNAL_AT_STAT.format(folder=folder, record=str(record)))
    completed = job.crash_run(python_flags=flags)
    assert completed.returncode == 143
    assert len(set(record.read_text().splitlines())) < 10
    assert job.state_path.read_bytes() == state
    assert job.puts() == []


def test_what_waits_for_its_turn_is_not_sent_after_a_signal() -> None:
    module, sent = program(), []
    module.import_boto3()
    retries = module.Retries(None, slots=1)

    class Slot:
        def __enter__(self) -> None:
            retries.stop.set()  # while it waits

        def __exit__(self, *_: object) -> None:
            pass

    retries._slot = Slot()
    with pytest.raises(module.Stopped):
        retries.run(lambda: sent.append("a request"))
    assert sent == []


# --- What is recorded ------------------------------------------------------------------------


def test_the_state_says_what_was_sent_when_the_run_stops(small_job: Job) -> None:
    job = small_job
    job.write({**small_files(40), "large": some_bytes(LARGE_BYTES)})
    job.proxy.add_fault(Fault(answer(404, "NoSuchBucket"), operation="PutObject", after=10))
    completed = job.run(*IN_PARTS, "--max-concurrency", "4")
    assert completed.returncode == 2
    answered = {r.key for r in job.requests("PutObject") if r.status == 200}
    assert len(answered) == 10
    assert answered <= job.uploaded() <= answered | {"large"}
    assert f"{len(job.uploaded())} file" in completed.stdout
    job.check_state_is_true()


# So that what happens is in the journal first, and the last answer comes before the end.
SLOW_TO_END = (("SAVE_INTERVAL_SECONDS = 2", "60"), ("SIGNAL_GRACE_SECONDS = 3", "30"))


def test_a_run_that_stops_by_itself_says_why_despite_a_signal(job: Job) -> None:
    job.make("gone.dat", "held.dat")
    leave = threading.Event()

    def hold(exchange: Exchange) -> None:
        leave.wait(60)
        pass_on(exchange)

    job.proxy.add_fault(Fault(hold, operation="PutObject", key="held.dat"))
    gone = answer(404, "NoSuchBucket")
    job.proxy.add_fault(Fault(gone, operation="PutObject", key="gone.dat"))
    process = job.start("--preferred-transfer-client", "classic", constants=SLOW_TO_END)
    job.wait_for("PutObject", 2)
    journal = journal_of(job.state_path)
    wait_until(
        lambda: journal.exists() and "gone.dat" in journal.read_text(encoding="utf-8"),
        60,
        "the end of the upload that stops the run",
    )
    process.send_signal(signal.SIGINT)
    leave.set()
    completed = finish(process, timeout=ENDS_WITHIN_SECONDS)
    assert completed.returncode == 130
    assert len(completed.stderr.splitlines()) == 2
    (stopped,) = lines_with(completed.stderr, "s3FileTransfer: stopped: ")
    assert "NoSuchBucket" in stopped
    (interrupted,) = lines_with(completed.stderr, "s3FileTransfer: interrupted; ")
    assert "the state is saved" in interrupted
    job.check_state_is_true()
    job.check_no_leftovers()


def most_at_once(job: Job, operation: str, pause_seconds: float = 0.2) -> list[int]:
    """Count how many requests of an operation are under way at once: the list has the most."""
    under_way, most = [0], [0]
    lock = threading.Lock()

    def count(exchange: Exchange) -> None:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        exchange.pause(pause_seconds)
        answer = exchange.forward()
        with lock:
            under_way[0] -= 1
        exchange.reply(answer)

    job.proxy.add_fault(Fault(count, operation=operation))
    return most


@pytest.mark.parametrize("asked", [3, pytest.param(12, marks=pytest.mark.long)])
def test_concurrency_reaches_the_parts_of_large_files(job: Job, asked: int) -> None:
    job.write({"large": some_bytes(12 * PART_BYTES)})
    most = most_at_once(job, "UploadPart", pause_seconds=0.5)
    assert_clean(job.run(*IN_PARTS, "--max-concurrency", str(asked)))
    assert most == [asked]


@pytest.mark.parametrize("way", ["crt", "classic"])
@pytest.mark.few(1)
def test_few_bytes_are_under_way_until_the_line_has_shown_more(job: Job, way: str) -> None:
    size_bytes = 100_000
    at_first = MIB // size_bytes
    job.write({f"{number:03}": some_bytes(size_bytes) for number in range(100)})
    come, gone, most = 0, 0, 0
    before_an_answer: list[int] = []
    lock, may_answer = threading.Lock(), threading.Event()

    def hold(exchange: Exchange) -> None:
        nonlocal come, gone, most
        with lock:
            come += 1
            most = max(most, come - gone)
            is_last_of_first = come == at_first
        if is_last_of_first:
            exchange.pause(0.5)  # for those that should not come
            before_an_answer.append(come)
            may_answer.set()
        may_answer.wait(60)
        exchange.pause(0.1)
        said = exchange.forward()
        with lock:
            gone += 1
        exchange.reply(said)

    job.proxy.add_fault(Fault(hold, operation="PutObject"))
    assert_clean(job.run("--preferred-transfer-client", way))
    assert before_an_answer == [at_first]
    assert most > 2 * at_first
    job.check_all_is_there()


class Line:
    """A line that moves files one after the other, at so many bytes a second of its own clock."""

    FILE_BYTES = 100_000

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.under_way_bytes = self.most_bytes = 0
        module = program()
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        options = types.SimpleNamespace(max_concurrency=None)
        self._room = module.Room(options, [None] * 8, slots=None, bandwidth=None)
        self._way = module.Way.LANE

    def move(self, bytes_per_second: float, *, seconds: float, arrives: bool = True) -> None:
        """Keep as much under way as may be, for so long; note the most after half of the time."""
        size, ends_at = self.FILE_BYTES, self.now + seconds
        self.most_bytes = 0
        while self.now < ends_at:
            while self._room.begin(self._way, size):
                self.under_way_bytes += size
            if ends_at - self.now < seconds / 2:
                self.most_bytes = max(self.most_bytes, self.under_way_bytes)
            self.now += size / bytes_per_second
            self._room.end(self._way, size, sent_bytes=size if arrives else 0)
            self._room.measure()
            self.under_way_bytes -= size


@pytest.mark.parametrize(
    ("bytes_per_second", "expected_bytes"),
    [(50_000, MIB), (625_000, 6_250_000), (2_000_000, 20_000_000), (100_000_000, 64 * MIB)],
    ids=["0.4 Mbit/s", "5 Mbit/s", "16 Mbit/s", "800 Mbit/s"],
)
def test_the_bytes_under_way_are_what_the_line_moves_in_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, bytes_per_second: int, expected_bytes: int
) -> None:
    line = Line(monkeypatch)
    line.move(bytes_per_second, seconds=60)
    assert 0.8 * expected_bytes < line.most_bytes <= 1.1 * expected_bytes


def test_the_bytes_under_way_are_fewer_again_when_the_line_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(monkeypatch)
    line.move(5_000_000, seconds=30)
    line.move(500_000, seconds=200)
    assert 4_000_000 < line.most_bytes < 5_500_000
    line.move(500_000, seconds=200, arrives=False)  # nothing arrives any more
    assert line.most_bytes <= MIB


def test_a_streamed_file_does_not_hold_up_the_small_ones(job: Job) -> None:
    job.write({"a-large": some_bytes(70 * MIB), **small_files(60)})
    leave = threading.Event()

    def hold(exchange: Exchange) -> None:
        leave.wait(60)
        exchange.reply(exchange.forward())

    job.proxy.add_fault(Fault(hold, operation="PutObject", key="a-large"))
    most = most_at_once(job, "PutObject")
    process = job.start()
    try:
        wait_until(lambda: len(job.puts()) == 61, 60, "all the others")
        wait_until(lambda: sum(r.status == 200 for r in job.requests("PutObject")) == 60, 60, "it")
    finally:
        leave.set()
    assert_clean(finish(process))
    assert most[0] > 4
    job.check_all_is_there()


# A file named so is larger than the walk saw it once it is opened, by whom ever.
GROWS = """\
import os
real = os.open
def growing_open(path, *rest, **named):
    if str(path).endswith("z-grown") and os.path.getsize(path) < {size}:
        with open(path, "ab") as file:
            file.write(bytes({size}))
    return real(path, *rest, **named)
os.open = growing_open
"""


@pytest.mark.parametrize("way", ["crt", "classic"])
@pytest.mark.few(1)
def test_a_file_that_has_grown_over_the_threshold_is_handed_out_once(
    job: Job, tmp_path: Path, way: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(GROWS.format(size=PART_BYTES))
    large = ("a", "b", "c")
    job.write({key: some_bytes(PART_BYTES) for key in large} | {"z-grown": b"small"})

    def completed(*keys: str) -> bool:
        ends = job.requests("CompleteMultipartUpload")
        return set(keys) <= {request.key for request in ends if request.status == 200}

    # While two large files are under way, a third waits for its turn, and what comes after it in
    # the plan has not been looked at. That goes on while the grown file is sent in parts.
    def hold(exchange: Exchange) -> None:
        if exchange.request.key == "z-grown":
            wait_until(lambda: completed(*large), 60, "the others")
        elif exchange.request.key == "c":
            wait_until(lambda: completed("a", "b"), 60, "a and b")
        else:
            wait_until(lambda: "z-grown" in job.sent(), 60, "the file that has grown")
        pass_on(exchange)

    job.proxy.add_fault(Fault(hold, operation="UploadPart"))
    client = ("--preferred-transfer-client", way)
    assert_clean(job.run(*IN_PARTS, *client, env={"PYTHONPATH": str(tmp_path)}))
    assert job.sent() == [*large, "z-grown"]
    assert job.puts() == []
    # Handed out again, it would be gone on with as if a run before had begun it.
    assert job.proxy.count("ListParts") == 0
    assert job.path("z-grown").stat().st_size > PART_BYTES
    job.check_all_is_there()


@pytest.mark.parametrize("change", ["appended", "replaced"])
@pytest.mark.few(2)
def test_a_file_that_grows_over_the_threshold_while_it_is_sent(small_job: Job, change: str) -> None:
    job, first = small_job, b"bytes at first"
    job.write({"f": first, "g": b"another"})

    def grow(_: Request) -> None:
        more = some_bytes(LARGE_BYTES)
        job.write({"f": first + more if change == "appended" else more})

    job.proxy.add_fault(Fault(call(grow), operation="PutObject", key="f", times=1))
    assert_clean(job.run(*IN_PARTS))
    if change == "appended":  # it is sent as long as it was
        assert job.sent() == ["f", "g"]
        assert job.in_bucket()["f"] == job.entry("f")["etag"] == md5(first)
    else:  # it is sent again, in parts now
        assert job.sent() == ["f", "f", "g"]
        assert job.proxy.count("CreateMultipartUpload", "f") == 1
        job.check_all_is_there()


@needs_limits
@pytest.mark.parametrize("way", ["crt", pytest.param("classic", marks=pytest.mark.long)])
@pytest.mark.few(1)
def test_few_open_files_mean_few_requests_at_a_time(rclone_job: Job, way: str) -> None:
    rclone_job.write(small_files(400))
    rclone_job.proxy.add_fault(Fault(delay(0.2), operation="PutObject"))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    assert_clean(rclone_job.run("--preferred-transfer-client", way, python_flags=prelude(limit)))
    rclone_job.check_all_is_there()


def test_a_bug_ends_the_run_with_its_traceback_and_the_state(job: Job) -> None:
    job.write(small_files(40))
    broken = "import hashlib; real = hashlib.md5; count = [0]"
    broken += """
def md5(*args, **keywords):
    count[0] += 1
    if count[0] > 20:
        raise ZeroDivisionError
    return real(*args, **keywords)
hashlib.md5 = md5
"""
    process = job.start("--max-concurrency", "1", python_flags=prelude(broken))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "ZeroDivisionError" in stderr.splitlines()[-2]
    assert "this is a bug" in stderr.splitlines()[-1]
    sent = {request.key for request in job.requests("PutObject") if request.status == 200}
    assert len(sent) > 5
    assert len(sent) - 1 <= len(job.uploaded()) <= len(sent)
    job.check_state_is_true()
    assert_clean(job.crash_run())
    job.check_all_is_there()


def test_concurrency_is_kept(small_job: Job) -> None:
    job = small_job
    job.write(small_files(30))
    most = most_at_once(job, "PutObject", pause_seconds=0.05)
    assert_clean(job.run("--max-concurrency", "5"))
    assert most == [5]
    job.check_all_is_there()
