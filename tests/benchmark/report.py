"""What the benchmark has measured, as tables in Markdown, as JSON, and as a chart in SVG."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from xml.sax.saxutils import escape

from clients import OURS, OURS_CRT, Client
from measure import Usage
from scenarios import Night, Scenario

COLUMNS_NOTE = (
    "CPU s and peak MB are of the client's whole process tree (user and system time; resident "
    "memory summed over processes, so what they share counts more than once). Server CPU % is the "
    "server's part of one core while the client ran: it shares the machine. The last two columns "
    "are the speed of s3FileTransfer, with boto3 alone and with boto3[crt], divided by that of the "
    "row's client."
)


@dataclass(frozen=True)
class Run:
    """One run of a client: what it took, what its server took and got, why it does not count."""

    usage: Usage
    server_cpu_s: float
    requests: dict[str, int]
    error: str | None


@dataclass
class Outcome:
    """All runs of a client in one scenario; `version` is None when it is not installed."""

    client: Client
    version: str | None
    runs: list[Run] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """Why there are no figures to show; None when there are."""
        if self.version is None:
            return "not installed"
        errors = [run.error for run in self.runs if run.error]
        if errors:
            return f"invalid: {errors[0]}"
        return None if self.runs else "not run"

    def median(self, value: Callable[[Run], float]) -> float:
        """The median over the runs of what `value` takes from each."""
        return median(value(run) for run in self.runs)

    @property
    def wall_s(self) -> float:
        """Median wall seconds."""
        return self.median(lambda run: run.usage.wall_s)

    @property
    def cpu_s(self) -> float:
        """Median CPU seconds of the client."""
        return self.median(lambda run: run.usage.cpu_s)

    @property
    def peak_rss_bytes(self) -> float:
        """Median of the peaks of the client's resident memory."""
        return self.median(lambda run: run.usage.peak_rss_bytes)

    @property
    def server_cpu_share(self) -> float:
        """Median of the server's CPU seconds by wall seconds; 1 is one core."""
        return self.median(lambda run: run.server_cpu_s / run.usage.wall_s)


# A scenario with its outcomes; those of a job's nights stand one after the other.
Result = tuple[Scenario, list[Outcome]]


@dataclass
class Report:
    """Everything that goes into the table: scenarios with their outcomes, in order."""

    rounds: int
    scale: float
    results: list[Result] = field(default_factory=list)
    date: datetime.date = field(default_factory=datetime.date.today)

    def jobs(self) -> list[list[Result]]:
        """The results, those of one job's nights together."""
        return [list(job) for _, job in groupby(self.results, key=lambda each: each[0].name)]


def machine() -> str:
    """The machine in a few words, without its name."""
    cores = len(os.sched_getaffinity(0))
    kernel = ".".join(platform.release().split(".")[:2])
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return (
        f"{cores} cores ({processor()}), {memory_gb:.0f} GB of memory, "
        f"{platform.system()} {kernel}, Python {platform.python_version()}"
    )


def processor() -> str:
    """The processor's own name for itself, or its architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def ratio(outcomes: Iterable[Outcome], ours: str, peer: Outcome) -> float | None:
    """How many times as fast as the peer one of our rows is; None where one has no figures."""
    for outcome in outcomes:
        if outcome.client.name == ours and not outcome.problem and not peer.problem:
            return peer.wall_s / outcome.wall_s
    return None


# Markdown.


def markdown(report: Report) -> str:
    """The whole report: date and machine, a table for each scenario, how each client was called."""
    parts = [heading(report)]
    for job in report.jobs():
        if job[0][0].night:
            parts += [f"### {job[0][0].title}, night after night", nights_table(job)]
        for scenario, outcomes in job:
            parts += [
                f"### {scenario.full_title}",
                str(scenario),
                table(scenario, outcomes, report),
            ]
            parts += [f"{each.client.name}: {each.problem}." for each in outcomes if each.problem]
    parts += [COLUMNS_NOTE, commands(report)]
    return "\n\n".join(parts) + "\n"


def heading(report: Report) -> str:
    """When, where and how it was measured."""
    scale = "" if report.scale == 1 else f" Data scaled by {report.scale:g}."
    rounds = "one round" if report.rounds == 1 else f"{report.rounds} interleaved rounds"
    return f"Measured on {report.date} on {machine()}. Medians of {rounds}.{scale}"


def table(scenario: Scenario, outcomes: Sequence[Outcome], report: Report) -> str:
    """The table of one scenario, fastest client first, those without figures last."""
    measured = ("wall s", scenario.unit, "CPU s", "peak MB", "server CPU %")
    header = ("client", *measured, "ours ÷ this", "ours[crt] ÷ this")
    rows = [table_row(scenario, outcome, outcomes, report) for outcome in fastest_first(outcomes)]
    return aligned([header, *rows])


def nights_table(job: Sequence[Result]) -> str:
    """All nights of a job in one table, the client with the fastest second night first."""
    header = ["client"]
    for scenario, _ in job:
        header += [f"{scenario.run_name}, s", "peak MB"]
    seconds = [outcomes for scenario, outcomes in job if scenario.night is Night.SECOND]
    rows = [header]
    for client in (outcome.client for outcome in fastest_first(seconds[0])):
        rows.append([client.name])
        for _, outcomes in job:
            its_own = [each for each in outcomes if each.client == client and not each.problem]
            figures = [(number(each.wall_s), f"{megabytes(each):,.0f}") for each in its_own]
            rows[-1] += figures[0] if figures else ("-", "-")
    return aligned(rows)


def megabytes(outcome: Outcome) -> float:
    """Peak memory in MB."""
    return outcome.peak_rss_bytes / 1e6


def fastest_first(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """By wall time, those without figures last."""
    return sorted(outcomes, key=lambda each: (bool(each.problem), each.problem or each.wall_s))


def table_row(
    scenario: Scenario, outcome: Outcome, outcomes: Sequence[Outcome], report: Report
) -> tuple[str, ...]:
    """The cells of one client's row."""
    name = outcome.client.name
    if outcome.problem:
        return (name, *["-"] * 7)
    if len(outcome.runs) < report.rounds:
        name += f" (rounds: {len(outcome.runs)})"
    ratios = (ratio(outcomes, ours, outcome) for ours in (OURS, OURS_CRT))
    return (
        name,
        number(outcome.wall_s),
        number(scenario.rate(outcome.wall_s)),
        number(outcome.cpu_s),
        f"{megabytes(outcome):,.0f}",
        f"{outcome.server_cpu_share * 100:.0f}",
        *("" if value is None else number(value) for value in ratios),
    )


def number(value: float) -> str:
    """A number with about three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text too; numbers stand at the right."""
    first_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    rule = ["-" * first_width, *("-" * (width - 1) + ":" for width in widths)]
    padded = [[first.ljust(first_width), *map(str.rjust, cells, widths)] for first, *cells in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [padded[0], rule, *padded[1:]])


def commands(report: Report) -> str:
    """Version and command line of each client, and how it was called for a crash run."""
    lines = (
        f"- {outcome.client.name}, {outcome.version}: `"
        f"{outcome.client.shown_command(crash_run=scenario.night is Night.CRASH_RUN)}`"
        for scenario, outcomes in report.results
        for outcome in outcomes
        if outcome.version
    )
    return "\n".join(dict.fromkeys(lines))


# JSON.


def as_json(report: Report) -> dict[str, object]:
    """Everything, every run included, for `json.dump`. Units are in the names."""
    return {
        "date": report.date.isoformat(),
        "machine": machine(),
        "rounds": report.rounds,
        "scale": report.scale,
        "scenarios": [
            {
                "name": scenario.name,
                "title": scenario.full_title,
                "night": scenario.night and scenario.night.value,
                "files": scenario.files,
                "file_bytes": scenario.file_bytes,
                "latency_ms": scenario.latency_ms,
                "server": scenario.server,
                "unit": scenario.unit,
                "folder_files": scenario.folder_files,
                "clients": [outcome_as_json(scenario, each, outcomes) for each in outcomes],
            }
            for scenario, outcomes in report.results
        ],
    }


def outcome_as_json(
    scenario: Scenario, outcome: Outcome, outcomes: Sequence[Outcome]
) -> Mapping[str, object]:
    """One client in one scenario; medians only where there are figures."""
    result: dict[str, object] = {
        "client": outcome.client.name,
        "version": outcome.version,
        "command": outcome.client.shown_command(crash_run=scenario.night is Night.CRASH_RUN),
        "problem": outcome.problem,
        "runs": [run_as_json(run) for run in outcome.runs],
    }
    if outcome.problem:
        return result
    ratios = {ours: ratio(outcomes, ours, outcome) for ours in (OURS, OURS_CRT)}
    return result | {
        "wall_s": outcome.wall_s,
        "rate": scenario.rate(outcome.wall_s),
        "cpu_s": outcome.cpu_s,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "server_cpu_share": outcome.server_cpu_share,
        "speed_of_ours_to_this": ratios,
        "speed_of_this_to_ours": {ours: value and 1 / value for ours, value in ratios.items()},
    }


def run_as_json(run: Run) -> Mapping[str, object]:
    """One run of one client."""
    return {
        "wall_s": run.usage.wall_s,
        "cpu_s": run.usage.cpu_s,
        "peak_rss_bytes": run.usage.peak_rss_bytes,
        "server_cpu_s": run.server_cpu_s,
        "requests": run.requests,
        "error": run.error,
    }


# SVG. A chart with a ground of its own is readable on any page; the media query fits it to dark
# ones where the viewer knows of them.

CHART_WIDTH = 860
MARGIN = 24
LABEL_WIDTH = 215
VALUE_WIDTH = 110
BAR_HEIGHT = 16
ROW_HEIGHT = 24
TITLE_HEIGHT = 40
STYLE = """
  text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px }
  .title { font-size: 15px; font-weight: 600 }
  .bold { font-weight: 600 }
  .name { text-anchor: end }
  .ground { fill: #ffffff }
  .title, .name, .value { fill: #1f2328 }
  .note { fill: #59636e }
  .ours { fill: #0969da }
  .peer { fill: #afb8c1 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 }
    .title, .name, .value { fill: #e6edf3 }
    .note { fill: #9198a1 }
    .ours { fill: #4493f8 }
    .peer { fill: #545d68 }
  }
"""


def svg(report: Report) -> str:
    """A chart with a group of bars for each scenario: the longer the bar, the faster the client.

    A second night has one more, of memory: the shorter the bar, the less of it.
    """
    elements: list[str] = []
    top = MARGIN
    for scenario, outcomes in report.results:
        shown = [each for each in fastest_first(outcomes) if each.version]
        groups = [(scenario.unit, shown, rate_of(scenario))]
        if scenario.night is Night.SECOND:
            leanest = sorted(shown, key=lambda each: 0 if each.problem else megabytes(each))
            groups += [("peak MB of memory, less is better", leanest, megabytes)]
        for what, bars, value in groups:
            elements += chart_group(what, scenario, bars, value=value, top=top)
            top += TITLE_HEIGHT + ROW_HEIGHT * len(bars) + MARGIN
    elements.append(text(MARGIN, top, f"{report.date}, {machine()}", css="note"))
    height = top + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{CHART_WIDTH}" height="{height}" '
        f'viewBox="0 0 {CHART_WIDTH} {height}" role="img">\n'
        "<title>Speed of s3FileTransfer and other clients; longer is faster</title>\n"
        f"<style>{STYLE}</style>\n"
        f'<rect class="ground" width="{CHART_WIDTH}" height="{height}" rx="8"/>\n'
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def rate_of(scenario: Scenario) -> Callable[[Outcome], float]:
    """What the bars of a scenario show."""
    return lambda outcome: scenario.rate(outcome.wall_s)


def chart_group(
    what: str,
    scenario: Scenario,
    outcomes: Sequence[Outcome],
    *,
    value: Callable[[Outcome], float],
    top: float,
) -> list[str]:
    """The bars of one scenario, of what `value` tells; the longest takes all the room there is."""
    plain = str(scenario).replace("`", "")
    elements = [
        text(MARGIN, top + 12, f"{scenario.full_title}: {what}", css="title"),
        text(MARGIN, top + 30, plain, css="note"),
    ]
    values = [0.0 if each.problem else value(each) for each in outcomes]
    for row, (outcome, its_value) in enumerate(zip(outcomes, values, strict=True)):
        y = top + TITLE_HEIGHT + row * ROW_HEIGHT
        share = its_value / max(values) if its_value else 0.0
        shown = outcome.problem.partition(":")[0] if outcome.problem else number(its_value)
        elements += bar(outcome.client.name, shown, share=share, top=y)
    return elements


def bar(name: str, value: str, *, share: float, top: float) -> list[str]:
    """A client's name, its bar and, behind the bar, its value."""
    left = MARGIN + LABEL_WIDTH
    width = share * (CHART_WIDTH - left - VALUE_WIDTH - MARGIN)
    ours = name in (OURS, OURS_CRT)
    baseline = top + BAR_HEIGHT - 3
    weight = " bold" if ours else ""
    return [
        text(left - 10, baseline, name, css=f"name{weight}"),
        f'<rect class="{"ours" if ours else "peer"}" x="{left}" y="{top}" '
        f'width="{max(width, 1):.1f}" height="{BAR_HEIGHT}" rx="2"/>',
        text(left + width + 8, baseline, value, css=f"value{weight}"),
    ]


def text(x: float, y: float, content: str, *, css: str) -> str:
    """A line of text whose baseline starts (or, where the style says so, ends) at x, y."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'
