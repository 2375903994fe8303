"""A training run from its configuration to its last checkpoint: what `dsmoe train` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm as dist
import torch.distributed

from dsmoe.checkpoint.files import find_checkpoint, read_manifest
from dsmoe.checkpoint.load import load_checkpoint
from dsmoe.config import RunConfig
from dsmoe.data.dataset import Blend, Corpus, heldout, open_corpus, training_stream
from dsmoe.data.identity import data_identity
from dsmoe.errors import DsmoeError, RunFolderError
from dsmoe.model.size import ModelSize, model_size
from dsmoe.parallel.groups import check_world, create_groups, start_processes
from dsmoe.runtime.device import on_gpu
from dsmoe.runtime.exit_codes import FAILED
from dsmoe.runtime.files import write_atomically
from dsmoe.runtime.phase import phase
from dsmoe.runtime.run_lock import RunLock
from dsmoe.training.engine import build_engine
from dsmoe.training.loop import Ending, Trainer
from dsmoe.training.placement import describe_placement
from dsmoe.training.resume import Change, Position, resume

VOCABULARY_MULTIPLE = 64  # embedding rows are rounded up to it: GEMMs like round sizes


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    run_dir: Path
    step: int
    finished: bool  # whether it reached `training.steps`
    stopped: bool  # by a signal, before it reached `training.steps` or `training.stop_at`
    metrics: dict[str, float]  # of the last evaluation


def train(config: RunConfig) -> RunSummary:
    """Train until `training.steps` or a signal; collective over all processes of the job.

    Raises:
        DsmoeError: a mistake of the user, before anything is built where that is possible; or, with `exit_code` FAILED,
            what went wrong in training.
    """
    start_processes()
    config = config.with_precision(on_gpu())
    training, world = config.training, dist.get_world_size()
    check_world(world, config.parallel.expert_parallel, training.global_batch_size, training.gradient_accumulation)
    run_dir = Path(config.logging.run_dir)
    with _held(run_dir) as lock:
        checkpoint = find_checkpoint(training.resume, run_dir)
        if checkpoint is None and training.decay_from is not None:
            checkpoint = find_checkpoint(training.decay_from, run_dir)
        corpus = open_corpus(config.data)
        config = with_vocabulary(config, corpus)
        length = config.model.sequence_length
        stream = training_stream(corpus, length, seed=training.seed, cache_dir=config.data.cache_dir)
        held = heldout(corpus, length, training.eval_sequences)
        data, position = data_identity(corpus), Position()
        changes: list[Change] = []
        if checkpoint is not None:
            position, changes = resume(read_manifest(checkpoint), config, data)
        groups = create_groups(config.parallel.expert_parallel, config.parallel.placement)
        engine = build_engine(config, groups)
        if checkpoint is not None:
            with phase.within("load"):
                load_checkpoint(engine, config, checkpoint)
        if groups.dp_rank == 0:
            _open_run_folder(run_dir, config, corpus)
        dist.barrier()
        phase.follow_layers(engine.module)
        trainer = Trainer(
            config, engine, groups, stream, held, corpus.bytes_per_token, position, data, lock, corpus.tokenizer
        )
        if lock is not None and lock.taken_over is not None:
            trainer.progress.say(f"took the run folder over from {lock.taken_over.text}, which is gone")
        trainer.progress.say(describe(config, world, corpus, model_size(config), checkpoint, position.step))
        if placed := describe_placement(config, groups):
            trainer.progress.say(placed)
        for change in changes:
            trainer.progress.say(f"changed {change}")
        resumed_from = None if checkpoint is None else str(checkpoint)
        trainer.history.start(position.step, world=world, resumed_from=resumed_from, changes=list(map(str, changes)))
        try:
            ending, metrics = trainer.run()
        except DsmoeError as error:
            error.exit_code = FAILED  # work had begun
            raise
    return RunSummary(run_dir, trainer.step, trainer.step == training.steps, ending is Ending.SIGNAL, metrics)


@contextmanager
def _held(run_dir: Path) -> Iterator[RunLock | None]:
    """The run folder is this job's alone. Yields its lock on rank 0. Collective.

    Raises:
        RunFolderError: on every rank, if another run holds it, or it cannot be written.
    """
    lock, problem = RunLock(run_dir) if dist.get_rank() == 0 else None, None
    try:
        if lock is not None:
            lock.acquire()
    except RunFolderError as error:
        problem = str(error)
    verdict = [problem]
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise RunFolderError(verdict[0])
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def with_vocabulary(config: RunConfig, corpus: Corpus | Blend) -> RunConfig:
    """The configuration with `model.vocab_size` settled, and checked against the data.

    Raises:
        DataError: the data has tokens that the embedding has no row for.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        vocab_size = -(-corpus.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    corpus.check_vocabulary(vocab_size)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def describe(
    config: RunConfig, world: int, corpus: Corpus | Blend, size: ModelSize, checkpoint: Path | None, step: int
) -> str:
    """A few lines that say what is about to happen."""
    model, parallel, training = config.model, config.parallel, config.training
    in_fp32 = on_gpu() and training.precision == "fp32"
    start = "from the beginning" if checkpoint is None else f"resumed from {checkpoint} (step {step})"
    return (
        f"model   {size.total:,} parameters, {size.active:,} active; {sum(model.moe_layers())} MoE layers of "
        f"{model.num_experts} experts, router {config.router.name}\n"
        f"data    {_data_in_words(config, corpus)}; "
        f"{training.global_batch_size} x {model.sequence_length} tokens a step\n"
        f"run     {world} process{'es' if world > 1 else ''}, expert parallel {parallel.expert_parallel}, "
        f"ZeRO {parallel.zero_stage}, {training.precision}; {training.steps} steps {start}"
        + (
            f"\nnote    fp32 on a GPU is slow: one call an expert{'' if training.tf32 else ', no tensor cores'}; see "
            "training.precision"
            if in_fp32
            else ""
        )
    )


def _data_in_words(config: RunConfig, corpus: Corpus | Blend) -> str:
    tokens, held_out = (sum(getattr(part, split).tokens for part in corpus.parts) for split in ("train", "valid"))
    if not isinstance(corpus, Blend):
        return f"{config.data.path}: {tokens:,} tokens, {held_out:,} held out"
    samples = config.training.steps * config.training.global_batch_size
    lines = corpus.described(config.model.sequence_length, samples)
    return f"a blend of {len(corpus.parts)}: {tokens:,} tokens, {held_out:,} held out\n{lines}\n        in all"


def _open_run_folder(run_dir: Path, config: RunConfig, corpus: Corpus | Blend) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", config.to_yaml().encode())
    if corpus.tokenizer is not None:
        # The run folder alone is then enough to generate text and to export.
        corpus.tokenizer.copy_to(run_dir)
