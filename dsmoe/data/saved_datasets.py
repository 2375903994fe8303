"""Folders that Hugging Face's `datasets` wrote: what in them is text to train on.

    a dataset that was saved      state.json names its .arrow files; cache-*.arrow beside them are results of `map`
    a DatasetDict that was saved  dataset_dict.json names its splits, a folder each
    what `load_dataset` prepared  dataset_info.json names its splits, a file NAME-SPLIT.arrow each, or several

Of a folder with splits `train` is read; the others are test data, which a model must not have seen, and are named as
`--valid` takes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dsmoe.errors import DataError

DICT, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
TRAIN = "train"
T = TypeVar("T")


def to_read(folder: Path, folders: list[str], files: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Which entries of a folder are read, and which hold other splits than `train`.

    Args:
        folder: any folder; one that `datasets` did not write is read as it is.
        folders, files: names in it.

    Returns:
        Folders to search and files, without those of `datasets` itself; and folders or files of other splits.

    Raises:
        DataError: there are splits, and none is called `train`; or a file that names them is damaged.
    """
    if DICT in files:
        splits = _read(folder / DICT, lambda tree: list(tree["splits"]))
        if TRAIN not in splits:
            raise DataError(f"{folder} has no split 'train' (found: {', '.join(splits)}); name one: {folder}/SPLIT")
        others = [name for name in folders if name in splits and name != TRAIN]
        return [name for name in folders if name not in others], [name for name in files if name != DICT], others
    if INFO not in files:
        return folders, files, []
    tables = [name for name in files if name.endswith(".arrow")]
    if STATE in files:
        named, others = _read(folder / STATE, lambda tree: {part["filename"] for part in tree["_data_files"]}), []
    else:
        splits = _read(folder / INFO, lambda tree: list(tree.get("splits") or ()))
        of_split = {split: [name for name in tables if _is_of(name, split)] for split in splits}
        others = [name for split in splits if split != TRAIN for name in of_split[split]] if of_split.get(TRAIN) else []
        named = {name for name in tables if not name.startswith("cache-") and name not in others}
    return folders, [n for n in files if n not in (STATE, INFO) and (n not in tables or n in named)], others


def _is_of(name: str, split: str) -> bool:
    return re.search(rf"-{re.escape(split)}(-\d+-of-\d+)?\.arrow$", name) is not None


def _read(path: Path, value: Callable[[Any], T]) -> T:
    """A value in a JSON file that `datasets` wrote."""
    try:
        return value(json.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path}, which Hugging Face's datasets wrote: {error!r}") from error
