"""The README's sections and code blocks, for tests that do what it says."""

from __future__ import annotations

import configparser
import re

from .script import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text under a heading of the second level."""
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of a language under a heading."""
    return blocks_of(section(heading), language)


def blocks_of(text: str, language: str) -> list[str]:
    """The code blocks of a language in a text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without the table's own head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = (re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:])
    return [[cell.strip() for cell in row] for row in cells]


def crontab(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The variables of a crontab, and its schedules with their commands, as crontab(5) reads it."""
    variables: dict[str, str] = {}
    jobs: list[tuple[str, str]] = []
    for line in text.splitlines():
        if variable := re.fullmatch(r"(\w+)\s*=\s*(.*)", line):
            variables[variable[1]] = variable[2]
        else:
            *fields, command = line.split(maxsplit=5)
            # cron takes an unescaped % for the end of the command.
            assert len(fields) == 5 and "%" not in command, line
            jobs.append((" ".join(fields), command))
    return variables, jobs


def units(text: str) -> dict[str, configparser.ConfigParser]:
    """The systemd units in a text, in which a comment names the file of each."""
    found: dict[str, configparser.ConfigParser] = {}
    for part in re.split(r"^# ", text, flags=re.MULTILINE)[1:]:
        name, _, lines = part.partition("\n")
        unit = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(re.sub(r"\\\n\s*", "", lines), source=name)
        found[name] = unit
    return found
