"""A bounded part of a text to learn from, drawn the same way at every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator


def chunks(text: str, size: int) -> Iterator[str]:
    """Cut a text into chunks of at most `size` characters, at line ends if there are any."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line_end = text.rfind("\n", start, end)
            end = line_end + 1 if line_end >= 0 else end
        yield text[start:end]
        start = end


def spread(items: Iterable[str], limit: int, cost: Callable[[str], int]) -> list[str]:
    """All of `items`, or a fixed random choice of them that costs between half the limit and all.

    Every item draws a number; whenever the limit is passed, those with the larger half go.
    """
    draw = random.Random(0)
    bound, spent = 1 << 32, 0
    kept: list[tuple[int, int, str]] = []
    for item in items:
        number = draw.getrandbits(32)
        if number >= bound:
            continue
        price = cost(item)
        kept.append((number, price, item))
        spent += price
        while spent > limit and bound > 1:
            bound //= 2
            kept = [entry for entry in kept if entry[0] < bound]
            spent = sum(price for _, price, _ in kept)
    return [item for _, _, item in kept]
