"""Train: `deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml [section.key=value ...]`.

The same file runs under torchrun and mpirun, and alone with `python launch/train.py` as one process. Exit codes:
0 finished, 1 failed, 2 refused, 75 stopped by a signal with a checkpoint.
"""

from __future__ import annotations

import argparse

from dsmoe.runtime.command_line import quiet_libraries, run
from dsmoe.runtime.exit_codes import FINISHED, STOPPED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    from dsmoe.config import load_config
    from dsmoe.optim import registry as optimizers
    from dsmoe.routers import registry as routers
    from dsmoe.training.run import train

    config = load_config(arguments.config, arguments.overrides, routers.option_classes(), optimizers.option_classes())
    return STOPPED if train(config).stopped else FINISHED


if __name__ == "__main__":
    run(main)
