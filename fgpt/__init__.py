"""FGPT: a config-driven trainer for a hand-written GPT on DeepSpeed."""

__version__ = "0.1.0"
