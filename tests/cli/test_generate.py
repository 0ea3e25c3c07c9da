"""`fgpt generate` on a run: what it reads, prints and refuses."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.cli import main
from fgpt.distributed.launch import World
from fgpt.engine.base import DTYPES
from fgpt.inference import load_decoder, session
from fgpt.inference.decoder import Decoder
from fgpt.inference.load_decoder import load_decoder_of
from fgpt.inference.weights import load_model, load_tokenizer_for, open_weights
from tests.ranks import run_ranks, start_ranks
from tests.tiny import Tiny, train_all

GREEDY = ("--temperature", "0", "--max_tokens", "6")
PROMPTS = ["def f(", "", "import", "class A"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """A run with one checkpoint, of two blocks and a context of 32 tokens."""
    tiny = Tiny(tmp_path_factory.mktemp("runs"), small_data)
    sets = ("--set=train.engine=plain", "--set=checkpoint.every=0", "--set=eval.every=0")
    [[outcome]] = run_ranks(train_all, 1, [tiny.flags("run", *sets)])
    assert (outcome.code, outcome.error) == (0, "")
    return tiny.path("run")


@pytest.fixture
def generate(run: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["generate", str(run), *map(str, arguments)])
        out, error = capsys.readouterr()
        return code, out, error

    return call


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_one_prompt_is_continued(generate: Any) -> None:
    code, out, error = generate("--prompt", "def f(", *GREEDY)
    assert (code, error) == (0, "")
    assert out.startswith("def f(") and out.endswith("\n") and len(out) > len("def f(\n")


def test_many_prompts_are_one_at_a_time(generate: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    prompts = [prompt for prompt in PROMPTS if prompt]
    file.write_text(
        "".join(f"{prompt}\n" for prompt in [*prompts, "", " "])
    )  # blank lines are none
    options = ("--samples", 2, "--max_tokens", 6, "--json")
    code, out, error = generate("--prompt_file", file, "--batch", 3, *options)
    assert (code, error) == (0, "")
    batched = lines(out)
    assert [(line["prompt"], line["sample"]) for line in batched] == [
        (prompt, sample) for prompt in prompts for sample in range(2)
    ]
    texts = [(line["text"], line["tokens"], line["stop_reason"]) for line in batched]
    assert len(set(texts)) > 4 and all(line["batch_tokens_per_s"] > 0 for line in batched)
    again = [word for prompt in prompts for word in ("--prompt", prompt)]
    _, out, _ = generate(*again, "--batch", 1, *options)
    assert [(x["text"], x["tokens"], x["stop_reason"]) for x in lines(out)] == texts


def test_all_of_a_pipe_is_one_prompt(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(\n  x"))
    _, out, _ = generate(*GREEDY)
    assert out.startswith("def f(\n  x")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    _, out, _ = generate(*GREEDY, "--prompt_file", "-", "--json")
    assert [line["prompt"] for line in lines(out)] == ["a", "b"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the prompt asks again, in a text ends it; Ctrl-D ends the session."""
    typed = iter(["def f(", KeyboardInterrupt(), "import", EOFError()])

    def typing(prompt: str) -> str:
        answer = next(typed)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typing)
    interrupted = interrupts(monkeypatch, after=3)
    code, out, error = generate("--temperature", 0, "--max_tokens", 20)
    assert (code, error) == (0, "") and interrupted
    first, _, second, _ = out.split("\n", 3)
    assert first and second and not first.startswith("def f(")


def interrupts(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Ctrl-C comes after this many pieces of text; returns when it came."""
    write, came, count = session._write, [], [0]

    def writing(text: str) -> None:
        write(text)
        count[0] += 1
        if count[0] == after:
            came.append(count[0])
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(session, "_write", writing)
    return came


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_text_and_the_verb(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts(monkeypatch, after=3)
    again = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    code, out, error = generate(*again, "--batch", 1, "--temperature", 0, "--max_tokens", 20)
    assert (code, error) == (130, "")
    assert out.startswith("def f(") and "class A" not in out and out.endswith("\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_long_prompt_is_cut_and_said(generate: Any) -> None:
    code, out, error = generate("--prompt", "x = 1 + 2 * y\n" * 30, *GREEDY, "--json")
    assert code == 0 and lines(out)[0]["stop_reason"] == "context is full"
    assert "warning: prompt 1 has" in error and "only its last 31 are used" in error


def test_stop_strings(generate: Any) -> None:
    _, out, _ = generate("--prompt", "def f(", *GREEDY, "--json")
    (whole,) = lines(out)
    stop = whole["text"][2:4]
    _, out, _ = generate("--prompt", "def f(", *GREEDY, "--json", "--stop", stop)
    (line,) = lines(out)
    assert line["text"] == whole["text"][: whole["text"].index(stop)]
    assert line["stop_reason"] == "stop string"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_the_model_in_that_dtype(
    dtype: str, generate: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders: list[Decoder] = []

    def load(*arguments: Any, **options: Any) -> Decoder:
        decoders.append(load_decoder_of(*arguments, **options))
        return decoders[-1]

    monkeypatch.setattr(load_decoder, "load_decoder_of", load)
    _, out, _ = generate("--prompt", "def f(", *GREEDY, "--json", "--dtype", dtype)
    (line,) = lines(out)
    # the slow twin: the cast model, a whole forward pass for each token
    source = open_weights(run)
    model, tokenizer = load_model(source, "cpu", torch.float32), load_tokenizer_for(source)
    model.to(DTYPES[dtype])
    ids = tokenizer.encode("def f(")
    wanted = model(torch.tensor([ids]))
    got = decoders[0].logits(torch.tensor([ids]))
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)  # of the same dtype
    for _ in range(6):
        logits = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
        ids.append(int(logits.argmax()))
    assert line["tokens"] == 6 and f"def f({line['text']}" == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "--temperature -1.0: must be 0 (greedy) or more"),
        (["--temperature=nan"], "--temperature nan: must be"),
        (["--top_p=0"], "--top_p 0.0: must be above 0"),
        (["--min_p=1.5"], "--min_p 1.5: must be"),
        (["--top_k=-1"], "--top_k -1: must be"),
        (["--max_tokens=0"], "--max_tokens 0: must be 1 to 1,048,576"),
        (["--samples=0"], "--samples 0: must be 1 to 1,048,576"),
        (["--repetition_penalty=0"], "--repetition_penalty 0.0: must be"),
        (["--stop="], "--stop '': name the text"),
        (["--prompt_file=x"], "--prompt and --prompt_file: give one of them"),
        (["--device=cuda"], "--device cuda: torch sees no GPU"),
        (["--compile=on", "--tp=2"], "--compile on: not under --tp and --pp: use --compile off"),
        (["--tp=2"], "is for 2, and 1 run: start torchrun --nproc-per-node 2 -m fgpt.cli"),
        (["--tokenizer=nowhere"], "nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(generate: Any, flags: list[str], message: str) -> None:
    code, out, error = generate("--prompt", "a", *flags)
    assert (code, out) == (2, "") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [None, "", b"\xff"], ids=["missing", "empty", "not UTF-8"])
def test_a_prompt_file_that_cannot_be_used(
    generate: Any, content: str | bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    code, out, error = generate("--prompt_file", file)
    assert (code, out) == (2, "") and str(file) in error and error.count("\n") == 1


def test_no_model_says_how_to_get_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, advice in (([], "make train"), ([str(tmp_path)], "run directory")):
        assert main(["generate", *arguments]) == 2
        error = capsys.readouterr().err
        assert advice in error and error.count("\n") == 1


def cli(world: World, argv: list[str]) -> int:
    return main(["generate", *argv])


def test_two_ranks_print_the_texts_once(generate: Any, run: Path) -> None:
    options = ["--prompt", "def f(", "--prompt", "import", "--max_tokens", "8", "--seed", "3"]
    _, alone, _ = generate(*options)
    for split in ("--tp", "--pp"):
        with start_ranks(cli, 2, [str(run), split, "2", *options], join=False) as ranks:
            assert ranks.wait() == [0, 0], ranks.output()
            assert ranks.results() == [0, 0]
            assert alone in ranks.output(0) and "def f(" not in ranks.output(1)
    missing = ["--tp", "2", "--prompt_file", "absent"]
    with start_ranks(cli, 2, [str(run), *missing], join=False) as ranks:
        assert ranks.wait() == [0, 0] and ranks.results() == [2, 2]
        assert "fgpt: absent: No such file or directory" in ranks.output(0)
        assert "fgpt:" not in ranks.output(1)


def cli_of_one(world: World, runs: list[str], options: list[str]) -> int:
    return main(["generate", runs[world.rank], *options])


def test_a_rank_that_cannot_open_the_model_ends_all(run: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for broken in (0, 1):
        runs = [str(run), str(run)]
        runs[broken] = absent
        options = ["--tp", "2", "--prompt", "a"]
        with start_ranks(cli_of_one, 2, runs, options, join=False) as ranks:
            assert ranks.wait(30) == [0, 0] and ranks.results() == [2, 2]
            lines = [line for line in ranks.output().splitlines() if "fgpt:" in line]
            rank = "rank 1: " if broken else ""
            assert len(lines) == 1 and f"fgpt: {rank}{absent}: does not exist" in lines[0]


def cli_beside_a_gpu(world: World, argv: list[str]) -> int:
    torch.cuda.is_available = lambda: True
    return main(["generate", *argv])


def test_ranks_obey_device_cpu(generate: Any, run: Path) -> None:
    options = ["--prompt", "def f(", *GREEDY, "--device", "cpu"]
    _, alone, _ = generate(*options)
    with start_ranks(cli_beside_a_gpu, 2, [str(run), "--pp", "2", *options], join=False) as ranks:
        assert ranks.wait() == [0, 0] and ranks.results() == [0, 0], ranks.output()
        assert alone in ranks.output(0)


def cli_with_damaged_weights(world: World, argv: list[str]) -> int:
    def load(*arguments: Any, **options: Any) -> Decoder:
        decoder = load_decoder_of(*arguments, **options)
        for layer in decoder.layers.values():
            for parameter in layer.parameters():
                parameter.fill_(float("nan"))
        return decoder

    load_decoder.load_decoder_of = load
    return main(["generate", *argv])


def test_logits_that_are_not_finite_end_all_ranks_with_one_line(run: Path) -> None:
    argv = [str(run), "--tp", "2", "--prompt", "def f("]
    with start_ranks(cli_with_damaged_weights, 2, argv, join=False) as ranks:
        assert ranks.wait(30) == [0, 0] and ranks.results() == [1, 1], ranks.output()
        assert "\nfgpt: the logits are not finite" in ranks.output(0)
        assert "fgpt:" not in ranks.output(1) and "Traceback" not in ranks.output()
