"""DeepSpeed's engine around the model: its JSON, the optimizer's parameter groups.

ZeRO 1 and 2 want experts in groups of their own, named after their expert-parallel group and marked `moe`. Weight
decay applies to matrices only, and to embedding and output matrices only if `training.decay_embeddings` says so.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from dsmoe.config import RunConfig, TrainingConfig
from dsmoe.model.gpt import LanguageModel
from dsmoe.optim.gradients import spare_copies
from dsmoe.parallel.groups import ParallelGroups, check_world
from dsmoe.routers import get
from dsmoe.runtime.device import device_name, on_gpu
from dsmoe.training.dead_expert_reset import DeadExpertReset

# On a CPU. DeepSpeed's 500M elements are a fresh 2-GB buffer in every step, whose pages the kernel must zero, and each
# gradient is copied there first; one that is larger than the bucket is reduced where it lies.
SMALL_BUCKETS = {"reduce_bucket_size": 1 << 19}
EMBEDDINGS = ("word_embeddings.weight", "output_layer.weight")


def build_engine(config: RunConfig, groups: ParallelGroups):
    """The model under DeepSpeed. `config.model.vocab_size` must be set.

    Returns:
        DeepSpeed's engine; `engine.module` is the `LanguageModel`.
    """
    training = config.training
    check_world(groups.dp_size, groups.ep_size, training.global_batch_size, training.gradient_accumulation)
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    model = LanguageModel(config.model, (router_class, options), groups, training.seed)
    device = device_name()
    if model.controller is not None:
        model.controller.to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training),
        lr=training.lr,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json(config, groups.dp_size))
    if device == "cpu" and training.precision == "fp32":
        spare_copies(engine, config.parallel.zero_stage)
    if training.revive_idle_experts:
        model.revival = DeadExpertReset(engine, groups, training.revive_idle_experts, training.seed)
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


def parameter_groups(model: torch.nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups with and without weight decay, experts apart."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        embedding = name.endswith(EMBEDDINGS)
        decays = parameter.dim() >= 2 and (training.decay_embeddings or not embedding)
        (decayed if decays else plain).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": training.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]
