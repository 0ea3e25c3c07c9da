"""The C library's memory, on a CPU.

glibc gives blocks above 32 MiB back to the system as soon as they are freed, and the end of its
heap, too; the next tensor of that size gets new pages, which the system fills with zeros one fault
at a time. A step of a small GPT has 35,000 of them, a tenth of its time.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**26
"""Blocks of this size are kept. Not more: up to version 2.37, glibc may leave seven aligned blocks
of one size unused before it takes the first of them again.
"""


def keep_freed_memory(environ: Mapping[str, str]) -> bool:
    """Have malloc keep what is freed, up to KEPT_BYTES in one block, for the next tensor.

    Nothing is done without glibc, or where the environment has settings of its own for malloc
    (MALLOC_..., GLIBC_TUNABLES). Returns whether it was.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environ)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # older versions take half of it at most
    kept = mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
    return bool(kept) and bool(mallopt(M_TRIM_THRESHOLD, -1))
