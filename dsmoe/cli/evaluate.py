"""Evaluate a run, a checkpoint or a Hugging Face model on held-out text.

dsmoe evaluate runs/first
deepspeed --num_gpus 2 --module dsmoe evaluate runs/first --sequences 500
dsmoe evaluate exported/first --data data/stdlib
dsmoe evaluate exported/first --tasks my_task --task-dir tasks
"""

from __future__ import annotations

import argparse
import os
from os.path import expanduser

from dsmoe.errors import CheckpointError
from dsmoe.runtime.command_line import quiet_libraries, require_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=expanduser, help="a run folder, one of its checkpoints, or a folder of a Hugging Face model"
    )
    parser.add_argument(
        "--data", type=expanduser, metavar="PATH", help="dataset to read the held-out split of (default: the run's)"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="at most (default: the run's, else 64)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens (default: as the model was trained)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="sequences per process (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="to compute in (default: as trained or exported)")
    parser.add_argument("--json", type=expanduser, metavar="FILE", help="write the result there, too")
    parser.add_argument("--tasks", metavar="NAME,...", help="of the Language Model Evaluation Harness (lm-eval)")
    parser.add_argument(
        "--task-dir",
        type=expanduser,
        metavar="FOLDER",
        help="with YAML files of your own tasks, and their data; nothing is downloaded then, unless HF_HUB_OFFLINE=0",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each task (default: all)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code of the model's folder that is not dsmoe's own"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = vars(parser.parse_args(argv))
    quiet_libraries()
    expected = "a run folder, one of its checkpoints or a folder of a Hugging Face model"
    require_path(arguments["model"], expected, CheckpointError)
    if arguments["task_dir"]:  # read when the libraries are imported; without it they knock at the Hub for minutes
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from dsmoe.inference.evaluate import EvaluationOptions, evaluate, report

    model, target, tasks, _ = (arguments.pop(name) for name in ("model", "json", "tasks", "local_rank"))
    results = evaluate(model, EvaluationOptions(**arguments, tasks=tuple(filter(None, (tasks or "").split(",")))))
    report(results, target)
    return 0
