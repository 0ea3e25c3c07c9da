"""`make test-faults`: what FGPT survives, one line per scenario, by the tests that prove it.

    python -m tests.faults            run all of them and print the table
    python -m tests.faults T8 F4      some rows

T1-T31 are scenarios of a list of fault tests, F1-F15 faults that a review has found in FGPT.
Nothing is lost where a row passes: its tests compare the run after the fault with one without.
"gone" is the longest time from the first end of a process of a failing run to that of its last one;
without it the row has no run, or its tests do not measure that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Scenario:
    """One row."""

    text: str
    """What is done, and what must come of it."""
    tests: tuple[str, ...]
    """tests/FILE.py::FUNCTION without "tests/", or a whole FILE.py."""
    not_covered: str = ""
    """What no test shows, and why."""


SCENARIOS = {
    "T1": Scenario(
        "kill -9 of a rank in forward, backward, the optimizer: the others end, the resume is"
        " exact",
        (
            "checkpoint/test_kills.py::test_a_rank_dies_while_training",
            "checkpoint/test_kills.py::test_a_rank_dies_within_a_step",
            "train/test_grid_kills.py::test_a_rank_dies",
        ),
    ),
    "T2": Scenario(
        "all ranks killed at every point of a save, in five layouts: the checkpoint before, or"
        " the new one, never a mixture",
        (
            "checkpoint/test_kills.py::test_all_ranks_die_while_saving",
            "checkpoint/test_kills.py::test_all_ranks_of_a_layout_die_while_saving",
            "checkpoint/test_kills.py::test_a_rank_dies_in_the_middle_of_a_file",
            "checkpoint/test_kills.py::test_killed_again_and_again",
        ),
    ),
    "T3": Scenario(
        "killed after the rename, before `latest`: the new checkpoint is used",
        ("checkpoint/test_kills.py::test_all_ranks_die_while_saving",),
    ),
    "T4": Scenario(
        "a rank that writes slowly: `latest` never names an incomplete checkpoint",
        ("checkpoint/test_kills.py::test_latest_never_names_an_unfinished_checkpoint",),
    ),
    "T5": Scenario(
        "truncated files of a checkpoint: refused on all ranks before a weight is touched, the"
        " older one is used",
        (
            "checkpoint/test_damage.py::test_damage_is_named_and_passed_over",
            "checkpoint/test_damage.py::test_damage_of_one_rank_is_known_to_all",
            "checkpoint/test_damage.py::test_all_damaged_is_an_error_and_not_a_fresh_start",
            "checkpoint/test_manifest.py::test_every_cut_is_noticed",
        ),
    ),
    "T6": Scenario(
        "one flipped bit in tensors, header or manifest: the same",
        (
            "checkpoint/test_damage.py::test_damage_is_named_and_passed_over",
            "checkpoint/test_manifest.py::test_every_flipped_bit_is_noticed",
            "checkpoint/test_manifest.py::test_another_byte_is_noticed",
        ),
    ),
    "T7": Scenario(
        "a file missing, added, exchanged between ranks or steps: the same",
        (
            "checkpoint/test_damage.py::test_damage_is_named_and_passed_over",
            "checkpoint/test_damage.py::test_a_named_damaged_checkpoint_is_not_replaced_by_another",
            "checkpoint/test_manifest.py::test_other_contents_are_refused",
        ),
    ),
    "T8": Scenario(
        "no space at every point of a save, a file size limit, a full tmpfs: training goes on,"
        " the third failure in a row ends it",
        (
            "checkpoint/test_full_disk.py::test_one_full_save_does_not_end_the_run",
            "checkpoint/test_full_disk.py::test_one_full_save_of_a_grid",
            "checkpoint/test_full_disk.py::test_three_failed_saves_end_the_run",
            "checkpoint/test_full_disk.py::test_a_failed_last_save_is_not_success",
            "checkpoint/test_full_disk.py::test_no_space_at_every_point",
            "checkpoint/test_full_disk.py::test_a_disk_that_is_really_full",
        ),
    ),
    "T9": Scenario(
        "checkpoint directory read-only, removed while training, a directory or link in the way",
        (
            "checkpoint/test_full_disk.py::test_a_read_only_directory",
            "checkpoint/test_full_disk.py::test_the_checkpoints_vanish_while_training",
            "checkpoint/test_full_disk.py::test_latest_is_a_directory",
            "checkpoint/test_full_disk.py::test_a_run_directory_that_cannot_be_made",
            "checkpoint/test_damage.py::test_a_linked_checkpoint_is_not_followed",
            "checkpoint/test_file_systems.py::test_what_is_in_the_way_of_a_save",
        ),
    ),
    "T10": Scenario(
        "SIGTERM and Ctrl-C to launcher, one rank, all, twice, in a save: one checkpoint of the"
        " current step, documented exit codes",
        (
            "train/test_stop_signals.py",
            "train/test_launchers.py::test_sigterm_to_the_launcher",
            "train/test_launchers.py::test_ctrl_c",
        ),
    ),
    "T11": Scenario(
        "kill -9 of the launcher (torchrun, deepspeed, its launch.py, accelerate): ranks save"
        " and end, also if they handle no signal",
        (
            "train/test_launchers.py::test_kill_9_of_the_launcher",
            "utils/test_process.py::test_a_rank_ends_with_its_launcher",
            "utils/test_process.py::test_a_rank_that_handles_no_signal_ends_with_its_launcher",
        ),
    ),
    "T12": Scenario(
        "a rank raises, exits, is killed, crashes, under every launcher: its code is not 0, one"
        " traceback",
        (
            "train/test_launchers.py::test_the_end_of_a_rank_is_the_launchers_failure",
            "train/test_launchers.py::test_kill_9_of_a_rank",
            "train/test_launchers.py::test_a_bad_json",
        ),
    ),
    "T13": Scenario(
        "save in every layout, resume in the same (bitwise) and in others (within bounds)",
        (
            "checkpoint/test_resume.py::test_resumed_is_uninterrupted",
            "checkpoint/test_layouts.py::test_what_is_loaded_is_saved_again_bit_for_bit",
            "checkpoint/test_layouts.py::test_resumed_at_another_layout",
            "checkpoint/test_layouts.py::test_three_changes_of_layout",
            "engine/test_pipe_checkpoints.py::test_resumed_on_two_by_two",
        ),
    ),
    "T14": Scenario(
        "interrupted after every step of an epoch, also twice and three times: every sample once",
        (
            "prepare/test_interruptions.py::test_interrupted_after_every_sample_of_an_epoch",
            "data/test_loader.py::test_one_epoch_cut_at_every_step",
            "data/test_loader.py::test_two_and_three_interruptions_in_one_epoch",
        ),
    ),
    "T15": Scenario(
        "other numbers of ranks: each step reads the same samples",
        (
            "prepare/test_interruptions.py::test_the_same_samples_per_step_at_any_world_size",
            "data/test_loader.py::test_same_samples_per_step_at_any_world_size",
            "data/test_loader.py::test_interruption_between_layouts",
        ),
    ),
    "T16": Scenario(
        "resume with other settings: what may change does, the rest is refused with both"
        " values; other texts and another tokenizer too",
        (
            "checkpoint/test_changes.py",
            "checkpoint/test_resume.py::test_what_makes_another_run_is_refused",
            "checkpoint/test_resume.py::test_another_data_set_is_refused",
            "checkpoint/test_resume.py::test_optimizer_settings_may_change_and_do",
        ),
    ),
    "T17": Scenario(
        "port in use, a rank that never comes, two runs in one directory: one line in time",
        (
            "train/test_startup.py::test_the_port_is_taken",
            "train/test_startup.py::test_a_rank_that_never_comes",
            "train/test_startup.py::test_two_runs_in_one_directory",
        ),
        "a stale rendezvous file: FGPT meets over TCP and uses none",
    ),
    "T18": Scenario(
        "a lock that a killed compilation left: the start does not wait for it",
        (
            "engine/test_ops.py::test_a_stale_lock_blocks_no_rank",
            "engine/test_ops.py::test_a_stale_lock_blocks_no_run",
        ),
    ),
    "T19": Scenario(
        "a rank is stopped, waits in the data, hangs in an evaluation: all leave, it is named;"
        " a slow first step survives",
        (
            "train/test_watchdog.py::test_a_stopped_rank",
            "train/test_watchdog.py::test_a_rank_that_waits_for_data",
            "train/test_watchdog.py::test_a_rank_stuck_in_an_evaluation",
            "train/test_watchdog.py::test_a_slow_first_step_survives",
        ),
    ),
    "T20": Scenario(
        "malformed JSON, unknown and misspelled keys at every level, wrong types: exit 2 with"
        " the place",
        (
            "utils/test_strict_json.py",
            "config/test_deepspeed_check.py",
            "config/test_run.py::test_refused_run_file",
        ),
    ),
    "T21": Scenario(
        "contradictions between the two JSONs, the grid and the batch: exit 2 with the numbers",
        (
            "config/test_rules.py::test_a_wrong_twin_is_found",
            "config/test_rules.py::test_a_rule_says_the_numbers",
            "config/test_batch.py::test_a_contradiction_names_the_numbers",
            "config/test_deepspeed_check.py::test_fp16_on_a_cpu_is_one_line",
        ),
    ),
    "T22": Scenario(
        "NaN in one rank's batch, in every step, in a checkpoint; a jump of the loss: no such"
        " weights on any rank or on disk",
        (
            "train/test_nonfinite.py",
            "engine/test_pipe_nonfinite.py",
            "train/test_loss_jump.py",
            "checkpoint/test_damage.py::test_values_that_are_not_finite_are_refused",
        ),
    ),
    "T23": Scenario(
        "dropout: recomputed and resumed alike, different on shards, equal on copies",
        (
            "model/test_dropout.py",
            "checkpoint/test_resume.py::test_recomputation_leaves_dropout_as_it_is",
            "engine/test_pipe_equality.py::test_five_layers_untied_with_dropout",
        ),
    ),
    "T24": Scenario(
        "gradient norm and tied embeddings in every layout: within 1e-6 of one process; copies"
        " equal",
        (
            "parity/test_parity.py",
            "parallel/test_grad_norm.py",
            "engine/test_pipe_tied.py",
        ),
    ),
    "T25": Scenario(
        "corpora that are empty, short, one 50 MB line, not UTF-8, archives, unreadable: one"
        " line with the place, nothing half-written",
        (
            "prepare/test_corpus.py",
            "prepare/test_sources.py::test_damaged_archives",
            "prepare/test_prepare.py::test_corpus_too_small",
            "prepare/test_prepare_survives.py::test_an_error_in_the_corpus_leaves_nothing",
        ),
    ),
    "T26": Scenario(
        "ids that the model or the file cannot hold, another tokenizer: refused at the start",
        (
            "train/test_startup.py::test_data_with_more_ids_than_the_model",
            "data/test_card.py::test_model_with_too_few_rows",
            "data/test_card.py::test_another_tokenizer",
            "data/test_shards.py::test_ids_that_would_wrap_are_refused",
            "tokenizer/test_bpe.py::test_special_token_absent",
        ),
    ),
    "T27": Scenario(
        "damaged index and token files, changed under the run: refused, no SIGBUS",
        ("data/test_shards.py", "data/test_loader.py::test_a_data_set_removed_during_the_run"),
    ),
    "T28": Scenario(
        "preparation killed at any file operation, disk full, twice at once: the same bytes, or"
        " none",
        (
            "prepare/test_prepare_survives.py",
            "prepare/test_workers.py::test_workers_end_with_a_parent_that_is_killed",
        ),
    ),
    "T29": Scenario(
        "pickles in checkpoints, weights and tokenizers, links and paths out of the run: never"
        " followed or run",
        (
            "checkpoint/test_damage.py::test_damage_is_named_and_passed_over",
            "checkpoint/test_damage.py::test_latest_is_only_for_people",
            "checkpoint/test_damage.py::test_a_linked_checkpoint_is_not_followed",
            "checkpoint/test_upgrade.py::test_damage_is_refused_and_nothing_changes",
            "tokenizer/test_load.py::test_invalid_files",
            "utils/test_files.py",
        ),
    ),
    "T30": Scenario(
        "saves in the background: killed while writing, failing, slower than their interval",
        (
            "train/test_hooks.py::test_a_save_in_the_background_is_complete_some_steps_later",
            "train/test_hooks.py::test_a_save_waits_for_the_one_before",
            "train/test_hooks.py::test_failures_in_the_background_are_counted",
            "train/test_stop_signals.py::test_a_signal_during_a_save",
            "checkpoint/test_kills.py::test_all_ranks_die_while_saving",
        ),
    ),
    "T31": Scenario(
        "a random fault every 5 to 15 steps (fgpt soak): weights, samples and losses of the"
        " clean run",
        ("parity/test_soak.py::test_a_short_soak",),
    ),
    "F1": Scenario(
        "an error of one rank in data, forward, backward, optimizer, save, evaluation: it"
        " leaves at once, although destroying a group blocks",
        (
            "train/test_leave.py::test_an_error_on_one_rank",
            "train/test_leave.py::test_an_error_on_one_rank_of_a_grid",
            "utils/test_deadlines.py",
        ),
        "NCCL itself: its blocking destroy is imitated on a CPU",
    ),
    "F2": Scenario(
        "a rank that is stopped or blocked in C++ ends the run, and with its launcher",
        (
            "train/test_watchdog.py::test_a_stopped_rank",
            "train/test_watchdog.py::test_a_signal_to_ranks_that_hang",
            "utils/test_process.py::test_a_rank_that_handles_no_signal_ends_with_its_launcher",
        ),
    ),
    "F3": Scenario(
        "hosts that do not share the run directory: refused, a save that rank 0 does not see fails",
        (
            "checkpoint/test_file_systems.py::test_files_that_rank_0_does_not_see",
            "train/test_startup.py::test_nodes_that_do_not_share_the_run_directory",
            "nodes/test_srun.py::test_hosts_that_do_not_share_the_run_directory",
        ),
    ),
    "F4": Scenario(
        "console on a full disk, a closed pipe, metrics and monitors that cannot be written:"
        " training goes on",
        (
            "train/test_console.py",
            "checkpoint/test_full_disk.py::test_metrics_wait_for_room",
        ),
    ),
    "F5": Scenario(
        "no compiler, no Python.h: blocks run eagerly after one line",
        (
            "train/test_preflight.py::test_blocks_without_a_compiler",
            "utils/test_compiler.py",
        ),
    ),
    "F6": Scenario(
        "NCCL's and CUDA's own errors are printed, and are no lost rank",
        (
            "train/test_leave.py::test_what_is_said_of_an_error",
            "distributed/test_launch.py::test_a_lost_rank_is_known_by_torchs_words",
        ),
    ),
    "F7": Scenario(
        "a dead host, a cut link to it, a rank killed on another host: all end; the Slurm script"
        " ends the job with its ranks",
        (
            "distributed/test_watchdog.py::test_who_publishes_nothing",
            "nodes/test_cut_link.py",
            "nodes/test_killed_rank.py",
            "train/test_slurm_script.py",
        ),
    ),
    "F8": Scenario(
        "a host name that means loopback: the interface that the others reach is used",
        ("distributed/test_interfaces.py", "nodes/test_names.py"),
    ),
    "F9": Scenario(
        "file systems without flock or fsync of directories: the run starts and saves",
        (
            "checkpoint/test_file_systems.py::test_a_lock_without_flock",
            "checkpoint/test_file_systems.py::test_directories_that_cannot_be_synced",
        ),
    ),
    "F10": Scenario(
        "no pidfd_open (old kernel, seccomp): deaths are seen by the collectives alone",
        ("distributed/test_peers.py::test_without_pidfd_nothing_is_watched",),
    ),
    "F11": Scenario(
        "an error after the rename: the checkpoint counts, a valid one is never deleted first",
        (
            "checkpoint/test_file_systems.py::test_after_the_rename_the_checkpoint_counts",
            "checkpoint/test_file_systems.py"
            "::test_a_retry_deletes_no_checkpoint_before_the_new_one_is_complete",
        ),
    ),
    "F12": Scenario(
        "EIO or ESTALE while reading: tried again, then an error; no older checkpoint is taken",
        ("checkpoint/test_file_systems.py::test_a_moment_without_the_file_system",),
    ),
    "F13": Scenario(
        "torchrun --max-restarts and a Slurm requeue go on with the run that they began",
        ("train/test_relaunch.py", "train/test_launchers.py::test_torchrun_restarts_a_killed_rank"),
    ),
    "F14": Scenario(
        "SIGHUP of a closed terminal: a checkpoint, then the end",
        ("train/test_stop_signals.py::test_signals",),
    ),
    "F15": Scenario(
        "one host without the device of the others: named before the process group waits",
        ("distributed/test_launch.py::test_devices_of_two_kinds_are_named_before_the_group_waits",),
    ),
}


@dataclass
class Result:
    """Of the tests of one function, or one file."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    gone_s: float | None = None

    def add(self, other: Result) -> None:
        """Add the tests of another one."""
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.seconds += other.seconds
        times = [t for t in (self.gone_s, other.gone_s) if t is not None]
        self.gone_s = max(times, default=None)

    @property
    def verdict(self) -> str:
        """pass, FAIL, or skipped where this machine cannot run any of them."""
        if self.failed or not (self.passed or self.skipped):
            return "FAIL"
        return "pass" if self.passed else "skip"


def function_names(file: Path) -> Iterator[str]:
    """Yield the test functions of a file."""
    for line in file.read_text().splitlines():
        if line.startswith("def test_"):
            yield line.removeprefix("def ").partition("(")[0]


def run(names: Sequence[str], workers: int = 2) -> dict[str, Result]:
    """Run tests by pytest; returns the result of each function, FILE.py::FUNCTION."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header"]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # 2 has no properties
        command += ["-n", str(workers)] if workers > 1 else []
        subprocess.run([*command, *(f"tests/{name}" for name in names)], cwd=ROOT)
        return read_report(report) if report.exists() else {}


def read_report(file: Path) -> dict[str, Result]:
    """Return FILE.py::FUNCTION -> its result, of pytest's JUnit XML."""
    results: dict[str, Result] = {}
    for case in ET.parse(file).getroot().iter("testcase"):
        path = case.attrib["classname"].removeprefix("tests.").replace(".", "/")
        name = f"{path}.py::{case.attrib['name'].partition('[')[0]}"
        gone = [p.attrib["value"] for p in case.iter("property") if p.attrib["name"] == "gone_s"]
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        results.setdefault(name, Result()).add(
            Result(
                passed=not failed and not skipped,
                failed=failed,
                skipped=skipped,
                seconds=float(case.attrib["time"]),
                gone_s=float(gone[0]) if gone else None,
            )
        )
    return results


def result_of(scenario: Scenario, results: dict[str, Result]) -> Result:
    """Return the sum over the tests of a row; one that did not run has failed."""
    total = Result()
    for test in scenario.tests:
        found = [r for name, r in results.items() if name == test or name.startswith(f"{test}::")]
        for result in found or [Result(failed=1)]:
            total.add(result)
    return total


def line(number: str, scenario: Scenario, result: Result) -> str:
    """Return the printed row."""
    lost = {"pass": "nothing", "skip": "-", "FAIL": "?"}[result.verdict]
    gone = "-" if result.gone_s is None else f"{result.gone_s:.1f} s"
    tests = f"{result.passed} test{'s' * (result.passed != 1)}" + (
        f", {result.skipped} skipped" * (result.skipped > 0)
    )
    row = f"{number:<4} {result.verdict:<5} lost {lost:<8} gone {gone:>7}  {scenario.text}"
    row += f" ({tests}, {result.seconds:.0f} s)"
    return row + (f"\n     not covered: {scenario.not_covered}" if scenario.not_covered else "")


def main(argv: Sequence[str]) -> int:
    """Run the tests of the rows named in argv, or of all; 1 if one fails."""
    if unknown := set(argv) - SCENARIOS.keys():
        print(f"no such rows: {', '.join(sorted(unknown))}; rows: {', '.join(SCENARIOS)}")
        return 2
    rows = {number: SCENARIOS[number] for number in (argv or SCENARIOS)}
    wanted = dict.fromkeys(test for scenario in rows.values() for test in scenario.tests)
    # pytest runs what is named twice, alone and with its file, once
    results = run([*wanted])
    totals = {number: result_of(scenario, results) for number, scenario in rows.items()}
    for number, scenario in rows.items():
        print(line(number, scenario, totals[number]))
    return 1 if any(total.verdict == "FAIL" for total in totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
