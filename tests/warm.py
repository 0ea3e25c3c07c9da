"""Imported once by the fork server of `distributed.py`: what every rank would import and load."""

import importlib

import torch

for name in (
    "fgpt.train.main",
    "fgpt.train.run",
    "fgpt.engine.zero",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "deepspeed.runtime.zero.muon.original_muon",  # torch's compiler: 3 s
):
    importlib.import_module(name)
torch.optim.AdamW([torch.zeros(1)])
