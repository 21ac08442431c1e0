"""The picture of a terminal: it can be made anew, and the one that is here is still true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX only: pseudo-terminals", allow_module_level=True)

PICTURES = Path(__file__).parent / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
SIZE = r"[\d.]+[kM]?B"
# What it shows, without its spaces: in a longer folder lines are wrapped at one of them.
SHOWN = [
    r"\$python3s3FileTransfer\.py--bucketnamemy-backup--backupfolderFOLDER",
    r"failed:FOLDER/report\.pdf:.+",
    rf"\d+/182files{SIZE}/{SIZE}\d+%{SIZE}/s\d+:\d+left1failed",
    rf"sent182files,{SIZE}tos3://my-backup/in[\d.]+s\({SIZE}/s\);1failed;state:PLACE/stateFile\.json",
    r"s3FileTransfer:somefilesarenotinthebucket;fixwhatisnamedabove,thenuse--crashrun1",
    r"\$python3s3FileTransfer\.py--bucketnamemy-backup--backupfolderFOLDER--crashrun1",
    rf"sent1file,{SIZE}tos3://my-backup/in[\d.]+s\({SIZE}/s\);0failed;state:PLACE/stateFile\.json",
]


def text_of(path: Path) -> str:
    """The text in a picture without its spaces, its title and style left out."""
    root = ElementTree.fromstring(path.read_bytes())
    assert root.tag == f"{SVG}svg"
    rows = ("".join(row.itertext()) for row in root.iter(f"{SVG}text"))
    return re.sub(r"\s", "", "".join(rows))


def check_shown(path: Path, place: Path) -> None:
    """Check that a picture shows all that it should, in this order."""
    text, end = text_of(path), 0
    for pattern in SHOWN:
        named = pattern.replace("FOLDER", f"{place}/backup").replace("PLACE", str(place))
        found = re.compile(named).search(text, end)
        assert found, f"not in the picture: {named}\n{text[end:]}"
        end = found.start() + 1


def without_figures(text: str, place: Path) -> str:
    """The text with what is other in each run left out."""
    return re.sub(rf"{SIZE}|\d[\d.:]*", "0", text.replace(str(place), "PLACE"))


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A new picture, and where it was made."""
    place = tmp_path_factory.mktemp("srv")
    path = tmp_path_factory.mktemp("picture") / "new.svg"
    program = str(PICTURES / "terminal.py")
    options = ["--place", str(place), "--output", str(path)]
    subprocess.run([sys.executable, program, *options], check=True, timeout=120)
    return path, place


@pytest.mark.long
def test_the_picture_can_be_made_anew(made_anew: tuple[Path, Path]) -> None:
    path, place = made_anew
    check_shown(path, place)
    assert list(place.iterdir()) == []


def test_the_picture_that_is_here_shows_all_that_it_should() -> None:
    check_shown(PICTURES / "terminal.svg", Path("/srv"))


@pytest.mark.long
def test_the_picture_shows_what_the_program_prints_today(made_anew: tuple[Path, Path]) -> None:
    path, place = made_anew
    here = without_figures(text_of(PICTURES / "terminal.svg"), Path("/srv"))
    anew = without_figures(text_of(path), place)
    assert "PLACE/stateFile.json" in here
    assert here == anew


def test_the_picture_is_small_and_needs_nothing_else() -> None:
    picture = (PICTURES / "terminal.svg").read_text(encoding="utf-8")
    assert len(picture) < 40_000
    assert not re.search(r"<script|<image|<foreignObject|@import|@font-face|href|url\(", picture)
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]


def test_the_picture_says_nothing_of_the_machine_it_was_made_on() -> None:
    text = text_of(PICTURES / "terminal.svg")
    assert not re.search(r"127\.|localhost|@|/tmp|/home|/root|/Users|/var", text)
