"""Kinds of kernels, and sums of overlapping times, checked by hand."""

from __future__ import annotations

import pytest

from fgpt.bench.time_breakdown import (
    Span,
    covered_s,
    exclusive_s,
    exposed_communication_s,
    kind_fractions,
    kind_of,
)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64", "matrix products"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("flash_fwd_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("c10d::allreduce_", "communication"),
        ("triton_poi_fused_gelu_0", "element-wise"),
        ("aten::copy_", "element-wise"),
        ("aten::_softmax", "attention"),
        ("aten::_log_softmax", "element-wise"),  # of the loss
        ("cunn_SoftMaxForward", "element-wise"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_covered_time_counts_overlap_once():
    spans = [Span("a", 0, 2), Span("b", 1, 3), Span("c", 5, 6), Span("d", 5.2, 5.5)]
    assert covered_s(spans) == pytest.approx(4)
    assert covered_s([]) == 0


def test_exclusive_time():
    assert exclusive_s([Span("n", 0, 4)], [Span("k", 1, 2), Span("k", 3, 9)]) == pytest.approx(2)


def test_fractions_and_idle():
    fractions = kind_fractions(
        [("aten::mm", 2.0), ("aten::add", 1.0), ("aten::bmm", 1.0)], 4.0, 8.0
    )
    assert fractions["matrix products"] == pytest.approx(3 / 8)
    assert fractions["element-wise"] == pytest.approx(1 / 8)
    assert fractions["idle"] == pytest.approx(1 / 2)


def test_communication_counts_while_nothing_else_runs():
    spans = [
        Span("gemm", 0, 4),
        Span("ncclDevKernel_AllReduce", 3, 6),  # exclusive: 2
        Span("ncclDevKernel_SendRecv", 7, 8),
        Span("gemm", 8, 9),
    ]
    assert exposed_communication_s(spans, True) == pytest.approx(
        {"communication": 2.0, "pipeline": 1.0}
    )
    assert exposed_communication_s(spans, False) == pytest.approx(
        {"communication": 3.0, "pipeline": 0.0}
    )
