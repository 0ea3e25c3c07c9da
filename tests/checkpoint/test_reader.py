"""Boxes, files and the reader, against numpy; how much is opened and held in memory."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fgpt.checkpoint import reader
from fgpt.checkpoint.boxes import Box, boxes_of_range, make_up
from fgpt.checkpoint.manifest import Manifest, read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.checkpoint.tensor_file import (
    SavedBox,
    TensorFile,
    TensorRecord,
    file_header,
    parts_of,
    stream,
    write_file,
)
from fgpt.engine.state import WEIGHT, Fragment, Progress, Shard, StateTensor, Values
from fgpt.errors import CheckpointError
from fgpt.optim.quantized import dequantize, quantize, scale_of_each
from tests.checkpoint.saved import info
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@given(SIZES, st.data())
def test_boxes_of_a_range_are_its_elements_in_order(sizes: list[int], data: st.DataObject) -> None:
    n = math.prod(sizes)
    begin = data.draw(st.integers(0, n))
    end = data.draw(st.integers(begin, n))
    numbers, found = np.arange(n).reshape(sizes), []
    whole = Box((0,) * len(sizes), tuple(sizes))
    boxes = list(boxes_of_range(sizes, begin, end))
    assert len(boxes) <= 2 * len(sizes) - 1  # in a matrix: part of a row, rows, part of a row
    for box, first in boxes:
        values = numbers[box.slices_in(whole)].ravel().tolist()
        assert values[0] == first and len(values) == box.n
        found += values
    assert found == list(range(begin, end))


@given(SIZES, st.data())
def test_boxes_make_up_a_tensor_if_each_element_is_in_one(
    sizes: list[int], data: st.DataObject
) -> None:
    n = math.prod(sizes)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    parts = [box for a, b in pairwise(cuts) for box, _ in boxes_of_range(sizes, a, b)]
    assert make_up(parts, sizes)
    # some boxes moved or of another size
    for i in data.draw(st.sets(st.integers(0, len(parts) - 1), max_size=2)):
        change = st.lists(st.integers(0, 6), min_size=len(sizes), max_size=len(sizes)).map(tuple)
        offsets = data.draw(st.sampled_from([parts[i].offsets]) | change)
        parts[i] = Box(offsets, data.draw(st.sampled_from([parts[i].sizes]) | change))
    times = np.zeros([size + 12 for size in sizes], dtype=int)
    for box in parts:
        times[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))] += 1
    inside = times[tuple(slice(0, size) for size in sizes)]
    is_tiled = bool((inside == 1).all()) and inside.sum() == times.sum()
    assert make_up(parts, sizes) == (is_tiled and all(box.n for box in parts))
    assert not make_up(parts, [*sizes, 1])


@given(SIZES, st.data())
def test_common_elements(sizes: list[int], data: st.DataObject) -> None:
    def box() -> Box:
        offsets = [data.draw(st.integers(0, size - 1)) for size in sizes]
        ends = [data.draw(st.integers(o + 1, s)) for o, s in zip(offsets, sizes, strict=True)]
        return Box(tuple(offsets), tuple(e - o for o, e in zip(offsets, ends, strict=True)))

    a, b = box(), box()
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    whole = Box((0,) * len(sizes), tuple(sizes))
    elements = [set(numbers[x.slices_in(whole)].ravel()) for x in (a, b)]
    common = a.common(b)
    expected = elements[0] & elements[1]
    assert (set() if common is None else set(numbers[common.slices_in(whole)].ravel())) == expected


@given(st.integers(1, 900), st.integers(0, 255), st.integers(0, 99))
def test_8_bit_states_come_back_bit_for_bit(n: int, phase: int, seed: int) -> None:
    """Values with the scales that they had: the same codes and scales, zero blocks included."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.cat([-torch.rand(127, generator=generator) * 0.99, torch.rand(128)])
    codebook = torch.cat([codebook, torch.ones(1)]).sort().values
    codes = torch.randint(0, 256, (n,), generator=generator).to(torch.uint8)
    scales = torch.rand(-(-n // 256), generator=generator) + 0.1
    scale = scale_of_each(scales, 0, n)
    values = dequantize(codes, codebook, scale)
    new_codes, new_scales = quantize(values, scale, codebook)
    assert torch.equal(new_scales, scales)
    assert torch.equal(codebook[new_codes.int()], codebook[codes.int()])
    assert len(scale_of_each(scales, min(phase, n - 1), n - min(phase, n - 1))) == n - min(
        phase, n - 1
    )


def tensors(values: torch.Tensor) -> list[StateTensor]:
    """A weight [2, 3] and a weight [4] in one flat tensor with padding between them."""
    matrix = Fragment(Shard("m", (2, 3), (0, 0), (2, 3)), 0, 6, 0)
    vector = Fragment(Shard("v", (4,), (0,), (4,)), 0, 4, 8)
    return [
        StateTensor(WEIGHT, values.dtype, [matrix, vector], lambda: nullcontext(Values(values)))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_safetensors_program_reads_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(12).to(dtype)
    parts, _ = parts_of(tensors(values))
    written = write_file(tmp_path / "a.safetensors", file_header(parts), stream(parts))
    assert written.size_bytes == (tmp_path / "a.safetensors").stat().st_size
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["m:weight[0:2,0:3]"], values[:6].view(2, 3))
    assert torch.equal(loaded["v:weight[0:4]"], values[8:])
    with pytest.raises(OSError, match="exists"):
        write_file(tmp_path / "a.safetensors", b"", [])


def test_what_is_no_tensor_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        TensorFile(tmp_path / "a")
    record = TensorRecord((2,), {WEIGHT: "F32"}, [SavedBox(0, Box((0,), (1,)))])
    manifest = Manifest(**vars(info()), progress=Progress(1), files=(), tensors={"w": record})
    with pytest.raises(CheckpointError, match="the boxes of w do not make up the tensor"):
        CheckpointReader(tmp_path, manifest)


@pytest.mark.dist
def test_a_tensor_opens_the_files_that_hold_it(tiny: Tiny) -> None:
    """Of four: two stages of two tensor ranks, then four parts of ZeRO-1."""
    cases = {"grid": ("--tp=2", "--pp=2"), "zero": ()}
    for name, flags in cases.items():
        ds = tiny.ds(name, zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=1)
        run = tiny.flags(name, *flags, "--steps", 1, ds=ds)
        assert run_ranks(train_all, 4, [run])[0][0].code == 0
        path = tiny.checkpoint(name, 1)
        manifest = read_manifest(path)
        assert len(manifest.files) == 4
        for tensor, record in manifest.tensors.items():
            owners = {manifest.files[saved.file].name for saved in record.boxes}
            with mock.patch.object(reader, "TensorFile", wraps=TensorFile) as opened:
                CheckpointReader(path, manifest).read(tensor)
            assert {call.args[0].name for call in opened.call_args_list} == owners, tensor
        owners_of = {len({saved.file for saved in r.boxes}) for r in manifest.tensors.values()}
        assert owners_of == {1, 2}, name


VERIFY = """
import sys
import torch, fgpt.checkpoint.manager, fgpt.checkpoint.reader, rich.console, rich.table
from fgpt.cli import main
def peak():  # ru_maxrss would begin with that of the process that started this one
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
assert main(["checkpoint", "verify", sys.argv[1]]) == 0
print((peak() - before) // 1024)
"""


def test_verify_holds_no_file_in_memory(tmp_path: Path) -> None:
    """400 MB are verified with 50 MiB; 2.1 GB were measured with 4 MiB."""
    values = torch.zeros(10**8)
    shard = Shard("w", (10**8,), (0,), (10**8,))
    tensor = StateTensor(
        WEIGHT, values.dtype, [Fragment(shard, 0, 10**8, 0)], lambda: nullcontext(Values(values))
    )
    parts, records = parts_of([tensor])
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    file = write_file(path / "rank_00000.safetensors", file_header(parts), stream(parts))
    manifest = Manifest(**vars(info()), progress=Progress(1), files=(file,), tensors=records)
    manifest.write(path)
    done = subprocess.run(
        [sys.executable, "-c", VERIFY, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout.splitlines()[-1]) < 50, done.stdout
