"""Router plugins: one method a file. `available()` lists them, `register` adds one."""

import dsmoe.runtime.megatron  # noqa: F401  (before anything imports Megatron-Core)
from dsmoe.routers.registry import available, get, register

__all__ = ["available", "get", "register"]
