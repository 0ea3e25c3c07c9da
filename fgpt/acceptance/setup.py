"""Before the checks: the report's header, and the data set of the training checks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from typing import Any

import torch

from fgpt.acceptance.check import Findings
from fgpt.acceptance.report import FORMAT
from fgpt.bench.record import environment
from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.errors import LaunchError
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.spec import TokenizerSpec

OPTIONAL_PACKAGES = ("triton", "transformers")
VOCAB_SIZE = 512
TEXT = "def f{0}(x):\n    return x * {0} + {1}\n\n\nclass C{1}:\n    value = {0}\n"


def describe_and_prepare(found: Findings) -> None:
    """Write header.json and the data set. Raises LaunchError without the device."""
    if found.on_gpu and not torch.cuda.is_available():
        raise LaunchError(
            "torch finds no GPU: nvidia-smi must list one, and torch be built for CUDA; --device"
            " cpu runs the stand-ins"
        )
    (found.work / "header.json").write_text(json.dumps(header(found.device)))
    texts = found.work / "texts"
    texts.mkdir()
    for number in range(200):
        lines = "".join(TEXT.format(number * i, number + i) for i in range(1, 20))
        (texts / f"{number:03d}.txt").write_text(lines)
    recipe = Recipe(
        "acceptance",
        SourceSpec("local", str(texts)),
        validation_fraction=0.1,
        tokenizer=TokenizerSpec(vocab_size=VOCAB_SIZE),
    )
    prepare(recipe, found.data, progress=False, workers=1)


def header(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: the first line of the report."""
    facts = environment(device)
    facts.pop("command")
    installed = [name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name)]
    facts["versions"] |= {name: importlib.metadata.version(name) for name in installed}
    facts["driver"] = None
    if device.type == "cuda":
        facts["versions"] |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
        facts["driver"] = driver()
    return {"format": FORMAT, "header": True, "device": device.type, **facts}


def driver() -> str | None:
    """The NVIDIA driver's version; None if /proc does not say."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return None
