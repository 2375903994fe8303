#!/usr/bin/env python
"""`dsmoe study` as a file."""

from dsmoe.cli.study import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
