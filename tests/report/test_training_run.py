"""Curves out of a metrics file, torn or not, and the picture of them."""

from __future__ import annotations

import io
import json

from rich.console import Console

from fgpt.report.run_record import read_metrics
from fgpt.report.training_run import plot_loss, print_summary, summary_rows


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


RECORDS = [
    {"step": 0, "valid_loss": 8.0},
    {"step": 1, "loss": 7.5, "skipped": False, "step_s": 0.5},
    {"step": 2, "loss": float("nan"), "skipped": True, "step_s": 0.25},
    {"step": 3, "loss": 7.0, "skipped": False, "step_s": 0.5},
    {"step": 3, "valid_loss": 7.1},
]


def test_columns(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, RECORDS, tail='{"step": 4, "lo')
    curves = read_metrics(file).curves()
    assert (curves.steps, curves.losses) == ([1, 3], [7.5, 7.0])
    assert (curves.valid_steps, curves.valid_losses) == ([0, 3], [8.0, 7.1])
    assert (curves.all_steps, curves.seconds) == (3, 1.25)


def test_picture(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, RECORDS)
    plot_loss(read_metrics(file).curves(), tmp_path / "loss.png", "a title")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (960, 540)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_summary_says_what_happened(tmp_path):
    summary = {
        "model": "tiny",
        "parameters": 4_273_664,
        "engine": "deepspeed, ZeRO stage 2, fp32",
        "ranks": 2,
        "device": "cpu",
        "steps": 400,
        "skipped_steps": 1,
        "tokens": 1_638_400,
        "train_loss": 4.0,
        "valid_loss_first": 8.36,
        "valid_loss": 4.21,
        "tokens_per_s": 10_000.0,
        "train_s": 164.0,
        "peak_memory_gib": 0.8,
        "checkpoint": None,
    }
    out = io.StringIO()
    rows = summary_rows(summary, tmp_path)
    print_summary(Console(file=out, width=200), "run", rows, ("def [bold]", "x[/bold]: pass"))
    text = out.getvalue()
    assert "8.3600 -> 4.2100 (fell by 4.15 nats)" in text
    assert "4,273,664 parameters" in text
    assert "def [bold]x[/bold]: pass" in text  # a sample is text, not markup
    summary |= {"valid_loss": None, "valid_loss_first": None}
    assert "validation loss" not in summary_rows(summary, tmp_path)
