"""The explicit mask against its definition, and which derived tensors are shared."""

from __future__ import annotations

import pytest
import torch

from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.mask import CAUSAL, AttentionMask

CPU = torch.device("cpu")
BEGINS = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]])


@pytest.mark.parametrize(("n_query", "n_key"), [(5, 5), (2, 5), (1, 5)])
def test_causal_queries_are_the_last_tokens(n_query, n_key):
    dense = CAUSAL.dense(n_query, n_key, CPU)
    offset = n_key - n_query
    assert dense.tolist() == [[j <= i + offset for j in range(n_key)] for i in range(n_query)]


def test_documents_are_causal_and_separate():
    dense = AttentionMask(BEGINS).dense(5, 5, CPU)
    expected = [[[begins[i] <= j <= i for j in range(5)] for i in range(5)] for begins in BEGINS]
    assert dense.tolist() == [[rows] for rows in torch.tensor(expected).tolist()]


def test_lengths_and_offsets_of_the_concatenated_rows():
    mask = AttentionMask(BEGINS)
    assert mask.document_lengths == [2, 3, 1, 3, 1] and mask.max_document_length == 3
    offsets = mask.cu_seqlens(CPU)
    assert offsets.tolist() == [0, 2, 5, 6, 9, 10] and offsets.dtype == torch.int32


def test_layers_share_the_derived_tensors():
    mask = AttentionMask(BEGINS)
    assert mask.dense(5, 5, CPU) is mask.dense(5, 5, CPU)
    assert mask.cu_seqlens(CPU) is mask.cu_seqlens(CPU)
    assert mask.begins(CPU) is mask.begins(CPU) and torch.equal(mask.begins(CPU), BEGINS.int())
    assert mask.document_lengths is mask.document_lengths
    assert not CAUSAL.__dict__["_document_mask"]  # the default, shared by all models, keeps nothing


@pytest.mark.parametrize("kernel", [reference_attention, sdpa_attention])
def test_one_document_per_row_is_the_causal_mask(kernel):
    q, k, v = torch.randn(3, 2, 4, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    rows = AttentionMask(torch.zeros(2, 8, dtype=torch.int64))
    torch.testing.assert_close(kernel(q, k, v, rows), kernel(q, k, v, CAUSAL))
