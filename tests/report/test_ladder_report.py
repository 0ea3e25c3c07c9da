"""The table and the plot of `fgpt bench recipe --ladder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.cli.report import report_verb
from fgpt.errors import UserError
from fgpt.report.ladder_report import ladder_parts, ladder_tables, read_ladder_records

CONSTANTS = {"E": 2.0, "A": 100.0, "a": 0.5, "B": 1000.0, "b": 0.5}
"""A/N^a is 0.1 at 1e6 parameters, B/D^b is 1 at 1e6 tokens."""


def point(width: int, parameters: float, tokens: float, loss: float, **more: Any) -> dict[str, Any]:
    predicted = 2 + 100 / parameters**0.5 + 1000 / tokens**0.5
    shape = {"d_model": width, "n_layer": 4, "parameters": parameters, "tokens": tokens}
    values = {"flops": 6 * parameters * tokens, "epochs": 0.1, "seconds": 3.0, "loss": loss}
    return {**shape, **values, "predicted": predicted, **more}


def record(**changes: Any) -> dict[str, Any]:
    about = {"row": "tiny", "recipe": "muon", "precision": "bf16", "data": "texts"}
    about |= {"seq_len": 256, "global_batch": 16, "diverged": []}
    spread = {name: [value * 0.9, value * 1.1] for name, value in CONSTANTS.items()}
    fitted = [point(64, 1e6, 1e6, 3.1), point(64, 1e6, 4e6, 2.6), point(128, 4e6, 1e6, 3.0)]
    left_out = [point(256, 16e6, 250e3, 4.1, lowest=4.0, highest=4.2)]
    law = {"constants": CONSTANTS, "spread": spread, "points": fitted, "left_out": left_out}
    head = {"measurement": "ladder", "hardware": "a CPU"}
    return {**head, **about, **law, **changes}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_table(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"measurement": "recipe"}, record(diverged=["4 x 96, 3 steps"])
    )
    text = ladder_tables(read_ladder_records([path]))
    assert text.startswith(
        "tiny, 4 layers, muon, bf16, 16 x 256 tokens a step, texts (a CPU):\n\n|"
    )
    assert "| 4 x 64 | 1.00M | 4.00M | 2.4e+13 | 2.600 | 2.600 | +0.0% |" in text
    assert "| 4 x 256, left out | 16.00M | 0.25M | 2.4e+13 | 4.100 | 4.025 | -1.8% |" in text
    words = " ".join(text.split())
    assert "E 2 (1.8 to 2.2), A 100 (90 to 110), a 0.5 (0.45 to 0.55)" in words
    assert "predicted 4.025 (4.000 to 4.200), measured 4.100: -0.075 nats, -1.8%." in words
    assert "has 3.000 at the same compute; taking that as the prediction: -26.8%." in words
    assert "Diverged and left out of the law: 4 x 96, 3 steps." in words
    assert ladder_tables([]) == "Not measured."


def test_shorter_runs_of_the_size_left_out_are_said_too(tmp_path: Path) -> None:
    runs = [point(256, 16e6, tokens, 4.1, lowest=4.0, highest=4.2) for tokens in (2e5, 250e3)]
    path = write(tmp_path / "a.jsonl", record(left_out=runs))
    words = " ".join(ladder_tables(read_ladder_records([path])).split())
    assert "-0.075 nats, -1.8% (its shorter runs: +3.9%). The next smaller size" in words


def test_the_last_record_of_a_ladder_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record(diverged=["x"]), record(recipe="adamw"), record())
    found = read_ladder_records([path])
    assert [(r.title.split(", ")[2], r.diverged) for r in found] == [("muon", []), ("adamw", [])]


def test_page_plot_and_readme(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record())
    (part,) = ladder_parts(read_ladder_records([path]))
    (picture,) = part.pictures
    assert picture.png.startswith(b"\x89PNG") and "measured 4.100" in picture.alt
    assert report_verb([str(path), "--out", str(tmp_path / "out")]) == 0
    assert "ladder: tiny" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / picture.name).exists()


def test_the_curves_are_the_law_and_the_points_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back from the figure: solid lines for fitted sizes, dashed for the one left out."""
    from fgpt.report import ladder_report

    figures: list[Any] = []
    monkeypatch.setattr(ladder_report, "png", lambda figure: figures.append(figure) or b"")
    ladder_parts(read_ladder_records([write(tmp_path / "a.jsonl", record())]))
    tokens, flops = figures[0].axes
    for axes, scale in ((tokens, 1 / 1e6), (flops, 6 * 16e6)):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        (curve,) = dashed
        x, y = curve.get_xdata()[30], curve.get_ydata()[30]
        assert y == pytest.approx(2 + 100 / 16e6**0.5 + 1000 / (x / scale) ** 0.5)
        marked = [line for line in axes.lines if line.get_label().startswith("4 x 256")]
        assert list(marked[0].get_xdata()) == pytest.approx([250e3 * scale])
        assert list(marked[0].get_ydata()) == [4.1]


@pytest.mark.parametrize(
    "changes",
    [{"constants": {"E": 1}}, {"points": []}, {"points": [{}]}, {"left_out": []}, {"spread": 3},
     {"left_out": [point(256, 16e6, 0.25e6, 0.0, lowest=1, highest=2)]}],
)  # fmt: skip
def test_damaged_record_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record(), record(**changes))
    with pytest.raises(UserError, match=f"{path}:2: the record .* -> measure it again"):
        read_ladder_records([path])
