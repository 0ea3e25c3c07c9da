"""`fgpt report RUN` and `fgpt runs`: what they read, compute, and write."""

from __future__ import annotations

import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fgpt.checkpoint.manifest import Start
from fgpt.cli import main
from fgpt.report import run_page as page
from fgpt.report.run_plots import FRAMES, curve_gif, terminal_plot
from fgpt.report.run_record import distinct_names, read_run

CONFIG = {
    "run": {
        "model": {"preset": "tiny", "max_seq_len": 256},
        "data": {"seq_len": 64},
        "train": {"steps": 4, "engine": "deepspeed"},
    },
    "deepspeed": {"optimizer": {"params": {"lr": 0.01}}},
    "batch": {"world": 2, "tp": 2, "pp": 1, "cp": 1, "global_size": 8},
    "precision": "bf16",
    "zero_stage": 1,
    "device": "cpu",
    "origins": {"deepspeed.optimizer.params.lr": "file ds.json"},
}
LOSSES = (4.0, 3.0, 2.5, 2.0)


def record(step: int, loss: float, **more: Any) -> str:
    fixed = {"step": step, "loss": loss, "step_s": 1800.0, "tokens_per_s": 100.0, "skipped": False}
    return json.dumps(fixed | {"learning_rate": 0.01, "grad_norm": 1.0, "data_wait_s": 18.0} | more)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps, the second one skipped."""
    path = tmp_path / "runs" / "first"
    path.mkdir(parents=True)
    lines = [record(i, loss, skipped=i == 2) for i, loss in enumerate(LOSSES, 1)]
    lines.insert(0, json.dumps({"step": 0, "valid_loss": 4.5}))
    lines.append(json.dumps({"step": 4, "valid_loss": 2.25}))
    lines.append(json.dumps({"step": 4, "suite": "mine", "accuracy": {"value": 0.5}}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    (path / "config.json").write_text(json.dumps(CONFIG))
    sample = {"step": 4, "prompt": "<b>", "text": "</script>\u00e9"}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return path


def embedded(html: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_the_page_has_the_values_of_the_metrics(run: Path) -> None:
    html = page.run_page([read_run(run)])
    data = embedded(html)
    (entry,) = data["runs"]
    loss, valid = entry["series"]["loss"], entry["series"]["valid_loss"]
    assert loss["y"] == [4.0, None, 2.5, 2.0]  # a skipped step has no loss
    assert loss["x"] == {
        "step": [1, 2, 3, 4],
        "tokens": [512, 1024, 1536, 2048],  # 8 samples of 64 tokens a step
        "hours": [0.5, 1.0, 1.5, 2.0],
    }
    assert (valid["x"]["step"], valid["x"]["hours"], valid["y"]) == (
        [0, 4],
        [0.0, 2.0],
        [4.5, 2.25],
    )
    assert entry["series"]["skipped_so_far"]["y"] == [0, 1, 1, 1]
    keys = [chart["key"] for chart in data["charts"]]
    assert keys == ["loss", "rate", "norm", "speed", "skipped", "suite-0"]  # what was recorded
    assert entry["series"]["suite mine"]["y"] == [0.5]
    for text in ("tiny, ZeRO-1, bf16, tp 2, 2 rank(s) on cpu", "0.01 (file ds.json)", "4 of 4"):
        assert text in html, text
    assert "<pre><b>&lt;b&gt;</b>&lt;/script&gt;\u00e9</pre>" in html
    assert not re.search(r'(src|href)="|@import|url\(h', html)  # it loads nothing


def test_no_text_ends_the_data(run: Path) -> None:
    """`<!--<script` would keep the element open to the end of the page."""
    record = {"step": 4, "suite": "<!--<script>", "accuracy": {"value": 0.5}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(record))
    html = page.run_page([read_run(run, "<!--<script></script>")])
    assert embedded(html)["runs"][0]["name"] == "<!--<script></script>"
    (data,) = re.findall(r'id="data">(.*?)</script>', html, re.S)
    assert "<" not in data and "&lt;!--&lt;script&gt;" in html


def test_much_is_thinned(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_SAMPLES", 3)
    monkeypatch.setattr("fgpt.report.run_series.MAX_POINTS", 4)
    samples = [json.dumps({"step": i, "prompt": "", "text": f"t{i}"}) for i in range(1, 11)]
    (run / "samples.jsonl").write_text("\n".join(samples))
    lines = [json.dumps({"step": i, "valid_loss": 1.0}) for i in range(1, 11)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    html = page.run_page([read_run(run)])
    assert re.findall(r"step (\d+)</summary>", html) == ["10", "6", "2"]
    valid = embedded(html)["runs"][0]["series"]["valid_loss"]
    assert valid["x"]["step"] == [1, 4, 7, 10]


def test_a_run_that_was_moved_is_not_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "lock").write_text(f"{os.getpid()}\n")
    monkeypatch.setattr(
        "fgpt.cli.report_runs.time.sleep", lambda seconds: run.rename(run.with_name("moved"))
    )
    assert main(["report", str(run), "--follow", "3"]) == 2
    assert not run.exists() and "No such file" in capsys.readouterr().err


def test_each_point_of_a_long_run_is_a_mean(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpt.report.run_series.MAX_POINTS", 2)
    loss = embedded(page.run_page([read_run(run)]))["runs"][0]["series"]["loss"]
    assert loss["x"]["step"] == [2, 4] and loss["y"] == [4.0, 2.25]


def test_runs_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parent / "second"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    config = CONFIG | {"deepspeed": {"optimizer": {"params": {"lr": 0.5}}}}
    (other / "config.json").write_text(json.dumps(config))
    out = run.parent / "compared"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["report.html"]
    html = (out / "report.html").read_text()
    assert [entry["name"] for entry in embedded(html)["runs"]] == ["first", "second"]
    (marked,) = re.findall(r"<tr class=differs>(.*?)</tr>", html)
    assert "deepspeed.optimizer.params.lr" in marked and "0.5" in marked
    assert main(["report", str(run), str(run / "config.json")]) == 2
    assert "name either run directories or files of records" in capsys.readouterr().err


def test_tokens_are_those_of_the_records(run: Path) -> None:
    lines = [record(i, 3.0, tokens=n) for i, n in ((1, 100), (2, 200), (4, 1224))]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    found = read_run(run)
    assert [found.tokens(step) for step in range(6)] == [0, 100, 200, 712, 1224, 1736]


def test_tokens_of_earlier_versions_are_those_of_the_starts(run: Path) -> None:
    """A start with another batch does not change those before it."""
    found = read_run(run)
    found.starts.append(Start(0, 0, {"ranks": 4}, (), "exported/hf"))
    found.starts.append(Start(2, 100, {"ranks": 1}, ("data.seed: 1 -> 2",)))
    assert [found.tokens(step) for step in range(5)] == [0, 50, 100, 612, 1124]
    html = page.run_page([found])
    assert "weights: exported/hf" in html
    assert (
        "ranks: 4 -&gt; 1" in html
        and "step 2" in html
        and "data.seed: 1 -&gt; 2" in html
        and "ranks 1" in html
    )


def test_the_curve_draws_itself(run: Path) -> None:
    lines = [record(i, 4.0 - i / 50) for i in range(1, 101)]
    lines += [json.dumps({"step": i, "valid_loss": 4.2 - i / 50}) for i in range(0, 101, 10)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    with Image.open(io.BytesIO(curve_gif(read_run(run)))) as image:
        assert image.n_frames == FRAMES  # type: ignore[attr-defined]
        colours = []
        for i in (0, FRAMES - 1):
            image.seek(i)
            rgb = image.convert("RGB")
            red = [p for p in rgb.get_flattened_data() if p[0] > p[1] + 60 and p[0] > p[2] + 60]
            colours.append(len(red))
    assert 4 * colours[0] < colours[1]  # the line of validation losses has grown


def test_what_a_terminal_shows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a rising line: one dot in each of the 8 rows and columns of dots
    cells = terminal_plot([([0, 7], [0.0, 7.0])], width=4, height=2)
    dots = {
        (4 * i + bit_row, 2 * j + bit_column)
        for i, row in enumerate(cells)
        for j, cell in enumerate(row)
        for bit_row, bits in enumerate(((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80)))
        for bit_column, bit in enumerate(bits)
        if cell & bit
    }
    assert dots == {(7 - i, i) for i in range(8)}
    assert {cell >> 8 for row in cells for cell in row if cell} == {1}
    before = sorted(run.iterdir())
    assert main(["report", str(run), "--terminal"]) == 0
    shown = capsys.readouterr().out
    assert "4.500" in shown and "step 0 to 4" in shown and "2.2500 at step 4" in shown
    assert any("\u2800" < letter <= "\u28ff" for letter in shown)
    assert sorted(run.iterdir()) == before


def test_the_report_follows_a_run_until_it_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "lock").write_text(f"{os.getpid()}\n")
    pages = []

    def another_step(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        if len(pages) == 2:
            (run / "lock").write_text("")
        lines = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
        (run / "metrics.jsonl").write_text(f"{lines}\n{record(4 + len(pages), 1.0)}\n")

    monkeypatch.setattr("fgpt.cli.report_runs.time.sleep", another_step)
    assert main(["report", str(run), "--follow", "3"]) == 0
    assert all('http-equiv="refresh" content="3"' in each for each in pages)
    last = (run / "report.html").read_text()
    assert "refresh" not in last and (run / "curve.gif").exists()
    assert embedded(last)["runs"][0]["series"]["loss"]["y"][-2:] == [1.0, 1.0]
    assert "first at step 6" in capsys.readouterr().out.splitlines()[-1]


def test_runs_lists_each_with_its_last_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(run.parent)]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["run", "state", "step"]
    assert row.split()[:6] == [str(run), "ended", "4/4", "2.0000", "2.2500", "100"]
    assert main(["runs", str(run / "nothing")]) == 2
    assert "no training run there" in capsys.readouterr().err
    (run.parent / "broken").mkdir()
    os.mkfifo(run.parent / "broken" / "metrics.jsonl")
    assert main(["runs", str(run.parent)]) == 0
    out, err = capsys.readouterr()
    assert str(run) in out and "broken: not a regular file" in err


HUGE = '{"step": 1, "loss": 1' + "0" * 400 + ', "step_s": 1}'
ODD = [
    "",
    HUGE,
    '{"step": 1, "loss": 2.0, "step_s": NaN}',
    "[]",
    "7",
    "{}",
    '{"step": "1", "loss": 2}',
    '{"step": 1, "loss": null}',
    "[" * 9999,
]


def test_lines_that_are_no_records_are_ignored(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_bytes("\n".join([*ODD, text]).encode() + b"\xff\n")
    (run / "config.json").write_text("{")
    found = read_run(run)
    assert [r["loss"] for r in found.records.steps] == list(LOSSES) and found.config == {}
    page.run_page([found])
    (run / "config.json").write_text('{"run": "x", "batch": 3, "origins": []}')
    page.run_page([read_run(run)])


def test_a_run_that_diverged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for loss in (math.nan, math.inf):
            file.write("\n" + record(5, loss) + "\n" + json.dumps({"step": 5, "valid_loss": loss}))
    assert main(["report", str(run), "--terminal"]) == main(["report", str(run)]) == 0
    embedded((run / "report.html").read_text())


def test_a_run_of_another_machine(run: Path) -> None:
    (run / "lock").write_text("1 on elsewhere\n")
    assert read_run(run).state == "running"  # its last record is new
    os.utime(run / "metrics.jsonl", (0, 0))
    assert read_run(run).state == "ended"


def test_ctrl_c_leaves_a_page_that_no_browser_renews(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "lock").write_text(f"{os.getpid()}\n")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fgpt.cli.report_runs.time.sleep", interrupted)
    assert main(["report", str(run), "--follow", "3"]) == 130
    assert "refresh" not in (run / "report.html").read_text() and (run / "curve.gif").exists()


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl; name the directory of a training run" in line
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert main(["report", str(tmp_path)]) == 2
    assert "not a regular file" in capsys.readouterr().err
    assert main(["report", "--terminal"]) == 2


def test_names_tell_runs_apart() -> None:
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/other")]
    assert distinct_names(paths) == ["x/run", "y/run", "other"]
