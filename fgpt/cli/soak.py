"""`fgpt soak`: a small run with faults must become the run without them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt.cli.arguments import ArgumentParser, file_path, nonempty, seed_number
from fgpt.cli.run_flags import counted
from fgpt.cli.working_folder import working_folder
from fgpt.errors import LaunchError, UserError

if TYPE_CHECKING:
    from fgpt.parity.soak_run import Outcome, Soak

LAYOUTS = {"same": ("zero2",), "change": ("zero1", "zero2", "zero3", "pp2", "tp2")}
"""Short names of --layouts."""
STEPS_PER_FAULT = 15
FAULTS_SHARE = 0.7
"""Of --minutes; the rest is for the end of the run, and the clean run."""


def soak_verb(argv: Sequence[str]) -> int:
    """Train both runs, print the report; 1 if they differ. Raises FgptError."""
    arguments = _parser().parse_args(argv)
    if "RANK" in os.environ:
        raise LaunchError("fgpt soak starts its own ranks: call it without a launcher")
    layouts = _layouts(arguments.layouts, arguments.ranks)
    with working_folder(arguments.keep, "soak") as folder:
        data = arguments.data
        if data is None:
            data = _prepare(folder / "data")
        return _soak(arguments, folder, data.absolute(), layouts)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt soak",
        description="Train a small model under torchrun, let a random fault happen every 5 to 15"
        " steps (kill -9, SIGSTOP, SIGTERM, a full disk, a damaged checkpoint, an end within a"
        " save), and start it again with --resume auto until its last step. Then train it without"
        " faults, in the same layouts at the same steps, and compare weights, samples and losses.",
        examples=["fgpt soak --faults 30 --seed 1", "fgpt soak --faults 4 --layouts same"],
    )
    add = parser.add_argument
    add("--faults", type=counted, default=30, metavar="N", help="(default: 30)")
    add("--seed", type=seed_number, default=0, help="of the faults and layouts (default: 0)")
    add(
        "--minutes",
        type=counted,
        default=25,
        metavar="M",
        help=f"after {100 * FAULTS_SHARE:.0f} %% of it no further fault happens (default: 25)",
    )
    add("--ranks", type=counted, default=2, metavar="N", help="(default: 2)")
    add(
        "--layouts",
        type=nonempty,
        default="change",
        metavar="NAMES",
        help="of the starts, drawn: same (zero2), change (zero1,zero2,zero3,pp2,tp2), or names",
    )
    add(
        "--data",
        type=file_path,
        metavar="DIR",
        help="data set of at most 400 ids (default: of FGPT's own sources)",
    )
    add("--out", type=file_path, metavar="FILE", help="also write the report as JSON")
    add("--keep", type=file_path, metavar="DIR", help="keep runs and logs in this new directory")
    return parser


def _layouts(text: str, ranks: int) -> tuple[str, ...]:
    """The layouts of --layouts. Raises UserError for one that these ranks cannot have."""
    from fgpt.parity.layouts import parse_layout

    names = LAYOUTS.get(text) or tuple(text.split(","))
    for name in names:
        layout = parse_layout(name)
        size = layout.tp * layout.pp * layout.cp
        if ranks % size:
            raise UserError(f"--layouts {name}: --ranks {ranks} is not a multiple of {size}")
    return names


def _prepare(out: Path) -> Path:
    """Make a small data set of this package's sources."""
    import fgpt
    from fgpt.data.recipe import Recipe, SourceSpec
    from fgpt.prepare.pipeline import prepare
    from fgpt.tokenizer.spec import TokenizerSpec

    package = Path(fgpt.__file__).parent
    source = SourceSpec("local", tuple(str(file) for file in sorted(package.rglob("*.py"))))
    tokenizer = TokenizerSpec(vocab_size=400)
    recipe = Recipe("soak", source, tokenizer=tokenizer, validation_fraction=0.1)
    prepare(recipe, out, progress=False)
    return out


def _soak(arguments: argparse.Namespace, folder: Path, data: Path, layouts: Sequence[str]) -> int:
    from fgpt.data.card import load_card
    from fgpt.data.token_dataset import check_vocabulary
    from fgpt.parity.soak_faults import draw_faults, draw_layouts
    from fgpt.parity.soak_faulty import FaultyRun
    from fgpt.parity.soak_run import VOCABULARY, Soak, Trainer, train_clean
    from fgpt.parity.soak_verdict import SoakVerdict, outcome_line, read_result
    from fgpt.utils.files import write_atomic

    check_vocabulary(data, load_card(data), VOCABULARY)
    n, seed = arguments.faults, arguments.seed
    soak = Soak(
        folder,
        data,
        arguments.ranks,
        steps=STEPS_PER_FAULT * n + STEPS_PER_FAULT,
        faults=draw_faults(n, arguments.ranks, seed),
        layouts=draw_layouts(n + 1, layouts, seed),
        limit_s=60 * arguments.minutes * FAULTS_SHARE,
    )
    _say(_head(soak, seed))
    told: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        told.append(outcome)
        _say(outcome_line(len(told), outcome))

    trainer = Trainer(soak)
    record = FaultyRun(soak, trainer, tell).train()
    layouts_text = ", ".join(f"{s.layout} from step {s.begin}" for s in record.segments)
    _say(f"the clean run: {layouts_text}")
    train_clean(soak, trainer, record.segments)
    faulty, clean = (read_result(soak, name) for name in ("faulty", "clean"))
    verdict = SoakVerdict(faulty, clean, record, n)
    for line in verdict.lines():
        _say(line)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"seed": seed, "ranks": soak.ranks} | verdict.as_json(), indent=1)
        write_atomic(arguments.out, text.encode())
    return 1 if verdict.departures else 0


def _head(soak: Soak, seed: int) -> str:
    return (
        f"{soak.steps} steps on {soak.ranks} ranks, {len(soak.faults)} faults of seed {seed},"
        f" layouts {', '.join(sorted(set(soak.layouts)))}"
    )


def _say(line: str) -> None:
    print(line, flush=True)
