"""A study corpus from what any Debian machine can install: Python, English and C.

    python   *.py of the interpreter's standard library and of the packages that dsmoe requires, and that those require
    docs     Documentation/ of the package linux-source-6.1, without translations
    c        *.c and *.h of the same package, a share of the folders

A document is a file. Files with equal content count once. Whole folders are held out, so that a held-out file has no
neighbour in the training text. The corpus depends on the versions of Python, of these packages (`constraints.txt`) and
of the kernel, and not on what else is installed: `corpus.json` names them, and holds, for each kind, the number of
documents and a hash over all of them. Needs about 3 bytes of memory for each byte of text.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from dsmoe.data.description import DatasetDescription, TokenizerDescription, file_sha256
from dsmoe.data.encoding import encode_documents
from dsmoe.data.folder import new_folder
from dsmoe.data.prepare import SplitWriter, written_by
from dsmoe.data.sources import STDLIB, find_files
from dsmoe.data.survey import byte_length, survey_documents
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DataError

LINUX = "/usr/src/linux-source-*.tar.xz"
MIN_BYTES, MAX_BYTES = 200, 200_000  # of a file: below are stubs, above generated register tables
GROUP_DEPTH = 3  # folders below a source's root that are held out or kept as one
CORPUS = "corpus.json"


@dataclass(frozen=True)
class Document:
    """A file of the corpus. `name` is its path below the source, with '/'."""

    kind: str
    name: str
    text: str

    @property
    def group(self) -> str:
        """What is held out as a whole: the kind and the first folders of the path."""
        return "/".join((self.kind, *PurePosixPath(self.name).parent.parts[:GROUP_DEPTH]))


def build_corpus(
    output: Path, *, linux: Path | None = None, c_share: float = 0.3, vocab_size: int = 2048,
    valid_fraction: float = 0.01, limit_bytes: int | None = None, workers: int = 1, overwrite: bool = False,
    console: Console | None = None,
) -> DatasetDescription:  # fmt: skip
    """Write the dataset folder `output`, as `dsmoe.data.prepare` does, with `corpus.json` beside.

    Args:
        linux: a linux-source-*.tar.xz; None: the newest in /usr/src, or Python alone where there is none.
        c_share: of the C files, by the hash of their folder.
        valid_fraction: of the bytes, held out by folder.
        limit_bytes: the documents up to so many bytes of text, in an order by the hash of their names.
        workers: processes that tokenize.

    Raises:
        DataError: `linux` cannot be read, or there is too little text to hold any out.
    """
    console = console or Console(quiet=True)
    console.print("reading")
    linux, packages = linux or newest_linux(), required_packages()
    documents, duplicates = without_duplicates(read_documents(linux, c_share, packages))
    documents.sort(key=lambda document: (_hash(document.name), document.kind))
    documents = _first_bytes(documents, limit_bytes)
    held = held_out_groups(documents, valid_fraction)
    with new_folder(output, overwrite) as folder:
        size = sum(byte_length(document.text) for document in documents)
        console.print(f"{len(documents):,} documents, {size / 1e6:,.1f} MB of text; training the tokenizer")
        sample = survey_documents((document.text for document in documents), 0.5, 0, size).sample
        tokenizer = Tokenizer.train(sample, folder / "tokenizer.model", vocab_size)
        console.print("encoding")
        splits = {}
        for split in ("train", "valid"):
            writer = SplitWriter(folder / split, tokenizer.vocab_size)
            texts = (document.text for document in documents if (document.group in held) == (split == "valid"))
            for texts_of_group, encoded in encode_documents(texts, tokenizer.path, writer.dtype, workers):
                for text, ids in zip(texts_of_group, encoded, strict=True):
                    writer.add(text, ids)
            splits[split] = writer.finish()
        summary = {
            **_summary(documents, held), "duplicates_removed": duplicates, "python": platform.python_version(),
            "packages": {name: package.version for name, package in packages.items()},
            "linux": None if linux is None else file_sha256(linux),
        }  # fmt: skip
        (folder / CORPUS).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        description = DatasetDescription(
            name=output.resolve().name,
            sources=sorted({document.kind for document in documents}),
            field="text",
            seed=0,
            valid_fraction=valid_fraction,
            limit_bytes=limit_bytes,
            tokenizer=TokenizerDescription(
                file=tokenizer.path.name, sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id, trained_here=True,
            ),
            splits=splits,
            files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
            versions=written_by(tokenizer),
        )  # fmt: skip
        description.save(folder)
    return description


def newest_linux() -> Path | None:
    """The kernel source that Debian's package installed, or None."""
    return max(Path("/").glob(LINUX.removeprefix("/")), default=None)


def required_packages(root: str = "dsmoe") -> dict[str, metadata.Distribution]:
    """The installed packages that `root` requires, directly or not, by canonical name; itself and extras that nothing
    asks for left out."""
    packages: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(root)]
    visited: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        packages[name] = package
        for line in package.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(requirement)
    packages.pop(canonicalize_name(root), None)
    return dict(sorted(packages.items()))


def read_documents(
    linux: Path | None, c_share: float, packages: dict[str, metadata.Distribution]
) -> Iterator[Document]:
    """Every file that counts as a document, duplicates included."""
    for file in find_files([STDLIB]):
        yield from _document("python", f"stdlib/{file.name}", file.path.read_bytes())
    for package in packages.values():
        for module in sorted(package.files or [], key=str):
            if module.suffix == ".py" and ".." not in module.parts:
                yield from _document("python", module.as_posix(), Path(str(module.locate())).read_bytes())
    if linux is not None:
        yield from _linux_documents(linux, c_share)


def _linux_documents(archive: Path, c_share: float) -> Iterator[Document]:
    try:
        with tarfile.open(archive, "r|*") as files:  # one pass: the archive is 1.3 GB unpacked
            for file in files:
                name = file.name.partition("/")[2]
                kind = _linux_kind(name, c_share)
                if kind and file.isreg() and file.size <= MAX_BYTES:
                    yield from _document(kind, name, files.extractfile(file).read())
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {archive}: {error}; expected the archive of Debian's linux-source-6.1") from error


def _linux_kind(name: str, c_share: float) -> str | None:
    path = PurePosixPath(name)
    if path.parts[:1] == ("Documentation",):
        return "docs" if path.suffix in (".rst", ".txt") and "translations" not in path.parts else None
    if path.suffix in (".c", ".h") and _hash(str(path.parent)) < c_share * 2**64:
        return "c"
    return None


def _document(kind: str, name: str, content: bytes) -> Iterator[Document]:
    """Nothing where the file is too short, too long, or no UTF-8."""
    if MIN_BYTES <= len(content) <= MAX_BYTES:
        try:
            yield Document(kind, name, content.decode("utf-8"))
        except UnicodeDecodeError:
            return


def without_duplicates(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """The first document of each content, and how many were left out."""
    seen: dict[bytes, Document] = {}
    total = 0
    for document in documents:
        total += 1
        seen.setdefault(hashlib.sha256(document.text.strip().encode("utf-8", "replace")).digest(), document)
    return list(seen.values()), total - len(seen)


def held_out_groups(documents: list[Document], valid_fraction: float) -> set[str]:
    """Groups in the order of their hash until each kind has `valid_fraction` of its bytes; one that is too large is
    passed over. Raises `DataError` where no group fits."""
    held: set[str] = set()
    for kind in sorted({document.kind for document in documents}):
        sizes: dict[str, int] = {}
        for document in documents:
            if document.kind == kind:
                sizes[document.group] = sizes.get(document.group, 0) + byte_length(document.text)
        remaining = valid_fraction * sum(sizes.values())
        for group in sorted(sizes, key=_hash):
            if sizes[group] <= remaining:
                held.add(group)
                remaining -= sizes[group]
    if not held:
        raise DataError(f"valid_fraction: found {valid_fraction}, of which no folder of the corpus is small enough")
    return held


def _first_bytes(documents: list[Document], limit: int | None) -> list[Document]:
    if limit is None:
        return documents
    head, size = [], 0
    for document in documents:
        if size >= limit:
            break
        head.append(document)
        size += byte_length(document.text)
    return head


def _summary(documents: list[Document], held: set[str]) -> dict:
    kinds = {}
    for kind in sorted({document.kind for document in documents}):
        of_kind = [document for document in documents if document.kind == kind]
        digest = hashlib.sha256()
        for document in of_kind:
            digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "replace"))
        kinds[kind] = {
            "documents": len(of_kind),
            "bytes": sum(byte_length(document.text) for document in of_kind),
            "held_out_bytes": sum(byte_length(document.text) for document in of_kind if document.group in held),
            "sha256": digest.hexdigest(),
        }
    return {"kinds": kinds, "held_out_folders": sorted(held)}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
