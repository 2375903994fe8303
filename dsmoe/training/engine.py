"""DeepSpeed's engine around the model: its JSON, and the optimizer in it."""

from __future__ import annotations

from typing import Any

import deepspeed

from dsmoe.config import RunConfig
from dsmoe.model.gpt import LanguageModel
from dsmoe.optim.deepspeed import accept_optimizer, spare_copies
from dsmoe.optim.groups import parameter_groups
from dsmoe.optim.registry import optimizer_class
from dsmoe.parallel.groups import ParallelGroups, check_world
from dsmoe.routers import get
from dsmoe.runtime.device import device_name, on_gpu, use_tf32
from dsmoe.training.dead_expert_reset import DeadExpertReset

# On a CPU. DeepSpeed's 500M elements are a fresh 2-GB buffer in every step, whose pages the kernel must zero, and each
# gradient is copied there first; one that is larger than the bucket is reduced where it lies.
SMALL_BUCKETS = {"reduce_bucket_size": 1 << 19}


def build_engine(config: RunConfig, groups: ParallelGroups):
    """The model under DeepSpeed. `config.model.vocab_size` must be set.

    Returns:
        DeepSpeed's engine; `engine.module` is the `LanguageModel`.
    """
    training = config.training
    check_world(groups.dp_size, groups.ep_size, training.global_batch_size, training.gradient_accumulation)
    use_tf32(training.tf32)
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    model = LanguageModel(config.model, (router_class, options), groups, training.seed)
    device = device_name()
    if model.controller is not None:
        model.controller.to(device)
    optimizer_kind = optimizer_class(training)
    optimizer = optimizer_kind.build(parameter_groups(model, training), training)
    accept_optimizer(type(optimizer))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json(config, groups.dp_size))
    if device == "cpu" and training.precision == "fp32":
        spare_copies(engine, config.parallel.zero_stage)
    if training.revive_idle_experts:
        patience, seed = training.revive_idle_experts, training.seed
        model.revival = DeadExpertReset(engine, groups, patience, seed, optimizer_kind)
    return engine


def deepspeed_json(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's keys, and over them what dsmoe sets itself."""
    training = config.training
    settings = dict(config.deepspeed)
    settings |= {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.global_batch_size // (world_size * training.gradient_accumulation),
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": training.clip_grad,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "overlap_comm": False,
            **(SMALL_BUCKETS if not on_gpu() else {}),
            **settings.get("zero_optimization", {}),
            "stage": config.parallel.zero_stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
        },
    }
    settings.setdefault("steps_per_print", 10**9)  # dsmoe reports progress itself
    if training.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if config.logging.tensorboard:
        settings["tensorboard"] = {"enabled": True, "output_path": config.logging.run_dir, "job_name": "tensorboard"}
    return settings
