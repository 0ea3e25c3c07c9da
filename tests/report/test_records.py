"""Reading records: which of several counts, which are ignored, which are refused."""

from __future__ import annotations

import json

import pytest

from fgpt.errors import UserError
from fgpt.report.records import read_records
from tests.report.sample_records import CPU, GPU, environment, multi, record, single, without, write

OTHER_BENCH = {"measurement": "encode", "environment": {"hardware": CPU}}


def test_the_last_line_of_a_scenario_counts(tmp_path):
    first = write(tmp_path / "a.jsonl", [without("skipped", "no GPU"), record(ratio_memory=0.7)])
    second = write(tmp_path / "b.jsonl", [record(ratio_memory=0.4), record(env_name="bf16")])
    records = read_records([first, second], require_records=True)
    assert [(r.env_name, r.measurement.memory_ratio) for r in records] == [
        ("base", 0.4),
        ("bf16", 1.0),
    ]


def test_machines_are_kept_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(), record(environment=environment(GPU))])
    records = read_records([path], require_records=True)
    assert [(r.hardware, r.on_gpu) for r in records] == [(GPU, True), (CPU, False)]  # GPUs first


def test_machines_with_one_name_are_kept_apart(tmp_path):
    facts = {"family": "25", "vector_extensions": ["avx2"]}
    machines = [facts, facts | {"vector_extensions": ["avx2", "avx512f"]}, facts]
    lines = [
        record(environment=environment(CPU) | {"machine": machine}, ratio_memory=ratio)
        for machine, ratio in zip(machines, (0.7, 0.6, 0.5), strict=True)
    ]
    path = write(tmp_path / "a.jsonl", [*lines, without("skipped", "no GPU", env_name="graphs")])
    records = read_records([path], require_records=True)
    memory = {r.hardware: r.measurement.memory_ratio for r in records if r.measurement}
    assert memory == {CPU: 0.5, f"machine 2: {CPU}": 0.6}


def test_names_that_no_picture_can_show(tmp_path):
    lines = [record(env_name="a\ud800b\x1b"), record()]
    path = tmp_path / "a.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows' editors save it
    records = read_records([path], require_records=True)
    assert {r.env_name for r in records} == {"a?b\\x1b", "base"}


def test_listed_by_section_and_order(tmp_path):
    path = write(tmp_path / "a.jsonl", reversed([*single(), *multi()]))
    records = read_records([path], require_records=True)
    assert [r.bench for r in records] == ["single"] * 42 + ["multi"] * 6
    assert [r.section for r in records] == ["ladder"] * 36 + ["memory"] * 6 + [
        "layouts", "layouts", "strong", "strong", "weak", "weak",
    ]  # fmt: skip
    assert [r.order for r in records[:3]] == [(0, 0), (0, 1), (0, 2)]


def test_a_skipped_scenario_without_hardware_is_of_the_machine_before_it(tmp_path):
    skipped = without("skipped", "no GPU", env_name="compiled")
    path = write(tmp_path / "a.jsonl", [skipped, record(), skipped | {"env_name": "graphs"}])
    assert {r.hardware for r in read_records([path], require_records=True)} == {CPU}


def test_other_benches_and_a_torn_last_line_are_ignored(tmp_path):
    path = write(tmp_path / "a.jsonl", [OTHER_BENCH, record()])
    path.write_text(path.read_text() + '\n{"format": 1, "ben')
    assert len(read_records([path], require_records=True)) == 1


def test_measurement_by_hand(tmp_path):
    path = write(tmp_path / "a.jsonl", [record()])
    measurement = read_records([path], require_records=True)[0].measurement
    # 4 batches of 32 samples in 0.5 s (0.4, 0.5, 0.64); 128 tokens each
    assert measurement.train.samples_per_s == 256
    assert measurement.train.ms_for(500) == pytest.approx((1953.125, 1562.5, 2500))
    assert measurement.predict.samples_per_s == 1024
    assert measurement.tokens_per_s == 32_768
    assert measurement.mfu == pytest.approx(32_768 * 5e6 / 0.8e12)


def test_mfu_counts_all_ranks_and_is_unknown_without_a_peak(tmp_path):
    records = [record(ranks=4), record(env_name="bf16", peak_tflops=None)]
    four, unknown = read_records([write(tmp_path / "a.jsonl", records)], require_records=True)
    assert four.measurement.mfu == pytest.approx(32_768 * 5e6 / 3.2e12)
    assert unknown.measurement.mfu is None


def test_memory_is_that_of_the_largest_rank(tmp_path):
    memory = {"peak_bytes": 5, "what": "allocated on the GPU", "per_rank_bytes": [5, 7, 6]}
    path = write(tmp_path / "a.jsonl", [record(memory=memory)])
    assert read_records([path], require_records=True)[0].measurement.memory_bytes == 7


BAD = {
    "no JSON": ("{}\nsamples: 3\n{}\n", ":2: is not JSON"),
    "no object": ("[1, 2]\n", ":1: is not an object"),
    "another format": (json.dumps(record(format=2)), ":1: has format 2, known is 1"),
    "no record": (json.dumps(OTHER_BENCH), "holds no record"),
    "empty": ("", "holds no record"),
    "one torn line": ('{"format": 1', "is not JSON"),
    "no rounds": (json.dumps(record(train={"round_s": [], "batches": 4})), "no round of training"),
    "no time": (json.dumps(record(train={"round_s": [0.0], "batches": 4})), "rounds of"),
    "no memory": (json.dumps(record(memory=None)), "is damaged"),
    "no number": (json.dumps(record(loss_departure="small")), "could not convert"),
    "no ratio": (json.dumps(record(ratio={"train": [1.0, None, 1.0]})), "is damaged"),
    "a machine": (json.dumps(record(environment="mine")), "is damaged"),
    "no ranks": (json.dumps(record(ranks=0)), "0 is not a number of things"),
    "negative memory": (
        json.dumps(record(memory={"peak_bytes": -1, "what": "RSS"})),
        "-1 is not a number of things",
    ),
    "not a time": (
        json.dumps(record(train={"round_s": [0.5, float("nan")], "batches": 4})),
        "nan is not a number",
    ),
    "endless batches": (
        json.dumps(record(train={"round_s": [0.5], "batches": 10**400})),
        "is damaged: 1000",
    ),
    "no ratios": (json.dumps(record(ratio={"train": [0, 0, 0]})), "ratios of 0.0"),
    "versions": (json.dumps(record(environment={"versions": "2.13"})), "versions or command"),
    "a name": (json.dumps(record(row=None)), "None is not text"),
    "nesting": ("[" * 100_000, "is not JSON"),
    "a state": (json.dumps(record(state="fine")), "'fine' is none of measured"),
    "a section": (json.dumps(record(section="weak")), "'weak' is none of ladder"),
    "a key": (json.dumps({k: v for k, v in record().items() if k != "grid"}), "lacks 'grid'"),
    "no text": (b"\xff\xfe\x00", "is not text"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_refused(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_records([path], require_records=True)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        read_records([tmp_path / "none.jsonl"], require_records=False)
