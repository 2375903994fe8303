#!/usr/bin/env python
"""`dsmoe benchmark` as a file."""

from dsmoe.cli.benchmark import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
