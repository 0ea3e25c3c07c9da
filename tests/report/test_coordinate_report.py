"""The tables and plots of `fgpt bench recipe --coordinate-check` and `--rate-transfer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.cli.report import report_verb
from fgpt.errors import UserError
from fgpt.report import coordinate_report, rate_report
from fgpt.report.coordinate_report import (
    coordinate_parts,
    coordinate_tables,
    read_coordinate_records,
)
from fgpt.report.rate_report import rate_parts, rate_tables, read_rate_records

ABOUT = {
    "row": "tiny", "n_layer": 4, "recipe": "muon", "precision": "fp32", "data": "texts",
    "seq_len": 128, "global_batch": 8, "widths": [64, 128, 256], "base": 64, "hardware": "a CPU",
    "rates": {"optimizer.params.lr": 0.01, "optimizer.params.adam_lr": 0.02,
              "scheduler.params.warmup_max_lr": 0.01},
}  # fmt: skip


def kind(slope: float, *last: float) -> dict[str, Any]:
    changes = [[value / 2, value] for value in last]
    return {"slope": slope, "changes": changes, "sizes": [[1.0, *change] for change in changes]}


MLP = {"mup": kind(0.01, 0.50, 0.51, 0.52), "standard": kind(0.98, 0.50, 1.0, 1.95)}
LOGITS = {"mup": kind(-0.1, 0.2, 0.19, 0.18), "standard": kind(0.5, 0.2, 0.3, 0.4)}


def checked(**changes: Any) -> dict[str, Any]:
    more = {"steps": 2, "seeds": 3, "activations": {"blocks.0.mlp": MLP, "logits": LOGITS}}
    return {"measurement": "coordinate_check", **ABOUT, **more, **changes}


def curve(width: int, mup: bool, best: int, vertex: float | None, **more: Any) -> dict[str, Any]:
    losses = [None if power == 3 else 4.0 + abs(power - best) / 10 for power in range(-1, 4)]
    about = {"d_model": width, "mup": mup, "powers": list(range(-1, 4)), "losses": losses}
    return {**about, "best": best, "vertex": vertex, "at_end": False, **more}


def transferred(**changes: Any) -> dict[str, Any]:
    curves = [curve(64, False, 2, None), curve(128, True, 2, 2.1), curve(256, True, 1, 1.4)]
    curves += [curve(128, False, 1, 1.2), curve(256, False, -1, None, at_end=True)]
    more = {"steps": 100, "seeds": 1, "curves": curves}
    return {"measurement": "rate_transfer", **ABOUT, **more, **changes}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_coordinate_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"measurement": "recipe"}, checked(seeds=9), checked())
    text = coordinate_tables(read_coordinate_records([path]))
    assert text.startswith(
        "tiny, 4 layers, muon, fp32, 2 steps of 8 x 128 tokens, texts, d_model 64, 128, 256"
    )
    assert text.count("| logits |") == 1
    assert "| output of | slope with muP | without | 64 to 256 with muP | without |" in text
    assert "| blocks.0.mlp | +0.01 | +0.98 | 1.04 | 3.90 |" in text
    words = " ".join(text.split())
    assert "after 2 steps at the recipe's constant rate (lr 0.01, adam_lr 0.02)" in words
    assert "mean over 3 seeds" in words and "over the widths 64, 128, 256" in words
    assert coordinate_tables([]) == "Not measured."


def test_rate_table(tmp_path: Path) -> None:
    base = curve(64, False, 2, 1.9)
    curves = [base, *transferred()["curves"][1:]]
    path = write(tmp_path / "a.jsonl", transferred(), transferred(curves=curves))
    text = rate_tables(read_rate_records([path]))
    assert "| 64 | base | 4 | - | - | 4.000 | 4.000 |" in text
    assert "| 128 | with | 4 | +0 | +0.2 | 4.000 | 4.000 |" in text
    assert "| 256 | with | 2 | -1 | -0.5 | 4.000 | 4.100 |" in text
    assert "| 256 | without | 0.5 (end of the grid) | -3 | - | 4.000 | 4.300 |" in text
    words = " ".join(text.split())
    assert "after 100 steps" in words and "end of the grid: no rate beyond it was tried" in words
    assert rate_tables([]) == "Not measured."


def test_a_rate_that_diverged_or_was_not_tried(tmp_path: Path) -> None:
    base = curve(64, False, 7, None, powers=list(range(4, 9)))
    narrow = curve(128, True, 2, None)
    path = write(tmp_path / "a.jsonl", transferred(curves=[base, narrow]))
    assert "| 128 | with | 4 | -5 | - | 4.000 | - |" in rate_tables(read_rate_records([path]))
    narrow["powers"] = [0, 1, 2, 3, 7]  # the last one diverged
    path = write(tmp_path / "b.jsonl", transferred(curves=[base, narrow]))
    assert "| diverged |" in rate_tables(read_rate_records([path]))


def test_page_and_readme(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", checked(), transferred())
    parts = [*coordinate_parts(read_coordinate_records([path])),
             *rate_parts(read_rate_records([path]))]  # fmt: skip
    pictures = [picture for part in parts for picture in part.pictures]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)
    assert "blocks.0.mlp +0.01 and +0.98" in pictures[0].alt
    assert "128 with 4" in pictures[1].alt
    readme = tmp_path / "README.md"
    names = ("coordinate", "rates")
    readme.write_text("".join(f"<!-- bench:{n} -->\n\n<!-- /bench:{n} -->\n" for n in names))
    flags = [str(path), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert report_verb(flags) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "coordinate check: tiny" in page and "rate transfer: tiny" in page
    assert all((tmp_path / "out" / picture.name).exists() for picture in pictures)
    assert (
        "| blocks.0.mlp | +0.01 |" in readme.read_text() and "| 64 | base |" in readme.read_text()
    )


def test_lines_are_the_measured_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the figures."""
    figures: list[Any] = []
    for module in (coordinate_report, rate_report):
        monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or b"")
    both = {
        kind: {**MLP[kind], "changes": [[1e-3, *c] for c in MLP[kind]["changes"]]} for kind in MLP
    }
    path = write(
        tmp_path / "a.jsonl",
        checked(steps=3, activations={"blocks.0.mlp": both, "logits": both}),
        transferred(),
    )
    coordinate_parts(read_coordinate_records([path]))
    rate_parts(read_rate_records([path]))
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["blocks.0.mlp", "logits"]
    lines = {line.get_label(): line for line in panels[0].lines}
    assert list(lines["muP: +0.01"].get_xdata()) == [64, 128, 256]
    assert list(lines["without: +0.98"].get_ydata()) == [0.5, 1.0, 1.95]
    with_mup, without = figures[1].axes
    for axes, best in ((with_mup, [4, 4, 2]), (without, [4, 2, 0.5])):
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert [float(star.get_xdata()[0]) for star in stars] == best
    curves = {line.get_label(): line for line in with_mup.lines}
    assert list(curves["256"].get_xdata()) == [0.5, 1, 2, 4]  # that of 8 diverged
    assert list(curves["256"].get_ydata()) == pytest.approx([4.2, 4.1, 4.0, 4.1])


@pytest.mark.parametrize(
    "record",
    [
        checked(activations={}),
        checked(activations={"logits": {"mup": MLP["mup"]}}),
        checked(steps=3),
        checked(widths=[64]),
        checked(activations={"logits": {**LOGITS, "mup": kind(0, 0.1, 0.0, 0.2)}}),
        transferred(curves=[curve(64, False, 2, None)]),
        transferred(curves=[curve(64, False, 3, None), curve(128, True, 2, None)]),
        transferred(rates=3),
    ],
)
def test_damaged_record_is_one_line(record: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", checked(), transferred(), record)
    with pytest.raises(UserError, match=f"{path}:3: the record .* -> measure it again"):
        read_coordinate_records([path])
        read_rate_records([path])
