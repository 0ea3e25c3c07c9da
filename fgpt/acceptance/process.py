"""The process of one check: its arguments are MODULE:NAME DEVICE WORK DATA RESULT."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import traceback
import warnings
from pathlib import Path

from fgpt.acceptance.check import Findings
from fgpt.errors import FgptError
from fgpt.utils.process import signal_on_parent_death


def main() -> int:
    """Run the check and write its part of the report; returns 0 also if it failed."""
    function, device_kind, work, data, result = sys.argv[1:]
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    signal_on_parent_death(signal.SIGKILL)  # a killed run leaves no check behind
    Path(work).mkdir()
    found = Findings(device_kind, Path(work), Path(data))
    try:
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(found)
    except Exception as error:  # of any kind: it is the result
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, FgptError) else f"{type(error).__name__}: "
        found.failures.append(f"{kind}{first}")
    Path(result).write_text(json.dumps(found.line()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
