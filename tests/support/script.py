"""Runs s3FileTransfer.py as its users do: as a program, in a clean environment.

What runs is a copy of the script with less patience, or the tests would wait for most of their
time: nothing differs but the values of the constants in HASTE. `real_time` runs the script itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import forks

if TYPE_CHECKING:
    from .servers import S3Server

T = TypeVar("T")

PROJECT = Path(__file__).resolve().parents[2]
# To see a test fail, break a copy of the script and name it in S3_TEST_SCRIPT.
SCRIPT_PATH = Path(os.environ.get("S3_TEST_SCRIPT") or PROJECT / "s3FileTransfer.py")
POLL_SECONDS = 0.02

# What a copy of Python for other users does without, and the services that it knows.
UNUSED_FOLDERS = (
    "site-packages dist-packages test idlelib config-* lib2to3 tkinter ensurepip pydoc_data "
    "distutils turtledemo unittest"
).split()
SERVICES = ("s3", "sts", "sso", "sso-oidc")

# Of each constant: its line in the script, and the value that the copy has in its place.
HASTE = {
    "READ_TIMEOUT_SECONDS = 60": "5",
    "PATIENCE_SECONDS = 60": "4",
    "FIRST_PATIENCE_SECONDS = 9": "1.5",
    "FIRST_REQUEST_SECONDS = 18": "4",
    "CONNECT_TIMEOUT_SECONDS = 10": "2",
    "ANSWER_SECONDS = 120": "5",
    "APPEARS_SECONDS = 180": "2",
    "BACKOFF_FIRST_SECONDS = 0.5": "0.05",
    "BACKOFF_MAX_SECONDS = 10": "0.5",
    "TRY_LATER_SECONDS = 2": "0.1",
    # So that both are met: the journal between two saves, and saves in the middle of a run.
    "SAVE_INTERVAL_SECONDS = 10": "2",
    "SAVE_SHARE = 0.03": "0.5",  # a disk that is busy with other tests makes no save rare
    "SIGNAL_GRACE_SECONDS = 8": "3",
    "FILES_PER_LANE = 500": "50",
    "STUCK_SECONDS = 120": "15",
    "ANSWER_SECONDS = 25": "4",
}


@dataclass(frozen=True)
class Completed:
    """How a run ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Prelude(list[str]):
    """Python flags that run some code before the script, which a fork runs by itself."""

    def __init__(self, code: str) -> None:
        then = "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        super().__init__(["-c", f"{code}\nimport runpy, sys; {then}"])
        self.code = code


def prelude(code: str) -> Prelude:
    """Python flags that run some code before the script, in its process.

    The script sees the command line that it would see without.
    """
    return Prelude(code)


def run_script(
    *args: str | Path,
    server: S3Server | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path,
    timeout: float = 120,
    user: int | None = None,
    python_flags: Sequence[str] = (),
    stdin: str | None = None,
    real_time: bool = False,
    constants: tuple[tuple[str, str], ...] = (),
) -> Completed:
    """Run the script to its end; a traceback on stderr is a failure of the test.

    Args:
        args: the script's arguments.
        server: the endpoint and credentials in its environment; neither without one.
        env: more environment variables, which win over all others.
        cwd: the current directory of the run.
        timeout: seconds after which the run is killed, and subprocess.TimeoutExpired raised.
        user: numeric id of the user to run as; ignored unless the tests run as root.
        python_flags: flags of the interpreter.
        stdin: text on its standard input, which is empty otherwise.
        real_time: whether to run the script as it is, and not the copy with less patience.
        constants: more of them that the copy has other values for, as in HASTE.
    """
    process = start_script(
        *args,
        server=server,
        env=env,
        cwd=cwd,
        user=user,
        python_flags=python_flags,
        real_time=real_time,
        constants=constants,
    )
    try:
        return finish(process, timeout=timeout, stdin=stdin)
    finally:
        kill_group(process)


def start_script(
    *args: str | Path,
    server: S3Server | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path,
    user: int | None = None,
    python_flags: Sequence[str] = (),
    real_time: bool = False,
    constants: tuple[tuple[str, str], ...] = (),
) -> subprocess.Popen[str]:
    """Start the script, in a process group of its own; the arguments are those of `run_script`.

    `finish` waits for it. A test that signals it uses `process.send_signal` or `os.killpg`.
    """
    switch = user if is_root() else None
    launch = launch_for(switch, real_time=real_time, constants=constants)
    own = {
        **base_environment(shared_folder() / "home"),
        **(server.environment() if server else {}),
        **(env or {}),
    }
    environment = {**launch.environment, **own}
    before = python_flags.code if isinstance(python_flags, Prelude) else ""
    if not real_time and (before or not python_flags) and forks.can_run(own):
        return forks.start(
            launch.python,
            launch.script,
            *args,
            cwd=cwd,
            env=environment,
            user=switch,
            before=before,
        )
    identity: dict[str, Any] = {}
    if switch is not None:
        identity = {"user": switch, "group": switch, "extra_groups": []}
    return subprocess.Popen(
        [launch.python, *python_flags, launch.script, *args],
        cwd=cwd,
        env=environment,
        **forks.TEXT_PIPES,
        start_new_session=True,
        **identity,
    )


def finish(
    process: subprocess.Popen[str], *, timeout: float = 120, stdin: str | None = None
) -> Completed:
    """Wait for a started script, and check that it ended without a traceback."""
    stdout, stderr = process.communicate(stdin, timeout=timeout)
    completed = Completed(process.returncode, stdout, stderr)
    runs.append((process.args, completed))
    assert "Traceback" not in stderr, stderr
    return completed


# The runs of the test that is running, for the text of its failure.
runs: list[tuple[Any, Completed]] = []


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a started script if it still runs, with the processes that it started."""
    # Once it has been waited for, its process group may be another one's.
    if process.poll() is None:
        if sys.platform == "win32":  # where its lanes see that it is gone
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def is_root() -> bool:
    """Whether the tests run as the user who may do everything."""
    return sys.platform != "win32" and os.geteuid() == 0


def base_environment(home: Path) -> dict[str, str]:
    """The variables that every program gets: none of the tester's own, but what it needs."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    if sys.platform == "win32":
        environment["USERPROFILE"] = str(home)
        environment["PYTHONUTF8"] = "1"  # for what the script prints into a pipe
        environment |= {name: os.environ[name] for name in ("SYSTEMROOT", "TEMP")}
    return environment


@dataclass(frozen=True)
class Launch:
    python: Path
    script: Path
    environment: Mapping[str, str]


@functools.cache
def launch_for(
    user: int | None, *, real_time: bool = False, constants: tuple[tuple[str, str], ...] = ()
) -> Launch:
    """Find an interpreter and a script that the user may read."""
    script = SCRIPT_PATH if real_time else hasty_script(constants)
    own = Launch(Path(sys.executable), script, {})
    if user is None or _can_launch(own, user):
        return own
    # The checkout, the virtual environment or the Python below it may lie where nobody but root
    # gets at, /root for one, and root should not open that up for a test. A relocated copy of
    # all three is the one thing that works for each of these cases.
    copy = replace(_public_python(), script=script)
    if real_time:
        shutil.copy(SCRIPT_PATH, copy.python.parent)
        copy = replace(copy, script=copy.python.with_name(SCRIPT_PATH.name))
    assert _can_launch(copy, user), f"user {user} cannot run a copy of Python in {copy.python}"
    return copy


def hasty_text() -> str:
    """The text of the script with less patience."""
    return with_haste(SCRIPT_PATH.read_text(encoding="utf-8"), HASTE)


def hasty_script(constants: tuple[tuple[str, str], ...] = ()) -> Path:
    """The copy of the script that has less patience, and other constants."""
    return _hasty_script(constants)


@functools.cache
def _hasty_script(constants: tuple[tuple[str, str], ...]) -> Path:
    name = "-".join(("hasty", *(value for _, value in constants)))
    path = shared_folder() / name / SCRIPT_PATH.name
    path.parent.mkdir()
    # Compiled once and not by each of a thousand runs; Python takes bytecode under any name.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / SCRIPT_PATH.name
        source.write_text(with_haste(hasty_text(), dict(constants)), encoding="utf-8")
        py_compile.compile(str(source), cfile=str(path), dfile=str(path), doraise=True)
    path.chmod(0o644)
    return path


@functools.cache
def program() -> Any:
    """The program as a module, for rules about sizes and times that no run of a test can reach."""
    spec = importlib.util.spec_from_file_location("program", SCRIPT_PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["program"] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def with_haste(text: str, haste: Mapping[str, str]) -> str:
    """Put other values into lines that assign constants; each must be there, once."""
    for line, value in haste.items():
        name = line.partition(" = ")[0]
        text, count = re.subn(rf"(?m)^( *){re.escape(line)}$", rf"\g<1>{name} = {value}", text)
        assert count == 1, f"{count} lines of the script are {line!r}"
    return text


def _can_launch(launch: Launch, user: int) -> bool:
    find = "importlib.util.find_spec('boto3').origin"  # to import it takes half a second
    check = f"import importlib.util, sys; open(sys.argv[1]).close(); open({find}).close()"
    try:
        completed = subprocess.run(
            [launch.python, "-c", check, launch.script],
            user=user,
            group=user,
            extra_groups=[],
            cwd="/",
            env=dict(launch.environment),
            capture_output=True,
            check=False,
        )
    except PermissionError:
        return False
    return completed.returncode == 0


@functools.cache
def _public_python() -> Launch:
    """Copy interpreter, standard library and boto3 to where everybody may read."""
    prefix = shared_folder() / "python"
    stdlib = Path(sysconfig.get_path("stdlib"))
    library = prefix / stdlib.relative_to(sys.base_prefix)
    shutil.copytree(stdlib, library, ignore=shutil.ignore_patterns(*UNUSED_FOLDERS))
    # Beside the standard library: every build of Python looks there, while the name and the place
    # of site-packages differ.
    for name in _with_dependencies("boto3"):
        for path in importlib.metadata.files(name) or []:
            # Not the scripts in bin/, and of botocore's data no services but those here.
            is_data = path.parts[:2] == ("botocore", "data") and len(path.parts) > 3
            if ".." not in path.parts and (not is_data or path.parts[2] in SERVICES):
                target = library / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path.locate(), target)  # with its time, or no .pyc would be valid
    launch = Launch(
        python=prefix / "bin" / "python3",
        script=SCRIPT_PATH,
        environment={"LD_LIBRARY_PATH": str(prefix / "lib")},
    )
    launch.python.parent.mkdir()
    shutil.copy(Path(sys.executable).resolve(), launch.python)
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        libpython = sysconfig.get_config_var("INSTSONAME")
        shutil.copy(Path(sysconfig.get_config_var("LIBDIR")) / libpython, prefix / "lib")
    _let_everybody_read(prefix)
    return launch


def _with_dependencies(name: str) -> set[str]:
    """A distribution and all that it needs, without its extras."""
    names, found = [name], set[str]()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            for requirement in importlib.metadata.requires(name) or []:
                match = re.match(r"[\w.-]+", requirement)
                if match and ";" not in requirement:
                    names.append(match[0])
    return found


def _let_everybody_read(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | (0o755 if path.is_dir() or mode & 0o100 else 0o644))


@functools.cache
def shared_folder() -> Path:
    """A folder of this test process that every user may enter, gone when the process ends."""
    temporary = tempfile.TemporaryDirectory(prefix="s3FileTransfer-tests-")
    _keep_until_exit.append(temporary)
    folder = Path(temporary.name)
    folder.chmod(0o755)
    (folder / "home").mkdir()
    return folder


_keep_until_exit: list[tempfile.TemporaryDirectory[str]] = []


def read_state(path: Path) -> list[dict[str, Any]]:
    """The entries of a state file with those of its journal over them, as the script reads them."""
    state, journal = _state_and_journal(path.resolve())
    entries = json.loads(state)
    assert isinstance(entries, list)
    first, *lines = journal.split(b"\n")
    # What stands behind the last line feed is torn, and nothing is known of it.
    if lines and json.loads(first) == {"crc32": zlib.crc32(state)}:
        # Version 1.1 wrote no numbers.
        names = {entry["filepath"]: n for n, entry in enumerate(entries, start=2)}
        newer = {e.pop("line", names.get(e["filepath"])): e for e in map(json.loads, lines[:-1])}
        before = [newer.pop(1)] if 1 in newer else []
        entries = before + [newer.pop(n, entry) for n, entry in enumerate(entries, start=2)]
        assert newer == {}
    return entries


def journal_of(state_path: Path) -> Path:
    """The journal beside a state file."""
    return state_path.with_name(f"{state_path.name}.journal")


def _state_and_journal(path: Path) -> tuple[bytes, bytes]:
    """The bytes of both, of the same moment: a save replaces the one before the other."""
    while True:
        state, journal = path.read_bytes(), b""
        with contextlib.suppress(FileNotFoundError):
            journal = journal_of(path).read_bytes()
        if path.read_bytes() == state:
            return state, journal


def wait_until(condition: Callable[[], T | None], timeout_seconds: float, what: str) -> T:
    """Wait until the condition is true and return what it returned; fail after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds} seconds"
        time.sleep(POLL_SECONDS)
    return result
