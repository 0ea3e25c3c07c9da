"""The table of `make test-faults`: it is complete, its tests exist, a failure shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import ROOT, SCENARIOS, Result, function_names, line, read_report, result_of

REPORT = """<testsuites><testsuite>
<testcase classname="tests.train.test_a" name="test_kill[0]" time="1.5">
  <properties><property name="gone_s" value="0.5"/></properties></testcase>
<testcase classname="tests.train.test_a" name="test_kill[1]" time="2.5">
  <properties><property name="gone_s" value="3.5"/></properties></testcase>
<testcase classname="tests.train.test_a" name="test_other" time="1"><failure/></testcase>
<testcase classname="tests.train.test_b" name="test_root" time="1"><skipped/></testcase>
</testsuite></testsuites>"""


def test_every_scenario_has_a_row() -> None:
    assert [*SCENARIOS] == [f"T{i}" for i in range(1, 32)] + [f"F{i}" for i in range(1, 16)]


@pytest.mark.parametrize("number", SCENARIOS)
def test_the_tests_of_a_row_exist(number: str) -> None:
    for test in SCENARIOS[number].tests:
        file, _, function = test.partition("::")
        names = list(function_names(ROOT / "tests" / file))
        assert names and function in ("", *names), test


def test_a_row_is_the_sum_of_its_tests(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(REPORT)
    results = read_report(file)

    def result(*tests: str) -> Result:
        from tests.faults import Scenario

        return result_of(Scenario("killed", tests), results)

    killed = result("train/test_a.py::test_kill")
    assert (killed.verdict, killed.passed, killed.seconds, killed.gone_s) == ("pass", 2, 4.0, 3.5)
    said = line("T1", SCENARIOS["T1"], killed)
    assert said.startswith("T1   pass  lost nothing  gone   3.5 s") and "(2 tests, 4 s)" in said
    assert result("train/test_a.py").verdict == "FAIL"
    assert result("train/test_b.py::test_root").verdict == "skip"
    assert result("train/test_kil").verdict == "FAIL"  # did not run
