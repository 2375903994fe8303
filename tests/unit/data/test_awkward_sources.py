"""Sources as they lie on people's disks: odd names, odd JSON, long windows, tables, one file with many documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dsmoe.cli.prepare_data import main
from dsmoe.config import validate_config
from dsmoe.data.description import DatasetDescription
from dsmoe.data.documents import read_documents, separator_of
from dsmoe.data.sources import find_files, other_splits, passed_over
from dsmoe.errors import DataError

OPTIONS = ["--vocab-size", "300", "--workers", "1"]
SENTENCES = [f"Sentence number {n} is about thing {n * n % 17}, and not about {n * 7 % 23}.\n" for n in range(400)]


def documents(*sources: Path, **options) -> list[str]:
    return list(read_documents(find_files([str(source) for source in sources]), **options))


def prepared(folder: Path) -> DatasetDescription:
    return DatasetDescription.load(folder)


def test_a_name_that_is_no_utf8(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        path = os.fsencode(folder) + b"/caf\xe9-%d.txt" % number
        Path(os.fsdecode(path)).write_text("".join(SENTENCES[number * 50 : number * 50 + 50]))
    assert main([str(folder), "--output", str(tmp_path / "out"), *OPTIONS]) == 0
    assert sum(split.documents for split in prepared(tmp_path / "out").splits.values()) == 4
    odd = os.fsdecode(os.fsencode(folder) + b"/nothing\xff")
    assert main([odd, "--output", str(tmp_path / "other"), *OPTIONS]) == 2
    error = capsys.readouterr().err
    assert "nothing\\xff" in error and error.encode()
    bad = Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.jsonl"))
    bad.write_text("{")
    with pytest.raises(DataError, match=r"bad\\xff.jsonl, line 1: not valid JSON"):
        documents(bad)


def test_json_with_a_number_that_python_does_not_convert(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": ' + "7" * 5000 + ', "text": "kept"}\n{"text": -3}\n')
    with pytest.raises(DataError, match=r"line 2: 'text' is int, expected a string"):
        documents(path)
    path.write_text('{"id": ' + "7" * 5000 + ', "text": "kept"}\n')
    assert documents(path) == ["kept"]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_nested_deeply_is_named(tmp_path, opening):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + opening * 200_000 + "\n")
    with pytest.raises(DataError, match=r"a.jsonl, line 2: (nested too deeply|not valid JSON)"):
        documents(path)


def test_a_zstd_frame_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    text = "".join(SENTENCES)
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(text.encode()) + compressor.flush())
    assert documents(tmp_path / "a.txt.zst") == [text]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(SENTENCES[number * 60 : number * 60 + 60]))
    assert main(["~/texts", "--output", "~/out", *OPTIONS]) == 0
    assert (tmp_path / "out" / "dataset.json").is_file() and not (tmp_path / "~").exists()
    config = validate_config({"data": {"path": "~/out"}, "logging": {"run_dir": "~/runs/a"}})
    assert config.data.path == str(tmp_path / "out") and config.logging.run_dir == str(tmp_path / "runs" / "a")


def test_what_is_passed_over_is_said(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.jsonl", "b.txt", "c.txt"):
        text = "".join(SENTENCES[:80]) if name != "c.txt" else "".join(SENTENCES[80:160])
        (folder / name).write_text(json.dumps({"text": text}) + "\n" if name == "a.jsonl" else text + name)
    for name in ("x.json", "y.json", "z.bz2", "README", ".hidden.json"):
        (folder / name).write_text("{}")
    assert passed_over([str(folder)]) == {".json": 2, ".bz2": 1, "no suffix": 1}
    assert main([str(folder), "--output", str(tmp_path / "out"), *OPTIONS]) == 0
    assert "passed over in folders: 2 .json, 1 .bz2, 1 no suffix" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("blank", ["one\nmore\n", "two\n", "three"]), (r"^two$\n", ["one\nmore\n\n", "\n \n\nthree"])],
)
def test_documents_of_one_file(tmp_path, pattern, expected):
    (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n\n \n\nthree")
    assert documents(tmp_path / "a.txt", separator=separator_of(pattern)) == expected


def test_a_separator_that_is_no_expression():
    with pytest.raises(DataError, match="--split-documents: found '\\(', expected 'blank' or a regular expression"):
        separator_of("(")


def test_two_files_miss_the_aim_and_say_so_and_split_they_meet_it(tmp_path, capsys):
    for name, part in (("valid.txt", SENTENCES[:200]), ("test.txt", SENTENCES[200:])):
        (tmp_path / name).write_text("\n".join(part))
    assert main([str(tmp_path), "--output", str(tmp_path / "two"), *OPTIONS]) == 0
    assert "of the text is held out, 2.0% was asked for" in capsys.readouterr().out
    options = ["--split-documents", "blank", "--valid-fraction", "0.1", *OPTIONS]
    assert main([str(tmp_path), "--output", str(tmp_path / "many"), *options]) == 0
    splits = prepared(tmp_path / "many").splits
    assert (splits["train"].documents, splits["valid"].documents) == (360, 40)
    assert "was asked for" not in capsys.readouterr().out


def test_held_out_text_by_name(tmp_path, capsys):
    """Its documents are left out of the rest, where they occur there too."""
    shared = SENTENCES[10] * 5
    lines = [{"text": sentence * 5} for sentence in SENTENCES[:60]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (shared, "never seen before")))
    out, held = tmp_path / "out", str(tmp_path / "held.jsonl")
    assert main([str(tmp_path / "train.jsonl"), "--valid", held, "--output", str(out), *OPTIONS]) == 0
    description = prepared(out)
    assert (description.splits["train"].documents, description.splits["valid"].documents) == (59, 2)
    assert description.valid_sources == [held]
    assert main([held, "--valid", held, "--output", str(tmp_path / "none"), *OPTIONS]) == 2
    assert "nothing is left to train on" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert main([held, "--valid", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "none"), *OPTIONS]) == 2
    assert "the held-out sources hold no text" in capsys.readouterr().err


def table(texts: list[str | None]) -> pyarrow.Table:
    return pyarrow.table({"text": pyarrow.array(texts, "string"), "id": pyarrow.array(range(len(texts)), "int64")})


def test_parquet_and_arrow(tmp_path):
    texts = ["one", None, "two", "three"]
    pyarrow.parquet.write_table(table(texts), tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table([]).schema) as out:
        out.write_table(table(["four"]))  # as `datasets` saves
    with pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table([]).schema) as out:
        out.write_table(table(["five"]))
    assert documents(tmp_path / "a.parquet") == ["one", "two", "three"]
    assert sorted(documents(tmp_path)) == ["five", "four", "one", "three", "two"]


def test_tables_that_cannot_be_read(tmp_path):
    pyarrow.parquet.write_table(table(["one"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no key 'body' \(found: 'text', 'id'\); name it with --field"):
        documents(tmp_path / "a.parquet", field="body")
    with pytest.raises(DataError, match="a.parquet: 'id' is int64, expected a string"):
        documents(tmp_path / "a.parquet", field="id")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:40])
    with pytest.raises(DataError, match="b.parquet is damaged or no .parquet data"):
        documents(tmp_path / "b.parquet")
    (tmp_path / "c.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match="c.arrow is damaged or no .arrow data"):
        documents(tmp_path / "c.arrow")


def save_to_disk(folder: Path, texts: list[str], cached: list[str] | None = None) -> None:
    """A dataset as `datasets` saves it, and the file that `map` leaves beside it."""
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}}))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "acc23f7d", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    write_stream(folder / "data-00000-of-00001.arrow", texts)
    if cached is not None:
        write_stream(folder / "cache-d514257e9abe4321.arrow", cached)


def write_stream(path: Path, texts: list[str]) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table([]).schema) as out:
        out.write_table(table(texts))


def test_what_map_cached_beside_a_saved_dataset_is_not_read_twice(tmp_path):
    save_to_disk(tmp_path / "saved", ["one", "two"], ["ONE", "TWO"])
    assert documents(tmp_path / "saved") == ["one", "two"]
    assert passed_over([str(tmp_path / "saved")]) == {}
    assert documents(tmp_path / "saved" / "cache-d514257e9abe4321.arrow") == ["ONE", "TWO"]  # by its own name


def test_of_a_saved_dictionary_of_splits_train_is_read(tmp_path, capsys):
    root = tmp_path / "dictionary"
    for place, split in enumerate(("train", "test", "validation")):
        save_to_disk(root / split, SENTENCES[place * 100 : place * 100 + 100], ["cached"])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test", "validation"]}))
    assert sorted(documents(root)) == sorted(SENTENCES[:100])
    assert documents(root / "test") == SENTENCES[100:200]
    assert other_splits([str(root)]) == [root / "test", root / "validation"]
    assert main([str(root), "--output", str(tmp_path / "out"), *OPTIONS]) == 0
    said = capsys.readouterr().out
    assert f"only 'train' of the splits was read; --valid {root / 'test'} holds a split out" in said
    held = ["--valid", str(root / "validation")]
    assert main([str(root), *held, "--output", str(tmp_path / "held"), *OPTIONS]) == 0
    splits = prepared(tmp_path / "held").splits
    assert (splits["train"].documents, splits["valid"].documents) == (100, 100)
    assert "of the splits was read" not in capsys.readouterr().out
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "validation"]}))
    with pytest.raises(DataError, match=r"no split 'train' \(found: test, validation\); name one: .*/SPLIT"):
        documents(root)
    (root / "dataset_dict.json").write_text("[]")
    with pytest.raises(DataError, match=r"cannot read .*dataset_dict.json, which Hugging Face's datasets wrote"):
        documents(root)


def test_folders_of_the_installed_datasets(tmp_path, monkeypatch):
    """The same from the library itself, and what `load_dataset` prepares, where splits are files of one folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets", reason="datasets is not installed")
    names = ("train", "test")
    saved = {name: library.Dataset.from_dict({"text": [f"{name} {n}" for n in range(3)]}) for name in names}
    library.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    library.load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "saved" / "train").glob("cache-*.arrow"))
    assert documents(tmp_path / "saved") == ["train 0", "train 1", "train 2"]
    files = {name: str(tmp_path / f"{name}.jsonl") for name in names}
    for name, path in files.items():
        Path(path).write_text(json.dumps({"text": name}) + "\n")
    library.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache")).map(lambda row: row | {"n": 1})
    assert list((tmp_path / "cache").rglob("cache-*.arrow"))
    assert documents(tmp_path / "cache") == ["train"]
    (other,) = other_splits([str(tmp_path / "cache")])
    assert documents(other) == ["test"]


def test_the_texts_of_several_keys_are_one_document(tmp_path, capsys):
    """Megatron's `--json-keys title text`."""
    rows = [{"title": f"Title {n}", "text": SENTENCES[n] * 3, "id": n} for n in range(60)]
    rows[0]["title"] = ""
    expected = [rows[0]["text"], *(f"Title {n}\n\n{SENTENCES[n] * 3}" for n in range(1, 60))]
    lines, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([rows[0] | {"title": None}, *rows[1:]]), parquet)
    assert documents(lines, field=["title", "text"]) == documents(parquet, field=["title", "text"]) == expected
    assert documents(parquet, field=["text", "title"])[1] == f"{SENTENCES[1] * 3}\n\nTitle 1"
    with pytest.raises(DataError, match="line 1: no key 'body'"):
        documents(lines, field=["title", "body"])
    with pytest.raises(DataError, match="a.parquet: no key 'body'"):
        documents(parquet, field=["title", "body"])
    for number, words in enumerate((["--json-keys", "title", "text"], ["--field", "title", "--field", "text"])):
        assert main([str(lines), "--output", str(tmp_path / str(number)), *OPTIONS, *words]) == 0
        description = prepared(tmp_path / str(number))
        assert description.field == ["title", "text"]
        splits = description.splits.values()
        assert sum(split.documents for split in splits) == 60
        assert sum(split.bytes for split in splits) == sum(map(len, expected))
    assert (tmp_path / "0" / "train.bin").read_bytes() == (tmp_path / "1" / "train.bin").read_bytes()
    assert main([str(lines), "--output", str(tmp_path / "one"), *OPTIONS]) == 0
    assert prepared(tmp_path / "one").field == "text"
