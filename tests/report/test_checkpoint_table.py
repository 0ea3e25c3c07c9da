"""The tables of `fgpt bench checkpoint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.cli.report import report_verb
from fgpt.errors import UserError
from fgpt.report.checkpoint_table import LINES, read_save_records, save_tables


def saved(**changes: Any) -> dict[str, Any]:
    """A record in which every value is 2 (1-4), and checkpoints are 2 and 3 GB."""
    names = {name for _, *names in LINES for name in names if name is not None}
    values = dict.fromkeys(sorted(names | {"verify_s", "step during / step"}), [2.0, 1.0, 4.0])
    values |= {"bytes": [2e9, 2e9, 2e9], "deepspeed_bytes": [3e9, 3e9, 3e9]}
    about = {"row": "gpt2", "precision": "bf16", "zero": 2, "ranks": 2, "rounds": 5}
    return {"measurement": "checkpoint", "hardware": "a CPU", **about, "values": values, **changes}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"measurement": "encode"}, saved(rounds=1), saved())
    text = save_tables(read_save_records([path]))
    assert text.startswith("gpt2, bf16 ZeRO-2, 2 ranks (a CPU):\n\n|  | FGPT | DeepSpeed | x |")
    assert "| on disk, GB | 2.000 | 3.000 | 2.000 | - | - |" in text
    cell = "2.00 (1.00-4.00)"
    assert f"| save, s | {' | '.join([cell] * 5)} |" in text
    assert f"| verify, load, s | {cell} | {cell} | {cell} | - | - |" in text
    assert "Median of 5 rounds" in text and text.count("on disk") == 1  # the last record
    assert max(map(len, text.splitlines())) <= 112
    assert text.endswith("GPU: not measured.")
    assert save_tables([]) == "Not measured."


def test_engines_and_machines_have_their_own(tmp_path: Path) -> None:
    records = saved(), saved(zero=1, precision="fp32"), saved(hardware="another CPU")
    assert len(read_save_records([write(tmp_path / "a.jsonl", *records)])) == 3


@pytest.mark.parametrize("changes", [{"values": {}}, {"values": {"bytes": [1]}}, {"rounds": "x"}])
def test_damaged_record_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", saved(), saved(**changes))
    with pytest.raises(UserError, match=f"{path}:2: the record .* -> measure it again"):
        read_save_records([path])


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fgpt.cli.report.COMMITTED", tmp_path)
    write(tmp_path / "a.jsonl", saved())
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:checkpoint -->\n<!-- /bench:checkpoint -->\n")
    assert report_verb(["--readme", str(readme), "--check"]) == 1
