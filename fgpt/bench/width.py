"""Models that differ in their width alone, with muP and without: for checks of muP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fgpt.bench.recipe import Common, Recipe
from fgpt.config.presets import PRESETS
from fgpt.config.schema import ModelConfig, Shapes
from fgpt.errors import UserError

NARROWEST_HEAD = 8
"""Of the heads that are tried, in elements."""


@dataclass(frozen=True)
class WidthModel:
    """A model of one width."""

    d_model: int
    mup: bool
    """Whether muP is on. It is off for the base, which muP does not change."""
    common: Common
    """The run that all its runs have in common."""


def width_models(recipe: Recipe, common: Common, widths: Sequence[int]) -> list[WidthModel]:
    """The narrowest width, muP's base; then the wider ones with muP, then without.

    Raises ConfigError and UserError before any is trained.
    """
    base, *wider = sorted(set(widths))
    if not wider:
        raise UserError(f"--widths {base}: one width has nothing to compare with: name two or more")
    preset = PRESETS[common.run["model.preset"]]
    _check_run_file(recipe, common, preset)
    shapes = shapes_at(preset, [base, *wider])
    models = []
    for mup, d_model in [(False, base), *((m, width) for m in (True, False) for width in wider)]:
        fields: dict[str, int] = {**shapes[d_model], **({"mup_base": base} if mup else {})}
        run = {**common.run, **{f"model.{name}": value for name, value in fields.items()}}
        models.append(WidthModel(d_model, mup, replace(common, run=run)))
        models[-1].common.resolved(recipe, steps=1, seed=1)
    return models


def _check_run_file(recipe: Recipe, common: Common, preset: ModelConfig) -> None:
    """Raise UserError if the recipe sets what the widths set."""
    model = common.resolved(recipe, steps=1, seed=1).run.model
    wanted: dict[str, int | None] = {"d_model": preset.d_model}
    wanted |= {"mup_base": None, "mup_base_d_head": None, **vars(Shapes.of(preset))}
    for name, value in wanted.items():
        if (found := getattr(model, name)) not in (value, None):
            raise UserError(
                f"--recipe {recipe.name}: model.{name} {found}: leave it out of the run file;"
                " --widths sets the shapes"
            )


def shapes_at(model: ModelConfig, widths: Sequence[int]) -> dict[int, dict[str, int]]:
    """Width -> its model fields, in proportion to the model's: more heads, all of one width, that
    of the model's or the widest below it that divides all widths. Raises UserError if none does.
    """
    own = Shapes.of(model)
    for d_head in range(own.d_head, NARROWEST_HEAD - 1, -1):
        if d_head % 2:  # rotary embeddings rotate pairs
            continue
        found = {width: _shape(model, own, width, d_head) for width in widths}
        known = {width: fields for width, fields in found.items() if fields is not None}
        if len(known) == len(found):
            return known
    raise UserError(
        f"--widths {' '.join(map(str, widths))}: no heads of one even width from"
        f" {NARROWEST_HEAD} to {own.d_head} elements divide them all: name multiples of"
        f" {own.d_head}"
    )


def _shape(model: ModelConfig, own: Shapes, width: int, d_head: int) -> dict[str, int] | None:
    """None: this width of heads does not divide it."""
    sizes = {
        "n_head": (own.n_head * own.d_head * width, model.d_model * d_head),
        "n_kv_head": (own.n_kv_head * own.d_head * width, model.d_model * d_head),
        "d_ff": (own.d_ff * width, model.d_model),
    }
    if any(above % below or above < below for above, below in sizes.values()):
        return None
    fields = {name: above // below for name, (above, below) in sizes.items()}
    return {"d_model": width, "d_head": d_head, **fields}


def about(
    recipe: Recipe, models: Sequence[WidthModel], rates: Mapping[str, float]
) -> dict[str, Any]:
    """What records of both checks say of their runs."""
    common = models[0].common
    resolved = common.resolved(recipe, steps=1, seed=1)
    return {
        "row": common.run["model.preset"],
        "n_layer": resolved.run.model.n_layer,
        "recipe": recipe.name,
        "precision": resolved.precision,
        "data": str(common.run["data.path"]),
        "seq_len": resolved.seq_len,
        "global_batch": resolved.batch.global_size,
        "rates": dict(rates),
        "base": models[0].d_model,
        "widths": sorted({model.d_model for model in models}),
    }
