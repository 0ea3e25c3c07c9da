"""The supervisor: what it starts again and from where, when it gives up, and what it counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fgpt.config.field_syntax import ranges_text
from fgpt.errors import UserError
from fgpt.train import supervisor
from fgpt.train.supervisor import SupervisedRun, Supervisor
from tests.ranks import ROOT, run_ranks, wait_until
from tests.tiny import Tiny, train_all
from tests.train import fake_run


@dataclass
class Fake:
    """Supervised stand-ins (`fake_run`) in a directory of one run."""

    folder: Path
    said: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def supervise(
        self, restarts: int = 5, skip: int = 0, resumes: bool = False, **plan: Any
    ) -> int:
        """Run the plan, of 12 steps and with a checkpoint every 5; returns the exit code."""
        text = json.dumps({"steps": 12, "every": 5} | plan)
        script = [sys.executable, str(Path(fake_run.__file__)), str(self.run_dir), text]

        def command(resume: bool, skipped: Sequence[tuple[int, int]]) -> list[str]:
            flags = ["--resume", "auto" if resume or resumes else "mine"]
            if skipped:
                flags.append(f"--set=data.skip_samples={ranges_text(skipped)}")
            return [*script, *flags]

        job = SupervisedRun(self.run_dir, command, restarts, skip, resumes)
        return Supervisor(job, self.said.append).run()

    @property
    def starts(self) -> list[list[str]]:
        """The flags of every start."""
        lines = (self.folder / "starts.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def report(self) -> dict[str, Any]:
        """The run's supervisor.json."""
        value: dict[str, Any] = json.loads((self.run_dir / "supervisor.json").read_text())
        return value


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Fake(tmp_path)


def test_a_run_that_fails_goes_on_from_its_newest_checkpoint(fake: Fake) -> None:
    starts = [{"at": 8, "do": "kill"}, {"at": 11, "do": "exit 1"}]
    assert fake.supervise(starts=starts) == 0
    assert fake.starts == [["--resume", "mine"], *[["--resume", "auto"]] * 2]
    first, recovered, second, again, summary = fake.said
    assert first.startswith("failed after step 8, exit code 137, and no rank recorded why; restart")
    assert first.endswith("restart 1 of 5 from step 5")
    assert recovered.startswith("recovered: 3 steps lost, ") and recovered.endswith("of step 6")
    assert second.endswith("restart 2 of 5 from step 10") and "1 steps lost" in again
    assert summary.startswith("restarts: 2, steps lost: 4, ")
    assert fake.report["lost_steps"] == 4 and len(fake.report["recovery_s"]) == 2
    lines = (fake.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 13))


def test_what_is_counted(fake: Fake) -> None:
    """Twelve steps of 10 ms are kept; the time to recover includes starting a Python."""
    began = time.time()
    assert fake.supervise(starts=[{"at": 8, "do": "exit 1"}]) == 0
    wall_s = time.time() - began
    (recovery_s,) = fake.report["recovery_s"]
    assert 0.01 < recovery_s < wall_s
    useful_s = 12 * fake_run.STEP_S
    assert useful_s / wall_s <= fake.report["goodput"] * 1.01 < useful_s / recovery_s


@pytest.mark.parametrize("what", ["exit 2", "bad"])
def test_bad_input_is_not_tried_again(fake: Fake, what: str) -> None:
    """Also where the launcher reports 1 and only the rank's record says 2."""
    fake.run_dir.mkdir()
    assert fake.supervise(starts=[{"do": what}]) == 2
    assert len(fake.starts) == 1 and fake.said[0].startswith("gave up, the input is wrong: failed")


@pytest.mark.parametrize("what", ["exit 2", "bad"])
def test_what_has_trained_had_the_right_input(fake: Fake, what: str) -> None:
    """A file system that is away for a moment is an error of the input to the rank that reads."""
    event = {"at": 3, "do": what}
    assert fake.supervise(starts=[event]) == 0
    assert len(fake.starts) == 2


def test_bad_input_that_repeats(fake: Fake) -> None:
    assert fake.supervise(starts=[{"at": 3, "do": "exit 2"}] * 9) == 2
    assert len(fake.starts) == 2 and fake.said[-2].startswith("gave up, the input is wrong: failed")


def test_starts_that_fail_are_not_the_fault_again(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port in use, a device in reset: the run goes on once they are back, with longer pauses."""
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.5)
    fails = [{"at": 7, "do": "exit 1"}, {"do": "exit 1"}, {"do": "exit 2"}, {"do": "exit 1"}]
    began = time.monotonic()
    assert fake.supervise(starts=fails) == 0
    assert len(fake.starts) == 5 and time.monotonic() - began > 3 * 0.5


@pytest.mark.parametrize("code", [129, 130, 143])
def test_a_run_that_was_asked_to_stop_is_not_started_again(fake: Fake, code: int) -> None:
    assert fake.supervise(starts=[{"at": 3, "do": f"exit {code}"}]) == code
    assert len(fake.starts) == 1 and fake.said[0] == "stopped; continue with --resume auto"


def test_a_fault_that_repeats_at_a_step(fake: Fake) -> None:
    assert fake.supervise(bad_samples=[30]) == 1
    assert len(fake.starts) == 2  # samples 28 to 31 are those of the step after step 7
    assert fake.said[-2] == (
        "gave up, a restart does not help, --skip_bad_batches would leave the samples out: failed"
        " after step 7, exit code 1: rank 1, data, samples 28-31: broken"
    )
    assert fake.said[-1].startswith("restarts: 1, steps lost: 4")


@pytest.mark.parametrize("event", [{"at": 0, "do": "exit 1"}, {"do": "exit 1"}])
def test_a_run_that_never_takes_a_step(fake: Fake, event: dict[str, Any]) -> None:
    assert fake.supervise(starts=[event] * 9) == 1
    assert len(fake.starts) == 2
    assert "gave up, a restart does not help: failed after step 0" in fake.said[-2]


def test_faults_of_different_steps_or_with_a_checkpoint_between_are_not_one(fake: Fake) -> None:
    starts = [{"at": step, "do": "exit 1"} for step in (7, 6, 7, 10)]
    assert fake.supervise(starts=starts) == 0
    assert len(fake.starts) == 5


def test_restarts_are_limited(fake: Fake) -> None:
    starts = [{"at": step, "do": "exit 1"} for step in (1, 2, 3, 4)]
    assert fake.supervise(restarts=2, starts=starts) == 1
    assert len(fake.starts) == 3
    assert "gave up, after 2 restarts (--max-restarts): failed after step 3" in fake.said[-2]
    assert fake.supervise(restarts=0, starts=[{}, {}, {}, {"at": 1, "do": "exit 1"}]) == 1


def test_bad_batches_are_left_out(fake: Fake) -> None:
    assert fake.supervise(restarts=9, skip=2, bad_samples=[12, 33]) == 0
    skip = "--set=data.skip_samples="
    assert [start[2:] for start in fake.starts] == [
        *([], [], [f"{skip}12-15"]),
        *([f"{skip}12-15"], [f"{skip}12-15,32-35"]),
    ]
    batches = fake.report["skipped_batches"]
    assert [batch["samples"] for batch in batches] == [[[12, 15]], [[32, 35]]]
    assert [batch["step"] for batch in batches] == [3, 7]  # a step earlier for each left out
    assert "failed twice after step 3: leaving out samples 12-15" in fake.said


def test_no_more_batches_are_left_out_than_allowed(fake: Fake) -> None:
    assert fake.supervise(restarts=9, skip=1, bad_samples=[12, 33]) == 1
    assert len(fake.starts) == 4 and "samples 32-35: broken" in fake.said[-2]
    # a later supervisor of the run counts and leaves out those of this one
    assert fake.supervise(restarts=9, skip=1, resumes=True, bad_samples=[12, 33]) == 1
    assert fake.starts[4][2:] == ["--set=data.skip_samples=12-15"] and len(fake.starts) == 6
    assert fake.supervise(restarts=9, skip=2, resumes=True, bad_samples=[12, 33]) == 0
    (fake.run_dir / "supervisor.json").write_text("{}")
    with pytest.raises(UserError, match=r"supervisor.json: cannot be read.*name the samples"):
        fake.supervise(resumes=True)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"skipped_batches": {}}',
        '{"skipped_batches": [{"samples": [[0, 1e400]]}]}',
        '{"skipped_batches": [{"samples": [[5, 3]]}]}',
        '{"skipped_batches": [{"samples": [[-4, 3]]}]}',
    ],
)
def test_a_damaged_report(fake: Fake, text: str) -> None:
    fake.run_dir.mkdir()
    (fake.run_dir / "supervisor.json").write_text(text)
    with pytest.raises(UserError, match=r"supervisor.json: cannot be read.*name the samples"):
        fake.supervise(resumes=True)
    assert not (fake.folder / "starts.jsonl").exists()


def test_the_users_resume_holds_until_the_run_has_its_directory(fake: Fake) -> None:
    """Else a restart would continue the earlier run that --resume none is to move away."""
    (fake.run_dir / "checkpoints" / "step_00000007").mkdir(parents=True)
    (fake.run_dir / "config.json").write_text("{}")
    starts = [{"do": "exit 1"}, {"at": 9, "do": "exit 1"}]
    assert fake.supervise(starts=starts) == 0
    assert [start[1] for start in fake.starts] == ["mine", "mine", "auto"]


def test_success_before_the_last_step_is_none(fake: Fake) -> None:
    """`deepspeed` ends with 0 when its own child is killed."""
    assert fake.supervise(starts=[{"at": 8, "do": "exit 0"}]) == 0
    assert len(fake.starts) == 2 and fake.said[0].startswith("failed after step 8, exit code 0")


def test_success_before_the_run_has_its_directory_is_none(fake: Fake) -> None:
    """Also where an earlier start has saved the last step."""
    assert fake.supervise() == 0
    assert fake.supervise(starts=[{}, {"do": "exit 0"}], resumes=True) == 0
    assert len(fake.starts) == 3 and fake.said[1].startswith("failed after step 0, exit code 0")


def test_no_process_is_left(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one in another session that ignores SIGTERM, before the next start."""
    monkeypatch.setattr(supervisor, "LEFTOVER_GRACE_S", 0.5)
    assert fake.supervise(starts=[{"at": 3, "do": "orphan"}]) == 0
    orphan = int((fake.folder / "orphan").read_text())
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == "zombie"


def after(file: Path, *delays_s: float, number: int = signal.SIGTERM) -> threading.Thread:
    """Send a signal to this process after each delay, the first one once `file` exists."""

    def send() -> None:
        wait_until(file.exists, 60, "the run waits")
        for delay_s in delays_s:
            time.sleep(delay_s)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_signal_is_passed_on_once(fake: Fake) -> None:
    thread = after(fake.folder / "ready", 0.0, 0.3)  # a scheduler's: soon after each other
    assert fake.supervise(starts=[{"at": 3, "do": "wait"}]) == 143
    thread.join()
    assert len(fake.starts) == 1 and (fake.folder / "signals").read_text() == "1"


def test_a_signal_in_the_pause_before_a_restart(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Supervisor, "_pause", lambda _: os.kill(os.getpid(), signal.SIGTERM), raising=True
    )
    assert fake.supervise(starts=[{"at": 3, "do": "exit 1"}]) == 143
    assert len(fake.starts) == 1 and "stopped; continue with --resume auto" in fake.said


def test_the_second_signal_kills(fake: Fake) -> None:
    thread = after(fake.folder / "ready", 0.0, supervisor.REPEATED_SIGNAL_S + 0.5)
    began = time.monotonic()
    assert fake.supervise(starts=[{"at": 3, "do": "hold"}]) == 143
    thread.join()
    assert len(fake.starts) == 1 and time.monotonic() - began < 30


SUPERVISE = """
import sys
from pathlib import Path
from fgpt.train.supervisor import SupervisedRun, Supervisor
job = SupervisedRun(Path(sys.argv[1]), lambda *_: sys.argv[2:], 3)
Supervisor(job, print).run()
"""


def test_the_command_ends_with_its_supervisor(fake: Fake) -> None:
    text = json.dumps({"steps": 12, "every": 5, "starts": [{"at": 3, "do": "wait"}]})
    run = [sys.executable, str(Path(fake_run.__file__)), str(fake.run_dir), text]
    mine = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(fake.run_dir), *run])
    wait_until((fake.folder / "ready").exists, 60, "the run waits")
    (command,) = psutil.Process(mine.pid).children()
    mine.kill()
    mine.wait()
    psutil.wait_procs([command], timeout=30)
    assert not command.is_running() or command.status() == psutil.STATUS_ZOMBIE
    assert (fake.folder / "signals").read_text() == "1"


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    job = SupervisedRun(tmp_path / "run", lambda *_: ["no-such-launcher", "x"], 3)
    with pytest.raises(UserError, match="no-such-launcher: No such file.*check the launch command"):
        Supervisor(job, print).run()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_costs_nothing_but_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of a run whose rank 1 is killed in step 4 are those of a whole run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_ranks(train_all, 2, [tiny.flags("whole")])[0][0].code == 0
    said: list[str] = []

    def command(resume: bool, skipped: object) -> list[str]:
        torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2"]
        fault = [] if resume else ["env", "FGPT_FAULT=forward:1:3:kill"]
        script = ["--standalone", "--local-addr", "127.0.0.1", str(ROOT / "launchers/train.py")]
        flags = tiny.flags("run", *(["--resume", "auto"] if resume else []))
        return [*fault, *torchrun, *script, *flags]

    job = SupervisedRun(tiny.path("run"), command, 1)
    assert Supervisor(job, said.append).run() == 0, said
    assert tiny.losses("run") == tiny.losses("whole")
    assert said[-1].startswith("restarts: 1, steps lost: 1"), said
