"""The `fgpt` command."""

from __future__ import annotations

import sys
from subprocess import PIPE, run

import pytest

from fgpt.cli import VERBS, main
from tests.ranks import ROOT


def test_help_names_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys, fgpt.cli; fgpt.cli.main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'deepspeed', 'rich') if m in sys.modules])"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert verb in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_verb(capsys):
    assert main(["chekc"]) == 2
    assert "did you mean check?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    assert "verbs: check" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"fgpt {verb}" in capsys.readouterr().out


def test_errors_are_one_report_and_exit_code_2(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text('{"gradient_clipp1ng": 1.0, "zero_optimization": {"stage": 9}}')
    assert main(["check", "--ds_config", str(bad)]) == 2
    error = capsys.readouterr().err
    assert "gradient_clipping" in error and "stage" in error
    assert "Traceback" not in error
    assert (
        main(["prepare", "--input", str(tmp_path / "nothing"), "--out", str(tmp_path / "o")]) == 2
    )
    assert "nothing" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "fgpt 0.1.0\n"


def test_output_that_cannot_be_written() -> None:
    command = [sys.executable, "-m", "fgpt.cli", "check", "--device", "cpu", "--ds_config"]
    command.append(str(ROOT / "ds_configs" / "zero2.json"))
    for words in (command, [*command[:3], "--help"], [*command[:3], "--version"]):
        with open("/dev/full", "w") as full:
            done = run(words, stdout=full, stderr=PIPE, text=True, cwd=ROOT)
        said = "fgpt: output cannot be written: No space left on device\n"
        assert (done.returncode, done.stderr) == (1, said)
    closed = run(
        f"{' '.join(command)} --json | head -c 1 > /dev/null",
        shell=True,
        stderr=PIPE,
        text=True,
        cwd=ROOT,
    )
    assert closed.stderr == ""
