"""Compiles the Triton kernels for a GPU, which need not be here. Prints each kernel's bytes of
shared memory and of machine code, as JSON. `test_dropout_attention.py` runs it.

    python -m tests.model.compiled_attention CAPABILITY DTYPE D_HEAD MASKS

MASKS: "window", "documents", both or "none".
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fgpt.model.kernels import dropout_attention
from fgpt.model.kernels import dropout_attention_tiles as tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {
    **dict.fromkeys(("hashes", "begins", "ends"), "*i32"),
    **dict.fromkeys(("log_sums", "products"), "*fp32"),
    **dict.fromkeys(("scale", "kept_factor"), "fp32"),
    **dict.fromkeys(("H", "T", "threshold", "window"), "i32"),
}
"""Of the arguments that do not have the dtype of q."""


def main(capability: int, dtype: str, d_head: int, masks: str) -> None:
    q = torch.empty(1, 4, 8, d_head, dtype=DTYPES[dtype])
    window = 5 if "window" in masks else None
    begins = torch.zeros(1, 8) if "documents" in masks else None
    _, options = dropout_attention._options(q, q[:, :2], 0.1, window, begins)
    target, stages = GPUTarget("cuda", capability, 32), {"num_stages": options["num_stages"]}
    found = []
    for kernel in (tiles.forward_tile, tiles.grad_q_tile, tiles.grad_kv_tile):
        fixed = {n: options[n] for n in kernel.arg_names if n in options and n not in TYPES}
        absent = ("begins", "ends") if begins is None else ()  # None is a constant, too
        fixed |= {n: None for n in kernel.arg_names if n in absent}
        signature = {
            n: "constexpr" if n in fixed else TYPES.get(n, f"*{dtype}") for n in kernel.arg_names
        }
        built = triton.compile(ASTSource(kernel, signature, constexprs=fixed), target, stages)
        found.append((built.metadata.shared, len(built.asm["cubin"])))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
