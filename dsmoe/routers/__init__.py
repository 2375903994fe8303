"""Router plugins: one method a file. `available()` lists them, `register` adds one."""

from dsmoe.routers.registry import available, get, register

__all__ = ["available", "get", "register"]
