#!/usr/bin/env python
"""`dsmoe generate` as a file."""

from dsmoe.cli.generate import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
