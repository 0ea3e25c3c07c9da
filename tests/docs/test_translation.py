"""README.zh-CN.md says what README.md says: headings, commands, outputs, tables, measurements."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest

import pytest

from tests.cli.parse_only import FIRST_WORDS
from tests.ranks import ROOT

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


def headings(text: str) -> list[str]:
    """The levels of the headings."""
    return re.findall(r"^#+(?= )", text, re.M)


def code(text: str) -> list[str]:
    """The lines of the indented blocks, without the remarks beside commands."""
    found = re.findall(r"^ {4}.*\S", text, re.M)
    is_command = [line.split()[0] in FIRST_WORDS for line in found]
    beside = re.compile(r"(?<=\S)( {3,}|  +#).*")
    return [beside.sub("", a) if b else a for a, b in zip(found, is_command, strict=True)]


def table_cells(text: str) -> list[str]:
    """Of each cell of the tables, the code in it: names of rooms, files and commands."""
    cells = [cell for line in re.findall(r"^\|.*", text, re.M) for cell in line.split("|")[1:-1]]
    return [" ".join(re.findall(r"`[^`]+`", cell)) for cell in cells]


def table_numbers(text: str) -> list[str]:
    """Of each row of the tables, the numbers outside of code, whose order may be another."""
    rows = [re.sub(r"`[^`]+`", "", line) for line in re.findall(r"^\|.*", text, re.M)]
    return [" ".join(sorted(re.findall(r"\d[\d.]*(?:e-\d)?", row))) for row in rows]


def measurements(text: str) -> list[str]:
    """The lines that `fgpt report --readme` writes."""
    (block,) = re.findall(r"<!-- bench:best -->.*<!-- /bench:best -->", text, re.S)
    return block.splitlines()


PARTS: list[Callable[[str], list[str]]] = [
    headings,
    code,
    table_cells,
    table_numbers,
    measurements,
]


def difference(part: Callable[[str], list[str]], english: str, chinese: str) -> str:
    """The first place where a part of two texts differs; empty if none does."""
    pairs = zip_longest(part(english), part(chinese), fillvalue="(nothing)")
    for i, (one, other) in enumerate(pairs, 1):
        if one != other:
            return f"{part.__name__}, {i}: {ENGLISH} has\n{one}\n{CHINESE} has\n{other}"
    return ""


@pytest.mark.parametrize("part", PARTS)
def test_both_readmes_say_the_same(part: Callable[[str], list[str]]) -> None:
    english, chinese = ((ROOT / name).read_text() for name in (ENGLISH, CHINESE))
    assert len(part(english)) > 5
    assert not (found := difference(part, english, chinese)), found


@pytest.mark.parametrize(
    ("part", "before", "after"),
    [
        (headings, "\n## ", "\n### "),
        (code, "--tp 2 --pp 2", "--tp 2"),
        (code, "step      0/460", "step      1/460"),
        (table_cells, "`fgpt/plan`, ", ""),
        (table_numbers, "1.3e-7", "1.3e-6"),
        (measurements, "GPU: not measured.", "GPU: fast."),
    ],
)
def test_a_difference_is_said(part: Callable[[str], list[str]], before: str, after: str) -> None:
    english = (ROOT / ENGLISH).read_text()
    assert before in english
    found = difference(part, english, english.replace(before, after, 1))
    assert part.__name__ in found and f"{CHINESE} has" in found


def test_each_links_to_the_other() -> None:
    for name, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        first = "".join((ROOT / name).read_text().splitlines(keepends=True)[:5])
        assert f"]({other})" in first
    assert len((ROOT / ENGLISH).read_text().splitlines()) <= 150


def test_links_lead_to_files() -> None:
    for name in (ENGLISH, CHINESE, "docs/tutorial.md"):
        text = (ROOT / name).read_text()
        links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(
            r"`([\w/.-]+\.(?:md|json|png))`", text
        )
        folders = (ROOT, ROOT / "ds_configs")
        assert not [a for a in links if not any((folder / a).exists() for folder in folders)]
