"""Recipe -> prepared data set: the pipeline.

1. lock        one writer per output directory; half-written left-overs are removed
2. tokenizer   the recipe's, or learned from (a sample of) the corpus
3. encoder     the fastest that gives the tokenizer's own ids on a sample of this corpus
4. encode      tasks -> parts, kept beside OUT, by worker processes (parts.py, workers.py)
5. merge       parts, in order -> splits by content hash, while others are still made (merge.py)
6. commit      all files fsynced beside OUT, card last, then one rename to OUT (workspace.py)

Nothing is ever under the name OUT but a complete data set. After a kill, a full disk or Ctrl-C the
same command goes on from the parts that are finished, to the same bytes. Memory: a batch of text
for each worker, 4 bytes per document, about 1 KB per file; the corpus may be larger than memory.
"""

from __future__ import annotations

from pathlib import Path

from fgpt.data.card import CARD_NAME, DataCard
from fgpt.data.recipe import Recipe, check_recipe, load_recipe
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.parts import Timing
from fgpt.prepare.prepare_job import PrepareJob
from fgpt.prepare.progress import Reporter
from fgpt.prepare.workspace import Workspace, exclusive_writer
from fgpt.tokenizer.encoders import EncoderChoice


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    force: bool = False,
    progress: bool = True,
    wait: bool = False,
    workers: int | None = None,
    encoder: EncoderChoice = "auto",
    timing: Timing | None = None,
) -> DataCard:
    """Make the data set `out` (a directory) from `recipe`, or find that it is there already.

    force       replace a data set in `out`
    progress    print to stderr
    wait        wait for another writer instead of refusing
    workers     processes; None: one per core, none for a small corpus; 0: none
    encoder     auto, fast (fail without it) or exact (the tokenizer's own library)
    timing      is told where the time went

    Only the recipe decides the bytes. Raises DataError: unusable corpus, another data set in `out`,
    another writer, disk full.
    """
    check_recipe(recipe, recipe.name)
    target = Path(out)
    if target.is_symlink():
        target = target.resolve()
    if target.name in ("", ".."):
        raise DataError(f'"{out}" is not a name for a new directory; choose another --out')
    try:
        with exclusive_writer(target, wait=wait):
            report = Reporter(progress)
            timing = timing or Timing()
            space = Workspace(target)
            return PrepareJob(recipe, space, report, workers, encoder, timing).run(force)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise DataError(f"{target}: {what}; finished parts are kept: run again to go on") from error


def ensure_prepared(
    path: str | Path, recipe_path: str | Path, *, progress: bool = True
) -> TokenDataset:
    """Open the data set at `path`; prepare it from the recipe first if nothing is there.

    A missing path that does not bear the recipe's name is refused: training must not silently run
    on the default corpus because of a misspelt path. Raises DataError.
    """
    target = Path(path)
    if not (target / CARD_NAME).exists():
        recipe = load_recipe(recipe_path)
        if target.name != recipe.name:
            fix = f"fgpt prepare --recipe {recipe_path} --out {target}"
            what = f"no data set here, and recipe {recipe.name} is another name"
            raise DataError(f"{target}: {what}; correct data.path, or make it with: {fix}")
        prepare(recipe, target, progress=progress, wait=True)
    return open_token_dataset(target)
