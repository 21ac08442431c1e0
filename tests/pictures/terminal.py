"""Makes terminal.svg: what a backup with one failure, and the crash run, look like on a terminal.

    sh tests/pictures/run.sh

Everything in the picture is what a shell and the script have written on a terminal, where they
ran against a local S3 server behind a line of 100 Mbit/s.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.files import make_files
from support.screen import Cell, Terminal
from support.script import SCRIPT_PATH, wait_until
from support.servers import S3Server, rclone

PLACE, FOLDER = Path("/srv"), "backup"
COLUMNS, ROWS = 104, 40
LINE_BYTES_PER_SECOND = 12_500_000
PROMPT = "\033[1;32m$\033[0m "
COMMAND = "python3 s3FileTransfer.py --bucketname my-backup --backupfolder {}"
REMARK = "# the disk that report.pdf links to was not mounted; now it is: send the rest"
# A line of progress that shows all that there is, in the middle of the run.
IN_THE_MIDDLE = re.compile(r"\d+/\d+ files .* [4-7]\d%  .*/s  .* left  .* failed")

CELL_WIDTH, ROW_HEIGHT = 7.8, 19
MARGIN, TITLE_HEIGHT = 18, 34
STYLE = """
  .window { fill: #0d1117; stroke: #484f58 }
  text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
    font-size: 13px; fill: #e6edf3; white-space: pre }
  .bold { font-weight: 700 }
  .green { fill: #56d364 }
  .later { fill: #8b949e; font-style: italic }
  .rule { stroke: #484f58; stroke-dasharray: 3 4 }
"""

Picture = list[list[Cell]]


# --- The runs --------------------------------------------------------------------------------


def demo_files() -> dict[str, bytes]:
    """Some large files and many small ones, by their paths."""
    rng = random.Random(1)
    sizes = {"db/monday.sql": 6_000_000, "db/tuesday.sql": 9_000_000}
    sizes |= {f"mail/{number:04}": rng.randrange(500, 20_000) for number in range(120)}
    sizes |= {
        f"photos/lake-{number:02}.jpg": rng.randrange(300_000, 900_000) for number in range(60)
    }
    return {path: rng.randbytes(size) for path, size in sizes.items()}


@contextmanager
def demo(place: Path) -> Iterator[Path]:
    """Put the script and a folder to back up into an empty folder; remove them in the end.

    A link in the folder is broken; yields the path of the file that it should lead to.
    """
    if not place.is_dir() or any(place.iterdir()):
        raise SystemExit(f"{place} is not an empty folder")
    try:
        shutil.copy(SCRIPT_PATH, place)
        make_files(place / FOLDER, demo_files())
        report = place / "disk2" / "report.pdf"
        (place / FOLDER / report.name).symlink_to(report)
        yield report
    finally:
        for path in place.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def distant_server(work: Path) -> Iterator[S3Server]:
    """A local S3 server, as far away as the line makes it."""
    (work / "buckets").mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(rclone(work / "buckets", log_path=work / "server.log"))
        proxy = stack.enter_context(server.proxy())
        proxy.limit_bandwidth(LINE_BYTES_PER_SECOND)
        yield replace(server, endpoint_url=proxy.url)


def record(place: Path) -> tuple[Picture, Picture]:
    """Run a backup and the crash run; return the screen in the middle, and at the end."""
    with ExitStack() as stack:
        report = stack.enter_context(demo(place))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        server = stack.enter_context(distant_server(work))
        terminal = stack.enter_context(Terminal(COLUMNS, ROWS))
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        env = {"PATH": path, "HOME": str(work), "PS1": PROMPT, **server.environment()}
        terminal.start(["/bin/sh"], cwd=place, env=env)
        command = COMMAND.format(place / FOLDER)
        wait_for_prompt(terminal, 0)
        terminal.type(f"{command}\r")
        middle = wait_until(lambda: picture_in_the_middle(terminal), 60, "progress")
        wait_for_prompt(terminal, 1)
        make_files(report.parent, {report.name: b"the report\n" * 10_000})
        terminal.type(f"{REMARK}\r")
        wait_for_prompt(terminal, 2)
        terminal.type(f"{command} --crashrun 1\r")
        wait_for_prompt(terminal, 3)
        return middle, terminal.cells()


def wait_for_prompt(terminal: Terminal, commands: int) -> None:
    """Wait until so many commands were typed, and the shell asks for the next one."""

    def is_there() -> bool:
        rows = terminal.rows()
        typed = sum(row.startswith("$ ") for row in rows)
        return typed == commands and rows[-1:] == ["$"]

    wait_until(is_there, 60, "the prompt")


def picture_in_the_middle(terminal: Terminal) -> Picture | None:
    """The screen, if it shows the progress line with all that there is."""
    picture = terminal.cells()
    return picture if picture and IN_THE_MIDDLE.fullmatch(text_of(picture[-1])) else None


def text_of(row: Iterable[Cell]) -> str:
    """The characters of a row."""
    return "".join(cell.text for cell in row)


# --- The picture -----------------------------------------------------------------------------


def svg(middle: Picture, end: Picture) -> str:
    """A window with the screen in the middle of the backup and, below, what came in its place."""
    same = len(middle) - 1
    rest = end[same:-1]  # without the last prompt
    width = COLUMNS * CELL_WIDTH + 2 * MARGIN
    top: float = TITLE_HEIGHT + MARGIN
    elements = [svg_row(row, top + n * ROW_HEIGHT) for n, row in enumerate(middle)]
    y = top + (len(middle) - 0.2) * ROW_HEIGHT
    elements += [
        f'<path class="rule" d="M{MARGIN} {y:.1f}H{width - MARGIN:.1f}"/>',
        f'<text class="later" x="{MARGIN}" y="{y + ROW_HEIGHT:.1f}">'
        "in its place, when the run is over:</text>",
    ]
    top = y + 2.2 * ROW_HEIGHT
    elements += [svg_row(row, top + n * ROW_HEIGHT) for n, row in enumerate(rest)]
    height = top + (len(rest) - 1) * ROW_HEIGHT + MARGIN
    lights = "".join(
        f'<circle cx="{MARGIN + 5 + n * 18}" cy="18" r="5.5" fill="{colour}"/>'
        for n, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">\n'
        "<title>A backup with one failure, and the crash run that sends the rest</title>\n"
        f"<style>{STYLE}</style>\n"
        f'<rect class="window" x="0.5" y="0.5" width="{width - 1:.0f}" '
        f'height="{height - 1:.0f}" rx="9"/>\n'
        f"{lights}\n" + "\n".join(elements) + "\n</svg>\n"
    )


def svg_row(row: list[Cell], y: float) -> str:
    """A row of the screen, as wide as its cells are, whatever font there is."""
    spans = []
    for (colour, is_bold), cells in groupby(row, lambda cell: (cell.colour, cell.is_bold)):
        text = escape(text_of(cells))
        css = " ".join(["bold"] * is_bold + [colour] * (colour != "default"))
        spans.append(f'<tspan class="{css}">{text}</tspan>' if css else text)
    length = len(row) * CELL_WIDTH
    return (
        f'<text xml:space="preserve" x="{MARGIN}" y="{y:.1f}" textLength="{length:.1f}">'
        f"{''.join(spans)}</text>"
    )


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--place", type=Path, default=PLACE, help="an empty folder to work in")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    middle, end = record(options.place)
    options.output.write_text(svg(middle, end), encoding="utf-8")


if __name__ == "__main__":
    main()
