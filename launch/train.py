#!/usr/bin/env python
"""`dsmoe train` as a file, for launchers: `deepspeed --num_gpus 2 launch/train.py --config FILE`."""

from dsmoe.cli.train import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
