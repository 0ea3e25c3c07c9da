"""Rules about single keys: known to DeepSpeed, but without effect here."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.deepspeed.check import walk
from fgpt.config.rules.context import Context, Finding, Rule
from fgpt.utils.keys import shown


def _refused(ctx: Context) -> Iterator[Finding]:
    for path, key, value in walk(ctx.tree):
        if key.refused:
            fix = f"write it as {key.instead!r}" if key.instead else ""
            yield Finding(f"deepspeed.{path}", f"{shown(value)}: {key.refused}", fix)


def _not_default(ctx: Context) -> Iterator[Finding]:
    for path, key, value in walk(ctx.tree):
        if key.only_default and value != key.default:
            what = f"{shown(value)}: {key.only_default}"
            yield Finding(f"deepspeed.{path}", what, f"delete it, or write {shown(key.default)}")


def _other_stage(ctx: Context) -> Iterator[Finding]:
    for path, key, value in walk(ctx.tree):
        # A switch in its resting position says what happens anyway.
        at_rest = value is None or (isinstance(value, bool) and value == bool(key.default))
        if not key.stages or ctx.stage in key.stages or at_rest:
            continue
        stages = " and ".join(map(str, key.stages))
        what = f"{shown(value)} is read at ZeRO stage {stages} only; stage is {ctx.stage}"
        yield Finding(f"deepspeed.{path}", what)


RULES = (
    Rule(
        "no-effect-here",
        "The key is known to DeepSpeed, but FGPT does not drive it, or DeepSpeed has removed it.",
        "delete it",
        _refused,
    ),
    Rule(
        "default-only",
        "The key is known to DeepSpeed, but any other value than its default would have no effect"
        " here or would break what FGPT promises.",
        "delete it",
        _not_default,
    ),
    Rule(
        "other-zero-stage",
        "The key is read at other ZeRO stages and would do nothing at this one.",
        "delete it, or choose a stage that reads it",
        _other_stage,
    ),
)
