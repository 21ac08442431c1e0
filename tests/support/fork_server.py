"""Runs a script again and again in forks of one process that has imported boto3 already.

    python fork_server.py SCRIPT.pyc SOCKET-FD

A request over the socket is either a run (JSON, with the three files that are to be its standard
streams) or the id of a run's process, which is answered with how it ended, or null. A run gets
its own arguments, folder, environment, session and streams, and the memory of a process that has
done nothing but import libraries: to the script it is as if Python had just started it, after
half a second of work less.
"""

from __future__ import annotations

import array
import contextlib
import dis
import functools
import gc
import importlib
import io
import json
import marshal
import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PYC_HEADER_BYTES = 16
REQUEST_MAX_BYTES = 1 << 20


def imports_of(code: types.CodeType) -> Iterator[str]:
    """The modules that some code imports, in its functions too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from imports_of(constant)


def preload(code: types.CodeType) -> None:
    """Import what a run would import, by doing without a server what it does first."""
    for name in imports_of(code):
        with contextlib.suppress(ImportError):  # some are of another system
            importlib.import_module(name)
    boto3, loaders = map(importlib.import_module, ("boto3", "botocore.loaders"))
    # Of the libraries' own files too, which do not change: each is read and parsed once.
    loaders.JSONFileLoader.load_file = once(loaders.JSONFileLoader.load_file)
    loaders.Loader.list_available_services = once(loaders.Loader.list_available_services)
    # So are the answers of pure functions, and the system's table of media types.
    hooks: Any = importlib.import_module("botocore.hooks")
    hooks.accepts_kwargs = functools.cache(hooks.accepts_kwargs)
    hooks.EventAliaser._alias_event_name = once(hooks.EventAliaser._alias_event_name)
    importlib.import_module("mimetypes").init()
    boto3.Session("none", "none").client("s3", region_name="eu-west-1")
    gc.collect()
    gc.freeze()


def once(method: Callable[..., T]) -> Callable[..., T]:
    """A method that remembers what it returned, for all objects with the same attributes."""
    known: dict[str, T] = {}

    def remembered(self: object, *args: object, **keywords: object) -> T:
        key = repr((getattr(self, "search_paths", None), args, keywords))
        if key not in known:
            known[key] = method(self, *args, **keywords)
        return known[key]

    return remembered


def next_run(requests: socket.socket) -> dict[str, Any]:
    """Answer requests; return, in a new process for each, the runs that are asked for."""
    while True:
        data, files = received(requests)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            requests.send(json.dumps(status if pid else None).encode())
            continue
        is_ready, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for target, file in enumerate(files):
                os.dup2(file, target)
            os.close(ready)
            os.closerange(3, max(*files, requests.fileno(), is_ready, ready) + 1)
            requests.detach()
            assert isinstance(request, dict)
            return request
        for file in (*files, ready):
            os.close(file)
        os.read(is_ready, 1)  # ends when the run has a session of its own
        os.close(is_ready)
        requests.send(json.dumps(pid).encode())


def received(requests: socket.socket) -> tuple[bytes, list[int]]:
    """A message, and the files that came with it."""
    files = array.array("i")
    data, ancillary, _, _ = requests.recvmsg(REQUEST_MAX_BYTES, socket.CMSG_SPACE(3 * 4))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) // 4 * 4])
    return data, list(files)


def standard_stream(like: Any, number: int) -> io.TextIOWrapper:
    """A standard stream as Python would have opened it for what is no terminal."""
    binary = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115
    stream = io.TextIOWrapper(
        binary,
        encoding=like.encoding,
        errors=like.errors,
        newline="\n" if number else None,
        line_buffering=number == 2,
    )
    stream.mode = "w" if number else "r"  # type: ignore[misc]
    return stream


def become(run: dict[str, Any], script: str, code: types.CodeType) -> types.CodeType:
    """Be the process of that run, with all that it finds around it; return what it executes."""
    os.chdir(run["cwd"])
    if run["user"] is not None:
        os.setgroups([])
        os.setgid(run["user"])
        os.setuid(run["user"])
    coerced = {name: os.environ[name] for name in ("LC_CTYPE",) if name in os.environ}
    os.environ.clear()
    os.environ.update({**coerced, **run["env"]})
    sys.argv[:] = [script, *run["args"]]
    sys.orig_argv[:] = [sys.executable, *sys.argv]
    sys.path.insert(0, str(Path(script).parent))
    sys.stdin = sys.__stdin__ = standard_stream(sys.stdin, 0)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = standard_stream(sys.stdout, 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = standard_stream(sys.stderr, 2)  # type: ignore[misc]
    if site := run["env"].get("PYTHONPATH"):
        sys.path.insert(1, site)
        sys.modules.pop("sitecustomize", None)  # the one of the system
        importlib.import_module("sitecustomize")
    exec(run["before"], {"__name__": "before"})
    # The module __main__ is the script's from here on.
    builtins = globals()["__builtins__"]
    globals().clear()
    globals().update(
        __name__="__main__", __builtins__=builtins, __file__=script, __spec__=None, __cached__=None
    )
    return code


if __name__ == "__main__":
    script, fd = sys.argv[1:]
    del sys.path[0]  # this file's folder
    code = marshal.loads(Path(script).read_bytes()[PYC_HEADER_BYTES:])
    preload(code)
    # Here, and in no function: Python ends as it does after any script.
    exec(become(next_run(socket.socket(fileno=int(fd))), script, code))
