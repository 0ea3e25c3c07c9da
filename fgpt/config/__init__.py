"""Everything that changes between two runs: the DeepSpeed JSON, the run file and the flags.

Pure Python: nothing here imports torch or DeepSpeed. `fgpt/config/README.md` says how a value
travels from a file to the engine.
"""
