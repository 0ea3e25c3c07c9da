"""Imported once by the fork server of `distributed.py`: what every rank would import and load."""

import gc
import importlib

import torch

for name in (
    "fgpt.cli.train",
    "fgpt.train.finish",
    "fgpt.train.run",
    "fgpt.engine.deepspeed.zero_engine",
    "fgpt.engine.deepspeed.pipeline_engine",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch's compiler: 3 s
    "deepspeed.utils.pin_memory",
    "torch.utils.cpp_extension",
):
    importlib.import_module(name)
torch.optim.AdamW([torch.zeros(1)])

# a rank's collector would walk over all of this, and copy every page of it
gc.collect()
gc.freeze()
