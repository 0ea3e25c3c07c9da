"""Rules about the data sets and how they are cut into samples."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.data_path import blend_issue
from fgpt.config.rules.context import Context, Finding, Rule


def _blend(ctx: Context) -> Iterator[Finding]:
    issue = blend_issue(ctx.run("data.path"))
    if issue:
        yield Finding("run.data.path", issue)


def _reset_without_mask(ctx: Context) -> Iterator[Finding]:
    if ctx.run("data.reset_positions") and not ctx.run("data.document_mask"):
        yield Finding("run.data.reset_positions", "true with data.document_mask false")


def _reset_without_positions(ctx: Context) -> Iterator[Finding]:
    if ctx.run("data.reset_positions") and ctx.run("model.position") == "none":
        yield Finding("run.data.reset_positions", "true with model.position none")


RULES = (
    Rule(
        "blend-text",
        "data.path is one directory, or several with a positive weight each.",
        "write DIR, or DIR:0.7,DIR:0.3",
        _blend,
    ),
    Rule(
        "reset-needs-mask",
        "Positions that begin anew with each document would be the same for tokens of several"
        " documents that attend to each other.",
        "write data.document_mask true, or leave data.reset_positions out",
        _reset_without_mask,
    ),
    Rule(
        "reset-needs-positions",
        "A model without positions has none to begin anew.",
        "leave data.reset_positions out, or choose another model.position",
        _reset_without_positions,
    ),
)
