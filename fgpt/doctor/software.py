"""Python, libraries and FGPT's own code: what this process has, what is supported, who differs."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

import fgpt
from fgpt.doctor.check import Check, Places

# what FGPT's numbers depend on -> names of its distributions; not every platform has triton
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "deepspeed": ("deepspeed",),
    "accelerate": ("accelerate",),
    "numpy": ("numpy",),
    "safetensors": ("safetensors",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm"),
}


def versions() -> dict[str, str]:
    """Name -> version of Python, the installed `LIBRARIES`, and NCCL if torch has it."""
    found = {"python": platform.python_version()}
    for name, distributions in LIBRARIES.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    if torch.version.cuda or torch.version.hip:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def supported_versions() -> dict[str, str] | None:
    """Name -> range of versions that FGPT supports, >=2.11,<2.14; None if FGPT is not installed."""
    from packaging.requirements import Requirement

    try:
        facts = metadata.metadata("fgpt")
    except metadata.PackageNotFoundError:
        return None
    ranges = {"python": str(facts["Requires-Python"])}
    for requirement in map(Requirement, facts.get_all("Requires-Dist") or ()):
        if requirement.name in LIBRARIES:
            ranges[requirement.name] = str(requirement.specifier)
    return ranges


def judge_versions(found: Mapping[str, str], supported: Mapping[str, str] | None) -> list[Check]:
    """One line with all versions, and one for each that is missing or out of FGPT's range."""
    from packaging.specifiers import SpecifierSet

    text = ", ".join(f"{name} {version}" for name, version in found.items())
    checks = [Check("ok", "versions", text)]
    if supported is None:
        remedy = "install FGPT (pip install -e .), which also installs them"
        value = "FGPT is not installed here, and the ranges that it supports are not known"
        return [*checks, Check("warning", "versions", value, remedy)]
    for name, specifier in supported.items():
        version = found.get(name)
        remedy = f"pip install '{name}{specifier}'"
        if name == "python":
            remedy = "make the virtual environment with another Python"
        if version is None:
            checks.append(Check("error", "versions", f"{name} is not installed", remedy))
        elif not SpecifierSet(specifier).contains(version, prereleases=True):
            value = f"{name} {version} is not in FGPT's range {specifier}"
            checks.append(Check("error", "versions", value, remedy))
    return checks


def code_hash() -> str:
    """SHA-256 of FGPT's Python files, names and contents."""
    digest = hashlib.sha256()
    root = Path(fgpt.__file__).parent
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def differing(values: Sequence[str | None]) -> tuple[str, dict[str, list[int]]]:
    """The most frequent value, and the ranks of every other; of equally frequent ones the lowest
    rank's counts. None: this rank has none, and does not count.
    """
    counts = Counter(value for value in values if value is not None)
    usual = max(counts, key=counts.__getitem__, default="")
    others: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value is not None and value != usual:
            others.setdefault(value, []).append(rank)
    return usual, others


def judge_agreement(what: str, values: Sequence[str | None], remedy: str, places: Places) -> Check:
    """One line that names the ranks whose value (a hash, a version) is not that of most ranks."""
    usual, others = differing(values)
    if not others:
        n = len({value for value in values if value is not None})
        return Check("ok", what, "the same on all ranks" if n else "none")
    texts = [f"{places.describe(ranks)}: {_short(value)}" for value, ranks in others.items()]
    return Check("error", what, f"{'; '.join(texts)}; the others: {_short(usual)}", remedy)


def judge_version_agreement(found: Sequence[Mapping[str, str]], places: Places) -> list[Check]:
    """One line for each library whose versions differ; one ok if none does."""
    names = list(dict.fromkeys(name for versions in found for name in versions))
    remedy = "give every node the same environment"
    checks = [
        judge_agreement(
            f"version of {name}", [v.get(name, "absent") for v in found], remedy, places
        )
        for name in names
    ]
    differ = [check for check in checks if check.grade != "ok"]
    return differ or [Check("ok", "versions on the ranks", "the same on all ranks")]


def _short(value: str) -> str:
    """A hash is recognized by its beginning."""
    return f"{value[:12]}..." if len(value) == 64 else value
