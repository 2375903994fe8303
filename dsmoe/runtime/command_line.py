"""What all command lines share: quiet libraries, and errors a person can read."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

import dsmoe.runtime.signals  # noqa: F401  (notes the launcher before anything slow is imported)
from dsmoe.errors import DsmoeError
from dsmoe.runtime.device import prefer_growing_segments
from dsmoe.runtime.exit_codes import FINISHED, INTERRUPTED, REFUSED, STOPPED

USER_ERROR = REFUSED


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: with what it returns, or with the message and the exit code of a `DsmoeError`
    instead of a stack trace."""
    quiet_libraries()
    prefer_growing_segments()
    try:
        code = main() or 0
    except DsmoeError as error:
        _print_once(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    _leave(code)


def quiet_libraries() -> None:
    """Keep the frameworks' start-up chatter off the screen; DSMOE_VERBOSE=1 lets it through."""
    if os.environ.get("DSMOE_VERBOSE"):
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard looks for TensorFlow
    for name in ("megatron.core", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # These two set their level when they are imported; a filter outlives that.
    for name in ("DeepSpeed", "megatron.core.transformer.transformer_layer"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def _print_once(message: str) -> None:
    """Rank 0 speaks. The others, who mostly met the same error, wait: if rank 0 did too, its launcher ends them."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    rank = int(next((os.environ[name] for name in names if name in os.environ), "0"))
    if rank:
        time.sleep(3)
        message = f"[rank {rank}] {message}"
    print(message, file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    """Exit without waiting for collectives that other ranks will not answer."""
    import torch.distributed

    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        if code in (FINISHED, STOPPED):  # then all ranks are here
            torch.distributed.barrier()
            mpi = sys.modules.get("mpi4py.MPI")
            if mpi is not None and mpi.Is_initialized():
                mpi.Finalize()  # mpirun takes a process that leaves without it for a failed one
        os._exit(code)
    sys.exit(code)
