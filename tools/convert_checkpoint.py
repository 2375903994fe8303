#!/usr/bin/env python
"""`dsmoe export`, `dsmoe import` and `dsmoe verify` as one file."""

from dsmoe.cli.convert import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
