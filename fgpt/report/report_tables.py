"""The report's tables: one for each benchmark, hardware and section, with the notes below them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from fgpt.report import tables
from fgpt.report.records import SECTIONS, Measurement, Record
from fgpt.report.tables import (
    NONE,
    SAMPLES,
    Column,
    Table,
    identity_columns,
    make_table,
    measured,
    number,
    percent,
    with_references,
)

TITLES = {
    "ladder": "The ladder: each variant adds one optimization",
    "memory": "Memory",
    "compare": "Compared with a plain loop and with transformers",
    "layouts": "Layouts",
    "strong": "Strong scaling: the same batch on more ranks",
    "weak": "Weak scaling: a batch that grows with the ranks",
}
UNITS = (
    f"Times are for {SAMPLES} samples: {SAMPLES} / SPS x 1000, median over the rounds"
    " (lowest-highest round). SPS: samples per second of all ranks. GB: 2^30 bytes."
)
FEW_ROUNDS = 3
"""Fewer show no spread; the time of the benchmark was over."""
EFFICIENCY = (
    "Efficiency: on GPUs, the speed of N ranks / (N x the speed of one). On a CPU the ranks share"
    " the cores, so N ranks cannot be faster than one process that uses all cores: there it is the"
    " speed of N ranks / the speed of that process."
)
SENT = (
    "MB sent (10^6 bytes): per step, by the rank that sends most, by kind of process group. The"
    " shares are fractions of a step's time, mean over the ranks; pipeline: waiting for another"
    " stage."
)


def _training_ms(measurement: Measurement) -> str:
    median, low, high = measurement.train.ms_for(SAMPLES)
    return f"{number(median)} ({number(low)}-{number(high)})"


def _prediction_ms(measurement: Measurement) -> str:
    return NONE if measurement.predict is None else number(measurement.predict.ms_for(SAMPLES)[0])


def _loss_difference(measurement: Measurement) -> str:
    if measurement.loss_difference is None:
        return NONE
    text = f"{measurement.loss_difference:.1e}"
    bound = measurement.loss_bound
    return text if bound is None else f"{text} (bound {bound:.0e})"


COLUMNS = (
    measured("Training Time (ms)", _training_ms, or_state=True),
    measured("Training Throughput (SPS)", lambda m: number(m.train.samples_per_s)),
    measured("Prediction Time (ms)", _prediction_ms),
    measured("Prediction Throughput (SPS)", tables.prediction_sps),
    measured("Memory Usage (GB)", lambda m: tables.gigabytes(m.memory_bytes)),
    Column("model", lambda record: record.workload, is_text=True),
    measured("batch, precision", lambda m: m.batch, is_text=True),
    measured("tokens/s", lambda m: f"{m.tokens_per_s:,.0f}"),
    measured("MFU", lambda m: percent(m.mfu)),
)
"""After env_name and parameter count."""


def report_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each benchmark, hardware and section. `records`: in the report's order."""
    groups = groupby(records, key=lambda record: record.table)
    return [_table(list(group), records) for _, group in groups]


def unmeasured_sections(records: Sequence[Record]) -> list[str]:
    """One line for each section without measurements."""
    lines = []
    for bench, sections in SECTIONS.items():
        present = [record for record in records if record.bench == bench and record.measurement]
        if not any(record.on_gpu for record in present):
            lines.append(f"{bench}, GPU: not measured (no record's hardware is a GPU).")
        if not present:
            lines.append(f"{bench}, CPU: not measured.")
            continue
        missing = [name for name in sections if name not in {record.section for record in present}]
        lines += [f"{bench}, {section}: not measured." for section in missing]
    return lines


def _table(group: Sequence[Record], records: Sequence[Record]) -> Table:
    bench, hardware, section = group[0].table
    shown = with_references(group, records)
    references = {record.reference for record in group}
    reference = references.pop() if len(references) == 1 else "the reference"
    columns = [
        *identity_columns(records),
        *COLUMNS,
        measured(f"training speed, x {reference}", lambda m: tables.ratio(m.train_ratio)),
        measured(f"prediction speed, x {reference}", lambda m: tables.ratio(m.predict_ratio)),
        measured(f"memory, % of {reference}", lambda m: percent(m.memory_ratio)),
    ]
    notes = [UNITS]
    if bench == "multi":
        columns += _multi_columns(records)
        notes += [EFFICIENCY, SENT]
    columns.append(measured("loss difference", _loss_difference))
    notes += [*_memory_note(shown), *_mfu_note(shown), *state_notes(shown), *_origins(shown)]
    return make_table(f"{TITLES[section]} ({bench}, {hardware})", shown, columns, notes)


def _multi_columns(records: Sequence[Record]) -> list[Column]:
    def share(name: str) -> Callable[[Measurement], str]:
        return lambda m: NONE if m.breakdown is None else percent(m.breakdown.get(name))

    return [
        measured("ranks", lambda m: str(m.ranks)),
        measured("grid", lambda m: m.grid, is_text=True),
        measured("memory per rank, largest (GB)", lambda m: tables.gigabytes(m.memory_bytes)),
        measured("MB sent per step", tables.sent, is_text=True),
        measured("computing", share("compute")),
        measured("communicating", share("communication")),
        measured("pipeline", share("pipeline")),
        measured("waiting for data", share("data")),
        efficiency_column(records),
    ]


def efficiency_column(records: Sequence[Record]) -> Column:
    """See `efficiency`."""
    return Column("efficiency", lambda record: percent(efficiency(record, records)))


def efficiency(record: Record, records: Sequence[Record]) -> float | None:
    """Speed relative to one rank: per GPU; on a CPU not divided, as the ranks share its cores.

    None if the reference is not one rank.
    """
    measurement = record.measurement
    if measurement is None or measurement.train_ratio is None:
        return None
    for other in records:
        if (other.bench, other.workload, other.env_name, other.hardware) == (
            record.bench, record.workload, record.reference, record.hardware,
        ):  # fmt: skip
            if other.measurement is None or other.measurement.ranks != 1:
                return None
            return record.train_ratio / (measurement.ranks if record.on_gpu else 1)
    return None


def state_notes(records: Iterable[Record]) -> list[str]:
    """A sentence for each reason why scenarios are skipped, failed, wrong or have few rounds."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for record in records:
        n_rounds = len(record.measurement.train.round_s) if record.measurement else 0
        why = (record.why or "no reason recorded").rstrip(".")
        if record.state == "measured" and n_rounds < FEW_ROUNDS:
            why = f"in {n_rounds} of {FEW_ROUNDS} rounds"
        elif record.state == "measured":
            continue
        names = reasons.setdefault((record.state, why), {})
        names.setdefault(record.env_name, []).append(record.workload)
    notes = []
    for (state, why), names in reasons.items():
        heading = "WRONG" if state == "wrong" else state.capitalize()
        scenarios = [f"{name} of {', '.join(models)}" for name, models in names.items()]
        notes.append(f"{heading} ({why}): {'; '.join(scenarios)}.")
    return notes


def _memory_note(records: Iterable[Record]) -> list[str]:
    kinds = _unique(r.measurement.memory_kind for r in records if r.measurement)
    return [f"Memory: {'; '.join(kinds)}."] if kinds else []


def _mfu_note(records: Iterable[Record]) -> list[str]:
    """The formula, and the peaks that it was used with."""
    peaks = _unique(
        f"{record.measurement.peak_tflops:.4g} TFLOP/s ({record.measurement.peak_source})"
        for record in records
        if record.measurement and record.measurement.peak_tflops
    )
    formula = "MFU: tokens/s x FLOPs per token / (peak x ranks), attention counted in full"
    return [f"{formula}; peak: {'; '.join(peaks)}."] if peaks else []


def _origins(records: Iterable[Record]) -> list[str]:
    """Date, commit, versions and command of the measurements."""
    lines = []
    for record in records:
        origin = record.environment
        if not record.measurement or not origin:
            continue
        changed = " with uncommitted changes" if origin.get("uncommitted_changes") else ""
        lines.append(
            f"Measured {str(origin.get('time_utc'))[:10]} at commit"
            f" {str(origin.get('commit'))[:10]}{changed}, torch"
            f" {(origin.get('versions') or {}).get('torch')}, {origin.get('threads')} thread(s), by"
            f" {' '.join(origin.get('command') or [])}."
        )
    return _unique(lines)


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def scaling_sentences(records: Sequence[Record]) -> list[str]:
    """Strong and weak scaling in words: a paragraph for each machine."""
    scaled = [r for r in records if r.section in ("strong", "weak") and r.train_ratio]
    machines = dict.fromkeys(record.hardware for record in scaled)
    lines = [
        _machine_sentences([record for record in scaled if record.hardware == machine], records)
        for machine in machines
    ]
    if not any(record.on_gpu for record in scaled):
        lines.append("Scaling over GPUs: not measured.")
    return lines


def _machine_sentences(scaled: Sequence[Record], records: Sequence[Record]) -> str:
    ideal = (
        "ideal: N on N GPUs"
        if scaled[0].on_gpu
        else "ideal: 1, as the ranks share the cores that one process uses alone"
    )
    sentences = [f"{scaled[0].hardware}, training speed relative to 1 rank ({ideal})."]
    for section, batch in (("strong", "the same batch"), ("weak", "a batch that grows")):
        for workload in dict.fromkeys(record.workload for record in scaled):
            chosen = [r for r in scaled if (r.section, r.workload) == (section, workload)]
            texts = "; ".join(_scaled_text(record, records) for record in chosen)
            sentences += [f"{workload} with {batch}: {texts}."] if texts else []
    return " ".join(sentences)


def _scaled_text(record: Record, records: Sequence[Record]) -> str:
    """For example `4 ranks 3.60 (efficiency 90.0%, 8.0% communicating)`."""
    measurement = record.measurement
    assert measurement is not None
    remarks = []
    if record.on_gpu:
        remarks.append(f"efficiency {percent(efficiency(record, records))}")
    if measurement.breakdown and measurement.ranks > 1:
        remarks.append(f"{percent(measurement.breakdown.get('communication'))} communicating")
    noun = "rank" if measurement.ranks == 1 else "ranks"
    text = f"{measurement.ranks} {noun} {record.train_ratio:.2f}"
    return f"{text} ({', '.join(remarks)})" if remarks else text
