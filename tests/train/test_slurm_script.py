"""launchers/slurm.sbatch, with stand-ins for Slurm's programs that record their arguments."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from fgpt.cli.train import parser
from tests.ranks import ROOT

SCRIPT = ROOT / "launchers" / "slurm.sbatch"
SRUN = """#!/bin/bash
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT" "$SRUN_CPUS_PER_TASK" "$@" > "$RECORD"
exit 143
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[7-8]" ] && printf 'node7\\nnode8\\n'
"""


def test_the_job_ends_with_its_ranks_and_resumes(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4031234", "RECORD": str(record)}
    slurm["SLURM_CPUS_PER_TASK"] = "8"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "--steps", "9 9"]
    done = subprocess.run(command, env=os.environ | slurm | path, cwd=ROOT, capture_output=True)
    assert done.returncode == 143 and done.stderr == b""
    meeting_point, cores, *words = record.read_text().splitlines()
    assert (meeting_point, cores) == ("node7:21234", "8")
    assert words[:3] == ["--kill-on-bad-exit=1", ".venv/bin/python", "launchers/train.py"]
    assert words[-2:] == ["--steps", "9 9"]
    flags = parser().parse_args([*words[3:-1], "9"])
    assert flags.resume == "auto"
    assert (ROOT / flags.ds_config).is_file() and (ROOT / flags.run).is_file()


def test_every_rank_gets_a_signal_before_the_end() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    # with B: only the script would get it, and srun's ranks would be killed
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= {*options}
