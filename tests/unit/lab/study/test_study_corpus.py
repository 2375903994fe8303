"""The study corpus: what counts as a document, what is held out, and the dataset that comes of it."""

import io
import json
import platform
import tarfile
from pathlib import Path

import pytest

from dsmoe.config import DataConfig
from dsmoe.data.corpus import open_corpus
from dsmoe.errors import DataError
from dsmoe.lab.study import corpus
from dsmoe.lab.study.corpus import (
    Document,
    build_corpus,
    held_out_groups,
    read_documents,
    required_packages,
    without_duplicates,
)

TEXT = "int main(void) { return NUMBER; }\n" * 20


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"linux-source-6.1/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_kinds_come_from_the_kernel_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "find_files", lambda sources: [])
    long_enough = TEXT.encode()
    linux = archive(
        tmp_path / "linux.tar.xz",
        {
            "kernel/fork.c": long_enough,
            "include/linux/list.h": long_enough + b"1",
            "Documentation/mm/slub.rst": long_enough,
            "Documentation/translations/it_IT/index.rst": long_enough,
            "Documentation/Makefile": long_enough,
            "kernel/latin1.c": long_enough + b"\xe9",
            "kernel/stub.c": b"\n",
            "kernel/table.h": b"#define A 1\n" * 20_000,
        },
    )
    actual = {(document.kind, document.name) for document in read_documents(linux, 1.0, {})}
    assert actual == {("c", "kernel/fork.c"), ("c", "include/linux/list.h"), ("docs", "Documentation/mm/slub.rst")}
    assert {document.kind for document in read_documents(linux, 0.0, {})} == {"docs"}
    with pytest.raises(DataError, match="linux-source"):
        list(read_documents(tmp_path / "missing.tar.xz", 1.0, {}))


def install(folder: Path, name: str, requires: list[str], **files: str) -> None:
    """A package as an installer leaves it."""
    information = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {line}" for line in requires)]
    (information / "METADATA").write_text("\n".join(lines) + "\n")
    recorded = [f"{name}/{module}.py" for module in files] + [f"../../bin/{name}.py", f"{name}/data.json"]
    (information / "RECORD").write_text("".join(f"{path},,\n" for path in recorded))
    (folder / name).mkdir()
    for module, text in files.items():
        (folder / name / f"{module}.py").write_text(text)


def test_python_is_that_of_required_packages_whatever_else_is_installed(tmp_path, monkeypatch):
    requires = [
        "a_library>=1",
        "with_extra[fast]",
        "missing",
        "unwanted ; extra == 'more'",
        "off ; python_version < '3'",
    ]
    install(tmp_path, "program", requires, main=TEXT)
    install(tmp_path, "A-Library", ["program"], one=TEXT + "1", two=TEXT + "2", stub="")  # and in a circle
    install(tmp_path, "with_extra", ["speedup ; extra == 'fast'"], three=TEXT + "3")
    install(tmp_path, "speedup", [], four=TEXT + "4")
    for name in ("unwanted", "off", "beside"):
        install(tmp_path, name, [], module=TEXT + name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(corpus, "find_files", lambda sources: [])
    packages = required_packages("program")
    assert {name: package.version for name, package in packages.items()} == {
        "a-library": "1.0", "speedup": "1.0", "with-extra": "1.0"
    }  # fmt: skip
    names = [document.name for document in read_documents(None, 1.0, packages)]
    assert names == ["A-Library/one.py", "A-Library/two.py", "speedup/four.py", "with_extra/three.py"]


def test_the_packages_of_dsmoe_are_those_it_names_and_theirs():
    packages = required_packages()
    assert {"torch", "deepspeed", "megatron-core", "numpy", "sympy"} <= packages.keys()  # sympy: torch's
    assert not {"dsmoe", "pytest", "lm-eval"} & packages.keys()


def test_equal_files_count_once_whatever_their_last_line_end():
    documents = [Document("c", "a/x.c", "text\n"), Document("c", "b/y.c", "text"), Document("c", "b/z.c", "other")]
    unique, removed = without_duplicates(documents)
    assert [document.name for document in unique] == ["a/x.c", "b/z.c"] and removed == 1


def documents() -> list[Document]:
    return [
        Document(kind, f"{folder}/sub/{number}.c", TEXT.replace("NUMBER", f"{kind}{folder}{number}"))
        for kind in ("c", "python")
        for folder in range(40)
        for number in range(3)
    ]


def test_whole_folders_of_every_kind_are_held_out():
    held = held_out_groups(documents(), 0.1)
    for kind in ("c", "python"):
        mine = [document for document in documents() if document.kind == kind]
        share = sum(document.group in held for document in mine) / len(mine)
        assert 0.05 <= share <= 0.1
    assert held == held_out_groups(documents()[::-1], 0.1)
    with pytest.raises(DataError, match="valid_fraction: found 0.0001"):
        held_out_groups(documents(), 0.0001)


def test_a_corpus_is_a_dataset_that_training_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_documents", lambda linux, c_share, packages: iter([*documents(), documents()[0]]))
    description = build_corpus(tmp_path / "study", vocab_size=300, valid_fraction=0.1)
    assert description.splits["train"].documents + description.splits["valid"].documents == 240
    summary = json.loads((tmp_path / "study" / "corpus.json").read_text())
    assert summary["duplicates_removed"] == 1 and set(summary["kinds"]) == {"c", "python"}
    assert summary["packages"]["megatron-core"] == "0.16.1" and summary["python"] == platform.python_version()
    assert "corpus.json" in description.files
    read = open_corpus(DataConfig(path=str(tmp_path / "study")))
    assert read.train.tokens == description.splits["train"].tokens
    again = build_corpus(tmp_path / "again", vocab_size=300, valid_fraction=0.1)
    assert again.files == description.files
