"""The README says what the program does: its tables, its numbers, its commands."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.job import Job, Run
from support.readme import README, blocks_of, rows, section
from support.script import HASTE, PROJECT
from support.systems import needs_shell

TESTS = Path(__file__).parent

# What stands in the first column of "What happens when…", and the tests that show the second.
TESTED = {
    "the process is killed, or the power fails": [
        "test_one_crash_run_finishes_what_was_killed_anywhere",
        "test_a_kill_while_the_state_is_saved",
        "test_a_kill_during_the_walk_leads_the_crash_run_to_every_file",
        "test_every_save_is_on_the_disk_before_it_is_the_state",
        "test_only_missing_parts_are_sent",
    ],
    "SIGINT, SIGTERM, SIGHUP": [
        "test_a_signal_among_small_files_leaves_what_was_answered",
        "test_a_slow_upload_is_cut_off",
        "test_a_second_signal_ends_the_run_at_once",
    ],
    "the state's disk is full": [
        "test_full_disk_keeps_the_old_state",
        "test_disk_that_fills_during_the_run_keeps_the_last_state",
    ],
    "the network is away, or S3 throttles (503)": [
        "test_an_endpoint_that_is_away_for_a_while_is_waited_for",
        "test_a_server_that_stalls_once_is_ridden_out",
        "test_a_fifth_refused_and_a_twentieth_dropped_loses_nothing",
    ],
    "…for good; the token expires, not renewed; the bucket is gone": [
        "test_a_token_that_nobody_renewed_stops_the_run",
        "test_an_endpoint_that_goes_away_for_good_stops_the_run_with_one_message",
        "test_what_every_file_meets_from_some_moment_on_stops_the_run",
        "test_what_every_file_would_meet_stops_the_run_with_one_message",
        "test_a_closed_port_is_given_up",
    ],
    "S3 fails again and again at one file (500)": [
        "test_one_key_at_which_the_server_always_fails_is_one_failure"
    ],
    "a file changes while it is sent, or is damaged on the way": [
        "test_what_is_damaged_again_and_again_is_tried_three_times_and_fails",
        "test_a_fault_once_is_mended_by_sending_again",
        "test_a_file_that_changes_once_is_sent_again",
        "test_a_file_that_changes_all_the_time_is_tried_three_times",
        "test_a_file_changed_between_parts_is_never_completed",
    ],
    "a file grows at its end while it is sent (a log)": [
        "test_a_growing_file_is_sent_as_long_as_it_was"
    ],
    "a folder or file is unreadable": [
        "test_unreadable_folder_fails_and_the_crash_run_walks_it",
        "test_unreadable_file_fails",
    ],
    "the bucket was deleted since the last run": [
        "test_crash_run_sends_all_again_when_the_bucket_is_gone",
        "test_a_bucket_that_is_gone_has_all_sent",
    ],
    "a second run of the same job starts; the state file is damaged": [
        "test_a_second_run_is_refused_until_the_first_is_gone",
        "test_damaged_state_is_refused",
    ],
    "the backup folder is empty (its disk is not mounted)": [
        "test_empty_folder_is_said",
        "test_empty_folder_of_which_files_were_uploaded_is_refused",
    ],
}


def names_of_quick_tests() -> set[str]:
    """The names of all tests but those that only --long runs."""
    found = set()
    for path in TESTS.glob("test_*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(ast.unparse(node) == "pytestmark = pytest.mark.long" for node in module.body):
            continue
        for node in module.body:
            if isinstance(node, ast.FunctionDef):
                marks = {ast.unparse(mark) for mark in node.decorator_list}
                if "pytest.mark.long" not in marks:
                    found.add(node.name)
    return found


def test_every_line_of_what_happens_when_has_its_tests() -> None:
    assert [what for what, _ in rows("What happens when…")] == list(TESTED)
    assert {name for names in TESTED.values() for name in names} - names_of_quick_tests() == set()


def test_what_a_run_leaves_beside_the_shipped_state_is_no_part_of_the_repository() -> None:
    ignored = (PROJECT / ".gitignore").read_text(encoding="utf-8").split()
    companions = {f"stateFile.json.{name}" for name in ("journal", "lock", "tmp")}
    assert companions - set(ignored) == set()
    assert ".journal" in README
    assert json.loads((PROJECT / "stateFile.json").read_text(encoding="utf-8")) == []


# What the README says of time, and the constants of the script (which HASTE has as they are).
TIMES = {
    "what is under way has 8 seconds": "SIGNAL_GRACE_SECONDS = 8",
    "again and again, for a minute": "PATIENCE_SECONDS = 60",
    "a run's first for 20 s": "FIRST_REQUEST_SECONDS = 18",
}


def test_its_times_are_those_of_the_program() -> None:
    assert [words for words in TIMES if words not in section("What happens when…")] == []
    assert set(TIMES.values()) <= set(HASTE)


def options_of_help(text: str) -> dict[str, str]:
    """What --help says of each option."""
    entry = re.compile(r"^  (?:-h, )?(--[a-z-]+)(?: \S+)?(?:  +|\n)((?:.+\n)(?: {24}.+\n)*)", re.M)
    return {name: " ".join(words.split()) for name, words in entry.findall(text)}


def test_its_options_are_those_of_the_help_in_the_same_words(run: Run) -> None:
    in_help = options_of_help(run("--help").stdout)
    named = []
    for options, meaning in rows("Options"):
        names = re.findall(r"--[a-z-]+", options)
        assert meaning.replace("`", "") == "; ".join(in_help[name] for name in names)
        named += names
    assert sorted(named) == sorted(in_help)
    assert named[:3] == list(in_help)[:3] == ["--bucketname", "--backupfolder", "--crashrun"]


def test_the_help_fits_a_terminal(run: Run) -> None:
    lines = run("--help", env={"COLUMNS": "80"}).stdout.splitlines()
    assert [line for line in lines if len(line) > 79] == []


def test_its_exit_codes_are_those_of_the_help(run: Run) -> None:
    _, _, codes = run("--help").stdout.partition("exit codes:\n")
    in_help = re.findall(r"^  (\d+) ", codes, flags=re.MULTILINE)
    in_readme = [code for codes, _ in rows("Exit codes") for code in re.split(r"\D+", codes)]
    assert in_readme == in_help == ["0", "1", "2", "130", "143"]


def test_it_is_read_in_ten_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) < 300
    assert [line for line in lines if len(line) > 110] == []


def test_its_state_file_is_one(job: Job) -> None:
    (shown,) = re.findall(r"^```\n(.*?)^```$", section("The state file"), re.DOTALL | re.MULTILINE)
    job.make("a.dat", "b.dat")
    job.path("b.dat").unlink()
    job.path("b.dat").symlink_to("missing")
    assert job.run().returncode == 1
    for shown_entry, entry in zip(json.loads(shown.replace(", …", "")), job.entries(), strict=True):
        assert list(shown_entry)[:3] == list(entry)[:3]
        assert set(shown_entry) <= set(entry)
        assert shown_entry["uploadedSuccess"] == entry["uploadedSuccess"]


@needs_shell
@pytest.mark.parametrize("block", blocks_of(README, "sh"))
def test_shell_blocks_are_valid(block: str) -> None:
    subprocess.run(["sh", "-n"], input=block, encoding="utf-8", check=True)


@pytest.mark.parametrize("block", blocks_of(README, "json"))
def test_json_blocks_are_valid(block: str) -> None:
    json.loads(block)


@needs_shell
@pytest.mark.long
def test_the_command_to_try_it_shows_a_backup_a_failure_and_the_crash_run() -> None:
    assert "sh tests/try_it.sh" in README
    environment = {**os.environ, "PYTHON": sys.executable}
    completed = subprocess.run(
        ["sh", PROJECT / "tests" / "try_it.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0
    assert "report.pdf: its link is broken" in completed.stderr
    assert "0 differences found" in completed.stderr
    assert "4 matching files" in completed.stderr
    first, _, second = completed.stdout.partition("--crashrun 1\n")
    assert "sent 3 files, " in first
    assert "(exit code 1)" in first
    assert '"uploadedSuccess": 0' in first
    assert second.startswith("sent 1 file, ")
    assert "(exit code" not in second
