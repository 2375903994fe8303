"""`python -m dsmoe COMMAND ...`, which launchers can start too."""

from dsmoe.cli import main
from dsmoe.runtime.command_line import run

if __name__ == "__main__":
    run(main)
