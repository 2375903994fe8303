#!/usr/bin/env python
"""`dsmoe prepare-data` as a file."""

from dsmoe.cli.prepare_data import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
