"""What torch.compile and Triton need of this machine to build code while a program runs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def missing_compiler(device_kind: str) -> str | None:
    """Return what this machine lacks for compiled code, with the remedy; None: nothing.

    On a CPU torch.compile builds C++ for every graph, with CXX or g++; on a GPU Triton builds C
    that starts its kernels, with CC, gcc or clang. Both include Python.h.
    """
    if device_kind == "cpu":
        variable, language = "CXX", "C++"
        usual = ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, language, usual = "CC", "C", ["gcc", "clang"]
    named = os.environ.get(variable)
    if not any(map(shutil.which, usual if named is None else [named])):
        found = " or ".join(usual) if named is None else f"{variable}={named} is not found"
        return f"no {language} compiler ({found}): install {usual[0]}, or set {variable}"
    if not any((folder / "Python.h").exists() for folder in _include_folders()):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"no Python.h in {_include_folders()[0]}: install Python's headers (python{version}-dev"
            " on Debian and Ubuntu), or add their folder to CPATH"
        )
    return None


def _include_folders() -> list[Path]:
    """Where a compiler finds Python.h: this Python's folder, and those of CPATH."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder below /usr/local; the headers are where Python's is
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    named = os.environ.get("CPATH", "").split(os.pathsep)
    return [Path(sysconfig.get_path("include", scheme)), *(Path(name) for name in named if name)]
