"""Make a trained model smaller: drop experts that no token takes, merge experts that do the same.

    dsmoe prune runs/first --out runs/pruned
    dsmoe prune runs/first --out runs/half --experts 4
    dsmoe prune exported/first --out exported/pruned --data data/stdlib

A run becomes a run, an export an export; both train and export like any other. The loss on held-out text before and
after is said, and kept in OUT/prune_report.json with what became of each expert.
"""

from __future__ import annotations

import argparse
from os.path import expanduser

from dsmoe.errors import CheckpointError
from dsmoe.runtime.command_line import quiet_libraries, require_path, user_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", type=user_path, metavar="RUN|EXPORT", help="a run folder, one of its checkpoints, an export"
    )
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="FOLDER", help="what is written; it must not exist"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="that stay in each layer; the least needed go "
                        "(default: only what the two limits below let go)")  # fmt: skip
    parser.add_argument("--dead", type=float, default=0.0, metavar="X", help="drop experts with at most this share of "
                        "the mean load (default: %(default)g, no token at all)")  # fmt: skip
    parser.add_argument("--similar", type=float, default=0.9, metavar="X", help="merge experts whose outputs have at "
                        "least this cosine (default: %(default)g)")  # fmt: skip
    parser.add_argument("--data", type=expanduser, metavar="DATASET", help="a prepared dataset (default: the run's)")
    parser.add_argument("--sequences", type=int, default=32, metavar="N", help="of training text, by which experts are "
                        "chosen (default: %(default)s)")  # fmt: skip
    arguments = vars(parser.parse_args(argv))
    quiet_libraries()
    path, out = arguments.pop("path"), arguments.pop("out")
    require_path(path, "a run folder, one of its checkpoints or an export", CheckpointError)
    from dsmoe.lab.prune.prune import PruneOptions, prune, summary

    print(summary(out, prune(path, out, PruneOptions(**arguments))))
    return 0
