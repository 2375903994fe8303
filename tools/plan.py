#!/usr/bin/env python
"""`dsmoe plan` as a file."""

from dsmoe.cli.plan import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
