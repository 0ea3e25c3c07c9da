"""The table of rules: read by the validator, by ds_configs/README.md and by the tests.

To add one, write a generator of findings and a `Rule` beside its kin in `rules_*.py`, its row in
ds_configs/README.md, and its wrong twin in tests/config/test_rules.py.
"""

from __future__ import annotations

from fgpt.config.rules import (
    data,
    extras,
    grid,
    keys,
    optim,
    parallel,
    plain,
    speed,
    zero,
)
from fgpt.config.rules.context import Rule
from fgpt.config.rules.grid import batch_of

__all__ = ["RULES", "batch_of"]

RULES: tuple[Rule, ...] = (
    *keys.RULES,
    *grid.RULES,
    *data.RULES,
    *parallel.RULES,
    *zero.RULES,
    *optim.RULES,
    *extras.RULES,
    *plain.RULES,
    *speed.RULES,
)
