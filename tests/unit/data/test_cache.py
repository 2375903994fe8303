import time
from pathlib import Path

import pytest
from forked import call_each, context

from dsmoe.data.cache import BUILDING, cache_folders, provide_folder
from dsmoe.errors import DataError


def provide(cache: Path, log: Path) -> None:
    def build(folder):
        with open(log, "a") as file:
            file.write("built\n")
        (folder / "first").write_text("1")
        time.sleep(0.5)
        (folder / "second").write_text("2")

    folder = provide_folder([cache], "thing", build)
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_processes_that_ask_together_build_once_and_all_read_the_whole(tmp_path):
    call_each([(provide, (tmp_path / "cache", tmp_path / "log"))] * 4)
    assert (tmp_path / "log").read_text() == "built\n"
    assert names(tmp_path / "cache") == ["thing"]


def test_what_a_killed_builder_left_is_removed_and_built_anew(tmp_path):
    process = context.Process(target=provide, args=(tmp_path, tmp_path / "log"))
    process.start()
    while not list(tmp_path.glob(f"{BUILDING}*/first")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / "thing").exists()
    folder = provide_folder([tmp_path], "thing", lambda path: (path / "file").touch())
    assert names(folder) == ["file"]
    assert names(tmp_path) == ["log", "thing"]


def test_the_next_folder_is_taken_where_the_first_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()  # root may write into any folder, but not into a file
    calls = []
    for _ in range(2):
        actual = provide_folder([tmp_path / "file", tmp_path / "spare"], "thing", calls.append)
        assert actual == tmp_path / "spare" / "thing"
    assert len(calls) == 1
    with pytest.raises(DataError, match=r"no place to keep .*file: .*set data\.cache_dir"):
        provide_folder([tmp_path / "file"], "thing", calls.append)


def test_a_failing_build_leaves_nothing_and_is_not_hidden(tmp_path):
    def build(folder):
        (folder / "half").touch()
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        provide_folder([tmp_path], "thing", build)
    assert names(tmp_path) == []


def test_without_locks_the_first_to_rename_wins(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks here")

    def build(folder):
        (folder / "mine").touch()
        (tmp_path / "thing").mkdir()  # another process, at the same moment
        (tmp_path / "thing" / "theirs").touch()

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert names(provide_folder([tmp_path], "thing", build)) == ["theirs"]
    assert names(tmp_path) == ["thing"]


def test_only_a_chosen_folder_is_used_where_one_is_chosen(tmp_path):
    assert cache_folders(tmp_path / "train", "chosen") == [cache_folders(tmp_path, "chosen")[0]]
    beside, spare = cache_folders(tmp_path / "train", None)
    assert beside == tmp_path / "train.cache"
    assert tmp_path not in spare.parents
