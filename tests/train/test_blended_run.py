"""A run on two corpora with a document mask equals a loop written out in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.config.presets import PRESETS
from fgpt.config.schema import DataConfig
from fgpt.data.token_dataset import open_blended_dataset
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.optim.build import parameter_groups
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.spec import TokenizerSpec
from tests.prepare.corpora import small_recipe
from tests.ranks import run_ranks
from tests.tiny import ADAM, STEPS, Tiny, train_all

CONFIG = replace(
    PRESETS["tiny"], n_layer=2, d_model=32, n_head=2, vocab_size=400, max_seq_len=32
)  # as in tests.tiny
GLOBAL_BATCH = 4


@pytest.fixture
def other_data(tmp_path: Path, small_data: Path) -> Path:
    """A second data set, of short documents, with the first one's tokenizer."""
    texts = tmp_path / "other"
    texts.mkdir()
    for i in range(120):
        (texts / f"{i:03d}.txt").write_text(" ".join("hgfedcba"[j % 8 :] for j in range(i % 7 + 1)))
    tokenizer = TokenizerSpec(path=str(small_data / "tokenizer.json"))
    prepare(small_recipe(texts, tokenizer=tokenizer), tmp_path / "second", progress=False)
    return tmp_path / "second"


def begins_after(ids: Tensor, eod: int) -> Tensor:
    """Column at which each token's document begins: the one after the last end before it."""
    begins = torch.zeros_like(ids)
    for row, tokens in enumerate(ids.tolist()):
        for column in range(1, len(tokens)):
            ended = tokens[column - 1] == eod
            begins[row, column] = column if ended else begins[row, column - 1]
    return begins


def written_out(p: Mapping[str, Tensor], ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Return logits of GPT-2's architecture; `mask`: bool [B, T, T], query x key."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    x = p["embedding.token.weight"][ids] + p["embedding.position.weight"][positions]
    for i in range(CONFIG.n_layer):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.attention.qkv", norm(f"{block}.attention_norm", x))
        q, k, v = qkv.unflatten(-1, (CONFIG.n_head, 3, -1)).permute(3, 0, 2, 1, 4)
        scores = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(~mask[:, None], -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{block}.attention.out", y)
        h = F.gelu(linear(f"{block}.mlp.up", norm(f"{block}.mlp_norm", x)), approximate="tanh")
        x = x + linear(f"{block}.mlp.down", h)
    return F.linear(norm("final_norm", x), p["embedding.token.weight"])


def losses_written_out(path: str, packing: str, *, apart: bool = True) -> list[tuple[int, float]]:
    """Return (step, loss) of training on this blend."""
    data = open_blended_dataset(path)
    options = DataConfig(packing=packing, document_mask=True)
    samples = data.samples("train", options, 32, seed=DataConfig.seed)
    model = GPT(CONFIG)
    initialize(model, CONFIG, 1234)
    parameters = dict(model.named_parameters())
    adam = {name: value for name, value in ADAM.items() if name != "torch_adam"}
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters()), **adam)
    column, losses = torch.arange(32), []
    for step in range(STEPS):
        numbers = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH).numpy()
        ids, targets, said = (torch.from_numpy(x) for x in samples.batch(numbers))
        begins = begins_after(ids, data.tokenizer.eod_id) if packing == "stream" else said
        begins = begins if apart else torch.zeros_like(ids)
        sees = (column <= column[:, None]) & (column >= begins[..., None])
        logits = written_out(parameters, ids, sees, column - begins)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((step + 1, loss.item()))
    return losses


@pytest.mark.dist
@pytest.mark.timeout(170)
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_losses_are_those_of_an_explicit_mask(tiny: Tiny, other_data: Path, packing: str) -> None:
    path = f"{tiny.data}:0.6,{other_data}:0.4"
    how = ["document_mask=true", "reset_positions=true", f"packing={packing}"]
    more = ["--data", path, *(f"--set=data.{x}" for x in how)]
    four = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": GLOBAL_BATCH}
    plain = tiny.ds("plain", zero_optimization={"stage": 0}, **four)
    alone = tiny.flags("plain", *more, "--set=train.engine=plain", ds=plain)
    assert run_ranks(train_all, 1, [alone])[0][0].error == ""
    together = tiny.flags("ranks", *more, ds=tiny.ds(**four))
    outcome = run_ranks(train_all, 2, [together])[0][0]
    assert outcome.error == ""
    for line in (f"{tiny.data}: ", "0.6 of the samples, ", "0.4 of the samples, "):
        assert line in outcome.output
    wanted = losses_written_out(path, packing)
    for run in ("plain", "ranks"):
        for (step, found), (at, loss) in zip(tiny.losses(run), wanted, strict=True):
            assert step == at and found == pytest.approx(loss, rel=2e-5), (run, step)
    unmasked = losses_written_out(path, packing, apart=False)
    assert max(abs(a[1] - b[1]) for a, b in zip(unmasked, wanted, strict=True)) > 3e-3


@pytest.mark.dist
@pytest.mark.timeout(170)
def test_another_blend_is_another_run(tiny: Tiny, other_data: Path) -> None:
    def flags(*more: object) -> list[str]:
        ds = tiny.ds(zero_optimization={"stage": 0})
        return tiny.flags("run", "--set=train.engine=plain", "--steps=2", *more, ds=ds)

    def blend(first: str, second: str, *more: object) -> list[str]:
        path = f"{tiny.data}:{first},{other_data}:{second}"
        return flags("--data", path, "--resume", "auto", *more)

    runs = [
        blend("0.6", "0.4"),
        blend("3", "2"),  # the same
        blend("0.5", "0.5"),
        flags("--resume", "auto"),
        blend("3", "2", "--set=data.packing=best_fit"),
        blend("3", "2", "--set=data.document_mask=true"),
    ]
    ended = run_ranks(train_all, 1, runs)[0]
    assert [outcome.code for outcome in ended] == [0, 0, 2, 2, 2, 2]
    assert "fingerprint of the data card): checkpoint '3/5 of " in ended[2].error
    assert "this run '1/2 of " in ended[2].error
    assert "data.packing: checkpoint 'stream', this run 'best_fit'" in ended[4].error
    assert "data.document_mask: checkpoint False, this run True" in ended[5].error
