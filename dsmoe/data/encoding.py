"""Tokenize documents in several processes, in order.

The result does not depend on the number of workers: documents are grouped before they are handed out, and groups come
back in the order in which they went. Only a few groups are on their way at a time, so a corpus larger than the memory
streams through.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy

from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DataError

GROUP_CHARACTERS = 1 << 18  # large enough that passing a group between processes costs nothing
GROUPS_PER_WORKER = 4


def encode_documents(
    texts: Iterable[str], tokenizer_path: Path, dtype: type[numpy.integer], workers: int
) -> Iterator[tuple[list[str], list[numpy.ndarray]]]:
    """Groups of documents and their ids `[tokens]` of `dtype`, each ending with the end-of-document id.

    Args:
        texts: documents.
        tokenizer_path: see `Tokenizer.load`; loaded once by each worker.
        dtype: integer type of the ids.
        workers: processes; 1 encodes in this process.

    Raises:
        DataError: a worker was killed, as the system does when memory runs out.
    """
    if workers == 1:
        tokenizer = Tokenizer.load(tokenizer_path)
        for group in _groups(texts):
            yield group, _encode(tokenizer, group, dtype)
        return
    # "spawn": the parent has threads (the progress bar), and a fork of a threaded process may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_path, dtype))
    pending: deque[tuple[list[str], Future]] = deque()
    try:
        for group in _groups(texts):
            pending.append((group, pool.submit(_encode_in_worker, group)))
            if len(pending) >= workers * GROUPS_PER_WORKER:
                group, future = pending.popleft()
                yield group, future.result()
        for group, future in pending:
            yield group, future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker was killed while encoding, as when memory runs out; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _encode(tokenizer: Tokenizer, group: list[str], dtype: type[numpy.integer]) -> list[numpy.ndarray]:
    return [numpy.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=dtype) for text in group]


_worker: tuple[Tokenizer, type[numpy.integer]]  # of a worker process


def _start_worker(tokenizer_path: Path, dtype: type[numpy.integer]) -> None:
    global _worker
    _worker = Tokenizer.load(tokenizer_path), dtype
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent answers for them
    # A parent that is killed cannot end its workers, and these would wait for work for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)


def _encode_in_worker(group: list[str]) -> list[numpy.ndarray]:
    tokenizer, dtype = _worker
    return _encode(tokenizer, group, dtype)
