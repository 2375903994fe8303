"""`dsmoe env`, and `python -m dsmoe.env`: what this machine has, and which accelerations are on."""

from dsmoe.runtime.environment import main

__all__ = ["main"]
