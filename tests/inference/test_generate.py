"""Generation against its slow twin, a whole forward pass for each token; limits; transformers."""

from __future__ import annotations

import pytest
import torch

from fgpt.errors import TrainingError
from fgpt.inference.generate import Limits, Row
from fgpt.inference.sampling import Sampling
from fgpt.inference.weights import load_model, open_weights
from tests.inference.letters import (
    CPU,
    DRAWN,
    GREEDY,
    LETTERS,
    decoder_of,
    generated,
    rows_of,
    uncached,
)
from tests.model.test_gpt import LLAMA, TINY, VARIANTS, built

ROW = Row([5, 17, 80])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_is_one_at_a_time_is_uncached(variant, sampling):
    model = built(VARIANTS[variant], seed=3)
    rows = rows_of(model.config)
    wanted = [uncached(model, row, sampling, seed=5) for row in rows]
    decoder = decoder_of(model)
    batched = generated(decoder, rows, sampling, seed=5)
    assert [completion.ids for completion in batched] == wanted
    alone = [generated(decoder, [row], sampling, seed=5)[0] for row in rows]
    assert alone == batched


def test_samples_and_seeds_differ():
    decoder = decoder_of(built(TINY))
    rows = [Row([1], prompt, sample) for prompt in range(2) for sample in range(2)]
    texts = [c.text for c in generated(decoder, rows, Sampling(), seed=1)]
    assert len(set(texts)) == 4
    assert texts == [c.text for c in generated(decoder, rows, Sampling(), seed=1)]
    assert texts[0] != generated(decoder, rows[:1], Sampling(), seed=2)[0].text


def test_samples_share_the_work_on_their_prompt(monkeypatch):
    decoder = decoder_of(built(TINY))
    prompts = [[5, 17, 80], [3, 4, 5, 6, 7]]
    rows = [Row(ids, n, sample) for n, ids in enumerate(prompts) for sample in range(3)]
    alone = [generated(decoder, [row], DRAWN)[0] for row in rows]
    sizes, decode = [], decoder.decode

    def counting(ids, cache):
        sizes.append(tuple(ids.shape))
        return decode(ids, cache)

    monkeypatch.setattr(decoder, "decode", counting)
    assert generated(decoder, rows, DRAWN) == alone
    assert sizes[0] == (2, 5) and set(sizes[1:]) == {(6, 1)}
    assert len({completion.text for completion in alone}) == 6


def test_the_end_of_the_context_and_long_prompts():
    decoder = decoder_of(built(TINY))
    long = [1 + i % 80 for i in range(50)]  # the context is 32
    cut, whole, full = generated(
        decoder, [Row(long), Row(long[-31:]), Row([1, 2])], limits=Limits(99)
    )
    assert len(cut.ids) == 1 and cut.stop_reason == "context is full" and cut == whole
    assert len(full.ids) == TINY.max_seq_len - 2 and full.stop_reason == "context is full"
    assert generated(decoder, [ROW], limits=Limits(4))[0].stop_reason == "max_tokens"


def test_a_row_that_ends_leaves_the_others_as_they_are():
    model = built(TINY)
    decoder, rows = decoder_of(model), rows_of(TINY)
    free = generated(decoder, rows)
    stop = free[0].text[4:6]
    stopped, *others = generated(decoder, rows, limits=Limits(12, (stop,)))
    assert stopped.stop_reason == "stop string"
    assert stopped.text == free[0].text[: free[0].text.index(stop)]
    assert [c.ids for c in others if stop not in c.text][:1]
    for before, after in zip(free[1:], others, strict=True):
        assert before.text.startswith(after.text)


def test_end_of_document(monkeypatch):
    decoder = decoder_of(built(TINY))
    free = generated(decoder, [ROW])[0]
    monkeypatch.setattr(LETTERS, "eod_id", free.ids[7])
    ended = generated(decoder, [ROW])[0]
    assert ended.ids == free.ids[: free.ids.index(free.ids[7])]
    assert ended.stop_reason == "end of document"


def test_ids_are_below_the_tokenizers_vocabulary():
    model = built(TINY)
    with torch.no_grad():
        model.embedding.token.weight[LETTERS.vocab_size :] *= 100
    assert max(uncached(model, ROW, Sampling(temperature=9.0), 29)) < LETTERS.vocab_size
    ids = generated(decoder_of(model), [ROW], Sampling(temperature=9.0), Limits(29))[0].ids
    assert max(ids) < LETTERS.vocab_size <= int(model(torch.tensor([ROW.prompt_ids])).argmax())


def test_the_pieces_are_the_text_and_an_interruption_keeps_it():
    decoder = decoder_of(built(TINY))
    pieces: list[tuple[int, str]] = []

    def collect(row: int, piece: str) -> None:
        pieces.append((row, piece))

    texts = generated(
        decoder, rows_of(TINY), on_text=collect, should_stop=lambda: len(pieces) >= 20
    )
    assert {text.stop_reason for text in texts} == {"interrupted"}
    for row, text in enumerate(texts):
        assert text.text and text.text == "".join(piece for n, piece in pieces if n == row)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float16, "use --dtype fp32 or bf16"), (torch.float32, "use an earlier checkpoint")],
)
def test_logits_that_are_not_finite_are_an_error(dtype, advice, sampling):
    model = built(TINY).to(dtype)
    with torch.no_grad():
        model.embedding.token.weight[5] = float("nan")
    with pytest.raises(TrainingError, match=f"the logits are not finite.*{advice}"):
        generated(decoder_of(model), [ROW, Row([7])], sampling)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_compiled_decoding_is_the_eager_one(config):
    model = built(config, seed=3)
    rows = rows_of(config)
    decoder = decoder_of(model)
    wanted = generated(decoder, rows, DRAWN)
    decoder.compile(cuda_graphs=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert generated(decoder, rows, DRAWN) == wanted
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


SIZES = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_the_greedy_text_is_that_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(**SIZES, **shape, initializer_range=0.3)
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        name = {"llama": "Llama", "qwen3": "Qwen3"}[kind]
        more = {"head_dim": 16} if kind == "qwen3" else {}
        config = getattr(transformers, f"{name}Config")(
            **SIZES, **WIDTHS, **HEADS, **more, initializer_range=0.3
        )
        theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    theirs.eval().save_pretrained(tmp_path)
    decoder = decoder_of(load_model(open_weights(tmp_path), CPU, torch.float32))
    rows = rows_of(decoder.config)
    seen: set[int] = set()
    outside = [0, *range(LETTERS.vocab_size, 96)]  # ids that would end a text, or are no letters
    for row, ours in zip(rows, generated(decoder, rows), strict=True):
        ids = torch.tensor([row.prompt_ids])
        mask = torch.ones_like(ids)
        text = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, suppress_tokens=outside
        )
        wanted = text[0, ids.shape[1] :].tolist()
        if ours.stop_reason == "end of document":
            wanted = wanted[: len(ours.ids)]
        assert ours.ids == wanted
        seen.update(wanted)
    assert len(seen) > 5
