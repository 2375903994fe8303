"""Run a function on real gloo ranks, with a deadline: a hang is a failure that names the ranks and where they wait."""

from __future__ import annotations

import functools
import os

from forked import call_each

from dsmoe.parallel.place import free_port


def once(function):
    """`functools.cache` that also keeps an `AssertionError`: what hangs or fails for many tests costs its time once."""

    @functools.cache
    def attempt(*args):
        try:
            return function(*args), None
        except AssertionError as error:
            return None, error

    @functools.wraps(function)
    def wrapper(*args):
        value, error = attempt(*args)
        if error is not None:
            raise error
        return value

    return wrapper


def run_ranks(world_size: int, function, *args, deadline: float = 120.0) -> list:
    """Call `function(*args)` on every rank of a new gloo job; return what each rank returned, by rank.

    `function` must be a module's top-level function; what it returns must be picklable. Raises `AssertionError` with
    the rank's traceback if one fails, and with the stacks of those that did not answer if the deadline (seconds)
    passes.
    """
    port = free_port()
    jobs = [(_rank, (rank, world_size, port, function, args)) for rank in range(world_size)]
    return call_each(jobs, deadline, name="rank")


def _rank(rank: int, world_size: int, port: str, function, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
    )  # fmt: skip
    from dsmoe.parallel.groups import start_processes

    start_processes(timeout_minutes=2)
    return function(*args)
