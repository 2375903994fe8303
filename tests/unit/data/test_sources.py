import gzip
import json
import shutil

import pytest
import zstandard

from dsmoe.data.documents import read_documents
from dsmoe.data.sources import find_files
from dsmoe.errors import DataError

UNTIDY = "line one\r\nline two\n\ttab, é, 漢字 and no end of line"


def read(*sources, field="text", progress=None):
    return list(read_documents(find_files([str(source) for source in sources]), field, progress))


def json_lines(documents, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents)


def compress(data, suffix):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_to_the_last_byte(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(UNTIDY.encode(), suffix))
    assert read(path) == [UNTIDY]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json"])
def test_json_lines_are_one_document_a_line_in_order(tmp_path, suffix, ending):
    path = tmp_path / f"a{ending}{suffix}"
    path.write_bytes(compress(json_lines([UNTIDY, "", "second"], "content").encode(), suffix))
    assert read(path, field="content") == [UNTIDY, "second"]  # an empty document is none


def test_appended_compressed_files_are_read_to_the_end(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"first ", suffix) + compress(b"second", suffix))
        assert read(path) == ["first second"]


def test_a_folder_is_searched_for_text_and_json_lines_and_skips_hidden_and_other_files(tmp_path):
    for name in ("a.txt", "deep/b.md", "deep/er/c.txt.gz", ".git/d.txt", ".e.txt", "f.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compress(name.encode(), ".gz" if name.endswith(".gz") else ""))
    (tmp_path / "g.jsonl").write_text(json_lines(["g1", "g2"]))
    assert sorted(read(tmp_path)) == ["a.txt", "deep/b.md", "deep/er/c.txt.gz", "g1", "g2"]


def test_a_glob_takes_any_name(tmp_path):
    for name in ("a.c", "deep/b.c", "c.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(read(tmp_path / "**" / "*.c")) == ["a.c", "deep/b.c"]


def test_overlapping_sources_count_a_file_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path, tmp_path / "a.txt", tmp_path / "*.txt") == ["a"]


def test_order_is_shuffled_and_depends_on_names_only(tmp_path):
    names = [f"{number:03}.txt" for number in range(100)]
    for name in reversed(names):
        (tmp_path / "one" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_text(name)
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "two")
    actual = read(tmp_path / "one")
    assert actual == read(tmp_path / "elsewhere" / "two")
    assert sorted(actual) == names
    assert actual != names
    assert 20 < sum(int(name[:3]) < 50 for name in actual[:60]) < 40  # a prefix looks like the whole


def test_stdlib_is_this_interpreters_library_without_packages_and_tests():
    files = find_files(["stdlib"])
    names = {file.name for file in files}
    assert {"json/decoder.py", "dataclasses.py"} <= names
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "test", "__pycache__"))
    documents = list(read_documents(files))
    assert len(documents) > 300
    assert any("class JSONDecoder" in text for text in documents)


def test_progress_adds_up_to_the_size_on_disk(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(["text"] * 5000).encode()))
    (tmp_path / "b.txt").write_text("plain")
    reported = []
    read(tmp_path, progress=reported.append)
    assert sum(reported) == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{bad", "not valid JSON"),
        ('["text"]', "found a JSON list"),
        ('{"body": "x"}', r"no key 'text' \(found: 'body'\); name it with --field"),
        ('{"text": 5}', "'text' is int, expected a string"),
    ],
)
def test_a_bad_json_line_names_file_and_line(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {complaint}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_and_false_compressed_files_are_refused(tmp_path, suffix):
    whole = compress(json_lines(str(number) for number in range(5000)).encode(), suffix)
    for content in (whole[: len(whole) // 2], whole[:-1], b"this was never compressed"):
        (tmp_path / f"a.txt{suffix}").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.txt\{suffix} is damaged or not \{suffix} data"):
            read(tmp_path / f"a.txt{suffix}")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: .* \(byte 0xe9\)"):
        read(tmp_path)


def test_missing_sources_say_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder \(looked for .*absent.*'stdlib'"):
        find_files([str(tmp_path / "absent")])
    with pytest.raises(DataError, match="no file matches this glob"):
        find_files([str(tmp_path / "*.txt")])
    with pytest.raises(DataError, match=r"the folder has no \.txt, .* give a glob such as"):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match="no source given"):
        find_files([])
