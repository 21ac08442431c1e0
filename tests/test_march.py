"""Walk, last state and listing merged by key: who decides, and in which order things may come."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support.checks import assert_clean, assert_lost, lines_with
from support.faults import Fault, call
from support.files import IN_PARTS, LARGE_BYTES, make_files, some_bytes
from support.job import NOBODY, Job
from support.listing import Lister, by_bytes, by_names, by_time, objects_of
from support.proxy import Request
from support.script import program
from support.systems import needs_permissions

SKIP, CRASHRUN = "--skip-unchanged", ("--crashrun", "1")
# So that a few keys make many ranges of the listing.
FINELY = (("INTERVAL = 900", "5"),)
# Whose order is another where folders go by their bare names, or text by its UTF-16.
NAMES = (
    "a b", "a!", "a-1", "a.txt", "a/b/c", "a/b!", "a/b-2/d", "a/b/e", "a0", "b!/x", "b!y", "b/x",
    "b/y", "b0/z", "c", "c-/x", "c-/y", "c-1/z", "c.d/e/f", "d/1", "d/2", "d/3", "d/4", "d/5",
    "d/6", "d/7", "d/8", "d/9", "e+f", "e%2Fg", "e&<>", "\ttab", "\x7fdelete",
    unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "\uff5e", "\U0001f389",
)  # fmt: skip

# --- What becomes of a key -------------------------------------------------------------------


def entry(**changes: Any) -> Any:
    """The entry of a file as it is here."""
    fields = {"bucket": "b", "size": 5, "mtime_ns": 10, "ctime_ns": 100, **changes}
    return program().Entry("/folder/key", "key", **fields)


def sent_before(**changes: Any) -> Any:
    """The entry of that file as a run has sent it."""
    return entry(**{"uploaded": True, "etag": "md5", **changes})


HERE, ERROR = "it is here", "it cannot be read"


class Case(NamedTuple):
    """A key, and what becomes of it.

    What is here of it; how the last state differs from what is here (None: it has no entry);
    whether the bucket lists the object of that state. The decision; the ETag that the plan has.
    """

    here: str | None
    before: dict[str, Any] | None
    in_bucket: bool | None
    decision: str
    etag: str | None
    is_unseen: bool = False


KMS: dict[str, Any] = {"sse": "aws:kms"}
PENDING: dict[str, Any] = {"uploaded": False, "etag": None, "known_etag": "md5"}
PENDING |= {"known_ctime_ns": 100}
FAILED = {**PENDING, "error": "!"}
YOUNG: dict[str, Any] = {"ctime_ns": 0, "etag": "md5"}  # as version 1.1 wrote it
UNKNOWN: dict[str, Any] = {"uploaded": False, "etag": None}
CASES = {
    "it is new": Case(HERE, None, None, "SEND", None),
    "unchanged": Case(HERE, {}, True, "UNCHANGED", "md5"),
    "of a system without ctime": Case(HERE, {"ctime_ns": None}, True, "UNCHANGED", "md5"),
    "under KMS": Case(HERE, KMS, True, "UNCHANGED", "md5"),
    "another size": Case(HERE, {"size": 6}, True, "SEND", None),
    "another mtime": Case(HERE, {"mtime_ns": 11}, True, "SEND", None),
    "of three fields": Case(HERE, {"size": None, "mtime_ns": None}, True, "SEND", None),
    "only its ctime differs": Case(HERE, {"ctime_ns": 99}, True, "COMPARE", "md5"),
    "it was young": Case(HERE, {"ctime_ns": 0}, True, "COMPARE", "md5"),
    "only its ctime, under KMS": Case(HERE, {"ctime_ns": 99, **KMS}, True, "SEND", "md5"),
    "it was young, under KMS": Case(HERE, {"ctime_ns": 0, **KMS}, True, "SEND", "md5"),
    "its object is gone, or another": Case(HERE, {}, False, "SEND", None),
    "that, and its ctime": Case(HERE, {"ctime_ns": 99}, False, "SEND", None),
    "not listed": Case(HERE, {}, None, "SEND", "md5"),
    "not listed, and another mtime": Case(HERE, {"mtime_ns": 11}, None, "SEND", None),
    "pending, and it is there": Case(HERE, PENDING, True, "UNCHANGED", "md5"),
    "pending, and it is not": Case(HERE, PENDING, False, "SEND", None),
    "pending, and changed": Case(HERE, {**PENDING, "size": 6}, True, "SEND", None),
    "pending, to be compared": Case(HERE, {**UNKNOWN, **YOUNG}, True, "COMPARE", "md5"),
    "pending, and its ctime differs": Case(
        HERE, {**PENDING, "known_ctime_ns": 99}, True, "COMPARE", "md5"
    ),
    "failed, and it is there": Case(HERE, FAILED, True, "UNCHANGED", "md5"),
    "unreadable and new": Case(ERROR, None, None, "FAIL", None),
    "unreadable": Case(ERROR, {}, None, "FAIL", "md5"),
    "unreadable again": Case(ERROR, FAILED, None, "FAIL", "md5"),
    "gone": Case(None, {}, None, "FORGET", None),
    "gone before it was sent again": Case(None, PENDING, None, "FORGET", None),
    "gone before it was sent": Case(None, UNKNOWN, None, "FORGET", None),
    "nobody has looked": Case(None, {}, None, "KEEP", "md5", is_unseen=True),
    "nor, and it is there": Case(None, {}, True, "KEEP", "md5", is_unseen=True),
    "nor, and the bucket is anew": Case(None, {}, False, "SEND", None, is_unseen=True),
    "nor, and it was pending": Case(None, UNKNOWN, None, "FORGET", None, is_unseen=True),
    "nor, and it was half sent": Case(
        None, {**UNKNOWN, "upload_id": "id"}, None, "KEEP", None, is_unseen=True
    ),
    "nor, and it was to be sent again": Case(None, PENDING, None, "KEEP", "md5", is_unseen=True),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=what) for what, case in CASES.items()])
def test_what_becomes_of_a_key(case: Case) -> None:
    module, in_bucket = program(), case.in_bucket
    found = case.here and entry(**({"size": None, "error": "!"} if case.here is ERROR else {}))
    last = None if case.before is None else sent_before(**case.before)
    decision = module.decide(found, last, in_bucket=in_bucket, is_unseen=case.is_unseen)
    assert decision.name == case.decision
    plan = module.planned(found, last, decision=decision, in_bucket=in_bucket)
    assert (plan is None) == (case.decision == "FORGET")
    if plan:
        was_sent = last and last.uploaded
        assert plan.known.etag == case.etag
        assert plan.uploaded == (
            case.decision == "UNCHANGED" or (case.decision == "KEEP" and was_sent)
        )
        assert (plan.etag is None) == (not plan.uploaded and case.decision != "COMPARE")
        assert (not (plan.uploaded or plan.error)) == (case.decision in ("SEND", "COMPARE"))
        # One that cannot be read is known again, when it can, by the size that it had.
        assert plan.size == (None if case == CASES["unreadable and new"] else 5)


# --- Walk, state and bucket together, without a server ---------------------------------------


class ListingClient:
    """boto3's client, as far as the listing knows it, of a bucket that lists in its own way."""

    def __init__(
        self,
        objects: Mapping[str, tuple[int, str]],
        rng: random.Random,
        *,
        order: Callable[[str], Any] | None = None,
    ) -> None:
        orders: list[Callable[[str], Any]] = [by_bytes, by_names, by_time]
        self._order = order or rng.choice(orders)
        self._objects, self._keys = objects, sorted(objects, key=self._order)
        self.page_size, self.shuffles = rng.choice([5, 7, 1000, 1000]), rng.random() < 0.2
        if self._order is by_time:  # a page has all keys that begin with one that is looked up
            self.page_size = 1000
        self.knows_start_after, self._rng, self.requests = rng.random() < 0.7, rng, 0
        as_s3 = (by_bytes, True, False)
        self.is_in_order = (self._order, self.knows_start_after, self.shuffles) == as_s3
        self.meta = SimpleNamespace(events=SimpleNamespace(register=lambda *_: None))

    def list_objects_v2(
        self, *, Bucket: str, Prefix: str = "", StartAfter: str = "", ContinuationToken: str = ""
    ) -> dict[str, object]:
        """Answer as the event handler of the script has boto3 do."""
        self.requests += 1
        after = ContinuationToken or (StartAfter if self.knows_start_after else "")
        left = [k for k in self._keys if not after or self._order(k) > self._order(after)]
        left = [key for key in left if key.startswith(Prefix)]
        shown = left[: self.page_size]
        more = {"ContinuationToken": shown[-1]} if shown != left else {}
        if self.shuffles:
            self._rng.shuffle(shown)
        page = {key: self._objects[key] for key in shown}
        return {"page": program().Page(page, more)}


@dataclass
class Found:
    """What a march is to find: a file, the entry of the last state, an object of the bucket."""

    text: str | None
    last: dict[str, Any] | None = None
    listed: tuple[int, str] | None = None

    def line(self, folder: Path, key: str) -> dict[str, Any]:
        """The line of the state."""
        fields: dict[str, Any] = {"filepath": key, "uploadedSuccess": 1, "filename": key}
        fields |= {"bucket": "bucket", "endpoint": "server", "size": len(self.text or "")}
        if self.text is not None:
            status = (folder / key).stat()
            fields |= {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
        fields |= {"etag": "etag", **(self.last or {})}  # in the order of the script
        return {**fields, "filepath": str(folder / fields["filepath"])}


def run_over(tmp_path: Path, state: str | None, *options: str) -> Any:
    """What all parts of the script work with, in a run over a folder with that state."""
    module, folder, state_path = program(), tmp_path / "backup", tmp_path / "state.json"
    folder.mkdir(exist_ok=True)
    if state is not None:
        state_path.write_text(state, encoding="utf-8")
    names = ("--bucketname", "bucket", "--backupfolder", folder, "--statefile", state_path)
    parsed = module.parse_arguments([*map(str, names), *options])
    interruption = SimpleNamespace(check=lambda: None, write=lambda *_: "")
    state_file, report = module.StateFile(str(state_path)), module.Report(parsed, interruption)
    return module.Run(parsed, state_file, report, interruption, endpoint="server")


class AtOnce:
    """In place of threads: what they are handed is done at once."""

    def __init__(self, _count: int) -> None:
        pass

    def submit(self, function: Callable[[], object]) -> Future[object]:
        """Do it."""
        answer: Future[object] = Future()
        answer.set_result(function())
        return answer


@pytest.fixture(autouse=True)
def _without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program(), "Threads", AtOnce)


def bucket_of(client: ListingClient, run: Any) -> Any:
    """A bucket, as far as the listing knows it."""
    source = SimpleNamespace(renewing=lambda attempt: attempt())
    parser = SimpleNamespace(parse=None, close=lambda: None)
    session = SimpleNamespace(source=source)
    return SimpleNamespace(
        exists=True, run=run, client=client, name="bucket", session=session, page_parser=parser
    )


def march_of(run: Any, objects: Mapping[str, tuple[int, str]]) -> Any:
    """The march of a run over a bucket with these objects."""
    assert run.state.load_journal()
    client = ListingClient(objects, random.Random(1))
    return program().March(run, program().LastState(run), bucket=bucket_of(client, run))


def state_of(*lines: object) -> str:
    """The text of a state, as the script writes it."""
    texts = [json.dumps(line, ensure_ascii=False) for line in lines]
    texts = [text if text.isprintable() else json.dumps(json.loads(text)) for text in texts]
    return "[\n" + ",\n".join(texts) + "\n]\n"


WAS: dict[str, Any] = {"uploadedSuccess": 1}
OPEN = {"uploadedSuccess": 0, "etag": None, "upload_id": "id", "part_size": 5 << 20}
SENT = (5, "etag")
MARCHED = {
    # what is here, the last state's entry, the object: uploaded, ETag, id of the upload
    "anew": (Found("12345"), (0, None, None)),
    "as it was": (Found("12345", WAS, SENT), (1, "etag", None)),
    "other object": (Found("12345", WAS, (5, "other")), (0, None, None)),
    "no object": (Found("12345", WAS), (0, None, None)),
    "object without an ETag": (Found("12345", WAS, (5, "")), (0, None, None)),
    "other path": (Found("12345", {"filepath": "elsewhere"}, SENT), (0, None, None)),
    "compared": (Found("12345", {"ctime_ns": 1}, SENT), (0, "etag", None)),
    "upload to go on with": (Found("12345", OPEN), (0, None, "id")),
    "upload of other bytes": (Found("12345", {**OPEN, "mtime_ns": 1}), (0, None, None)),
    "upload of another size": (Found("12345", {**OPEN, "size": 6}), (0, None, None)),
    "upload with other parts": (Found("12345", {**OPEN, "part_size": 5}), (0, None, None)),
    "upload under KMS": (Found("12345", {**OPEN, "sse": "aws:kms"}), (0, None, None)),
    # Its parts are compared with the bytes that are here.
    "upload of another path": (Found("12345", {**OPEN, "filepath": "elsewhere"}), (0, None, "id")),
    "upload of what is gone": (Found(None, OPEN), None),
    "upload beside an object": (Found("12345", {"upload_id": "id"}, SENT), (1, "etag", None)),
    "gone": (Found(None, WAS), None),
    "of another bucket": (Found("12345", {"bucket": "other"}, SENT), (0, None, None)),
    "of a folder that is away/a": (Found(None, {**WAS, "size": 5}, SENT), (1, "etag", None)),
    "of a folder that is away/b": (Found(None, OPEN), (0, None, "id")),
    "of a folder that is away/c": (Found(None, {**WAS, "size": 5}), (0, None, None)),
    "of a folder that is away-1": (Found(None, WAS, SENT), None),
}  # fmt: skip
ABANDONED = {
    *(f"upload {what}" for what in ("of other bytes", "of another size", "with other parts")),
    *(f"upload {what}" for what in ("under KMS", "of what is gone")),
    "upload beside an object",
}  # fmt: skip


def test_the_plan_of_many_keys(tmp_path: Path) -> None:
    folder, found = tmp_path / "backup", {key: found for key, (found, _) in MARCHED.items()}
    make_files(folder, {k: f.text.encode() for k, f in found.items() if f.text is not None})
    (folder / "of a folder that is away").symlink_to("nowhere")
    lines = [found[key].line(folder, key) for key in sorted(found) if found[key].last]
    objects = {key: file.listed for key, file in found.items() if file.listed}
    march = march_of(run_over(tmp_path, state_of(*lines), SKIP), objects)
    plan = list(march.entries())
    assert [e.filename for e in plan] == sorted(e.filename for e in plan)
    outcomes = {e.filename: (int(e.uploaded), e.known.etag, e.upload_id) for e in plan}
    assert outcomes.pop("of a folder that is away") == (0, None, None)
    assert outcomes == {key: outcome for key, (_, outcome) in MARCHED.items() if outcome}
    assert {e.filename for e in march.abandoned} == ABANDONED


def test_what_is_unchanged_is_told_from_the_text_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = tmp_path / "backup", ["a", 'b "quoted"', "c/ü", "d"]
    make_files(folder, dict.fromkeys(names, b"12345"))
    lines = [program().Entry.from_json(Found("12345", WAS).line(folder, key)) for key in names]
    state = state_of(*(json.loads(line.to_json()) for line in lines))
    objects = {key: SENT for key in names if key != "d"}
    decided = []
    decide = program().decide

    def note(found: Any, last: Any, **more: Any) -> Any:
        decided.append(found.filename)
        return decide(found, last, **more)

    monkeypatch.setattr(program(), "decide", note)
    plan = list(march_of(run_over(tmp_path, state, SKIP), objects).lines())
    assert plan[:3] == [line.to_json() for line in lines[:3]]
    assert decided == ["d"]


def test_what_was_a_folder_before_is_walked_by_a_crash_run_in_the_order_of_keys(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "backup"
    found = ["link!x", "link-2/b", "link-2/c", "link-a", "link.d", "link/b", "link/c", "link0"]
    make_files(folder, dict.fromkeys(found, b"12345"))
    pending = ["link", "link!x", "link-2", "link.d", "link0", "unsent"]
    uploaded = ["link-2/b", "link-a", "link/b", "link/gone"]
    entries = {key: Found("12345", OPEN | {"upload_id": None}).line(folder, key)
               for key in pending[1:] if (folder / key).is_file()}  # fmt: skip
    entries |= {key: {"filepath": str(folder / key), "uploadedSuccess": 0, "filename": key}
                for key in pending if key not in entries}  # fmt: skip
    entries |= {key: Found("12345" if key in found else None, WAS).line(folder, key)
                for key in uploaded}  # fmt: skip
    state = state_of(*(entries[key] for key in sorted(entries)))
    run = run_over(tmp_path, state, "--crashrun", "1")
    plan = list(march_of(run, dict.fromkeys(uploaded, SENT)).entries())
    assert [e.filename for e in plan] == sorted([*found, "unsent"])
    assert {e.filename for e in plan if e.uploaded} == {*uploaded} - {"link/gone"}


def test_what_was_an_unreadable_folder_and_is_none_keeps_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    make_files(folder, dict.fromkeys(["file", "file-1", "gone-1"], b"12345"))
    pending = ["file-1", "file/", "gone-1", "gone/"]
    run = run_over(tmp_path, state_of(*(pending_line(folder, key) for key in pending)), *CRASHRUN)
    plan = {entry.filename: entry.error or "" for entry in march_of(run, {}).entries()}
    assert list(plan) == pending
    assert "it was a folder and no longer is" in plan["file/"]
    assert "it has vanished" in plan["gone/"]
    assert plan["file-1"] == plan["gone-1"] == ""


def pending_line(folder: Path, key: str, **more: object) -> dict[str, Any]:
    """The line of what is to be sent, in a state of the original three fields and more."""
    path = os.path.join(folder, key.removesuffix("/")) if key else str(folder)
    return {"filepath": path, "uploadedSuccess": 0, "filename": key, **more}


TRICKY = ("a", "b", "a b", "a!", "a-1", "a.txt", "c", "a0")


def some_path(rng: random.Random) -> str:
    """A path of names whose order depends on what is a folder."""
    return "/".join(rng.choices(TRICKY, k=rng.randint(1, 3)))


def files_below(folder: Path, below: str = "") -> dict[str, bool]:
    """The keys of all files below a folder, and whether they can be read."""
    found: dict[str, bool] = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= files_below(path, f"{below}{path.name}/")
        else:
            found[below + path.name] = path.exists()
    return found


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.long)], ids=["few", "many"]
)
def test_any_march_finds_what_is_to_be_found_once_and_in_order(
    tmp_path: Path, seeds: range
) -> None:
    for seed in seeds:
        rng, place = random.Random(seed), tmp_path / str(seed)
        folder = place / "backup"
        folder.mkdir(parents=True)
        for path in (folder / some_path(rng) for _ in range(rng.randint(1, 15))):
            with contextlib.suppress(OSError):  # a file is where its folder should be
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to("nowhere") if rng.random() < 0.2 else path.write_bytes(b"12345")
        here, uploaded, pending = files_below(folder), set[str](), set[str]()
        for key in {*rng.sample(sorted(here), len(here) // 2), *(some_path(rng) for _ in range(9))}:
            kind = rng.choice(["uploaded", "pending", "folder"])
            uploaded |= {key} if kind == "uploaded" else set()
            pending |= {f"{key}/" if kind == "folder" else key} if kind != "uploaded" else set()
        pending |= {""} if rng.random() < 0.1 else set()
        known = {key for key in sorted(pending) if key[-1:] not in ("", "/") and rng.random() < 0.5}
        lines = [pending_line(folder, key) for key in pending - known]
        lines += [pending_line(folder, key, known_etag="etag") for key in known]
        lines += [pending_line(folder, key, **WAS, etag="etag", size=5) for key in uploaded]
        lines.sort(key=lambda line: line["filename"])
        is_crash_run = rng.random() < 0.6
        folders = {k.removesuffix("/") for k in pending if (folder / k).is_dir()}
        walked = {f"{key}/" if key else "" for key in folders} if is_crash_run else {""}
        wanted = {key for key in here if key.startswith(tuple(walked))}
        if is_crash_run:
            wanted |= {key for key in pending if not key.startswith(tuple(walked))}
            wanted -= folders
            wanted |= {key for key in uploaded if not key.startswith(tuple(walked))}
        away = tuple(f"{key}/" for key, is_readable in here.items() if not is_readable)
        wanted |= {key for key in uploaded | known if key.startswith(away)}
        run = run_over(place, state_of(*lines), *(CRASHRUN if is_crash_run else (SKIP,)))
        found = [e.filename for e in march_of(run, dict.fromkeys(uploaded, SENT)).entries()]
        assert found == sorted(wanted), seed


@pytest.mark.parametrize("prefix", ["", "daily/"])
def test_a_folder_that_the_state_names_twice_is_walked_once(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "backup"
    make_files(folder, dict.fromkeys(["a", "link/b", "z"], b"12345"))
    paths = {prefix: folder, f"{prefix}link": folder / "link", f"{prefix}link/": folder / "link"}
    for keys in ([prefix, prefix, f"{prefix}link"], [f"{prefix}link", f"{prefix}link/"]):
        state = state_of(
            *({"filepath": str(paths[k]), "uploadedSuccess": 0, "filename": k} for k in keys)
        )
        run = run_over(tmp_path, state, "--crashrun", "1", "--prefix", prefix)
        found = [entry.filename for entry in march_of(run, {}).entries()]
        names = ["a", "link/b", "z"] if keys[0] == prefix else ["link/b"]
        assert found == [f"{prefix}{name}" for name in names]


# --- The state in any order ------------------------------------------------------------------


def as_it_is(lines: list[dict[str, Any]]) -> str:
    return state_of(*lines)


def shuffled(lines: list[dict[str, Any]]) -> str:
    return state_of(*random.Random(1).sample(lines, len(lines)))


def backwards(lines: list[dict[str, Any]]) -> str:
    return state_of(*lines[::-1])


def by_walk(lines: list[dict[str, Any]]) -> str:
    """As version 1.1 wrote it."""
    return state_of(*sorted(lines, key=lambda line: by_names(line["filename"])))


def in_several_lines(lines: list[dict[str, Any]]) -> str:
    return json.dumps(lines, indent=2)


def in_several_lines_to_the_end(lines: list[dict[str, Any]]) -> str:
    return json.dumps(lines, indent=2) + "\n"


def with_one_line_indented(lines: list[dict[str, Any]]) -> str:
    return state_of(*lines).replace('\n{"', '\n {"', 3).replace('\n {"', '\n{"', 1)


def in_one_line(lines: list[dict[str, Any]]) -> str:
    return json.dumps(lines)


def with_a_bom(lines: list[dict[str, Any]]) -> str:
    return "\ufeff" + state_of(*lines)


def with_crlf(lines: list[dict[str, Any]]) -> str:
    return state_of(*lines).replace("\n", "\r\n")


def without_a_line_feed_at_the_end(lines: list[dict[str, Any]]) -> str:
    return state_of(*lines).rstrip("\n")


WRITTEN = (as_it_is, shuffled, backwards, by_walk, in_several_lines, in_several_lines_to_the_end,
           with_one_line_indented, in_one_line, with_a_bom, with_crlf,
           without_a_line_feed_at_the_end)  # fmt: skip
NUMBERS: dict[str, Any] = {"size": 5, "mtime_ns": 1, "ctime_ns": 1, "etag": "md5"}


def mixed_lines(tmp_path: Path) -> list[dict[str, Any]]:
    """Entries of files of that folder: unchanged, changed, unreadable, failed, gone, plain."""
    folder, lines = tmp_path / "backup", []
    make_files(folder, dict.fromkeys(NAMES, b"12345"))
    (folder / "a/away").symlink_to("nowhere")
    kinds: list[dict[str, Any]] = [WAS, WAS, {**WAS, **NUMBERS}, {"uploadedSuccess": 0}, OPEN]
    for number, key in enumerate(sorted([*NAMES, "a/away/x", "a/away!", "gone", "d/55"])):
        there = Found("12345" if key in NAMES else None, kinds[number % len(kinds)])
        fields = there.line(folder, key)
        if number % 7 == 0:
            fields = {name: fields[name] for name in ("filepath", "uploadedSuccess", "filename")}
        as_written = program().Entry.from_json(fields).to_json()
        lines.append(json.loads(as_written))
    return lines


@pytest.mark.parametrize("option", [(), (SKIP,), ("--crashrun", "1")], ids=" ".join)
def test_a_state_in_any_order_leads_to_the_same_new_state(
    tmp_path: Path, option: tuple[str, ...]
) -> None:
    lines = mixed_lines(tmp_path)
    objects = {line["filename"]: SENT for line in lines}
    del objects["a.txt"], objects["d/8"]
    plans = {}
    for write in WRITTEN:
        march = march_of(run_over(tmp_path, write(lines), *option), objects)
        plans[write.__name__] = list(march.lines())
        assert len(march.ways) == len(plans[write.__name__]) + 2
    wanted = plans["as_it_is"]
    for name, plan in plans.items():
        assert plan == wanted, name
    keys = [json.loads(line)["filename"] for line in wanted]
    assert keys == sorted(set(keys))
    assert {*NAMES} <= {*keys}


@pytest.mark.parametrize("option", [(), (SKIP,), ("--crashrun", "1")], ids=" ".join)
@pytest.mark.parametrize("turn", [1, -1], ids=["right first", "right last"])
def test_two_entries_of_one_key_are_accepted(
    tmp_path: Path, option: tuple[str, ...], turn: int
) -> None:
    folder = tmp_path / "backup"
    make_files(folder, dict.fromkeys("abc", b"12345"))
    lines = []
    for key, last in {"a": WAS, "b": OPEN, "c": {"uploadedSuccess": 0}}.items():
        right = Found("12345", last).line(folder, key)
        other = {**right, "uploadedSuccess": 0, "size": 6, "upload_id": None}
        lines += [right, other][::turn]
    march = march_of(run_over(tmp_path, state_of(*lines), *option), dict.fromkeys("abc", SENT))
    plan = list(march.entries())
    keys = [entry.filename for entry in plan]
    # A crash run takes its state at its word.
    assert (sorted(set(keys)) if "--crashrun" in option else keys) == ["a", "b", "c"]
    uploads = {entry.upload_id for entry in [*plan, *march.abandoned] if entry.upload_id}
    assert uploads == {"id"}


def test_a_journal_of_version_1_1_is_read_over_its_state(tmp_path: Path) -> None:
    lines, rng, newer = mixed_lines(tmp_path), random.Random(1), []
    older = list(lines)
    for number, line in enumerate(lines):
        if rng.random() < 0.5:
            newer.append(line)
            older[number] = {name: line[name] for name in ("filepath", "filename")}
            older[number]["uploadedSuccess"] = 0
    objects = {line["filename"]: SENT for line in lines}
    wanted = list(march_of(run_over(tmp_path, state_of(*lines), SKIP), objects).lines())
    run = run_over(tmp_path, by_walk(older), SKIP)
    state = Path(run.state.path).read_bytes()
    journal = [{"crc32": zlib.crc32(state)}, *rng.sample(newer, len(newer))]
    text = "".join(f"{json.dumps(line)}\n" for line in journal)
    Path(run.state.journal.path).write_text(text, encoding="utf-8")
    assert list(march_of(run, objects).lines()) == wanted


# --- The journal: what is read is state and journal, merged ----------------------------------


def reading_of(run: Any) -> list[dict[str, Any]]:
    """What the script makes of a state and its journal."""
    assert run.state.load_journal()
    return [json.loads(line) for line in run.state.lines()]


@pytest.mark.parametrize("seed", range(8))
def test_a_journal_is_read_by_the_numbers_of_lines(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    count = rng.choice([0, 1, 2, 30])
    entries = [{"filepath": f"/f/{n:02}", "uploadedSuccess": 0, "filename": f"{n:02}"}
               for n in range(count)]  # fmt: skip
    run = run_over(tmp_path, state_of(*entries) if entries else "[]\n")
    state = Path(run.state.path).read_bytes()
    journal, merged = [json.dumps({"crc32": zlib.crc32(state)}).encode()], dict(enumerate(entries))
    for turn in range(rng.choice([0, 1, 20, 60])):
        # Line 1 is the bracket, and before all; the last has the other bracket.
        number = rng.choice([-1, 0, 1, 2, count, count + 1, count + 2, 10**6, rng.randint(2, 40)])
        entry = {"filepath": f"/j/{turn}", "uploadedSuccess": 1, "filename": f"{number:02}"}
        torn = rng.choice([b"", b"", b'{"filepath": ', b"\0" * 9, b"{}"])
        journal += [json.dumps({"line": number, **entry}).encode(), *([torn] if torn else [])]
        if number == 1 or number - 2 in range(count):
            merged[number - 2] = entry
    path = Path(run.state.journal.path)
    path.write_bytes(
        b"".join(line + b"\n" for line in journal) + rng.choice([b"", b'{"line": 2, '])
    )
    wanted = [merged[number] for number in sorted(merged)]
    assert reading_of(run) == wanted
    if seed % 2:  # what is added goes on behind a torn end
        added = {number: program().Entry("/later", "later") for number in merged if number % 3 == 0}
        run.state.journal.add({number + 2: entry for number, entry in added.items()})
        merged |= {number: json.loads(entry.to_json()) for number, entry in added.items()}
        wanted = [merged[number] for number in sorted(merged)]
        assert [json.loads(line) for line in run.state.lines()] == wanted
    run.state.lock()
    run.state.save(run.state.lines())
    assert json.loads(Path(run.state.path).read_text(encoding="utf-8")) == wanted
    assert reading_of(run) == wanted
    assert not path.exists()


def test_a_journal_with_numbers_is_read_over_a_state_in_another_order(tmp_path: Path) -> None:
    lines = [pending_line(tmp_path / "backup", key) for key in "cab"]
    run = run_over(tmp_path, state_of(*lines), *CRASHRUN)
    assert reading_of(run) == lines
    sent = program().Entry(lines[1]["filepath"], "a", uploaded=True, etag="etag")
    root = program().Entry(str(tmp_path / "backup"), "")
    run.state.journal.add({1: root, 3: sent})
    assert run.state.load_journal()
    read = [entry.to_json() for entry in program().LastState(run).entries()]
    assert read == [root.to_json(), sent.to_json(), *map(json.dumps, [lines[2], lines[0]])]


class Killed(BaseException):
    """What stands for a kill: nothing in the script may catch it."""


@pytest.mark.parametrize("is_replaced", [False, True], ids=["before", "after"])
def test_a_kill_while_the_state_is_replaced_leaves_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    lines = [{"filepath": f"/f/{key}", "uploadedSuccess": 0, "filename": key} for key in "abc"]
    run = run_over(tmp_path, state_of(*lines))
    run.state.lock()
    assert reading_of(run) == lines
    root, newer = program().Entry("/f", ""), program().Entry("/f/c", "c", uploaded=True)
    run.state.journal.add({1: root, 4: newer})
    wanted = [json.loads(root.to_json()), *lines[:2], json.loads(newer.to_json())]

    def kill(*paths: str) -> None:
        if is_replaced:
            Path(paths[0]).rename(paths[1])
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            run.state.save(run.state.lines())
    assert Path(run.state.journal.path).exists()  # of the one state or the other
    assert reading_of(run_over(tmp_path, None)) == wanted


# --- Servers that list in their own way ------------------------------------------------------

CHANGED, LOST, NEW = "d/4", "b/x", "d/45"

LISTERS: dict[str, dict[str, Any]] = {
    "in order": {},
    "pages of 3": {"page": 3},
    "page of one": {"page": 1},
    "empty pages": {"page": 4, "has_empty_pages": True},
    "no tokens": {"page": 4, "has_tokens": False},
    "by names": {"order": by_names},
    "by names, pages of 3": {"order": by_names, "page": 3},
    "by time": {"order": by_time},
    "by time, pages of 3": {"order": by_time, "page": 3, "has_empty_pages": True},
    "at random": {"shuffles": True},
    "at random, pages of 7": {"shuffles": True, "page": 7},
    "no StartAfter": {"knows_start_after": False},
    "no StartAfter, pages of 3": {"knows_start_after": False, "page": 3},
    "no StartAfter, by names": {"knows_start_after": False, "order": by_names},
}
SHOWN_ALWAYS = {"empty pages", "no tokens", "by names, pages of 3", "no StartAfter, pages of 3"}


def list_as(job: Job, **how: Any) -> None:
    """Have the bucket, as it is now, listed in some way."""
    job.proxy.clear_faults()
    lister = Lister(objects_of(job.server, job.bucket), **how)
    job.proxy.add_fault(Fault(lister, operation="ListObjectsV2"))


def sent_by(job: Job, *arguments: str) -> list[str]:
    """What a run sends, which ends well."""
    since = job.seen()
    assert_clean(job.run(*arguments, constants=FINELY))
    return job.sent(since)


def leave_root_pending(job: Job) -> None:
    """Leave the state that a kill in the walk leaves, with a root entry before the others."""
    root = {"filepath": str(job.folder), "uploadedSuccess": 0, "filename": ""}
    job.write_state(root, *job.entries())


def check_is_known(job: Job) -> None:
    """Check that an unchanged folder is known again, by verify and by a crash run that walks it."""
    completed = job.run("--verify", constants=FINELY)
    assert_clean(completed)
    assert f"{len(job.in_folder())} files right" in completed.stdout
    leave_root_pending(job)
    assert sent_by(job, "--crashrun", "1") == []
    assert job.state() == dict.fromkeys(job.in_folder(), 1)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, id=name, marks=() if name in SHOWN_ALWAYS else pytest.mark.long)
        for name, how in LISTERS.items()
    ],
)
@pytest.mark.few(3)
def test_however_the_bucket_is_listed_what_has_changed_is_sent(
    rclone_job: Job, how: dict[str, Any]
) -> None:
    job = rclone_job
    job.back_up(*NAMES)
    job.write({CHANGED: b"longer than it was before", NEW: b"new"})
    job.delete(LOST)
    list_as(job, **how)
    since = job.seen()
    assert_lost(job.run(SKIP, constants=FINELY), "1 file")
    assert job.sent(since) == sorted([CHANGED, LOST, NEW])
    list_as(job, **how)
    check_is_known(job)
    job.check_all_is_there()


def listing_of(client: ListingClient, keys: Iterable[str]) -> Any:
    """The listing of a bucket, for a state with these keys."""
    module = program()
    run = SimpleNamespace(
        report=SimpleNamespace(doing=lambda _: None, detail=lambda _: None),
        interruption=SimpleNamespace(check=lambda: None),
        options=SimpleNamespace(max_concurrency=None),
    )
    sample = module.KeySample()
    for key in sorted(keys):
        sample.add(key)
    return module.Listing(bucket_of(client, run), sample)


def test_each_page_of_a_listing_in_order_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program().KeySample, "INTERVAL", 5)
    keys = [f"{number:02}" for number in range(50)]
    client = ListingClient(dict.fromkeys(keys, SENT), random.Random(1), order=by_bytes)
    client.page_size, client.knows_start_after, client.shuffles = 5, True, False
    listing = listing_of(client, keys)
    assert all(listing.find(key) for key in keys)
    # The first range has one key more.
    assert client.requests == 50 // 5 + 1


@pytest.mark.parametrize("order", [by_time, by_names], ids=["time", "names"])
def test_a_page_in_disorder_is_seen_though_many_others_are_deleted(
    order: Callable[[str], Any],
) -> None:
    deleted = [f"a{number:02}" for number in range(20)]
    there = sorted(f"b{number}{sign}{number}" for number in range(9) for sign in " !-/")
    client = ListingClient(dict.fromkeys(there, SENT), random.Random(1), order=order)
    client.page_size, client.knows_start_after, client.shuffles = 1000, False, False
    listing = listing_of(client, deleted + there)
    assert [key for key in deleted + there if listing.find(key)] == there


def test_what_is_listed_before_the_first_key_is_found_though_others_are_deleted() -> None:
    client = ListingClient({"a/x": SENT, "a/y": SENT}, random.Random(1), order=by_names)
    client.knows_start_after, client.shuffles = True, False
    # By names, what is asked for begins behind a/.
    keys = ["a b", "a b1", "a/x", "a/y"]
    listing = listing_of(client, keys)
    assert [key for key in keys if listing.find(key)] == ["a/x", "a/y"]


@pytest.mark.parametrize(
    "seeds", [range(150), pytest.param(range(150, 2000), marks=pytest.mark.long)]
)
@pytest.mark.parametrize("interval", [5, 900])
def test_every_key_is_found_wherever_a_server_lists_it(
    monkeypatch: pytest.MonkeyPatch, interval: int, seeds: range
) -> None:
    module = program()
    monkeypatch.setattr(module.KeySample, "INTERVAL", interval)
    monkeypatch.setattr(module.Listing, "RANGES_AT_ONCE", 2)
    names = ["a", "b", "a b", "a!", "a-1", "a.txt", "c", "b!", "b0", "d"]
    for seed in seeds:
        rng = random.Random(seed)
        paths = ["/".join(rng.choices(names, k=rng.randint(1, 3))) for _ in range(50)]
        known = sorted(set(paths[: rng.randint(3, 40)]))
        deleted = rng.sample(known, min(len(known), rng.choice([0, 0, 1, 2, 3, 5, 8])))
        of_others = {f"{path}{rng.randint(0, 9)}" for path in paths[: rng.choice([0, 10, 50])]}
        objects = {*known, *of_others} - set(deleted)
        client = ListingClient(dict.fromkeys(objects, (1, "etag")), rng)
        listing = listing_of(client, known)
        asked_for = sorted(rng.sample(known, rng.randint(1, len(known))))
        found = {key for key in asked_for if listing.find(key)}
        assert found == objects.intersection(asked_for), seed
        # In memory only where it must be.
        assert not (listing._is_whole and client.is_in_order)


def test_what_others_put_between_two_keys_takes_more_pages(rclone_job: Job) -> None:
    job = rclone_job
    job.back_up(*NAMES)
    of_others = {
        f"{key}{n}": (1, '"other"') for key in ("a b", "d/4", "\U0001f389") for n in range(20)
    }
    lister = Lister({**objects_of(job.server, job.bucket), **of_others}, page=7)
    job.proxy.add_fault(Fault(lister, operation="ListObjectsV2"))
    assert sent_by(job, SKIP) == []
    check_is_known(job)
    # It was read in order, range after range.
    asked = job.requests("ListObjectsV2")
    assert {request.query["prefix"] for request in asked} == {""}
    assert sum("start-after" in request.query for request in asked) >= 3 * len(NAMES) // 5


# --- Many files that fail, and large ones among many -----------------------------------------


@needs_permissions
@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_many_files_that_fail_are_counted_and_left_to_the_crash_run(job: Job, count: int) -> None:
    files = job.make(*(f"{n:04}" for n in range(count)), "0100a", "z")
    failing = [key for key in files if key.isdecimal()]
    for key in failing:
        job.path(key).chmod(0)
    completed = job.run(user=NOBODY)
    assert completed.returncode == 1
    assert f"sent 2 files, 24 B to s3://{job.bucket}/" in completed.stdout
    assert f"; {count:,} failed; " in completed.stdout
    assert len(lines_with(completed.stderr, "failed: ")) == count
    assert f"{count:,} of the {count:,} failures: " in completed.stderr
    assert list(job.state()) == sorted(files)
    assert job.uploaded() == {"0100a", "z"}
    assert set(job.errors()) == set(failing)
    job.check_no_leftovers()
    for key in failing:
        job.path(key).chmod(0o644)
    since = job.seen()
    completed = job.crash_run(user=NOBODY)
    assert_clean(completed)
    assert job.sent(since) == failing
    job.check_all_is_there()


def test_a_large_file_begins_before_the_small_ones_are_done(job: Job) -> None:
    # More than may be under way before the line has shown what it moves.
    small = {f"{n:03}": bytes(20_000) for n in range(100)}
    job.write({**small, "zzz": some_bytes(LARGE_BYTES)})
    has_begun = threading.Event()
    job.proxy.add_fault(Fault(call(lambda _: has_begun.set()), operation="CreateMultipartUpload"))

    def wait(request: Request) -> None:
        assert has_begun.wait(10), f"{request.key} is sent, and the large file is not begun"

    job.proxy.add_fault(Fault(call(wait), operation="PutObject"))
    assert_clean(job.run(*IN_PARTS))
    job.check_all_is_there()
