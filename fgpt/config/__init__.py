"""The configuration of a run: the DeepSpeed JSON, the run file and the flags.

Pure Python: nothing here imports torch or DeepSpeed. See fgpt/config/README.md.
"""
