"""DeepSpeed's monitors (TensorBoard, CSV, W&B), opened when the run directory is this run's.

The x axis of every event is the optimizer step; DeepSpeed's own is the number of samples, below
the heading "step". A resumed run continues after the checkpoint's step, and no step appears twice:

    CSV           rows of later steps are removed, and the header is not repeated; a new run in the
                  same directory renames earlier files to NAME.1.csv
    TensorBoard   readers hide earlier events of steps that are written again
    W&B           the run continues under its id, and ignores steps that it has already
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from fgpt.errors import LaunchError
from fgpt.utils.console import Outage
from fgpt.utils.files import write_atomic

LOGGED_BY_FGPT = {"lr", "loss_scale", "train_loss", "eval_loss"}
"""DeepSpeed's events that repeat FGPT's; its learning rate is that of the next step."""
CSV_OWNER = "run_dir.txt"
"""File beside the CSV files with the path of the run that writes them."""
WANDB_ID = "wandb_id"
"""File in the run directory."""


class Monitors:
    """Replaces a DeepSpeed engine's `monitor` on rank 0."""

    enabled = True

    def __init__(
        self,
        sections: Mapping[str, Any],
        run_dir: Path,
        current_step: Callable[[], int],
        warn: Callable[[str], None],
    ):
        """Open the enabled ones of the JSON's `sections`; `warn` prints a failed write.

        Raises LaunchError if one cannot be opened.
        """
        self.current_step, self._outage = current_step, Outage(warn)
        self._waiting: list[tuple[str, float, int]] = []
        step = current_step()
        has_wandb = sections.get("wandb", {}).get("enabled", False)
        named = _wandb_variables(run_dir, step) if has_wandb else contextlib.nullcontext()
        try:
            with named:
                self.master = MonitorMaster(get_monitor_config(dict(sections)))
            if (csv := self.master.csv_monitor) is not None:
                csv.filenames += _continue_csv_files(Path(csv.log_dir), run_dir, step, warn)
            if (board := self.master.tb_monitor) is not None:
                from torch.utils.tensorboard import SummaryWriter

                board.summary_writer.close()
                folder, first = board.summary_writer.log_dir, step + 1 if step else 0
                board.summary_writer = SummaryWriter(folder, purge_step=first)
        except OSError as error:
            problem = f"monitor: {error.filename}: {error.strerror}"
            raise LaunchError(f"{problem}; name another output_path, or turn it off") from error
        except Exception as error:
            if not has_wandb:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LaunchError(
                f"wandb: {reason}; log in with `wandb login`, set WANDB_MODE=offline, or turn"
                " wandb.enabled off"
            ) from error

    def close(self) -> None:
        """Write what waits for a step that is not logged any more."""
        if self._waiting:
            self.log({}, self.current_step())

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars of one step, behind DeepSpeed's of earlier ones."""
        due = [event for event in self._waiting if event[2] <= step]
        self._waiting = [event for event in self._waiting if event[2] > step]
        try:
            self.master.write_events(due + [(name, value, step) for name, value in scalars.items()])
        except OSError as error:
            place = error.filename or "event file"
            self._outage.failed(f"monitor: {place}: {error.strerror}; not recorded")
        else:
            self._outage.succeeded("monitor: recorded again")

    def write_events(self, events: Iterable[tuple[str, float, int]]) -> None:
        """Keep what DeepSpeed alone knows (`wall_clock_breakdown`) until the step is logged.

        On a GPU that is one step later, and W&B refuses events of earlier steps.
        """
        for name, value, _ in events:
            name = name.rpartition("/")[2]
            if name not in LOGGED_BY_FGPT:
                self._waiting.append((f"train/{name}", float(value), self.current_step()))


def _continue_csv_files(
    folder: Path, run_dir: Path, step: int, warn: Callable[[str], None]
) -> list[str]:
    """Cut the files of an earlier start back to `step`, or rename them in a new run.

    Files of another run, which names itself in a file beside them, are renamed, never cut. Returns
    the names, without suffix, of files that have their header.
    """
    owner, own_name = folder / CSV_OWNER, os.path.realpath(run_dir)
    named = owner.read_text(errors="replace").strip() if owner.is_file() else own_name
    is_own = step > 0 and named == own_name
    if step > 0 and not is_own:
        warn(f"csv_monitor: {folder} was last written by {named}: its files are now NAME.N.csv")
    write_atomic(owner, f"{own_name}\n".encode())
    kept = []
    for path in sorted(folder.glob("*.csv")):
        text = path.read_text(errors="replace") if path.is_file() else ""
        header, *rows = text.splitlines() or [""]
        if not header.startswith("step,") or "." in path.stem:
            continue  # another program's, or already renamed
        if not is_own:
            number = 1
            while (target := path.with_suffix(f".{number}.csv")).exists():
                number += 1
            path.rename(target)
            continue
        before = (row for row in rows if row.partition(",")[0].isdecimal())  # not half a row
        lines = [header, *(row for row in before if int(row.partition(",")[0]) <= step)]
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
        kept.append(path.stem)
    return kept


@contextlib.contextmanager
def _wandb_variables(run_dir: Path, step: int) -> Iterator[None]:
    """Tell wandb the run's directory, name and id, unless its own variables do."""
    file = run_dir / WANDB_ID
    if step == 0 or not file.exists():
        write_atomic(file, f"{uuid.uuid4().hex[:8]}\n".encode())
    values = {
        "WANDB_DIR": str(run_dir),
        "WANDB_NAME": run_dir.name,
        "WANDB_RUN_ID": file.read_text().strip(),
        "WANDB_RESUME": "allow",
    }
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
