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
    parser.add_argument("--check", action="store_true", help="only look whether all ranks could start, and say why not")
    parser.add_argument(
        "--fit", action="store_true", help="fit expert parallel and accumulation to the processes there are"
    )
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    from dsmoe.parallel.preflight import meet

    def read():  # whatever goes wrong in here on one rank, all hear of it
        from dsmoe.config import load_config
        from dsmoe.optim import registry as optimizers
        from dsmoe.routers import registry as routers
        from dsmoe.training.start import Start

        options = routers.option_classes(), optimizers.option_classes()
        return Start.read(load_config(arguments.config, arguments.overrides, *options), arguments.fit)

    place, start = meet(read)
    start.agree(place, arguments.check)
    if arguments.check:
        return FINISHED
    from dsmoe.training.run import train

    return STOPPED if train(start.config).stopped else FINISHED


if __name__ == "__main__":
    run(main)
