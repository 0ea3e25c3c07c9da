"""The tables' cells, compared with figures worked out by hand."""

from __future__ import annotations

import pytest

from fgpt.report.compared import explanation, published_table, scaling_here
from fgpt.report.full import full_tables, not_measured
from fgpt.report.published import MULTI, SINGLE, speed_of_two
from fgpt.report.reading import read_records
from fgpt.report.short import GENERATORS
from tests.report.made import CPU, GPU, faster, multi, record, single, without, write

SEEDS_COLUMNS = [
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
    return lambda made: read_records([write(tmp_path / "a.jsonl", made)], each=True)


def cells(table, env_name):
    """The line of one rung, by header."""
    line = next(row for row in table.rows if row.cells[0] == env_name)
    return dict(zip(table.headers, line.cells, strict=True))


def test_the_seeds_columns_come_first_and_the_cells_are_right(read):
    made = [record(), faster(2.5, env_name="bf16", order=[0, 1], predict=None)]
    (table,) = full_tables(read(made))
    assert list(table.headers[:7]) == SEEDS_COLUMNS
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
    assert bf16["training, times base"] == "2.50 (2.25-2.75)"
    assert bf16["memory against base"] == "50.0%"
    assert bf16["loss departs by"] == "1.2e-07 (bound 1e-04)"


def test_what_was_not_measured_says_why(read):
    tables = full_tables(read(single()))
    ladder, memory = tables
    assert cells(ladder, "compiled")["Training Time (ms)"] == "skipped"
    assert cells(ladder, "compiled")["Parameter Count (B)"] == "0.001"
    assert cells(memory, "ZeRO-3")["Training Time (ms)"] == "failed"
    where = "of seed-1m, seed-9m, seed-71m"
    assert f"Skipped (no GPU): compiled {where}; CUDA graphs {where}." in ladder.notes
    assert f"Failed (out of memory): ZeRO-3 {where}." in memory.notes
    assert cells(memory, "base")["memory against base"] == "100.0%"  # what it is compared with


def test_wrong_losses_are_marked(read):
    made = [record(), faster(9, env_name="fp8", order=[0, 1], state="wrong", why="loss departs")]
    records = read(made)
    (table,) = full_tables(records)
    assert "| **fp8 (WRONG)** |" in table.markdown()
    assert "WRONG (loss departs): fp8 of seed-1m." in table.notes
    assert "fp8" not in GENERATORS["best"](records)


def test_tables_of_ranks(read):
    cpu, gpu = read(multi()), read(multi(GPU, (1.9, 3.6)))
    layouts, strong, weak = full_tables(cpu)
    line = cells(layouts, "tp 2 x pp 2")
    assert line["MB sent per step"] == "data 38.5, pipe 6.29"
    assert (line["computing"], line["communicating"]) == ("80.0%", "15.0%")
    assert (line["pipeline"], line["waiting for data"]) == ("3.0%", "2.0%")
    assert (line["ranks"], line["grid"]) == ("4", "tp 2 x pp 2 x cp 1 x dp 1")
    assert cells(strong, "4 ranks")["efficiency"] == "80.0%"  # cores are shared: as it is
    assert cells(strong, "1 rank")["training, times 1 rank"] == "1.00 (1.00-1.00)"
    strong, weak = full_tables(gpu)[1:]
    assert cells(strong, "4 ranks")["efficiency"] == "90.0%"  # 3.6 / 4
    assert cells(weak, "2 ranks, weak")["efficiency"] == "95.0%"


def test_what_nobody_measured(read):
    assert not_measured(read(single())) == [
        "single, GPU: not measured (no record's hardware is a GPU).",
        "single, compare: not measured.",
        "multi, GPU: not measured (no record's hardware is a GPU).",
        "multi, CPU: not measured.",
    ]
    only_skipped = [without("skipped", "no GPU")]
    assert "single, CPU: not measured." in not_measured(read(only_skipped))


def test_the_published_figures_are_those_printed():
    for line in SINGLE:  # 1500 samples over one round's time; 500 predicted in theirs
        assert 1500 / line.train_ms * 1000 == pytest.approx(line.train_sps, rel=1e-5)
        assert 500 / line.predict_ms * 1000 == pytest.approx(line.predict_sps, rel=2e-5)
    for line in MULTI:  # one card's 250 samples over the time of three rounds
        assert 250 / line.train_ms * 1000 == pytest.approx(line.train_sps, rel=1e-4)
        assert 250 / line.predict_ms * 1000 == pytest.approx(line.predict_sps, rel=1e-4)


def test_the_published_figures_counted_right():
    assert SINGLE[0].train_samples_per_s == pytest.approx(500 / 0.209825)
    assert MULTI[0].train_samples_per_s == pytest.approx(6 * 413.453, rel=1e-5)
    table = published_table(times=True)
    assert list(table.rows[0].cells) == [
        "1", "0.001", "209.825", "7148.8", "2382.9", "53.019", "9430.532", "9430.6", "0.208",
    ]  # fmt: skip
    assert list(table.rows[9].cells) == [
        "2", "0.286", "25467.03", "9.817", "58.90", "5338.4", "46.831", "281.0", "10.754",
    ]  # fmt: skip
    train, predict = speed_of_two()
    assert [f"{ratio:.2f}" for ratio in train] == ["1.04", "1.09", "1.28", "1.35", "1.37"]
    assert [f"{ratio:.2f}" for ratio in predict] == ["1.85", "1.90", "2.03", "2.04", "2.05"]
    assert "trained 1.04-1.37 times as fast as one" in explanation()


def test_scaling_in_words(read):
    (gpu,) = scaling_here(read(multi(GPU, (1.9, 3.6))))
    assert "; 4 ranks 3.60 (efficiency 90.0%, 15.0% communicating)" in gpu
    cpu, missing = scaling_here(read(multi()))
    assert (
        cpu.startswith(CPU)
        and "seed-1m with the same batch: 2 ranks 0.90 (15.0% communicating);" in cpu
    )
    assert missing == "Scaling over GPUs: not measured."


def test_small_models_keep_a_digit(read):
    (table,) = full_tables(read([record(parameters=120_000)]))
    assert cells(table, "base")["Parameter Count (B)"] == "0.0001"


def test_cells_cannot_break_a_table(read):
    (table,) = full_tables(read([record(env_name="a | b\nc")]))
    assert table.markdown().splitlines()[2].startswith("| a \\| b c | 0.001 |")


def test_readme_tables_are_narrow(read):
    records = read([*single(), *multi()])
    for name in GENERATORS:
        text = GENERATORS[name](records)
        widest = max(map(len, text.splitlines()))
        assert widest <= 112, (name, widest)
