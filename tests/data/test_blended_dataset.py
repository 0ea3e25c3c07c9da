"""The data sets of a run: opening them, their identity and their use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from fgpt.config.schema import DataConfig
from fgpt.data.best_fit import BestFitSamples
from fgpt.data.blend import BlendedSamples
from fgpt.data.recipe import Recipe
from fgpt.data.samples import StreamSamples
from fgpt.data.token_dataset import BlendedDataset, TokenDataset, open_blended_dataset
from fgpt.errors import DataError
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.spec import TokenizerSpec


def test_one_data_set_is_no_blend(prepared: TokenDataset) -> None:
    for text in (str(prepared.path), f"{prepared.path}:0.3"):
        blend = open_blended_dataset(text)
        assert blend.weights == (1,)
        assert blend.fingerprint() == prepared.card.fingerprint()
        assert type(blend.samples("train", DataConfig(), 32, seed=0)) is StreamSamples
        packed = blend.samples("valid", DataConfig(packing="best_fit"), 32, seed=0)
        assert type(packed) is BestFitSamples and packed.tokens.path.name == "valid.bin"


def test_shares_and_identity(prepared: TokenDataset, copy_of: Callable[[], Path]) -> None:
    copy = copy_of()
    blend = open_blended_dataset(f"{prepared.path}:0.6, {copy}:0.4")
    assert blend.weights == (Fraction(3, 5), Fraction(2, 5))
    name = prepared.card.fingerprint()
    assert blend.fingerprint() == f"3/5 of {name}, 2/5 of {name}"
    assert type(blend.samples("train", DataConfig(), 32, seed=0)) is BlendedSamples
    with pytest.raises(DataError, match="the model has 300 rows"):
        blend.check_fits(300)


def test_what_a_run_will_use(prepared: TokenDataset, copy_of: Callable[[], Path]) -> None:
    epoch = prepared.train.tokens // 32 - 1
    (line,) = open_blended_dataset(str(prepared.path)).usage(32, epoch // 2)
    assert f"{prepared.train.tokens:,} training" in line and line.endswith("; 0.5 epochs")
    blend = BlendedDataset((prepared, prepared), (Fraction(9, 10), Fraction(1, 10)))
    often, seldom = blend.usage(32, 2 * epoch)
    assert often.endswith("; 0.9 of the samples, 1.8 epochs: repeated")
    assert seldom.endswith("; 0.1 of the samples, 0.2 epochs")
    (short,) = open_blended_dataset(str(prepared.path)).usage(prepared.train.tokens, 1)
    assert short.endswith("repeated") or short.endswith("epochs")  # said before it is refused


def test_different_tokenizers_are_refused(
    prepared: TokenDataset, recipe: Recipe, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    smaller = replace(recipe, tokenizer=TokenizerSpec(vocab_size=300))
    prepare(smaller, other, progress=False)
    with pytest.raises(DataError) as caught:
        open_blended_dataset(f"{prepared.path}:1,{other}:1")
    assert str(caught.value).startswith(f"{prepared.path} and {other} have different tokenizers (")


def test_a_directory_that_is_none(prepared: TokenDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: not a prepared data set"):
        open_blended_dataset(f"{prepared.path}:1,{tmp_path / 'nothing'}:1")
