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
from support.job import Run
from support.readme import README, blocks_of, section
from support.script import HASTE, PROJECT
from support.systems import needs_shell

TESTS = Path(__file__).parent

# What stands in the first column of "What happens when…", and the tests that show the second.
TESTED = {
    "the process is killed, at any moment": [
        "test_one_crash_run_finishes_what_was_killed_anywhere",
        "test_a_kill_while_the_state_is_saved",
        "test_a_kill_during_the_walk_leads_the_crash_run_to_every_file",
    ],
    "…in the middle of a large file": [
        "test_only_missing_parts_are_sent",
        "test_a_part_damaged_on_the_server_is_sent_again",
    ],
    "the power fails": [
        "test_a_kill_while_the_state_is_saved",
        "test_every_save_is_on_the_disk_before_it_is_the_state",
    ],
    "SIGINT, SIGTERM, SIGHUP": [
        "test_a_signal_among_small_files_leaves_what_was_answered",
        "test_a_slow_upload_is_cut_off",
        "test_a_second_signal_ends_the_run_at_once",
    ],
    "a process that sends small files is killed (out of memory)": [
        "test_a_killed_lane_costs_no_file",
        "test_lanes_that_are_all_killed_leave_their_files_to_the_reliable_way",
    ],
    "the state's disk is full": [
        "test_full_disk_keeps_the_old_state",
        "test_disk_that_fills_during_the_run_keeps_the_last_state",
    ],
    "the network is away for a while": [
        "test_an_endpoint_that_is_away_for_a_while_is_waited_for",
        "test_a_server_that_stalls_once_is_ridden_out",
    ],
    "…or for good": ["test_an_endpoint_that_goes_away_for_good_stops_the_run_with_one_message"],
    "the endpoint is not there at the start": [
        "test_a_closed_port_is_given_up",
        "test_a_server_that_says_nothing_is_given_up",
    ],
    "S3 throttles (503 SlowDown)": ["test_a_fifth_refused_and_a_twentieth_dropped_loses_nothing"],
    "S3 fails again and again at one file (500)": [
        "test_one_key_at_which_the_server_always_fails_is_one_failure"
    ],
    "the answer's ETag is wrong, or S3 got damaged bytes": [
        "test_what_is_damaged_again_and_again_is_tried_three_times_and_fails",
        "test_a_fault_once_is_mended_by_sending_again",
    ],
    "a file changes while it is sent": [
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
    "the token expires, the clock is wrong, the bucket is gone": [
        "test_what_every_file_meets_from_some_moment_on_stops_the_run",
        "test_what_every_file_would_meet_stops_the_run_with_one_message",
    ],
    "the bucket was deleted since the last run": [
        "test_crash_run_sends_all_again_when_the_bucket_is_gone"
    ],
    "a second run of the same job starts": ["test_a_second_run_is_refused_until_the_first_is_gone"],
    "the state file is damaged, or of another job": [
        "test_damaged_state_is_refused",
        "test_failures_of_another_job_are_not_buried",
        "test_a_crash_run_of_another_job_is_refused",
    ],
    "the backup folder is empty (its disk is not mounted)": [
        "test_empty_folder_is_said",
        "test_empty_folder_of_which_files_were_uploaded_is_refused",
    ],
}


def first_column(heading: str) -> list[str]:
    """The first column of the table under a heading, without the table's own head."""
    lines = section(heading).splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    return rows[2:]


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
    assert first_column("What happens when…") == list(TESTED)
    assert {name for names in TESTED.values() for name in names} - names_of_quick_tests() == set()


# What the README says of time, and the constants of the script (which HASTE has as they are).
TIMES = {
    "what is under way has 8 seconds": "SIGNAL_GRACE_SECONDS = 8",
    "with growing pauses, for a minute": "PATIENCE_SECONDS = 60",
    "exit 2 within 20 seconds": "FIRST_REQUEST_SECONDS = 18",
}


def test_its_times_are_those_of_the_program() -> None:
    assert [words for words in TIMES if words not in section("What happens when…")] == []
    assert set(TIMES.values()) <= set(HASTE)


def test_its_options_are_those_of_the_help(run: Run) -> None:
    in_help = re.findall(r"^  (?:-h, )?(--[a-z-]+)", run("--help").stdout, flags=re.MULTILINE)
    in_readme = [name for row in first_column("Options") for name in re.findall(r"--[a-z-]+", row)]
    assert sorted(in_readme) == sorted(in_help)


def test_its_exit_codes_are_those_of_the_help(run: Run) -> None:
    _, _, codes = run("--help").stdout.partition("exit codes:\n")
    in_help = re.findall(r"^  (\d+) ", codes, flags=re.MULTILINE)
    in_readme = [code for row in first_column("Exit codes") for code in re.split(r"\D+", row)]
    assert [code for code in in_readme if code] == in_help == ["0", "1", "2", "130", "143"]


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
    command = [f"sh {PROJECT / 'tests' / 'try_it.sh'}"]
    assert "sh tests/try_it.sh" in README
    environment = {**os.environ, "PYTHON": sys.executable}
    completed = subprocess.run(
        ["sh", "-c", *command], env=environment, capture_output=True, text=True, check=False
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
