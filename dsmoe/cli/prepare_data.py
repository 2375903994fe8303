"""Turn text into a dataset folder for training.

dsmoe prepare-data stdlib --output data/stdlib
dsmoe prepare-data 'corpus/*.jsonl.zst' notes/ --output data/mine --vocab-size 32000
"""

from __future__ import annotations

import argparse
import shlex
import sys
from os.path import expanduser
from pathlib import Path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="text or JSON-lines file (plain, .gz or .zst), folder, quoted glob, or 'stdlib': the sources of this "
        "Python's standard library",
    )
    parser.add_argument("--output", type=expanduser, required=True, metavar="FOLDER", help="dataset folder to make")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="of the tokenizer (default: 4096)")
    parser.add_argument(
        "--tokenizer",
        type=expanduser,
        metavar="PATH",
        help="use this one instead of training one: a SentencePiece model, a tokenizer.json, or the folder of a run or "
        "of a Hugging Face model",
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.02, metavar="X", help="of the documents, held out (default: 0.02)"
    )
    parser.add_argument(
        "--valid",
        action="append",
        default=[],
        metavar="SOURCE",
        help="hold out this text, not a fraction; repeatable",
    )
    parser.add_argument(
        "--split-documents",
        metavar="PATTERN",
        help="what separates documents in a text file: 'blank' lines, or a regular expression (default: nothing)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (default: one a core)")
    parser.add_argument("--field", action="append", metavar="KEY", dest="fields",
                        help="of the text in JSON lines and tables (default: text); of several, each with a --field of "
                        "its own, the texts are one document with a blank line between them")  # fmt: skip
    parser.add_argument("--json-keys", action="extend", nargs="+", metavar="KEY", dest="fields",
                        help="the same, as Megatron writes it; after the sources")  # fmt: skip
    parser.add_argument("--limit-mb", type=float, metavar="X", help="use the first X MB of text")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of held-out documents")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # Imported here: --help and a mistyped option answer at once.
    from rich.table import Table

    from dsmoe.data.prepare import prepare
    from dsmoe.errors import DsmoeError
    from dsmoe.runtime.screen import make_console

    console, fields = make_console(), arguments.fields or ["text"]
    try:
        dataset = prepare(
            arguments.sources,
            arguments.output,
            vocab_size=arguments.vocab_size,
            tokenizer=arguments.tokenizer,
            valid_fraction=arguments.valid_fraction,
            valid_sources=arguments.valid,
            split_documents=arguments.split_documents,
            workers=arguments.workers,
            field=fields[0] if len(fields) == 1 else fields,
            seed=arguments.seed,
            limit_bytes=None if arguments.limit_mb is None else int(arguments.limit_mb * 1e6),
            overwrite=arguments.overwrite,
            console=console,
        )
    except DsmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130

    title = f"{arguments.output}: vocabulary of {dataset.tokenizer.vocab_size:,}"
    table = Table("split", title=title, title_justify="left", title_style="bold")
    for heading in ("documents", "tokens", "bytes", "bytes per token"):
        table.add_column(heading, justify="right")
    for name, split in dataset.splits.items():
        table.add_row(
            name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", f"{split.bytes_per_token:.2f}"
        )
    console.print(table)
    for note in notes(arguments, dataset):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print("Train on it:", highlight=False)
    path = shlex.quote(Path(arguments.output).as_posix())
    command = f"  deepspeed --num_gpus 2 --module dsmoe train --config configs/quickstart.yaml data.path={path}"
    console.print(command, highlight=False, markup=False, soft_wrap=True)
    return 0


def notes(arguments: argparse.Namespace, dataset) -> list[str]:
    """What a user would want to know and did not ask: files that were not read, a split that misses its aim."""
    from dsmoe.data.sources import other_splits, passed_over

    lines = []
    others = [shlex.quote(str(path)) for path in other_splits(arguments.sources)]
    if others and not arguments.valid:
        lines.append(f"only 'train' of the splits was read; --valid {others[0]} holds a split out")
        lines[-1] += f" (there are {', '.join(others)})" if len(others) > 1 else ""
    skipped = passed_over([*arguments.sources, *arguments.valid])
    if skipped:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in skipped.items())
        lines.append(
            f"passed over in folders: {kinds}; files named one by one or by a glob are read whatever their name"
        )
    train, valid = dataset.splits["train"].bytes, dataset.splits["valid"].bytes
    share, wanted = valid / (train + valid), arguments.valid_fraction
    if not arguments.valid and not wanted / 2 <= share <= wanted * 2:
        documents = sum(split.documents for split in dataset.splits.values())
        lines.append(
            f"{share:.1%} of the text is held out, {wanted:.1%} was asked for: whole documents are, and there are "
            f"{documents:,} of uneven size; --split-documents makes more of them, --valid names the text to hold out"
        )
    return lines
