"""Strict JSON: each way in which a file is not, with its place and a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpt.errors import ConfigError
from fgpt.utils.strict_json import parse, read_object


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_object(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "holds a list, not an object"),
        ("3", "holds a number, not an object"),
        ('"x"', "holds a string, not an object"),
        ("null", "holds null, not an object"),
        ('{"a": 1', "line 1 column 8"),
        ('{"a": 1', "truncated"),
        ('{"a": "x', "truncated"),
        ('{\n  "a": 1,\n}', "delete the comma"),
        ('{"a": [1, 2,]}', "delete the comma"),
        ('{"a": 1 // one\n}', "no comments"),
        ('{"a": 1, # one\n}', "no comments"),
        ('/* a */ {"a": 1}', "no comments"),
        ("{'a': 1}", "double quotes"),
        ('{"a": True}', "true, false or null"),
        ("{a: 1}", "double quotes"),
        ('{"a": 1} {"b": 2}', "delete what follows"),
        ('{"a": {"b": NaN}}', "a.b: nan is not a finite number"),
        ('{"a": [1, -Infinity]}', "a[1]: -inf is not a finite number"),
        ('{"a": 1e999}', "a: inf is not a finite number"),
        ('{"a": {"b": 1, "b": 2}}', "'a.b' is written 2 times"),
        ('{"a": 1, "a": 1}', "'a' is written 2 times"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_refused_text(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    message = refusal(file)
    assert expected in message
    assert str(file) in message


def test_place_of_a_syntax_error(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{\n  "a": 1\n  "b": 2\n}')
    assert f"{file}: line 3 column 3" in refusal(file)


def test_refused_bytes_and_paths(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.json")
    assert "is a directory" in refusal(tmp_path)
    file = tmp_path / "x.json"
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert "byte-order mark" in refusal(file)
    file.write_bytes(b'{"a": "\xff"}')
    assert "is not UTF-8 (byte 7)" in refusal(file)
    assert "cannot be read" in refusal(file / "below")


def test_every_fault_of_one_file() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('{"a": NaN, "b": {"c": 1, "c": Infinity}}', "x")
    assert len(caught.value.issues) == 3


def test_good_json_is_what_it_says() -> None:
    text = '{"a": [1, 2.5, "x", true, null], "b": {"c": {}}}'
    assert parse(text, "x") == {"a": [1, 2.5, "x", True, None], "b": {"c": {}}}
