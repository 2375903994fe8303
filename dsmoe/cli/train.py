"""Train a run, or resume it: the same command again.

    dsmoe train --config configs/quickstart.yaml data.path=data/stdlib            one process
    deepspeed --num_gpus 2 --module dsmoe train --config FILE section.key=value   two; also on several hosts
    torchrun --nproc-per-node 2 -m dsmoe train --config FILE
    mpirun -n 2 python -m dsmoe train --config FILE

In a checkout, launch/train.py is the same. Exit codes: 0 finished, 1 failed, 2 refused, 75 stopped by a signal with a
checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
from os.path import expanduser

from dsmoe.cli.options import optimizer_options, router_options
from dsmoe.runtime.command_line import quiet_libraries
from dsmoe.runtime.exit_codes import FINISHED, STOPPED
from dsmoe.runtime.foreground import take_foreground


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=expanduser, default="configs/quickstart.yaml", metavar="YAML",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--help-config", nargs="?", const="all", metavar="SECTION", help="list the keys of a "
                        "configuration, or of one of its sections, and exit")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    parser.add_argument("--check", action="store_true", help="only look whether all ranks could start, and say why not")
    parser.add_argument(
        "--fit", action="store_true", help="fit expert parallel and accumulation to the processes there are"
    )
    arguments = parser.parse_intermixed_args(argv)
    quiet_libraries()
    if arguments.help_config:
        return _show_keys(arguments.help_config)
    take_foreground()
    from dsmoe.parallel.preflight import meet

    def read():  # whatever goes wrong in here on one rank, all hear of it
        from dsmoe.config import load_config
        from dsmoe.config.shipped import find_config

        path = find_config(arguments.config)
        config = load_config(path, arguments.overrides, router_options, optimizer_options)
        from dsmoe.lab.planner.memory import expected_bytes
        from dsmoe.training.start import Start

        return Start.read(config, arguments.fit, expected_bytes)

    place, start = meet(read)
    start.agree(place, arguments.check)
    if arguments.check:
        return FINISHED
    from dsmoe.training.run import train

    return STOPPED if train(start.config).stopped else FINISHED


def _show_keys(section: str) -> int:
    from dsmoe.config.describe import keys_text

    routers = {}
    if section in ("all", "router"):
        from dsmoe.routers.registry import option_classes

        routers = dict(option_classes())
    print(keys_text(section, routers, min(100, shutil.get_terminal_size().columns)))
    return 0
