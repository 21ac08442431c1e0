"""The README's sections and code blocks, for tests that do what it says."""

from __future__ import annotations

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
