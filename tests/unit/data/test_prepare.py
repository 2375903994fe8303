import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from commands import forked
from forked import context
from made_up import made_up_documents, write_documents
from megatron.core.datasets.indexed_dataset import IndexedDataset

from dsmoe.data import encoding
from dsmoe.data.description import DatasetDescription, file_sha256
from dsmoe.data.prepare import prepare
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DataError

REPOSITORY = Path(__file__).parents[3]
COMMAND = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py")]
FILES = ["dataset.json", "tokenizer.model", "train.bin", "train.idx", "valid.bin", "valid.idx"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder, split):
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    stored = IndexedDataset(str(folder / split))
    assert (numpy.diff(stored.document_indices) == 1).all()
    assert all(stored[index][-1] == tokenizer.eod_id for index in range(len(stored)))
    return [tokenizer.decode(stored[index][:-1].tolist()) for index in range(len(stored))]


def test_every_document_lies_in_one_split_unchanged(dataset, texts):
    train, valid = decoded(dataset, "train"), decoded(dataset, "valid")
    assert sorted(path.name for path in dataset.iterdir()) == FILES
    assert sorted(train + valid) == sorted(path.read_text() for path in texts.iterdir())
    assert len(valid) == 12  # a tenth


def test_the_description_is_true(dataset):
    description = DatasetDescription.load(dataset)
    for split, described in description.splits.items():
        documents = decoded(dataset, split)
        stored = IndexedDataset(str(dataset / split))
        size = sum(len(text.encode()) for text in documents)
        assert (described.documents, described.bytes) == (len(documents), size)
        assert described.tokens == stored.sequence_lengths.sum()
        assert described.bytes_per_token == pytest.approx(size / described.tokens)
        assert described.largest_token == max(stored[index].max() for index in range(len(stored)))
        assert stored.index.dtype == numpy.uint16
    assert description.files == {name: file_sha256(dataset / name) for name in FILES if name != "dataset.json"}
    assert description.tokenizer.sha256 == description.files["tokenizer.model"]
    assert description.tokenizer.vocab_size == 400


def test_the_result_does_not_depend_on_the_number_of_workers(dataset, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("dsmoe.data.encoding.GROUP_CHARACTERS", 2000)  # many groups on their way at once
    prepare([str(texts)], tmp_path / "dataset", vocab_size=400, valid_fraction=0.1, workers=2)
    assert contents(tmp_path / "dataset") == contents(dataset)


def test_the_seed_chooses_other_documents_and_order_does_not(texts, tmp_path):
    write_documents(tmp_path / "renamed", [path.read_text() for path in sorted(texts.iterdir(), reverse=True)])
    for name, source, seed in (("a", texts, 1), ("b", tmp_path / "renamed", 1), ("c", texts, 2)):
        prepare([str(source)], tmp_path / name, vocab_size=400, seed=seed, valid_fraction=0.1, workers=1)
    held_out = {name: set(decoded(tmp_path / name, "valid")) for name in "abc"}
    assert held_out["a"] == held_out["b"] != held_out["c"]


def test_a_document_that_occurs_twice_is_on_one_side_only(tmp_path):
    twice = made_up_documents(60) * 2
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in twice))
    prepare([str(tmp_path / "twice.jsonl")], tmp_path / "out", vocab_size=400, valid_fraction=0.2, workers=1)
    assert not set(decoded(tmp_path / "out", "train")) & set(decoded(tmp_path / "out", "valid"))


def test_a_given_tokenizer_is_copied(dataset, texts, tmp_path):
    model = dataset / "tokenizer.model"
    description = prepare([str(texts)], tmp_path / "out", tokenizer=model, vocab_size=7, workers=1)
    assert description.tokenizer.trained_here is False
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()


def test_the_limit_takes_a_first_part(dataset, texts, tmp_path):
    options = {"tokenizer": dataset / "tokenizer.model", "workers": 1, "limit_bytes": 10_000}
    splits = prepare([str(texts)], tmp_path / "out", **options).splits.values()
    assert 10_000 <= sum(split.bytes for split in splits) < 12_000


@pytest.mark.parametrize(
    ("documents", "complaint"),
    [
        ([""], "the corpus is empty"),
        (["only one"], "the corpus is one document"),
        (["the same"] * 3, "all 3 documents are equal"),
    ],
)
def test_a_corpus_that_cannot_be_split_is_refused_and_leaves_nothing(tmp_path, documents, complaint):
    write_documents(tmp_path / "in", documents)
    with pytest.raises(DataError, match=complaint):
        prepare([str(tmp_path / "in")], tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_documents_give_one_to_each_split(dataset, tmp_path):
    write_documents(tmp_path / "in", ["first", "second"])
    for fraction in (0.001, 0.999):
        out = tmp_path / str(fraction)
        prepare([str(tmp_path / "in")], out, tokenizer=dataset / "tokenizer.model", valid_fraction=fraction, workers=1)
        assert sorted(decoded(out, "train") + decoded(out, "valid")) == ["first", "second"]


def test_options_out_of_range_are_refused(texts, tmp_path):
    for options in ({"valid_fraction": 1.0}, {"workers": -1}, {"limit_bytes": 0}, {"seed": -1}):
        with pytest.raises(DataError, match=f"{next(iter(options)).split('_')[0]}.*: found"):
            prepare([str(texts)], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_dataset_is_replaced_only_when_asked(dataset, texts, tmp_path):
    options = {"tokenizer": dataset / "tokenizer.model", "workers": 1}
    prepare([str(texts)], tmp_path / "out", limit_bytes=10_000, **options)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="already holds a prepared dataset; --overwrite"):
        prepare([str(texts)], tmp_path / "out", **options)
    write_documents(tmp_path / "empty", [""])
    with pytest.raises(DataError, match="the corpus is empty"):
        prepare([str(tmp_path / "empty")], tmp_path / "out", overwrite=True, **options)
    assert contents(tmp_path / "out") == before  # also when the replacement fails
    prepare([str(texts)], tmp_path / "out", overwrite=True, **options)
    assert contents(tmp_path / "out").keys() == before.keys()
    assert contents(tmp_path / "out")["train.bin"] != before["train.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_a_folder_that_is_no_dataset_is_never_replaced(texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="exists and is no prepared dataset"):
        prepare([str(texts)], tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(dataset, texts, tmp_path):
    prepare([str(texts)], tmp_path / "out", tokenizer=dataset / "tokenizer.model", workers=1)
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(DataError, match="already holds a prepared dataset"):
        prepare([str(texts)], tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_between_the_two_renames_restores_the_dataset_at_once(dataset, texts, tmp_path, monkeypatch):
    options = {"tokenizer": dataset / "tokenizer.model", "workers": 1}
    prepare([str(texts)], tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    rename = Path.rename

    def failing_rename(path, target):
        if path.name == ".out.unfinished":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(DataError, match="cannot write .*out: the disk is gone"):
        prepare([str(texts)], tmp_path / "out", overwrite=True, limit_bytes=10_000, **options)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_turned_away_while_the_first_lives(texts, tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    descriptor = os.open(tmp_path / ".out.unfinished", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing this dataset"):
        prepare([str(texts)], tmp_path / "out")
    assert (tmp_path / ".out.unfinished").is_dir()
    os.close(descriptor)


def test_sources_that_change_between_the_passes_are_noticed(dataset, tmp_path, monkeypatch):
    source = write_documents(tmp_path / "in", made_up_documents(5))
    from dsmoe.data import prepare as module

    survey = module._survey

    def survey_and_change(*arguments):
        actual = survey(*arguments)
        (source / "0001.txt").write_text("something else")
        return actual

    monkeypatch.setattr(module, "_survey", survey_and_change)
    with pytest.raises(DataError, match="the sources changed while they were read"):
        prepare([str(source)], tmp_path / "out", tokenizer=dataset / "tokenizer.model", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def children(process):
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0]
    except OSError:
        return False


def wait_until(condition, seconds, reason):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, reason
        time.sleep(0.005)


def prepare_slowly(texts: Path, output: Path, tokenizer: Path) -> None:
    """With two workers at work on many groups, each document written a twentieth of a second after the last."""
    from dsmoe.data import prepare as module

    encoding.GROUP_CHARACTERS = 2000
    write = module.SplitWriter.add

    def write_later(self, text, ids):
        time.sleep(0.05)
        return write(self, text, ids)

    module.SplitWriter.add = write_later
    prepare([str(texts)], output, tokenizer=tokenizer, workers=2)


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_no_dataset_and_no_worker_and_the_next_run_succeeds(dataset, texts, tmp_path):
    process = context.Process(target=prepare_slowly, args=(texts, tmp_path / "out", dataset / "tokenizer.model"))
    process.start()
    written = tmp_path / ".out.unfinished" / "train.bin"
    while not written.exists() or not written.stat().st_size:
        assert process.is_alive(), "encoding never began"
        time.sleep(0.005)
    workers = children(process.pid)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(workers) >= 2
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    wait_until(lambda: not any(map(alive, workers)), 100, "workers outlived their parent")

    output = ["--output", str(tmp_path / "out"), "--tokenizer", str(dataset / "tokenizer.model"), "--workers", "2"]
    again = subprocess.run([*COMMAND, str(texts), *output], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "deepspeed --num_gpus 2 --module dsmoe train --config configs/quickstart.yaml data.path=" in again.stdout
    assert again.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_the_command_says_a_mistake_in_one_line(tmp_path):
    result = forked("tools/prepare_data.py", "absent.txt", "--output", str(tmp_path / "out"))
    assert result.code == 2
    assert result.output.startswith("error: source 'absent.txt': there is no such file")
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())
