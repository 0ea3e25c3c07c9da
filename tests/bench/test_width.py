"""The models of muP's checks, and wrong input to both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgpt.bench.width import shapes_at
from fgpt.cli.bench_recipe import bench_recipe_verb
from fgpt.config.presets import PRESETS
from fgpt.config.schema import Shapes
from fgpt.errors import UserError
from tests.bench.width_runs import small

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["tiny", "llama-tiny", "qwen3-0.6b", "seed-1m", "gpt2"])
def test_shapes_are_in_proportion(name: str) -> None:
    base = PRESETS[name]
    own, widths = Shapes.of(base), [base.d_model // 4, base.d_model // 2, base.d_model]
    found = shapes_at(base, widths)
    assert len({fields["d_head"] for fields in found.values()}) == 1
    for width, fields in found.items():
        share = width / base.d_model
        sizes = {name: fields[name] * fields["d_head"] for name in ("n_head", "n_kv_head")}
        assert sizes["n_head"] == share * own.n_head * own.d_head
        assert sizes["n_kv_head"] == share * own.n_kv_head * own.d_head
        assert fields["d_ff"] == share * own.d_ff


def test_heads_keep_their_width_where_it_divides() -> None:
    assert shapes_at(PRESETS["tiny"], [64, 512])[64]["d_head"] == 64
    assert shapes_at(PRESETS["tiny"], [32, 64])[64]["d_head"] == 32
    assert shapes_at(PRESETS["llama-tiny"], [64, 128])[64] == {
        "d_model": 64, "d_head": 32, "n_head": 2, "n_kv_head": 1, "d_ff": 176
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "flags", "words"),
    [
        ("coordinate-check", ["--widths", "64"], "--widths 64: one width has nothing to compare"),
        ("coordinate-check", ["--widths", "62", "93"], "no heads of one even width from 8 to 64"),
        ("rate-transfer", ["--widths", "64", "64"], "--widths 64: one width"),
        ("rate-transfer", ["--powers", "1", "2"], "--powers 1 2: a grid has three rates or more"),
        ("rate-transfer", ["--recipe", "b={json},{wide}"], "b: model.d_model 32: leave it out of"),
        ("coordinate-check", ["--recipe", "b={json},{mup}"], "b: model.mup_base 32: leave it out"),
    ],
)
def test_bad_input(
    mode: str, flags: list[str], words: str, small_data: Path, tmp_path: Path
) -> None:
    files = {"json": tmp_path / "own.json", "wide": tmp_path / "w.json", "mup": tmp_path / "m.json"}
    files["wide"].write_text(json.dumps({"model": {"d_model": 32}}))
    files["mup"].write_text(json.dumps({"model": {"mup": {"base": 32}}}))
    flags = [flag.format(**files) for flag in flags]
    with pytest.raises(UserError, match=words) as caught:
        bench_recipe_verb(small(tmp_path, small_data, mode, *flags))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "width.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ladder", "--rate-transfer"], "not allowed with argument"),
        (["--widths", "32", "64"], "--widths is for --coordinate-check and --rate-transfer"),
        (["--coordinate-check", "--powers", "0", "2"], "--powers is for --rate-transfer"),
    ],
)
def test_flags_that_contradict(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_recipe_verb(flags)
    assert words in capsys.readouterr().err
