"""`python -m dsmoe.env`: what this machine has, and which accelerations are on."""

import sys

from dsmoe.runtime.environment import main

if __name__ == "__main__":
    sys.exit(main())
