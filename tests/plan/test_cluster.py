"""Devices and links: the built-in table, a user's file, and what a group of ranks can send."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgpt.errors import ConfigError, UserError
from fgpt.plan.cluster import Cluster, devices, find_device


def test_a_users_file_adds_and_replaces(tmp_path: Path) -> None:
    entry = {"peak_16bit_tflops": 500, "memory_gib": 96, "memory_gb_s": 4000, "link_gb_s": 400}
    entry |= {"watts": 600}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"devices": {"x1": entry, "h100-80g": {**entry, "watts": 350}}}))
    assert find_device("x1", file).peak_tflops("fp8") == 500  # it has no fp8
    assert find_device("h100-80g", file).watts == 350
    assert find_device("a100-80g", file) == find_device("a100-80g")
    assert find_device("h100-80g").peak_tflops("fp8") == 1979


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "not an object"),
        ("{}", "no object of devices"),
        ('{"devices": {"x": 3}}', "no object of devices"),
        ('{"devices": {"x": {"flops": 3}}}', "x: unknown key 'flops'"),
        ('{"devices": {"x": {"watts": "3"}}}', 'x.watts: "3" is not a positive number'),
        ('{"devices": {"x": {"watts": -1}}}', "x.watts: -1 is not a positive number"),
        ('{"devices": {"x": {"watts": 1}}}', "missing"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises((UserError, ConfigError), match=says) as raised:
        devices(file)
    assert str(file) in str(raised.value)


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="--gpu h100-80gb: no such device; did you mean h100-80g?"):
        find_device("h100-80gb")
    with pytest.raises(UserError, match="known: a100-80g, "):
        find_device("zzz")


def test_bandwidth_of_a_group() -> None:
    """8 x 300 GB/s in a node, 200 GB/s between nodes."""
    cluster = Cluster(find_device("a100-80g"), 64, 8, 1600)
    assert cluster.nodes == 8
    assert cluster.bandwidth_gb_s(8) == 300  # within a node
    assert cluster.bandwidth_gb_s(64) == 200  # one ring through all nodes has the whole network
    assert cluster.bandwidth_gb_s(8, stride=8) == 25  # eight groups share it
    assert cluster.bandwidth_gb_s(2, stride=4) == 300
    assert cluster.bandwidth_gb_s(16, stride=4) == 50
