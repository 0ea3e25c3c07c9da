"""The modules that a training start loads: nothing that only preparing needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOADED = """
import importlib, json, pkgutil, sys
import fgpt.data
for module in pkgutil.walk_packages(fgpt.data.__path__, "fgpt.data."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """All modules in a process that imported every module of fgpt.data."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=120
    )
    modules: list[str] = json.loads(done.stdout)
    return modules


def test_reading_imports_nothing_of_preparing(loaded: list[str]) -> None:
    assert [name for name in loaded if name.startswith("fgpt.prepare")] == []


def test_a_training_start_reads_few_files_of_data(loaded: list[str]) -> None:
    assert len([name for name in loaded if name.startswith("fgpt.data")]) <= 13


def test_the_tokenizer_libraries_are_loaded_on_first_use(loaded: list[str]) -> None:
    assert {"tokenizers", "sentencepiece", "fgpt.tokenizer.load"}.isdisjoint(loaded)
