"""`--init_from`: a new run begins with the weights of another model, at any layout."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fgpt.checkpoint.manifest import read_manifest
from fgpt.cli import main
from fgpt.config.schema import DataConfig
from fgpt.data.token_dataset import open_blended_dataset, open_token_dataset
from fgpt.inference.weights import load_model, open_weights
from fgpt.model.init import initial_value
from tests.checkpoint.saved import state_of
from tests.convert.models import save_random, save_transformers, small_config
from tests.ranks import run_ranks
from tests.tiny import Outcome, Tiny, train_all, zero

pytest.importorskip("transformers")
pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


def flags(tiny: Tiny, run: str, source: Path, *more: object, **ds: Any) -> list[str]:
    """Two steps of 8 samples from these weights; no option of the model."""
    file = tiny.ds(run, **ds)
    text = json.loads(file.read_text())
    del text["train_micro_batch_size_per_gpu"]
    file.write_text(json.dumps(text | {"train_batch_size": 8}))
    fixed = ("eval.every=0", "eval.batches=1", "sample.tokens=0")
    values = ["--ds_config", file, "--data", tiny.data, "--run_dir", tiny.path(run), "--steps", 2]
    values += ["--init_from", source, *(f"--set={value}" for value in fixed), *more]
    return [str(value) for value in values]


def train(*argv: str) -> Outcome:
    """Train on the plain engine."""
    (outcome,) = run_ranks(train_all, 1, [[*argv, "--set=train.engine=plain"]])[0]
    return outcome


def first_loss(tiny: Tiny, run: str) -> float:
    """The validation loss before the first step."""
    lines = (tiny.path(run) / "metrics.jsonl").read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if "valid_loss" in r)
    assert first["step"] == 0
    return float(first["valid_loss"])


def loss_of_transformers(theirs: Any, tiny: Tiny) -> float:
    """Its mean loss on the samples of the first validation batch."""
    samples = open_blended_dataset(str(tiny.data)).samples("valid", DataConfig(), 32, seed=0)
    batch = samples.batch(np.arange(8))
    ids, targets = (torch.from_numpy(each) for each in (batch.inputs, batch.targets))
    with torch.no_grad():
        logits = theirs(ids).logits.flatten(0, 1)
    return float(F.cross_entropy(logits, targets.flatten()))


LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "tp2 pp2": (("--tp=2", "--pp=2"), zero(1)),
    "z3": ((), zero(3)),
    "bf16 z2": ((), zero(2) | {"bf16": {"enabled": True}}),
    "z3 offload": ((), zero(3, offload_optimizer={"device": "cpu"})),
    "tp2 z1": (("--tp=2",), zero(1)),
}


def check_first_loss(tiny: Tiny, *layouts: str) -> None:
    """Start from a GPT-2 of transformers at each of these layouts, on four ranks."""
    theirs = save_transformers(tiny.path("hf"), "gpt2", tied=True)
    expected = loss_of_transformers(theirs, tiny)
    runs = [(run, *LAYOUTS[run]) for run in layouts]
    argvs = [flags(tiny, run, tiny.path("hf"), *more, **ds) for run, more, ds in runs]
    outcomes = run_ranks(train_all, 4, argvs, timeout_s=150)[0]
    assert [outcome.error for outcome in outcomes] == [""] * len(layouts)
    for run in layouts:
        bound = 2e-2 if "bf16" in run else 1e-4
        assert first_loss(tiny, run) == pytest.approx(expected, abs=bound), run


def test_gpt2_starts_at_its_own_loss_at_any_layout(tiny: Tiny, capsys: Any) -> None:
    """And what tp2 x pp2 and ZeRO-3 then save is exported with the logits of transformers."""
    check_first_loss(tiny, "tp2 pp2", "z3")
    for run in ("tp2 pp2", "z3"):
        argv = ["convert", str(tiny.path(run)), "--to", "hf", "--out", str(tiny.path(f"{run} hf"))]
        assert main(argv) == 0
        assert "logits of 32 tokens of text: largest difference" in capsys.readouterr().out


@pytest.mark.slow
def test_further_layouts(tiny: Tiny) -> None:
    check_first_loss(tiny, "bf16 z2", "z3 offload", "tp2 z1")


def test_plain(tiny: Tiny, capsys: Any) -> None:
    """Lineage, a restart of the same command line, and a start from that run."""
    theirs = save_transformers(tiny.path("hf"), "llama", tied=False, kv=2)
    argv = flags(tiny, "a", tiny.path("hf"), "--resume", "auto")
    outcome = train(*argv)
    assert outcome.code == 0, outcome.error
    assert first_loss(tiny, "a") == pytest.approx(loss_of_transformers(theirs, tiny), abs=1e-4)
    assert f"starting from the weights of {tiny.path('hf')}" in outcome.output
    manifest = read_manifest(tiny.checkpoint("a", 2))
    origin = f"{tiny.path('hf')} (sha256 {open_weights(tiny.path('hf')).fingerprint()[:12]})"
    assert manifest.history[0].origin == origin and len(manifest.history) == 1
    assert manifest.config["run"]["model"]["n_kv_head"] == 2
    # the same command line again goes on
    outcome = train(*argv, "--steps", "3")
    assert outcome.code == 0, outcome.error
    assert "resuming from" in outcome.output and "are not read again" in outcome.output
    assert "starting from the weights" not in outcome.output
    # from that run: the optimizer and the step are new
    outcome = train(*flags(tiny, "b", tiny.path("a")))
    assert outcome.code == 0, outcome.error
    assert "warning" not in outcome.output
    manifest = read_manifest(tiny.checkpoint("b", 2))
    file = tiny.checkpoint("a", 3) / "manifest.json"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert manifest.history[0].origin == (
        f"{tiny.checkpoint('a', 3)} (step 3, 768 tokens, sha256 {sha256}), before that {origin}"
    )
    assert main(["checkpoint", "inspect", str(tiny.path("b"))]) == 0
    assert f"weights: {manifest.history[0].origin}" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(tiny.path("a"))]) == 0


def test_a_run_goes_on_without_its_first_weights(tiny: Tiny) -> None:
    """The model is that of the run's checkpoint: nothing is read from --init_from."""
    save_random(tiny.path("source"), small_config("llama", n_kv_head=2))
    argv = flags(tiny, "a", tiny.path("source"), "--resume", "auto", "--set=model.rotary_base=5e4")
    assert train(*argv).code == 0
    shutil.rmtree(tiny.path("source"))
    outcome = train(*argv, "--steps", "3")
    assert outcome.code == 0, outcome.error
    assert "resuming from" in outcome.output
    config = open_weights(tiny.checkpoint("a", 3)).config
    assert (config.n_kv_head, config.rotary_base) == (2, 5e4)
    # what contradicts the run's model names the checkpoint
    outcome = train(*argv, "--set=model.d_model=64")
    assert outcome.code == 2 and f"weights of {tiny.checkpoint('a', 3)} have 32" in outcome.error
    # the same by a path, and not without a checkpoint
    argv = [str(tiny.path("a")) if flag == "auto" else flag for flag in argv]
    outcome = train(*argv, "--steps", "4")
    assert outcome.code == 0, outcome.error
    argv = flags(tiny, "b", tiny.path("source"), "--resume", "auto")
    outcome = train(*argv)
    assert outcome.code == 2 and "--init_from" in outcome.error
    assert "does not exist" in outcome.error and "--run_dir" not in outcome.error
    # a run directory by default is named after the weights' model
    at = argv.index("--run_dir")
    outcome = train(*argv[:at], *argv[at + 2 :])
    assert outcome.code == 2 and "also name it with --run_dir" in outcome.error


@pytest.mark.parametrize("what", ["a file is missing", "no config"])
def test_an_incomplete_source(tiny: Tiny, what: str) -> None:
    """One line with the remedy."""
    source = tiny.path("source")
    if what == "no config":
        save_transformers(source, "gpt2", tied=True)
        (source / "config.json").unlink()
        (source / "config.json").mkdir()
    else:
        save_random(source, small_config())
        next(source.glob("checkpoints/step_*/rank_00000.safetensors")).unlink()
    outcome = train(*flags(tiny, "a", source))
    said = "cannot be read" if what == "no config" else "copy the whole checkpoint again"
    assert outcome.code == 2 and said in outcome.error and "\n" not in outcome.error
    assert "--init_from" in outcome.error and not tiny.path("a").exists()


def test_a_tokenizer_that_cannot_be_read(tiny: Tiny) -> None:
    """No tokenizer is compared; training starts."""
    save_transformers(tiny.path("hf"), "gpt2", tied=True)
    (tiny.path("hf") / "tokenizer.json").write_text("{}")
    (tiny.path("hf") / "tokenizer_config.json").mkdir()
    outcome = train(*flags(tiny, "a", tiny.path("hf")))
    assert outcome.code == 0, outcome.error


def test_new_rows(tiny: Tiny) -> None:
    """A larger vocabulary: the old rows are kept, the new ones have their initial values."""
    save_random(tiny.path("source"), small_config(tied_head=False))
    argv = flags(tiny, "a", tiny.path("source"), "--set=model.vocab_size=421", "--lr=1e-30")
    outcome = train(*argv, "--ds_set", "optimizer.params.weight_decay=0")
    assert outcome.code == 0, outcome.error
    assert "16 new rows get initial values" in outcome.output
    source = open_weights(tiny.path("source"))
    saved = state_of(tiny.checkpoint("a", 2))
    config = open_weights(tiny.path("a")).config
    for name in ("embedding.token.weight", "head.weight"):
        weight = saved[name, "weight"]
        assert torch.equal(weight[:405], source.read(name))
        assert torch.equal(weight[405:], initial_value(name, weight.shape, config, 1234)[405:])
    assert load_model(source, "cpu", torch.float32).config.vocab_size == 405


@pytest.mark.parametrize(
    ("kind", "option", "said"),
    [
        ("gpt2", "model.d_model=64", "64, the weights of"),
        ("gpt2", "model.n_head=2", "have 4"),
        ("gpt2", "model.max_seq_len=64", "learned positions cannot be resized"),
        ("gpt2", "model.vocab_size=400", "405 rows -> set model.vocab_size >= 405"),
        ("gpt2", "model.tied_head=false", "have true"),
        ("gpt2", "model.position=rotary", 'have "learned"'),
        ("llama", "model.activation=gelu", 'have "swiglu"'),
    ],
)
def test_another_shape_is_refused(tiny: Tiny, kind: str, option: str, said: str) -> None:
    """Before anything is written, naming both values; following the advice leads to a start."""
    save_random(tiny.path("source"), small_config(kind))
    outcome = train(*flags(tiny, "a", tiny.path("source"), f"--set={option}"))
    assert outcome.code == 2 and said in outcome.error, outcome.error
    assert not tiny.path("a").exists()


def test_another_rotary_base_is_said(tiny: Tiny) -> None:
    save_random(tiny.path("source"), small_config("llama"))
    options = ("--set=model.rotary_base=50000", "--set=model.max_seq_len=64")
    outcome = train(*flags(tiny, "a", tiny.path("source"), *options))
    assert outcome.code == 0, outcome.error
    assert "50000.0, the weights of" in outcome.output and "have 10000.0" in outcome.output
    assert open_weights(tiny.path("a")).config.max_seq_len == 64


def test_refusals(tiny: Tiny, capsys: Any) -> None:
    outcome = train(*flags(tiny, "a", tiny.path("missing")))
    assert outcome.code == 2 and "--init_from" in outcome.error and "exist" in outcome.error
    save_transformers(tiny.path("hf"), "gpt2", tied=True)
    argv = ["convert", str(tiny.path("hf")), "--from", "hf", "--out", str(tiny.path("run"))]
    assert main(argv) == 0
    # imported weights are no run
    argv = flags(tiny, "a", tiny.path("run"))
    outcome = train(
        *[a for a in argv if a not in ("--init_from", str(tiny.path("run")))],
        "--resume",
        str(tiny.path("run")),
    )
    assert outcome.code == 2 and "--init_from" in outcome.error
    # parity begins with initial values
    capsys.readouterr()
    parity = ["parity", "--layouts", "tp2", "--init_from", str(tiny.path("run"))]
    assert main([*parity, "--data", str(tiny.data)]) == 2
    assert "compared from initial values" in capsys.readouterr().err
    # the default data set has another tokenizer
    check = ["check", "--device", "cpu", "--ds_config", str(tiny.ds())]
    assert main([*check, "--init_from", str(tiny.path("hf"))]) == 2
    assert "name data that it has tokenized with --data DIR" in capsys.readouterr().err
    # a damaged checkpoint
    (step,) = (tiny.path("run") / "checkpoints").glob("step_*")
    file = step / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = train(*argv)
    assert outcome.code == 2 and "changed since it was written" in outcome.error
    assert not (tiny.path("a") / "metrics.jsonl").exists()


def test_a_run_keeps_its_tokenizer(tiny: Tiny) -> None:
    """So it can be used without its data, and another one is warned of."""
    from fgpt.inference.weights import load_tokenizer_for

    save_random(tiny.path("source"), small_config())
    assert train(*flags(tiny, "a", tiny.path("source"))).code == 0
    own = open_token_dataset(tiny.data).tokenizer
    shutil.move(tiny.path("a"), tiny.path("moved"))
    loaded = load_tokenizer_for(open_weights(tiny.path("moved")))
    assert (loaded.fingerprint, loaded.eod_id) == (own.fingerprint, own.eod_id)
    # a run of an earlier version has none: its data is named in the manifest
    shutil.rmtree(tiny.path("moved") / "tokenizer")
    assert load_tokenizer_for(open_weights(tiny.path("moved"))).fingerprint == own.fingerprint
