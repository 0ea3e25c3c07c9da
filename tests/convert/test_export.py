"""FGPT -> Hugging Face: transformers computes the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fgpt.cli import main
from fgpt.convert import convert
from fgpt.convert.convert import to_hugging_face
from fgpt.convert.export import export
from fgpt.convert.model_card import model_card
from fgpt.errors import TrainingError
from fgpt.inference import hf_layout
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.weights import load_model, load_tokenizer_for, open_weights
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.load import save_copy
from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer
from tests.convert.models import KINDS, save_random, small_config
from tests.prepare.corpora import small_recipe, write_corpus

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")  # transformers needs it

CASES = [
    (kind, tied, kv)
    for kind in KINDS
    for tied in (True, False)
    for kv in ((4,) if kind == "gpt2" else (1, 2, 4))
]


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers' own, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


@pytest.mark.parametrize(("kind", "tied", "kv"), CASES)
def test_transformers_computes_the_same(tmp_path: Path, kind: str, tied: bool, kv: int) -> None:
    run = save_random(tmp_path / "run", small_config(kind, tied_head=tied, n_kv_head=kv))
    source, out = open_weights(run), tmp_path / "out"
    out.mkdir()
    export(source, out, torch.float32, None)
    ids = torch.randint(405, (2, 32), generator=torch.Generator().manual_seed(1))
    mine = load_model(source, "cpu", torch.float32)(ids)
    torch.testing.assert_close(logits_of(out, ids), mine, rtol=0, atol=1e-4)
    assert mine.abs().max() > 0.5  # the bound means something
    names = set(load_file(out / "model.safetensors"))
    assert ("lm_head.weight" in names) is not tied
    # and it is the same model again
    again = HuggingFaceWeights(out)
    assert {name: torch.equal(again.read(name), source.read(name)) for name in source.names()} == (
        dict.fromkeys(source.names(), True)
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if quick else pytest.mark.slow)
        for kind in KINDS
        for dtype in ("fp32", "bf16")
        for quick in [(kind, dtype) in {("gpt2", "fp32"), ("qwen3", "bf16")}]
    ],
)
def test_mup(kind: str, dtype: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Its factors go into weights, here by factors that bf16 rounds; proven with transformers, and
    without."""
    config = small_config(kind, mup_base=24, mup_base_d_head=2)
    run, command = save_random(tmp_path / "run", config), ["convert", str(tmp_path / "run")]
    command += ["--to", "hf", "--dtype", dtype, "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "largest difference from transformers" in capsys.readouterr().out
    monkeypatch.setattr(convert, "why_no_logits", lambda source: "not here")
    assert main([*command, str(tmp_path / "again")]) == 0
    assert "tensors read back: largest difference 0.0e+00" in capsys.readouterr().out
    if dtype == "fp32":
        ids = torch.randint(405, (2, 32), generator=torch.Generator().manual_seed(1))
        mine = load_model(open_weights(run), "cpu", torch.float32)(ids)
        torch.testing.assert_close(logits_of(tmp_path / "out", ids), mine, rtol=0, atol=1e-4)


def test_sharded(tmp_path: Path) -> None:
    """Several files and an index, in bf16; each file has at most the bytes allowed."""
    source, out = open_weights(save_random(tmp_path / "run", small_config())), tmp_path / "out"
    out.mkdir()
    export(source, out, torch.bfloat16, None, max_shard_bytes=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 30_000 + 4096 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = sum(t.numel() * 2 for file in files for t in load_file(file).values())
    assert index["metadata"]["total_size"] == total
    ids = torch.arange(20)[None]
    model = load_model(source, "cpu", torch.bfloat16).float()
    torch.testing.assert_close(logits_of(out, ids), model(ids), rtol=0, atol=1e-4)


@pytest.fixture
def run_with_tokenizer(tmp_path: Path, small_data: Path) -> Path:
    """A run that keeps its tokenizer, and whose model has padding rows."""
    from fgpt.data.token_dataset import open_token_dataset

    run = save_random(tmp_path / "run", small_config())
    save_copy(open_token_dataset(small_data).tokenizer, run / "tokenizer")
    return run


def test_verb(run_with_tokenizer: Path, capsys: Any, monkeypatch: Any) -> None:
    out = run_with_tokenizer.parent / "my model"
    assert main(["convert", str(run_with_tokenizer), "--to", "hf", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("logits of 32 tokens of text: largest difference from transformers")
    assert lines[-1] == f"publish it with: hf upload USER/my-model '{out}'"
    assert "vocab_size is 405: 5 rows of padding are kept" in lines
    config = json.loads((out / "config.json").read_text())
    eod = load_tokenizer_for(open_weights(run_with_tokenizer)).eod_id
    assert config["eos_token_id"] == eod
    assert config["vocab_size"] == 405 and config["fgpt"]["tokens"] == 768
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == eod
    mine, text = load_tokenizer_for(open_weights(out)), "def f(x):\n    return '<|endoftext|>'"
    assert tokenizer(text)["input_ids"] == mine.encode(text)
    assert mine.eod_id == eod and open_weights(out).facts.valid_loss == 5.5
    card = (out / "README.md").read_text()
    assert "3 steps, 768 tokens" in card and "library_name: transformers" in card
    assert "the 5 rows beyond them" in card and "trained with FGPT" in card
    assert "base_model" not in card and "began with" not in card
    # a second time: not over it
    assert main(["convert", str(run_with_tokenizer), "--to", "hf", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_card_of_continued_training(tmp_path: Path) -> None:
    """It names the weights that the run began with, without the folders of this machine."""
    source = open_weights(save_random(tmp_path / "run", small_config()))
    origin = "/home/me/a run/step_00000009 (step 9, 9 tokens), before that /x/hf (sha256 12)"
    source.facts = replace(source.facts, origin=origin, base_model="owner/name")
    card = model_card(source, "out", None)
    assert "trained with FGPT" in card and "- 3 steps, 768 tokens" in card
    assert "weights step_00000009 (step 9, 9 tokens), before that hf (sha256 12)\n" in card
    assert '\nbase_model: "owner/name"\n---\n' in card


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        ({"type": "AdamW", "params": {"lr": 3e-4}}, "- AdamW, learning rate 0.0003\n"),
        (
            {"type": "Muon", "params": {"lr": 0.01, "adam_lr": 0.02}},
            "- Muon, learning rate 0.01 (AdamW's part 0.02)\n",
        ),
    ],
)
def test_card_has_the_learning_rates(optimizer: Any, line: str, tmp_path: Path) -> None:
    source = open_weights(save_random(tmp_path / "run", small_config()))
    source.facts = replace(source.facts, run_config={"deepspeed": {"optimizer": optimizer}})
    assert line in model_card(source, "out", None)


@pytest.mark.parametrize("name", ["no", "1.5", "a: b # c", "x\n---\nlicense: mit", 'say "hi"'])
def test_card_of_odd_names(tmp_path: Path, name: str) -> None:
    """The front matter is YAML with this value, the code is Python, and a line stays a line."""
    source = open_weights(save_random(tmp_path / "run", small_config()))
    source.facts = replace(source.facts, origin=name, base_model=name)
    source.path = tmp_path / name
    _, front, rest = model_card(source, 'a "b"', None).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name and "license" not in yaml.safe_load(front)
    assert "\nlicense" not in rest and r'from_pretrained("a \"b\"")' in rest


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram"])
def test_sentencepiece(kind: Any, tmp_path: Path, capsys: Any) -> None:
    """Its .model goes along, and a tokenizer.json by which transformers gives the same ids."""
    recipe = small_recipe(write_corpus(tmp_path / "texts"))
    recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, kind=kind))
    data = prepare(recipe, tmp_path / "data", progress=False)
    run, out = save_random(tmp_path / "run", small_config()), tmp_path / "out"
    argv = ["convert", str(run), "--to", "hf", "--out", str(out), "--tokenizer"]
    assert main([*argv, str(tmp_path / "data")]) == 0, data
    assert "warning" not in capsys.readouterr().out
    mine = load_tokenizer_for(open_weights(out))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert mine.kind == kind and (out / "tokenizer.model").is_file()
    texts = [path.read_text() for path in sorted((tmp_path / "texts").rglob("*.txt"))]
    texts += ["  a  b\t\n<0x0A> <|endoftext|>", "Größe 你好 \N{ROCKET}"]
    assert isinstance(mine, SentencePieceTokenizer)
    for text in texts:
        ids, other = mine.encode(text), theirs(text, add_special_tokens=False)["input_ids"]
        if kind == "sentencepiece-bpe":
            assert other == ids
        # of two equally probable segmentations the libraries may choose differently
        score, theirs_score = (sum(mine.info.scores[i] for i in some) for some in (ids, other))
        assert score == pytest.approx(theirs_score, abs=1e-3)
        assert theirs.decode(ids) == text == mine.decode(ids)


def test_without_transformers(
    run_with_tokenizer: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are compared instead, and it says so."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = run_with_tokenizer.parent / "out"
    argv = ["convert", str(run_with_tokenizer), "--to", "hf", "--out", str(out), "--dtype", "bf16"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no logits compared: transformers is not installed")
    assert lines[1].endswith("tensors read back: largest difference 0.0e+00")


def test_a_wrong_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in another order: the logits tell."""
    right = hf_layout._qkv_rows

    def shifted(*args: Any) -> Any:
        return [
            (module, [r._replace(begin=(r.begin + r.n) % (3 * 32)) for r in rows])
            for module, rows in right(*args)
        ]

    def wrong(family: Any, config: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(hf_layout, "_qkv_rows", shifted)
            return hf_layout.hf_tensors(family, config)

    source = open_weights(save_random(tmp_path / "run", small_config()))
    monkeypatch.setattr("fgpt.convert.export.hf_tensors", wrong)
    with pytest.raises(TrainingError, match="conversion is wrong"):
        to_hugging_face(
            source, tmp_path / "out", dtype=torch.float32, tokenizer=None, say=lambda _: None
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position": "sinusoidal"}, "model.position sinusoidal"),
        ({"activation": "relu2"}, "model.activation relu2"),
        ({"norm_place": "post"}, "model.norm_place post"),
        ({"bias": False}, "model.bias false"),
        ({"n_kv_head": 2}, "model.n_kv_head 2"),
        ({"d_head": 16}, "model.d_head 16"),
        ({"window": 8}, "model.window 8"),
        ({"embedding_scale": 2.0}, "model.embedding_scale 2.0"),
        ({"logit_softcap": 30.0}, "model.logit_softcap 30.0"),
        (KINDS["qwen3"] | {"bias": True}, "model.bias true"),
        (KINDS["llama"] | {"activation": "gelu"}, "model.activation gelu"),
    ],
)
def test_refused(changes: dict[str, Any], named: str, tmp_path: Path, capsys: Any) -> None:
    run, out = save_random(tmp_path / "run", small_config(**changes)), tmp_path / "out"
    assert main(["convert", str(run), "--to", "hf", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and not out.exists()


def test_a_weight_that_fp16_cannot_represent(tmp_path: Path, capsys: Any) -> None:
    """Refused with the dtype that can; nothing is left."""
    run, out = save_random(tmp_path / "run", small_config(), scale=1e6), tmp_path / "out"
    assert main(["convert", str(run), "--to", "hf", "--out", str(out), "--dtype", "fp16"]) == 2
    assert "--dtype bf16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
