"""Key/value cache for decoding batches of left-padded prompts.

B rows, T newest tokens, S columns attended to, G key/value heads, K d_head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fgpt.config.schema import ModelConfig, Shapes


class DecodeStep:
    """What the layers need to know about the newest T tokens of each row."""

    def __init__(
        self,
        cache: KVCache,
        columns: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        n_keys: int,
        begin: int | None,
    ):
        self.cache = cache
        self.columns = columns
        """Columns of the newest tokens in the cache, int64 [T]."""
        self.positions = positions
        """Their positions, int64 [B, T], or [1, T] without padding."""
        self.mask = mask
        """Columns that each of them attends to, bool [B or 1, 1, T, S]; None: causal, from the
        first column on."""
        self.n_keys = n_keys
        """S: the filled columns, or all of them where shapes must not change."""
        self.begin = begin
        """Column of the first newest token; None where no Python number may depend on it."""
        self._windows: dict[int, tuple[int, Tensor | None]] = {}
        self.rotation: tuple[Tensor, Tensor] | None = None
        """cos and sin of the positions; the first layer that needs them computes them for all."""

    @property
    def n_positions(self) -> int:
        """All positions are below it."""
        return self.cache.n_positions

    def within(self, window: int) -> tuple[int, Tensor | None]:
        """Return the first column in the window of any newest token, and the mask from it on, for a
        step of one token or with a mask: bool [B or 1, 1, T, S - first], None: no mask is needed.

        Computed by the first layer with this window, for all.
        """
        if window not in self._windows:
            first = 0 if self.begin is None else max(0, self.begin - window + 1)
            mask = self.mask
            if mask is not None:
                in_window = self.cache.all_columns[: self.n_keys] > self.columns[:, None] - window
                mask = (mask & in_window)[..., first:]
            self._windows[window] = first, mask
        return self._windows[window]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, G, T, K] of a block; return its keys and values so far, [B, G, S, K]."""
        keys, values = self.cache.layers[layer]
        keys.index_copy_(2, self.columns, k)
        values.index_copy_(2, self.columns, v)
        return keys[:, :, : self.n_keys], values[:, :, : self.n_keys]


class KVCache:
    """Keys and values of some blocks, [B, G, capacity, K] each; `length` columns are filled.

    Rows are aligned at their ends: row b begins with padding[b] columns that nothing attends to,
    and its positions count from the column after them.
    """

    def __init__(
        self,
        config: ModelConfig,
        padding: Tensor,
        capacity: int,
        dtype: torch.dtype,
        blocks: Iterable[int] | None = None,
    ):
        """`padding`: int64 [B], on the model's device; `blocks`: their numbers (default: all).

        With the `config` of a tensor-parallel rank, the cache of its heads.
        """
        shapes = Shapes.of(config)
        device, size = padding.device, (len(padding), shapes.n_kv_head, capacity, shapes.d_head)
        # zeros: a masked column takes part in a product with the weight 0
        self.layers = {
            i: (
                torch.zeros(size, device=device, dtype=dtype),
                torch.zeros(size, device=device, dtype=dtype),
            )
            for i in (range(config.n_layer) if blocks is None else blocks)
        }
        self.padding = padding
        self.is_padded = bool(padding.any())
        self.capacity = capacity
        self.n_positions = min(capacity, config.max_seq_len)
        self.length = 0
        self.all_columns = torch.arange(capacity, device=device)

    def fits(self, padding: Tensor, capacity: int) -> bool:
        """Whether `restart` makes it the cache of such rows."""
        return len(padding) == len(self.padding) and capacity == self.capacity

    def restart(self, padding: Tensor) -> None:
        """Empty the cache for other rows; tensors keep their addresses."""
        self.padding.copy_(padding)
        self.length = 0

    def copy_rows(self, source: KVCache, rows: Tensor) -> None:
        """Begin with the filled columns of these rows, int64 [B], of another cache of the same
        blocks, whose padding they share.
        """
        self.length = source.length
        for own, other in zip(self.layers.values(), source.layers.values(), strict=True):
            for target, values in zip(own, other, strict=True):
                target[:, :, : self.length] = values[rows, :, : self.length]

    def keep_addresses(self) -> None:
        """Tell torch.compile that the tensors stay where they are, so that CUDA graphs may write
        into them; rows count as padded, so that no Python value depends on them.
        """
        self.is_padded = True
        for tensor in (self.padding, *(t for pair in self.layers.values() for t in pair)):
            torch._dynamo.mark_static_address(tensor)

    def advance(self, n_tokens: int) -> Tensor:
        """Count the next T tokens as filled and return their columns, int64 [T].

        Raises ValueError beyond the capacity.
        """
        begin, self.length = self.length, self.length + n_tokens
        if self.length > self.capacity:
            self.length = begin
            raise ValueError(f"KV cache holds {self.capacity} tokens, {n_tokens} more do not fit")
        return self.all_columns[begin : self.length]

    def step(self, columns: Tensor, *, fixed_shapes: bool = False) -> DecodeStep:
        """Return the step of the tokens in these columns, the last ones that are filled.

        They attend to the filled columns; with `fixed_shapes` to all columns, those that are not
        filled masked, so that no shape and no Python number changes from token to token.
        """
        # 1. positions; those of padding and of rows that have ended are not used, only valid
        positions = columns[None]
        if self.is_padded:
            positions = columns - self.padding[:, None]
        positions = positions.clamp(0, self.n_positions - 1)
        # 2. without padding, the newest token attends to all filled columns, and the first T
        # tokens to each other: kernels need no mask
        n_keys = self.capacity if fixed_shapes else self.length
        begin = None if fixed_shapes else self.length - len(columns)
        if not fixed_shapes and not self.is_padded and len(columns) in (1, n_keys):
            return DecodeStep(self, columns, positions, None, n_keys, begin)
        # 3. otherwise, each attends to the columns from its row's first one to its own
        key = self.all_columns[:n_keys]
        mask = (key <= columns[:, None])[None, None]  # (1, 1, T, S)
        if self.is_padded:
            own = key == columns[:, None]  # a padding token attends to itself: no row is empty
            mask = mask & (own | (key >= self.padding[:, None, None]))[:, None]
        return DecodeStep(self, columns, positions, mask, n_keys, begin)
