"""Measure s3FileTransfer beside s5cmd, rclone, aws-cli and s3cmd, and print a table.

All clients send the same files to the same server on this machine, one client after the other, in
rounds: each round runs every client once, so a machine that gets slower or faster meets all of
them. Every run gets a new server and an empty bucket. It counts only if the client's exit code is 0
and the server has every file, with every byte.

The scenarios named `nights-…` are a job that comes back every night: a first night, a second one
on which nothing has changed, against a server that answers at once and again 30 ms away (a page of
the listing is an answer), and, for s3FileTransfer, a crash run with nothing to do. They have one
server for each client, and a run that sends anything again does not count.

`run.sh` beside this file installs everything and then calls it. All of it takes about 45 minutes on
two cores, and 10 GB of room in /dev/shm or, where memory is short, in the folder for temporary
files. What takes hours is measured only where it is asked for by name:

    tests/benchmark/run.sh --scenario nights-20k --scenario nights-200k --timeout 3600
    tests/benchmark/run.sh --scenario nights-1m --fill --timeout 1800

With --fill only s3FileTransfer, whose state comes of it, has a first night; the others meet a
server that begins with all files, as though they had sent them. --scale makes other numbers: with
`--scenario nights-200k --scale 1.5 --client ours-crt` it is 300,000 files and one client. Linux
only: what a client takes is read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clients import REGION, Client, all_clients, environment, nightly_clients
from measure import become_subreaper, cpu_seconds, run_measured
from null_servers import BUCKET, Server, Stored, null_server, rclone_server
from report import Outcome, Report, Result, Run, as_json, markdown, number, svg
from scenarios import LONG_SCENARIOS, SCENARIOS, Night, Scenario, make_files, place_for

ROOT = Path(__file__).resolve().parents[2]
# A client that takes longer than this is not asked again: what a run of minutes varies by does not
# matter, and one client that sends one file at a time would take most of the benchmark's time.
LONG_RUN_S = 120.0
# What was written just before it is sent is sent again by a careful client, and by s5cmd, too.
SETTLED_S = 3.0


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, write the files that were asked for.

    Returns 0 when every client that is installed has its figures, else 1.
    """
    args = parse_arguments(argv)
    become_subreaper()
    clients = all_clients(venvs=args.venvs, script=args.script)
    versions = {client.key: client.version() for client in clients}
    report = Report(args.rounds, args.scale)
    for scenario in SCENARIOS:
        if scenario.name not in args.scenario:
            continue
        results = [
            (each, [Outcome(client, versions[client.key]) for client in taking_part(each, args)])
            for each in scenario.scaled(args.scale).job()
        ]
        report.results += results
        try:
            measure_job(results, args)
        except OSError as error:  # no room for the files, or no such server
            print(f"{scenario.name}: not run: {error}", file=sys.stderr)
        write_files(report, args)
    print(markdown(report), end="")
    installed = [each for _, outcomes in report.results for each in outcomes if each.version]
    return int(not installed or any(outcome.problem for outcome in installed))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    assert __doc__
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scenario",
        action="append",
        choices=[scenario.name for scenario in SCENARIOS],
        help="only this scenario (repeatable; default: all but those that take hours)",
    )
    parser.add_argument(
        "--client",
        action="append",
        choices=[client.key for client in all_clients(venvs=ROOT, script=ROOT)],
        help="only this client (repeatable; default: all)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="multiply the number of files by this, or the size of the few large ones",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="kill a client that takes longer (default: 900)",
    )
    parser.add_argument(
        "--fill",
        action="store_true",
        help="let the server begin with all files, in place of the peers' first nights",
    )
    parser.add_argument(
        "--script",
        type=lambda path: Path(path).absolute(),
        default=ROOT / "s3FileTransfer.py",
        metavar="PATH",
        help="the s3FileTransfer.py to measure",
    )
    parser.add_argument(
        "--venvs",
        type=lambda path: Path(path).absolute(),
        default=ROOT / ".venv-benchmark",
        metavar="DIR",
        help="the virtual environments that run.sh made",
    )
    for name in ("json", "svg", "markdown"):
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE", help=f"write the report as {name} too"
        )
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.scale <= 0:
        parser.error("--rounds and --scale must be greater than zero")
    args.scenario = args.scenario or sorted({each.name for each in SCENARIOS} - {*LONG_SCENARIOS})
    return args


def taking_part(scenario: Scenario, args: argparse.Namespace) -> list[Client]:
    """The clients that have a run in a scenario."""
    clients = nightly_clients if scenario.night else all_clients
    filled = args.fill and scenario.night is Night.FIRST
    only_states = filled or scenario.night is Night.CRASH_RUN
    return [
        client
        for client in clients(venvs=args.venvs, script=args.script)
        if (not args.client or client.key in args.client)
        and (client.keeps_state or not only_states)
    ]


def measure_job(results: Sequence[Result], args: argparse.Namespace) -> None:
    """Run all clients in rounds over one set of files, adding to their outcomes."""
    scenario = results[0][0]
    by_client: dict[str, list[tuple[Scenario, Outcome]]] = {}
    for each, outcomes in results:
        for outcome in outcomes:
            by_client.setdefault(outcome.client.key, []).append((each, outcome))
    with temporary_folder(place_for(space_for(scenario))) as place:
        files = place / "files"
        files.mkdir()
        make_files(files, scenario)
        time.sleep(SETTLED_S if scenario.night else 0)
        for round_number in range(1, args.rounds + 1):
            for job in by_client.values():
                if all(is_due(outcome) for _, outcome in job):
                    measure_client(job, round_number, files=files, args=args)


def space_for(scenario: Scenario) -> int:
    """Bytes that the files take, with those that the server keeps, and some for file systems."""
    copies = 2 if scenario.server == "rclone" else 1
    file_overhead_bytes = 4096
    return copies * (scenario.total_bytes + scenario.files * file_overhead_bytes)


def is_due(outcome: Outcome) -> bool:
    """Whether a client is to run in the next round."""
    if outcome.version is None:
        return False
    return all(run.error is None and run.usage.wall_s < LONG_RUN_S for run in outcome.runs)


def measure_client(
    job: Sequence[tuple[Scenario, Outcome]],
    round_number: int,
    *,
    files: Path,
    args: argparse.Namespace,
) -> None:
    """Run a client's scenarios against a new server, until one fails; adds to its outcomes."""
    # On disk, as a user has it: s3FileTransfer saves its state there.
    with temporary_folder(None) as scratch, running_server(job[0][0], args, files) as server:
        for scenario, outcome in job:
            run = measure_run(
                outcome.client, scenario, server, files=files, scratch=scratch, args=args
            )
            outcome.runs.append(run)
            show_run(run, outcome.client, scenario, round_number)
            if run.error:
                return


def measure_run(
    client: Client,
    scenario: Scenario,
    server: Server,
    *,
    files: Path,
    scratch: Path,
    args: argparse.Namespace,
) -> Run:
    """Run a client once, against a server that is ready for it."""
    values = {
        "folder": str(files),
        "endpoint": server.endpoint,
        "host": server.endpoint.removeprefix("http://"),
        "scratch": str(scratch),
        "bucket": BUCKET,
        "region": REGION,
    }
    server.settle(scenario.latency_ms)
    requests_before = Counter(server.stored().requests)
    server_cpu_before_s = cpu_seconds(server.pid)
    usage = run_measured(
        client.command(values, crash_run=scenario.night is Night.CRASH_RUN),
        env=environment(endpoint=server.endpoint, home=scratch),
        cwd=scratch,
        log=scratch / "output.log",
        timeout_s=args.timeout,
    )
    server_cpu_s = cpu_seconds(server.pid) - server_cpu_before_s
    stored = server.stored()
    requests = Counter(stored.requests) - requests_before
    error = usage.error or missing(stored, scenario) or sent_again(requests, scenario)
    return Run(usage, server_cpu_s, dict(requests), error)


def missing(stored: Stored, scenario: Scenario) -> str | None:
    """What the server lacks after a run, in words; None if it has everything."""
    if stored.objects != scenario.files:
        return f"{stored.objects:,} of {scenario.files:,} objects arrived"
    if stored.bytes != scenario.total_bytes:
        return f"{stored.bytes:,} of {scenario.total_bytes:,} bytes arrived"
    return None


def sent_again(requests: Mapping[str, int], scenario: Scenario) -> str | None:
    """What was sent though nothing had changed, in words; None if nothing was."""
    sent = sum(requests.get(name, 0) for name in ("PutObject", "UploadPart"))
    if sent and scenario.night not in (None, Night.FIRST):
        return f"{sent:,} of {scenario.files:,} files were sent again"
    return None


@contextlib.contextmanager
def running_server(scenario: Scenario, args: argparse.Namespace, files: Path) -> Iterator[Server]:
    """The server that a client's first scenario asks for; what it keeps lies beside the files."""
    if scenario.server == "null":
        folder = files if scenario.night is Night.SECOND else None
        with null_server(latency_ms=scenario.latency_ms, folder=folder) as server:
            yield server
    else:
        rclone = args.venvs / "peers" / "bin" / "rclone"
        with (
            temporary_folder(files.parent) as folder,
            rclone_server(rclone, folder=folder) as server,
        ):
            yield server


@contextlib.contextmanager
def temporary_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that goes with the context; in the system's place for them without a parent."""
    folder = Path(tempfile.mkdtemp(prefix="s3FileTransfer-benchmark-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show_run(run: Run, client: Client, scenario: Scenario, round_number: int) -> None:
    """One line on stderr for each run, so that a person sees it going on."""
    wall_s, peak_mb = run.usage.wall_s, run.usage.peak_rss_bytes / 1e6
    rate = f"{number(scenario.rate(wall_s))} {scenario.unit}"
    result = f"invalid: {run.error}" if run.error else f"{rate}, {peak_mb:.0f} MB"
    name = f"{client.name}{', ' if scenario.night else ''}{scenario.run_name}"
    print(
        f"{scenario.name}, round {round_number}: {name}: {number(wall_s)} s, {result}",
        file=sys.stderr,
    )


def write_files(report: Report, args: argparse.Namespace) -> None:
    """Write the files that were asked for; after each scenario, so that none is lost."""
    if args.markdown:
        args.markdown.write_text(markdown(report), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    if args.svg:
        args.svg.write_text(svg(report), encoding="utf-8")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
