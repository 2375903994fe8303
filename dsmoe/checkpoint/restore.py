"""A run's model as a checkpoint left it, to read with and not to train: no DeepSpeed engine, no optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dsmoe.checkpoint.files import is_checkpoint, newest_checkpoint
from dsmoe.checkpoint.load import CheckpointReader, check_files, load_weights, saved_config
from dsmoe.config import RunConfig
from dsmoe.errors import CheckpointError
from dsmoe.model.gpt import LanguageModel
from dsmoe.parallel.groups import ParallelGroups, create_groups, start_processes
from dsmoe.routers import get
from dsmoe.runtime.device import device_name


@dataclass(frozen=True)
class TrainedModel:
    """A model in fp32 on this process's device, in evaluation mode.

    Attributes:
        model: holds this rank's share of the experts.
        config: of the run, `model.vocab_size` set.
        groups: of this job, which may have another number of processes than the run.
        step: optimizer steps behind the weights.
        run_dir: folder of the run; its tokenizer lies there, if it has one.
    """

    model: LanguageModel
    config: RunConfig
    groups: ParallelGroups
    step: int
    run_dir: Path

    @classmethod
    def load(cls, path: str | Path) -> TrainedModel:
        """From a run folder (its newest checkpoint) or a checkpoint; collective over all processes of the job.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = Path(path)
        folder = path if is_checkpoint(path) else newest_checkpoint(path)
        if folder is None:
            raise CheckpointError(f"{path} is neither a run that has a checkpoint nor a checkpoint")
        start_processes()
        check_files(folder)
        reader = CheckpointReader(folder)
        config = saved_config(reader.manifest, folder)
        # As the run had it where the processes allow; any common divisor splits the experts evenly.
        groups = create_groups(math.gcd(dist.get_world_size(), config.parallel.expert_parallel))
        router = get(config.router.name)
        options = router.Options.model_validate(config.router.options)
        model = LanguageModel(config.model, (router, options), groups, config.training.seed)
        load_weights(model, reader)
        device = device_name()
        if model.controller is not None:
            model.controller.to(device)
        return cls(model.to(device).eval(), config, groups, reader.manifest.step, folder.resolve().parent.parent)
