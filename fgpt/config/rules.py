"""The table of rules: read by the validator, by ds_configs/README.md and by the tests.

To add one, write a generator of findings and a `Rule` beside its kin in `rules_*.py`, its row in
ds_configs/README.md, and its wrong twin in tests/config/test_rules.py.
"""

from __future__ import annotations

from fgpt.config import (
    rules_data,
    rules_extras,
    rules_grid,
    rules_keys,
    rules_optim,
    rules_parallel,
    rules_plain,
    rules_speed,
    rules_zero,
)
from fgpt.config.context import Rule
from fgpt.config.rules_grid import batch_of

__all__ = ["RULES", "batch_of"]

RULES: tuple[Rule, ...] = (
    *rules_keys.RULES,
    *rules_grid.RULES,
    *rules_data.RULES,
    *rules_parallel.RULES,
    *rules_zero.RULES,
    *rules_optim.RULES,
    *rules_extras.RULES,
    *rules_plain.RULES,
    *rules_speed.RULES,
)
