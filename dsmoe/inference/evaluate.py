"""Held-out loss of a run, or of a Hugging Face model, on the same sequences in the same way; and tasks of the
Language Model Evaluation Harness on the latter."""

from __future__ import annotations

import json
import logging
from contextlib import chdir
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.config import DataConfig
from dsmoe.data.dataset import Blend, Corpus, heldout, open_corpus
from dsmoe.data.tokenizer import TOKENIZER_FILES, Tokenizer
from dsmoe.errors import ConfigError, DataError
from dsmoe.hf.hosted import HostedModel, is_hugging_face
from dsmoe.parallel.groups import ParallelGroups, create_groups, start_processes
from dsmoe.runtime.device import device_name
from dsmoe.runtime.files import write_atomically
from dsmoe.training.evaluate import evaluate as evaluate_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEQUENCES = 64  # of a Hugging Face model, which does not say how many; as training.eval_sequences
COMPARED_TOKENS = 1000


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and on what.

    Attributes:
        data: prepared dataset or prefix; None: the run's own.
        sequences: held-out sequences at most; None: the run's `training.eval_sequences`.
        sequence_length: in tokens; None: what the model was trained with.
        batch_size: sequences per process and forward pass.
        dtype: to compute in; None: the run's precision, or the folder's dtype.
        tasks: names of tasks of the Language Model Evaluation Harness; only for a Hugging Face model.
        task_dir: folder with YAML files of tasks; relative paths in them start there.
        limit: examples of each task; None: all.
        trust_remote_code: run code of a Hugging Face folder that is not dsmoe's own.
    """

    data: str | None = None
    sequences: int | None = None
    sequence_length: int | None = None
    batch_size: int = 8
    dtype: Literal["fp32", "bf16"] | None = None
    tasks: tuple[str, ...] = ()
    task_dir: str | None = None
    limit: int | None = None
    trust_remote_code: bool = False

    def check(self, path: Path) -> None:
        """Raises `ConfigError` for options that mean nothing, alone or for this model."""
        problems = [
            f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected {least} or more"
            for name, least in (("sequences", 1), ("sequence_length", 2), ("batch_size", 1), ("limit", 1))
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        hosted = is_hugging_face(path)
        if self.tasks and not hosted:
            problems.append(f"--tasks: tasks are run on a Hugging Face model; make one with: dsmoe export {path} OUT")
        if self.task_dir is not None and not Path(self.task_dir).is_dir():
            problems.append(f"--task-dir: there is no folder {self.task_dir}")
        if hosted and self.data is None and not self.tasks:
            problems.append(
                "--data: a Hugging Face model does not say on what; name a dataset that dsmoe prepare-data made "
                f"with --tokenizer {path}, or the one it was trained on"
            )
        if problems:
            raise ConfigError(problems, "the command line")


def evaluate(path: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate a run folder, a checkpoint or a Hugging Face folder; collective over all processes of the job.

    Returns:
        model, kind ("run" or "huggingface"), dtype; where held-out text is read: data, sequences, sequence_length and
        what `dsmoe.training.evaluate` returns; step (of a run); tasks: name -> metric -> value.

    Raises:
        DsmoeError: whatever is missing, damaged or does not fit.
    """
    path = Path(path)
    options.check(path)
    if options.tasks:
        _lm_eval()  # a missing package is said before a model is loaded
    return _evaluate_hosted(path, options) if is_hugging_face(path) else _evaluate_run(path, options)


def _evaluate_run(path: Path, options: EvaluationOptions) -> dict[str, Any]:
    trained = TrainedModel.load(path)
    config = trained.config
    dtype = options.dtype or config.training.precision
    data = config.data if options.data is None else _other_data(options.data, config.data.cache_dir)
    report = {"model": str(path), "kind": "run", "step": trained.step, "dtype": dtype}
    return report | _heldout_loss(
        trained.model.to(DTYPES[dtype]),
        open_data(data, trained.run_dir, config.model.vocab_size),
        options.sequence_length or config.model.sequence_length,
        options.sequences or config.training.eval_sequences,
        options.batch_size,
        trained.groups,
    )


def _evaluate_hosted(path: Path, options: EvaluationOptions) -> dict[str, Any]:
    start_processes()
    if options.tasks and torch.distributed.get_world_size() > 1:
        raise ConfigError(["--tasks: tasks are run by one process; launch it with plain python"], "the command line")
    groups = create_groups(1)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    model = HostedModel(path, dtype, groups, options.trust_remote_code).to(device_name())
    settings = model.network.config
    names = {kind: name for name, kind in DTYPES.items()}
    used = options.dtype or names.get(settings.dtype, str(settings.dtype))
    report: dict[str, Any] = {"model": str(path), "kind": "huggingface", "dtype": used}
    if options.data is not None:
        report |= _heldout_loss(
            model,
            open_data(_other_data(options.data), path, model.network.get_input_embeddings().num_embeddings),
            options.sequence_length or settings.max_position_embeddings,
            options.sequences or SEQUENCES,
            options.batch_size,
            groups,
        )
    if options.tasks:
        report["tasks"] = _run_tasks(model, path, options)
    return report


def _other_data(path: str, cache_dir: str | None = None) -> DataConfig:
    return DataConfig(path=path, cache_dir=cache_dir)


def _heldout_loss(
    model, corpus: Corpus | Blend, sequence_length: int, sequences: int, batch_size: int, groups: ParallelGroups
) -> dict[str, Any]:
    held = heldout(corpus, sequence_length, sequences)
    what = {
        "data": " ".join(str(part.valid.files.prefix) for part in corpus.parts),
        "sequences": len(held),
        "sequence_length": sequence_length,
    }
    return what | evaluate_model(model, held, batch_size, groups, corpus.bytes_per_token)


def open_data(data: DataConfig, folder: Path, embeddings: int) -> Corpus | Blend:
    """The corpus, checked to be in the ids of the model in `folder`. Raises `DataError` if it is not."""
    corpus = open_corpus(data)
    corpus.check_vocabulary(embeddings)
    if corpus.tokenizer is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return corpus
    tokenizer = Tokenizer.load(folder)
    if tokenizer.sha256 == corpus.tokenizer.sha256:
        return corpus
    # An export has another kind of file for the same ids, so the ids themselves are compared.
    valid = corpus.parts[0].valid
    ids = valid.files.indexed[valid.first][:COMPARED_TOKENS].tolist()
    text = corpus.tokenizer.decode(ids)
    if tokenizer.encode(text) != corpus.tokenizer.encode(text) or tokenizer.eod_id != corpus.tokenizer.eod_id:
        raise DataError(
            f"{data.path} was made with another tokenizer than {folder} has; make a dataset with: "
            f"dsmoe prepare-data SOURCES --output FOLDER --tokenizer {folder}"
        )
    return corpus


def _lm_eval():
    """The harness. Raises `ConfigError` with what to do where it is not installed."""
    try:
        import_module("lm_eval.models.huggingface")
        return import_module("lm_eval")
    except ImportError as error:
        advice = "install the harness with: .venv/bin/python -m pip install -c constraints.txt -e '.[evaluate]'"
        raise ConfigError([f"--tasks: {error}; {advice}"], "this environment") from error


def _run_tasks(model: HostedModel, folder: Path, options: EvaluationOptions) -> dict[str, dict[str, Any]]:
    """Tasks on the model that is loaded already. Raises `ConfigError` for a task that there is not."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    here = Path(options.task_dir).resolve() if options.task_dir else Path.cwd()
    manager = TaskManager(include_path=str(here) if options.task_dir else None)
    unknown = sorted(set(options.tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError([f"--tasks: there is no task {name!r}" for name in unknown], "the command line")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # What code the folder brings was looked at before the model was loaded.
    tokenizer = AutoTokenizer.from_pretrained(folder.resolve(), local_files_only=True, trust_remote_code=True)
    hosted = HFLM(
        model.network,
        backend="causal",
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        max_length=options.sequence_length or model.network.config.max_position_embeddings,
    )
    with chdir(here):
        results = import_module("lm_eval").simple_evaluate(
            hosted, tasks=list(options.tasks), task_manager=manager, limit=options.limit, log_samples=False
        )
    return results["results"]


def report(results: dict[str, Any], target: str | None = None) -> None:
    """Show an evaluation, and write it as JSON to `target`; on rank 0 only."""
    if torch.distributed.get_rank():
        return
    for name, value in results.items():
        if name != "tasks":
            print(f"{name:32} {_shown(value)}")
    for task, metrics in results.get("tasks", {}).items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{task}: {metric:{max(1, 30 - len(task))}} {_shown(value)}")
    if target is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(target), (json.dumps(results, indent=2, default=str) + "\n").encode())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "  ".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
