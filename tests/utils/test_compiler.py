"""What is missing for compiled code, on machines without a compiler or without headers."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from fgpt.utils.compiler import missing_compiler


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder with every compiler, and Python's headers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcc", "g++", "clang", "clang++", "other"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "Python.h").touch()
    for name in ("CC", "CXX", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(headers))
    return folder


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_nothing_is_missing(kind: str, tools: Path) -> None:
    assert missing_compiler(kind) is None


@pytest.mark.parametrize(
    ("kind", "removed", "variable", "value", "says"),
    [
        (
            "cpu",
            ["g++", "clang++"],
            "CC",
            "other",
            "no C++ compiler (g++): install g++, or set CXX",
        ),
        (
            "cuda",
            ["gcc", "clang"],
            "CXX",
            "other",
            "no C compiler (gcc or clang): install gcc, or set CC",
        ),
        ("cuda", ["gcc"], "CXX", "other", None),
        ("cpu", ["g++"], "CXX", "other", None),
        ("cuda", ["gcc", "clang"], "CC", "other", None),
        (
            "cuda",
            [],
            "CC",
            "absent",
            "no C compiler (CC=absent is not found): install gcc, or set CC",
        ),
        ("cuda", [], "CC", "", "no C compiler (CC= is not found): install gcc, or set CC"),
    ],
)
def test_compilers(
    kind: str,
    removed: list[str],
    variable: str,
    value: str,
    says: str | None,
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in removed:
        (tools / name).unlink()
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.platform", "linux")
    assert missing_compiler(kind) == says


def test_an_empty_path(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for kind in ("cpu", "cuda"):
        assert "compiler" in (missing_compiler(kind) or "")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_headers(kind: str, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = sysconfig.get_path("include")
    absent = tools / "absent"
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(absent))
    missing = missing_compiler(kind)
    assert missing is not None and missing.startswith(f"no Python.h in {absent}: install Python's")
    monkeypatch.setenv("CPATH", f"/nowhere:{headers}")  # as the advice says
    assert missing_compiler(kind) is None
