"""A training run from its configuration to its last checkpoint: what `launch/train.py` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm as dist

from dsmoe.checkpoint.files import find_checkpoint, write_atomically
from dsmoe.checkpoint.load import load_checkpoint
from dsmoe.config import RunConfig
from dsmoe.data.dataset import Corpus, TrainingStream, heldout, open_corpus
from dsmoe.model.size import ModelSize, model_size
from dsmoe.parallel.groups import check_world, create_groups, start_processes
from dsmoe.runtime.device import on_gpu
from dsmoe.training.engine import build_engine
from dsmoe.training.loop import Trainer

VOCABULARY_MULTIPLE = 64  # embedding rows are rounded up to it: GEMMs like round sizes


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    run_dir: Path
    step: int
    finished: bool  # False when a signal stopped it
    metrics: dict[str, float]  # of the last evaluation


def train(config: RunConfig) -> RunSummary:
    """Train until `training.steps` or a signal; collective over all processes of the job.

    Raises:
        DsmoeError: a mistake of the user, before anything is built where that is possible.
    """
    start_processes()
    config = with_precision(config)
    training, world = config.training, dist.get_world_size()
    check_world(world, config.parallel.expert_parallel, training.global_batch_size, training.gradient_accumulation)
    run_dir = Path(config.logging.run_dir)
    checkpoint = find_checkpoint(training.resume, run_dir)
    if checkpoint is None and training.decay_from is not None:
        checkpoint = find_checkpoint(training.decay_from, run_dir)
    corpus = open_corpus(config.data)
    config = with_vocabulary(config, corpus)
    stream = TrainingStream(corpus, config.model.sequence_length, seed=training.seed, cache_dir=config.data.cache_dir)
    held = heldout(corpus, config.model.sequence_length, training.eval_sequences)
    groups = create_groups(config.parallel.expert_parallel)
    engine = build_engine(config, groups)
    step, samples, copied_experts = 0, 0, False
    if checkpoint is not None:
        manifest = load_checkpoint(engine, config, checkpoint)
        step, samples, copied_experts = manifest.step, manifest.samples, manifest.copied_experts
    if groups.dp_rank == 0:
        _open_run_folder(run_dir, config, corpus)
    dist.barrier()
    trainer = Trainer(config, engine, groups, stream, held, corpus.bytes_per_token, step, samples, copied_experts)
    trainer.progress.say(describe(config, world, corpus, model_size(config), checkpoint, step))
    finished, metrics = trainer.run()
    return RunSummary(run_dir, trainer.step, finished, metrics)


def with_precision(config: RunConfig) -> RunConfig:
    """The configuration with `training.precision` settled: bf16 on a GPU unless the user has said fp32. In fp32 torch's
    grouped GEMM is one call an expert there."""
    if "precision" in config.training.model_fields_set or not on_gpu():
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": "bf16"})})


def with_vocabulary(config: RunConfig, corpus: Corpus) -> RunConfig:
    """The configuration with `model.vocab_size` settled, and checked against the data.

    Raises:
        DataError: the data has tokens that the embedding has no row for.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        vocab_size = -(-corpus.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    corpus.check_vocabulary(vocab_size)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def describe(config: RunConfig, world: int, corpus: Corpus, size: ModelSize, checkpoint: Path | None, step: int) -> str:
    """A few lines that say what is about to happen."""
    model, parallel, training = config.model, config.parallel, config.training
    in_fp32 = on_gpu() and training.precision == "fp32"
    start = "from the beginning" if checkpoint is None else f"resumed from {checkpoint} (step {step})"
    return (
        f"model   {size.total:,} parameters, {size.active:,} active; {sum(model.moe_layers())} MoE layers of "
        f"{model.num_experts} experts, router {config.router.name}\n"
        f"data    {config.data.path}: {corpus.train.tokens:,} tokens, {corpus.valid.tokens:,} held out; "
        f"{training.global_batch_size} x {model.sequence_length} tokens a step\n"
        f"run     {world} process{'es' if world > 1 else ''}, expert parallel {parallel.expert_parallel}, "
        f"ZeRO {parallel.zero_stage}, {training.precision}; {training.steps} steps {start}"
        + (
            "\nnote    fp32 on a GPU is slow: one call an expert, no tensor cores; see training.precision"
            if in_fp32
            else ""
        )
    )


def _open_run_folder(run_dir: Path, config: RunConfig, corpus: Corpus) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", config.to_yaml().encode())
    if corpus.tokenizer is not None:
        # The run folder alone is then enough to generate text and to export.
        corpus.tokenizer.copy_to(run_dir)
