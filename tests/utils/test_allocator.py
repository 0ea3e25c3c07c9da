"""Freed memory stays with the process, and is used again without page faults."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from tests.ranks import ROOT

FAULTS = """
import json, os, resource, torch
from fgpt.utils.process import keep_freed_memory
told = keep_freed_memory(os.environ)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = [told]
for megabytes in (50, 100):
    for round in range(16):
        if round == 12:
            before = faults()
        torch.ones(megabytes * 250_000)
    found.append(faults() - before)
print(json.dumps(found))
"""


def faults_of(**environ: str) -> tuple[bool, int, int]:
    """Whether malloc was told, and page faults of large tensors, each freed at once: 50 MB (12,207
    pages) and 100 MB, when others of their size have been freed before.
    """
    known = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    out = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        check=True,
        timeout=60,
    )
    told, *faults = json.loads(out.stdout)
    return told, *faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_tensors_get_the_pages_of_those_before_them() -> None:
    told, kept, returned = faults_of()
    assert told and kept < 100 < returned
    told, untouched, _ = faults_of(MALLOC_ARENA_MAX="8")  # the user's settings are left alone
    assert not told and untouched > 100
