"""The runner of the acceptance checks: lines, codes, time limits, what a second call repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from fgpt.acceptance import run
from fgpt.acceptance.check import CHECKS, NEEDS_GPU, Check
from fgpt.acceptance.report import read_lines
from fgpt.acceptance.run import TIME_UP, run_gpu_check
from fgpt.errors import UserError
from tests.ranks import ROOT, wait_until

HEADER = {"format": 1, "header": True, "hardware": "a machine", "commit": "c0ffee"}


def planted(name: str, limit_s: float = 60.0, **options: Any) -> Check:
    return Check(name, f"planted:{name}", limit_s, "", **options)


@pytest.fixture
def header(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The header that a run finds; its checks are those of planted.py."""
    facts = dict(HEADER)
    monkeypatch.setattr(run, "_setup", lambda folder, device: {**facts, "device": device})
    monkeypatch.setattr(run, "PACKAGE", "tests.acceptance")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return facts


def call(out: Path, *checks: Check, **options: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the last line of each check."""
    code = run_gpu_check(out, device="cpu", checks=checks, show=lambda line: None, **options)
    return code, {line["check"]: line for line in read_lines(out)[1:]}


def test_each_check_ends_in_one_line(tmp_path: Path, header: dict[str, Any]) -> None:
    """A crash, an error and a hang end no other check."""
    checks = [planted(name) for name in ("passes", "exceeds", "raises", "crashes")]
    checks += [planted("hangs", 3.0), planted("passes_on_gpus", cpu_stand_in=False)]
    code, lines = call(tmp_path / "report.jsonl", *checks)
    assert code == 1
    assert {name: line["state"] for name, line in lines.items()} == {
        "passes": "passed",
        "exceeds": "failed",
        "raises": "failed",
        "crashes": "failed",
        "hangs": "failed",
        "passes_on_gpus": "not run",
    }
    passed = lines["passes"]
    assert passed["ok"] is True and passed["device"] == "cpu" and 0 < passed["seconds"] < 60
    assert passed["figures"] == {"speed": {"value": 3.0, "unit": "tokens/s"}}
    assert passed["not_run"] == {"a kernel": NEEDS_GPU} and passed["error"] is None
    assert lines["exceeds"]["error"] == (
        "error: 0.002 relative, at most 0.001; nothing: nan nats, at most 1"
    )
    assert lines["exceeds"]["figures"]["nothing"]["value"] == "nan"
    assert lines["raises"]["error"] == "ValueError: no such kernel"
    assert lines["crashes"]["error"].startswith("the process ended with SIGSEGV")
    assert lines["hangs"]["error"].startswith("still ran after 9 s")
    assert lines["passes_on_gpus"]["not_run"] == {"all": NEEDS_GPU}
    child = int((tmp_path / "work/child").read_text())
    wait_until(lambda: not psutil.pid_exists(child), 10, "the end of the hanging check's child")


def test_a_second_call_goes_on_with_what_is_missing(tmp_path: Path, header: dict[str, Any]) -> None:
    out = tmp_path / "report.jsonl"
    assert call(out, planted("passes"), planted("raises"), only=["passes"])[0] == 0
    seconds = call(out, planted("passes"), planted("raises"))[1]
    assert [line["check"] for line in read_lines(out)[1:]] == ["passes", "raises"]
    # torn by a kill: the line is written again
    out.write_text(out.read_text()[:-20])
    again = call(out, planted("passes"), planted("raises"))[1]
    assert again["passes"] == seconds["passes"] and again["raises"]["state"] == "failed"
    call(out, planted("passes"), again=True)
    assert [line["check"] for line in read_lines(out)[1:]].count("passes") == 2


def test_a_report_of_another_commit_counts_for_nothing(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    out = tmp_path / "report.jsonl"
    call(out, planted("passes"))
    header["commit"] = "another"
    call(out, planted("passes"))
    earlier = read_lines(tmp_path / "report.earlier.jsonl")
    assert earlier[0]["commit"] == "c0ffee" and earlier[1]["state"] == "passed"
    assert [line.get("commit", line.get("check")) for line in read_lines(out)] == [
        "another",
        "passes",
    ]


def test_no_check_starts_when_the_time_is_up(tmp_path: Path, header: dict[str, Any]) -> None:
    code, lines = call(tmp_path / "report.jsonl", planted("passes"), minutes=0.1)
    assert code == 1 and lines["passes"]["not_run"] == {"all": TIME_UP}


def test_an_unknown_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--only mask: unknown check; did you mean 'masks'\?"):
        run_gpu_check(tmp_path / "report.jsonl", device="cpu", only=["mask"])


def test_the_table_names_functions() -> None:
    for check in CHECKS:
        module, _, function = check.function.partition(":")
        source = (ROOT / "fgpt/acceptance" / f"{module}.py").read_text()
        assert f"def {function}(found: Findings) -> None:" in source
    names = [check.name for check in CHECKS]
    assert len({*names}) == len(names) and json.dumps(names).isascii()
