#!/usr/bin/env python
"""`dsmoe evaluate` as a file."""

from dsmoe.cli.evaluate import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
