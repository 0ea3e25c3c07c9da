"""Train a GPT. The one script for every launcher:

    python launchers/train.py --ds_config ds_configs/zero2.json
    deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json
    torchrun --nproc-per-node 2 launchers/train.py --ds_config ds_configs/zero2.json
    accelerate launch --config_file launchers/accelerate/zero2.yaml launchers/train.py \
        --ds_config ds_configs/zero2.json
"""

import os
import sys
from pathlib import Path

# a clone works without being installed: the package stands beside this folder
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# torch reads this when it is imported. Its C++ warnings bury the line that says why a run ends:
# a rank whose store ends prints a page of frames
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from fgpt.utils.startup_signals import signals_exit_at_once

with signals_exit_at_once():
    from fgpt.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
