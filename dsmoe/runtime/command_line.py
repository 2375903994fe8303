"""What all command lines share: quiet libraries, and errors a person can read."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import dsmoe.runtime.signals  # noqa: F401  (notes the launcher before anything slow is imported)
from dsmoe.errors import DsmoeError
from dsmoe.runtime import supervision
from dsmoe.runtime.device import prefer_growing_segments
from dsmoe.runtime.exit_codes import FAILED, FINISHED, INTERRUPTED


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: with what it returns, with the message and the exit code of a `DsmoeError`
    instead of a stack trace, or with 1. In a job of several ranks an error of one ends all of them, with that error."""
    quiet_libraries()
    prefer_growing_segments()
    try:
        code = main() or 0
    except KeyboardInterrupt:
        _print_once("interrupted")
        _leave(INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(FINISHED)
    except Exception as error:
        _leave(_explain(error))
    _leave(code, together=True)


def _explain(error: Exception) -> int:
    """Say what went wrong, to the other ranks too; the exit code."""
    own = isinstance(error, DsmoeError)
    text, code = f"{type(error).__name__}: {error}", error.exit_code if isinstance(error, DsmoeError) else FAILED
    channel = supervision.current
    if channel is not None and not own:
        if supervision.lost_peer(error):
            channel.broken_collective()
        traceback.print_exception(error)
    if channel is not None:
        channel.fail(text, code)  # ends this process, unless nobody answers
    if own:
        _print_once(text)
    elif channel is None:
        traceback.print_exception(error)
    return code


def require_path(path: str | Path, expected: str, error: type[DsmoeError]) -> None:
    """Raise `error` if a path of the command line leads nowhere: at once, before libraries are imported for seconds."""
    if not Path(path).exists():
        raise error(f"{path} does not exist; expected {expected}")


def user_path(text: str) -> Path:
    """A path of the command line, as `type` of its option: ~ is the home folder also in --out=~/x and between quotes,
    where a shell leaves it alone. `os.path.expanduser` is the same for an option that stays a string."""
    return Path(os.path.expanduser(text))


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


def _leave(code: int, together: bool = False) -> NoReturn:
    """Exit without waiting for collectives that other ranks will not answer; `together`: all ranks leave like this."""
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        if together:
            distributed.barrier()
            mpi = sys.modules.get("mpi4py.MPI")
            if mpi is not None and mpi.Is_initialized():
                mpi.Finalize()  # mpirun takes a process that leaves without it for a failed one
            if supervision.current is not None:
                supervision.current.close()
        os._exit(code)
    if supervision.current is not None:
        supervision.current.close()
        os._exit(code)
    sys.exit(code)
