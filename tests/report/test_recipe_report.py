"""The table and the plot of `fgpt bench recipe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.cli.report import report_verb
from fgpt.errors import UserError
from fgpt.report.recipe_report import read_recipe_records, recipe_parts, recipe_tables

OLD = {"loss": [4.0, 3.9, 4.1], "step_time": [1, 1, 1], "tokens": [1, 1, 1], "seconds": [1, 1, 1]}
NEW = {"loss": [3.5, 3.5, 3.5], "step_time": [1.1, 1.0, 1.2], "tokens": [0.4, 0.3, 0.5]}
CURVES = [
    {"recipe": name, "seed": seed, "points": [[0, 0.0, 8.3], [4096, 1.0, 5.0], [8192, 2.0, end]]}
    for name, end in (("old", 4.0), ("new", 3.5))
    for seed in (1, 2)
]


def compared(**changes: Any) -> dict[str, Any]:
    about = {"row": "tiny", "precision": "bf16", "steps": 2, "tokens": 8192, "seeds": 2}
    values = {"old": OLD, "new": {**NEW, "seconds": None}}
    more = {"baseline": "old", "data": "texts", "values": values, "curves": CURVES}
    return {"measurement": "recipe", "hardware": "a CPU", **about, **more, **changes}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"measurement": "encode"}, compared(seeds=9), compared())
    text = recipe_tables(read_recipe_records([path]))
    assert text.startswith(
        "tiny, bf16, 2 steps of 4,096 tokens, texts: old, new (a CPU):\n\n| recipe |"
    )
    assert "| old | 4.000 (3.900-4.100) | 1.00 | 1.00 | 1.00 |" in text
    assert "| new | 3.500 | 1.10 (1.00-1.20) | 0.40 (0.30-0.50) | never |" in text
    assert "Median of 2 seeds" in text and text.count("| old |") == 1  # the last record
    assert recipe_tables([]) == "Not measured."


def test_page_and_plot(tmp_path: Path) -> None:
    (part,) = recipe_parts(read_recipe_records([write(tmp_path / "a.jsonl", compared())]))
    (picture,) = part.pictures
    assert picture.png.startswith(b"\x89PNG") and "old 4.000, new 3.500" in picture.alt
    assert report_verb([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert "recipe: tiny" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / picture.name).exists()


def test_other_recipes_are_another_comparison(tmp_path: Path) -> None:
    """And a long path of the data fits into the picture's file name."""
    curves = [line for line in CURVES if line["recipe"] == "old"]
    alone = compared(values={"old": OLD}, curves=curves, data="x" * 300)
    records = [compared(data="x" * 300), alone, compared(data="x" * 300)]
    parts = recipe_parts(read_recipe_records([write(tmp_path / "a.jsonl", *records)]))
    names = [part.pictures[0].name for part in parts]
    assert len(set(names)) == 2 and max(map(len, names)) < 100


@pytest.mark.parametrize("changes", [{"values": {"old": {}}}, {"curves": [{}]}, {"steps": "x"}])
def test_damaged_record_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", compared(), compared(**changes))
    with pytest.raises(UserError, match=f"{path}:2: the record .* -> measure it again"):
        read_recipe_records([path])
