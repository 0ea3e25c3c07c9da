"""The tables' cells, compared with values computed by hand."""

from __future__ import annotations

import pytest

from fgpt.report.readme_tables import GENERATORS
from fgpt.report.records import read_records
from fgpt.report.report_tables import report_tables, scaling_sentences, unmeasured_sections
from tests.report.sample_records import (
    CPU,
    GPU,
    environment,
    faster,
    multi,
    record,
    single,
    without,
    write,
)

FIRST_COLUMNS = [
    "env_name",
    "Parameter Count (B)",
    "Training Time (ms)",
    "Training Throughput (SPS)",
    "Prediction Time (ms)",
    "Prediction Throughput (SPS)",
    "Memory Usage (GB)",
]


@pytest.fixture
def read(tmp_path):
    return lambda made: read_records([write(tmp_path / "a.jsonl", made)], require_records=True)


def cells(table, env_name):
    """The row of one variant, by header."""
    line = next(row for row in table.rows if row.cells[0] == env_name)
    return dict(zip(table.headers, line.cells, strict=True))


def test_columns_and_cells(read):
    made = [record(), faster(2.5, env_name="bf16", order=[0, 1], predict=None)]
    (table,) = report_tables(read(made))
    assert list(table.headers[:7]) == FIRST_COLUMNS
    base, bf16 = cells(table, "base"), cells(table, "bf16")
    assert base["Parameter Count (B)"] == "0.001"
    assert base["Training Time (ms)"] == "1953.1 (1562.5-2500.0)"
    assert base["Training Throughput (SPS)"] == "256.0"
    assert base["Prediction Time (ms)"] == "488.3"  # 500 / 1024 s
    assert base["Prediction Throughput (SPS)"] == "1024.0"
    assert base["Memory Usage (GB)"] == "0.750"
    assert base["tokens/s"] == "32,768"
    assert base["MFU"] == "20.5%"
    assert bf16["Training Throughput (SPS)"] == "640.0"  # 128 samples in 0.2 s
    assert bf16["Prediction Time (ms)"] == "-"
    assert bf16["training speed, x base"] == "2.50 (2.25-2.75)"
    assert bf16["memory, % of base"] == "50.0%"
    assert bf16["loss difference"] == "1.2e-07 (bound 1e-04)"


def test_unmeasured_variants_show_why(read):
    tables = report_tables(read(single()))
    ladder, memory = tables
    assert cells(ladder, "compiled")["Training Time (ms)"] == "skipped"
    assert cells(ladder, "compiled")["Parameter Count (B)"] == "0.001"
    assert cells(memory, "ZeRO-3")["Training Time (ms)"] == "failed"
    where = "of seed-1m, seed-9m, seed-71m"
    assert f"Skipped (no GPU): compiled {where}; CUDA graphs {where}." in ladder.notes
    assert f"Failed (out of memory): ZeRO-3 {where}." in memory.notes
    assert cells(memory, "base")["memory, % of base"] == "100.0%"  # the reference


def test_wrong_losses_are_marked(read):
    made = [record(), faster(9, env_name="fp8", order=[0, 1], state="wrong", why="loss departs")]
    records = read(made)
    (table,) = report_tables(records)
    assert "| **fp8 (WRONG)** |" in table.markdown()
    assert "WRONG (loss departs): fp8 of seed-1m." in table.notes
    assert "fp8" not in GENERATORS["best"](records)


def test_the_peer_is_compared_round_by_round(read):
    """Only where one run measured both: the rounds were in turn."""
    compare = {"row": "mini", "section": "compare", "reference": "bare loop, fp32"}
    ours = record(env_name="FGPT, fp32", **compare)  # rounds of 0.5, 0.4, 0.64 s
    slower = {"round_s": [1.0, 1.0, 0.64], "batches": 4}
    theirs = record(env_name="transformers, fp32", train=slower, **compare)
    text = GENERATORS["best"](read([ours, theirs, faster(3, env_name="bf16", order=[0, 1])]))
    assert f"- {CPU}: against a plain loop in fp32, seed-1m 3.00 (2.70-3.30) with bf16; " in text
    assert "against transformers (mini), 2.00 (1.00-2.50) in fp32." in text.replace("\n ", "")
    later = environment(CPU) | {"time_utc": "2026-11-24T00:00:00Z"}
    text = GENERATORS["best"](read([ours, theirs | {"environment": later}]))
    assert "transformers" not in text


def test_tables_of_ranks(read):
    cpu, gpu = read(multi()), read(multi(GPU, (1.9, 3.6)))
    layouts, strong, weak = report_tables(cpu)
    line = cells(layouts, "tp 2 x pp 2")
    assert line["MB sent per step"] == "data 38.5, pipe 6.29"
    assert (line["computing"], line["communicating"]) == ("80.0%", "15.0%")
    assert (line["pipeline"], line["waiting for data"]) == ("3.0%", "2.0%")
    assert (line["ranks"], line["grid"]) == ("4", "tp 2 x pp 2 x cp 1 x dp 1")
    assert cells(strong, "4 ranks")["efficiency"] == "80.0%"  # cores are shared: as it is
    assert cells(strong, "1 rank")["training speed, x 1 rank"] == "1.00 (1.00-1.00)"
    strong, weak = report_tables(gpu)[1:]
    assert cells(strong, "4 ranks")["efficiency"] == "90.0%"  # 3.6 / 4
    assert cells(weak, "2 ranks, weak")["efficiency"] == "95.0%"


def test_unmeasured_sections(read):
    assert unmeasured_sections(read(single())) == [
        "single, GPU: not measured (no record's hardware is a GPU).",
        "single, compare: not measured.",
        "multi, GPU: not measured (no record's hardware is a GPU).",
        "multi, CPU: not measured.",
    ]
    only_skipped = [without("skipped", "no GPU")]
    assert "single, CPU: not measured." in unmeasured_sections(read(only_skipped))


def test_scaling_in_words(read):
    (gpu,) = scaling_sentences(read(multi(GPU, (1.9, 3.6))))
    assert "; 4 ranks 3.60 (efficiency 90.0%, 15.0% communicating)" in gpu
    cpu, missing = scaling_sentences(read(multi()))
    assert (
        cpu.startswith(CPU)
        and "seed-1m with the same batch: 2 ranks 0.90 (15.0% communicating);" in cpu
    )
    assert missing == "Scaling over GPUs: not measured."


def test_the_memory_of_old_records_is_described_plainly(read):
    records = read([record()])
    (table,) = report_tables(records)
    assert "Memory: RSS above the baseline after imports." in table.notes
    assert "RSS above the baseline after imports" in " ".join(GENERATORS["single"](records).split())


def test_small_models_keep_a_digit(read):
    (table,) = report_tables(read([record(parameters=120_000)]))
    assert cells(table, "base")["Parameter Count (B)"] == "0.0001"


def test_cells_cannot_break_a_table(read):
    (table,) = report_tables(read([record(env_name="a | b\nc")]))
    assert table.markdown().splitlines()[2].startswith("| a \\| b c | 0.001 |")


def test_readme_tables_are_narrow(read):
    records = read([*single(), *multi()])
    for name in GENERATORS:
        text = GENERATORS[name](records)
        widest = max(map(len, text.splitlines()))
        assert widest <= 112, (name, widest)
