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
from support.script import HASTE, PROJECT, SCRIPT_PATH, program
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
    "a response takes two minutes (15 for the request that joins the parts)": [
        "test_an_answer_that_trickles_is_given_up",
        "test_a_server_that_stalls_once_is_ridden_out",
        "test_an_object_that_appears_after_a_lost_complete_is_waited_for",
    ],
    "the network is down, or S3 throttles (503)": [
        "test_an_endpoint_that_is_away_for_a_while_is_waited_for",
        "test_a_server_that_stalls_once_is_ridden_out",
        "test_a_fifth_refused_and_a_twentieth_dropped_loses_nothing",
    ],
    "…for longer; the expired token is not renewed; the bucket is gone": [
        "test_a_token_that_nobody_renewed_stops_the_run",
        "test_an_endpoint_that_goes_away_for_good_stops_the_run_with_one_message",
        "test_what_every_file_meets_from_some_moment_on_stops_the_run",
        "test_what_every_file_would_meet_stops_the_run_with_one_message",
        "test_a_closed_port_is_given_up",
    ],
    "S3 accepts none of 20 files in a row, nor three from elsewhere in the folder": [
        "test_the_same_answer_to_every_file_stops_the_run",
        "test_a_server_that_fails_at_every_file_stops_the_run",
        "test_bad_keys_do_not_stop_the_good_ones",
    ],
    "the endpoint redirects to another address": ["test_where_the_endpoint_redirects_to_is_said"],
    "S3 keeps failing on one file (500)": [
        "test_one_key_at_which_the_server_always_fails_is_one_failure"
    ],
    "a file changes while it is sent, or is damaged in transit": [
        "test_what_is_damaged_again_and_again_is_tried_three_times_and_fails",
        "test_a_fault_once_is_mended_by_sending_again",
        "test_a_file_that_changes_once_is_sent_again",
        "test_a_file_that_changes_all_the_time_is_tried_three_times",
        "test_a_file_changed_between_parts_is_never_completed",
    ],
    "a file is appended to while it is sent (a log)": [
        "test_a_growing_file_is_sent_as_long_as_it_was"
    ],
    "a dump is half written": ["test_a_growing_file_is_sent_as_long_as_it_was", "test_exclude"],
    "another program holds a lease on a file (Samba, nfsd)": [
        "test_a_file_with_a_lease_is_sent_once_the_lease_is_given_up",
        "test_a_lease_that_lasts_is_waited_for_and_the_file_read_blocking",
    ],
    "a folder or file is unreadable": [
        "test_unreadable_folder_fails_and_the_crash_run_walks_it",
        "test_unreadable_file_fails",
    ],
    "a link points to a folder above it, or above the backup folder": [
        "test_link_back_to_a_folder_above_is_a_notice",
        "test_link_to_what_is_above_the_backup_folder_is_a_notice",
        "test_crash_run_does_not_follow_a_link_to_what_is_above",
    ],
    "the bucket was deleted, or recreated by another job": [
        "test_crash_run_sends_all_again_when_the_bucket_is_gone",
        "test_a_bucket_that_is_gone_has_all_sent",
        "test_a_bucket_that_another_job_made_anew_is_not_believed_full",
    ],
    "a second run of the same job starts; the state file is damaged": [
        "test_a_second_run_is_refused_until_the_first_is_gone",
        "test_damaged_state_is_refused",
    ],
    "another program deletes the lock or changes the state mid-run": [
        "test_a_lock_that_is_deleted_in_mid_run_is_noticed",
        "test_a_state_that_another_changes_in_mid_run_is_left_to_it",
    ],
    "the folder is empty (disk not mounted)": [
        "test_empty_folder_is_said",
        "test_empty_folder_of_which_files_were_uploaded_is_refused",
    ],
}

# What its other text says, in these words, and the tests that show it.
SHOWN = {
    "`aws login`": ["test_a_login_session_is_renewed_and_used"],
    "credentials that another program renews are picked up": [
        "test_a_token_that_another_program_renewed_is_taken",
        "test_lanes_go_on_with_a_renewed_token",
    ],
    "signed payloads, checksums or the application ID take precedence": [
        "test_bodies_are_signed_where_the_configuration_says_so",
        "test_checksums_are_sent_where_the_configuration_says_so",
        "test_the_application_of_the_configuration_is_named",
    ],
    "it compares the whole state with the listing": [
        "test_where_one_object_is_missing_all_are_compared"
    ],
    "the bucket is assumed to match the state": [
        "test_where_listing_is_refused_the_bucket_is_believed_and_that_is_said"
    ],
    "Some servers list keys out of order": [
        "test_every_key_is_found_wherever_a_server_lists_it",
        "test_a_page_in_disorder_is_seen_though_many_others_are_deleted",
    ],
    "If listing is denied (AccessDenied), every file is sent": [
        "test_a_listing_that_is_refused_is_said_and_all_is_sent"
    ],
    "any other listing error stops the run": [
        "test_a_listing_at_which_the_server_always_fails_has_nothing_sent_again",
        "test_an_answer_that_is_no_listing_says_nothing_of_the_bucket",
    ],
    'an error, except for `--prefix ""`': ["test_usage_errors", "test_an_empty_prefix_is_none"],
    "a glob that matches no file gives a notice": ["test_a_glob_that_matches_no_file_is_told"],
    "could not start, go on or write its list": ["test_a_list_that_cannot_be_written_is_an_error"],
    "entries in any order": ["test_a_state_in_any_order_leads_to_the_same_new_state"],
    "so is a state of version 1.1": [
        "test_a_state_of_an_earlier_version_is_accepted",
        "test_what_version_1_1_left_to_be_compared_is_read_and_not_sent",
    ],
    "server (`endpoint`)": ["test_the_state_has_the_server_and_no_password"],
    "one that is another user's symbolic link": ["test_a_link_of_another_user_is_not_followed"],
    "one that others own or can write to": [
        "test_root_does_not_act_on_what_another_user_can_write"
    ],
    "stops the run and is left alone": [
        "test_what_others_have_under_the_name_of_a_companion_is_left_alone"
    ],
    "it also covers the folders on the path": [
        "test_a_folder_that_becomes_a_link_after_the_walk_is_not_followed",
        "test_a_folder_that_becomes_a_link_in_the_walk_is_not_followed",
        "test_without_links_what_is_deep_below_is_opened",
    ],
    "objects whose ETag is not an MD5": [
        "test_where_an_etag_is_no_md5_the_object_is_looked_at_and_nothing_is_sent_twice"
    ],
    "write `/` as `%2F`, `@` as `%40`": [
        "test_the_password_of_an_endpoint_is_never_shown",
        "test_the_password_of_a_proxy_is_never_shown",
    ],
    "CPU quota counts as": ["test_the_quota_of_a_container_counts_as_its_cores"],
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


def test_what_its_other_text_says_has_its_tests() -> None:
    text = " ".join(README.split())
    assert [words for words in SHOWN if words not in text] == []
    assert {name for names in SHOWN.values() for name in names} - names_of_quick_tests() == set()


def test_what_a_run_leaves_beside_the_shipped_state_is_no_part_of_the_repository() -> None:
    ignored = (PROJECT / ".gitignore").read_text(encoding="utf-8").split()
    companions = {f"stateFile.json.{name}" for name in ("journal", "lock", "tmp")}
    assert companions - set(ignored) == set()
    assert [name for name in companions if f"`{name}`" not in section("The state file")] == []
    assert json.loads((PROJECT / "stateFile.json").read_text(encoding="utf-8")) == []


# What the README says of time, and the constants of the script (which HASTE has as they are).
TIMES = {
    "requests in flight get 8 seconds": "SIGNAL_GRACE_SECONDS = 8",
    "retried for a minute": "PATIENCE_SECONDS = 60",
    "a run's first for 20 s": "FIRST_REQUEST_SECONDS = 18",
    "a response takes two minutes": "ANSWER_SECONDS = 120",
    "retried for about 50 s": "TRY_LATER_SECONDS = 2",  # so often as stands below
}
# What it says of other numbers, which no test changes.
NUMBERS = {
    "(15 for the request that joins the parts)": "COMPLETE_SECONDS = 900",
    "retried for about 50 s": "OPEN_TRIES = 25",
    "20 files in a row": "FAILED_IN_A_ROW_MAX = 20",
    "sent up to three times": "FILE_TRIES = 3",
    "eight requests at a time": "RANGES_AT_ONCE = 8",
}


def test_its_times_are_those_of_the_program() -> None:
    assert [words for words in TIMES if words not in section("What happens when…")] == []
    assert set(TIMES.values()) <= set(HASTE)


def test_its_numbers_are_those_of_the_program() -> None:
    text = " ".join(README.split())
    assert [words for words in NUMBERS if words not in text] == []
    script = SCRIPT_PATH.read_text(encoding="utf-8")
    assert [number for number in NUMBERS.values() if f" {number}\n" not in script] == []


def test_its_version_is_that_of_the_program() -> None:
    assert f"Version {program().__version__} " in README


def test_the_help_names_each_field_of_the_state(run: Run) -> None:
    _, _, text = run("--help").stdout.partition("The state file is ")
    names = ["filepath", "uploadedSuccess", "filename", *program().OPTIONAL_FIELDS]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


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


def test_its_tables_of_speed_have_the_same_clients() -> None:
    clients = re.findall(r"^\| (?:\*\*)?(s3F|s5cmd|rclone|aws)", section("Speed"), re.MULTILINE)
    assert len(clients) == 8
    assert sorted(clients[:4]) == sorted(clients[4:])


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
