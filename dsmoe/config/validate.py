"""Validation in one pass: every mistake of a whole configuration, each with field, value, expectation and nearest name.

A field that has a line of its own does not cause further ones: the checks that look at several fields skip it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dsmoe.config.explain import explain, nearest_or_all
from dsmoe.config.schema import SECTIONS, ModelConfig, ParallelConfig, RouterConfig, RunConfig, TrainingConfig
from dsmoe.errors import ConfigError, one_of
from dsmoe.runtime.plugins import token_dispatchers

# DeepSpeed's own keys that dsmoe sets itself, and where to say it instead.
REFUSED_DEEPSPEED_KEYS = {
    "train_batch_size": "set training.global_batch_size",
    "train_micro_batch_size_per_gpu": "it follows from training.global_batch_size, the accumulation and the ranks",
    "gradient_accumulation_steps": "set training.gradient_accumulation",
    "optimizer": "set training.optimizer, training.lr and training.weight_decay",
    "scheduler": "set training.warmup_steps, training.lr and training.min_lr",
    "gradient_clipping": "set training.clip_grad",
    "bf16": "set training.precision",
    "fp16": "set training.precision (fp32 or bf16)",
    "amp": "set training.precision",
    "data_types": "set training.precision",
    "tensorboard": "set logging.tensorboard",
    "expert_parallel": "set parallel.expert_parallel",
    "tensor_parallel": "set parallel.tensor_parallel",
    "checkpoint": "set the section checkpoint",
    "elasticity": "a run resumes on another number of ranks with training.resume alone",
    "zero_optimization.stage": "set parallel.zero_stage",
    "zero_optimization.offload_optimizer": "offload does not support expert parameters here",
    "zero_optimization.offload_param": "offload does not support expert parameters here",
}

SIZE_ONE_ONLY = {
    "tensor_parallel": "Megatron-Core's tensor-parallel MoE needs sequence parallelism, and that needs other norms",
    "pipeline_parallel": "Megatron-Core's pipeline schedules do not run under DeepSpeed's engine",
    "context_parallel": "the SDPA attention used here does not exchange keys and values between ranks",
}


def validate_config(
    tree: dict[str, Any],
    routers: Mapping[str, type[BaseModel]] | None = None,
    problems: list[str] | None = None,
    source: str = "configuration",
    optimizers: Mapping[str, type[BaseModel]] | None = None,
) -> RunConfig:
    """Validate a tree of plain values in one pass. Raises `ConfigError` with all mistakes."""
    mistakes = _Mistakes(problems or [])
    for name in map(str, tree):
        if name not in SECTIONS and name != "deepspeed":
            mistakes.lines.append(f"{name}: unknown section{nearest_or_all(name, [*SECTIONS, 'deepspeed'])}")
    valid: dict[str, Any] = {
        name: _validate_section(name, section, {} if tree.get(name) is None else tree[name], mistakes)
        for name, section in SECTIONS.items()
    }
    if routers is not None:
        valid["router"] = _validate_router(valid["router"], routers, valid["model"], mistakes)
        _check_token_dispatcher(valid["model"], mistakes)
    _check_optimizer(valid["training"], optimizers, mistakes)
    _check_resume_with(valid["training"], mistakes)
    deepspeed = {} if tree.get("deepspeed") is None else tree["deepspeed"]
    _check_deepspeed(deepspeed, mistakes)
    _check_model(valid["model"], mistakes)
    _check_plan(valid["model"], valid["parallel"], valid["training"], mistakes)
    if mistakes.lines:
        raise ConfigError(mistakes.lines, source)
    return RunConfig.model_construct(**valid, deepspeed=deepspeed)


class _Mistakes:
    """Lines for the user, and the fields they are about."""

    def __init__(self, lines: list[str]):
        self.lines = list(lines)
        self.fields: set[str] = set()

    def add(self, field: str, value: Any, expected: str) -> None:
        self.lines.append(f"{field}: found {value}, expected {expected}")

    def none_in(self, *fields: str) -> bool:
        """Whether none of these fields has a line of its own."""
        return self.fields.isdisjoint(fields)

    def check_multiple(self, field: str, value: int, divisor_field: str, divisor: int) -> None:
        if self.none_in(field, divisor_field) and value % divisor:
            self.add(field, value, f"a multiple of {divisor_field} ({divisor})")


def _validate_section(name: str, section: type[BaseModel], value: Any, mistakes: _Mistakes) -> BaseModel:
    """The section; where fields are wrong, the section without them, so that the other checks can go on."""
    if not isinstance(value, dict):
        mistakes.add(name, repr(value), "a mapping of keys to values")
        return section.model_construct()
    values = {str(key): item for key, item in value.items()}  # YAML's keys may be numbers
    try:
        return section.model_validate(values)
    except ValidationError as error:
        explained = explain(error, section, (name,))
        mistakes.lines.extend(explained.values())
        mistakes.fields.update(explained)
        wrong = {field.removeprefix(f"{name}.").partition(".")[0] for field in explained}
        good = {key: item for key, item in values.items() if key not in wrong}
        return section.model_construct(**good)


def _validate_router(
    router: RouterConfig, routers: Mapping[str, type[BaseModel]], model: ModelConfig, mistakes: _Mistakes
) -> RouterConfig:
    if router.name not in routers:
        mistakes.add("router.name", repr(router.name), one_of(router.name, sorted(routers)))
        return router
    options = _validate_section("router", routers[router.name], router.options, mistakes)
    if not any(field.startswith(("router.", "model.")) for field in mistakes.fields) and hasattr(
        options, "validate_for_model"
    ):
        mistakes.lines.extend(options.validate_for_model(model))
    return RouterConfig(name=router.name, **options.model_dump())


def _check_optimizer(
    training: TrainingConfig, optimizers: Mapping[str, type[BaseModel]] | None, mistakes: _Mistakes
) -> None:
    name = training.optimizer
    for field in ("adam_beta1", "adam_beta2", "adam_eps") if name != "adamw" else ():
        if getattr(training, field) != TrainingConfig.model_fields[field].default:
            mistakes.lines.append(f"training.{field}: is adamw's, but training.optimizer is {name}")
    if optimizers is None or not mistakes.none_in("training.optimizer", "training.optimizer_options"):
        return
    if name not in optimizers:
        mistakes.add("training.optimizer", repr(name), one_of(name, sorted(optimizers)))
    else:
        _validate_section("training.optimizer_options", optimizers[name], training.optimizer_options, mistakes)


def _check_token_dispatcher(model: ModelConfig, mistakes: _Mistakes) -> None:
    name, known = model.token_dispatcher, ["auto", *token_dispatchers.available()]
    if name not in known and mistakes.none_in("model.token_dispatcher"):
        mistakes.add("model.token_dispatcher", repr(name), one_of(name, known))


def is_allowed(key: str, resume_with: list[str]) -> bool:
    """Whether `training.resume_with` names a key or its section."""
    return key in resume_with or key.partition(".")[0] in resume_with


def _check_resume_with(training: TrainingConfig, mistakes: _Mistakes) -> None:
    for name in training.resume_with if mistakes.none_in("training.resume_with") else ():
        section, _, key = name.partition(".")
        known = SECTIONS.get(section)
        if known is None or (key and section != "router" and key not in known.model_fields):
            keys = [f"{section}.{key}" for section, kind in SECTIONS.items() for key in kind.model_fields]
            close = nearest_or_all(name, [*SECTIONS, *keys])
            mistakes.add(
                "training.resume_with", repr(name), f"a section or a key, such as data or training.seed{close}"
            )


def _check_deepspeed(deepspeed: Any, mistakes: _Mistakes) -> None:
    if not isinstance(deepspeed, dict):
        mistakes.add("deepspeed", repr(deepspeed), "a mapping of DeepSpeed's own JSON keys")
        return
    zero = deepspeed.get("zero_optimization")
    nested = [f"zero_optimization.{key}" for key in zero] if isinstance(zero, dict) else []
    for key in [*deepspeed, *nested]:
        if key in REFUSED_DEEPSPEED_KEYS:
            mistakes.lines.append(f"deepspeed.{key}: dsmoe sets this itself; {REFUSED_DEEPSPEED_KEYS[key]}")
    if isinstance(zero, dict):
        for key in ("reduce_scatter", "contiguous_gradients"):
            if zero.get(key) is False:
                mistakes.add(f"deepspeed.zero_optimization.{key}", False, "True: ZeRO needs it for expert parameters")
    elif zero is not None:
        mistakes.add("deepspeed.zero_optimization", repr(zero), "a mapping")


def _check_model(model: ModelConfig, mistakes: _Mistakes) -> None:
    """What no field of the model can know alone."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    mistakes.check_multiple("model.num_attention_heads", heads, "model.num_query_groups", model.key_value_heads)
    if model.kv_channels is not None:
        if model.kv_channels % 2 and mistakes.none_in("model.kv_channels"):
            mistakes.add("model.kv_channels", model.kv_channels, "an even size, for rotary embedding")
    else:
        mistakes.check_multiple("model.hidden_size", hidden, "model.num_attention_heads", heads)
        odd = hidden % heads == 0 and (hidden // heads) % 2
        if odd and mistakes.none_in("model.hidden_size", "model.num_attention_heads"):
            size = f"{hidden}, heads of size {hidden // heads}"
            mistakes.add("model.hidden_size", size, "heads of an even size, for rotary embedding")
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        mistakes.add("model.moe_shared_expert_gate", True, "false, or model.moe_shared_expert_intermediate_size")
    if not mistakes.none_in("model.moe_layer_freq", "model.num_layers"):
        return
    frequency = model.moe_layer_freq
    if isinstance(frequency, int) and frequency < 1:
        mistakes.add("model.moe_layer_freq", frequency, "1 or more, or a list of 0 and 1")
    elif isinstance(frequency, list) and len(frequency) != model.num_layers:
        mistakes.add("model.moe_layer_freq", f"{len(frequency)} entries", f"one for each of {model.num_layers} layers")
    elif not any(model.moe_layers()):
        mistakes.add("model.moe_layer_freq", frequency, "at least one MoE layer")


def _check_plan(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, mistakes: _Mistakes) -> None:
    """What model, parallel plan and training can only know together."""
    experts, ranks = model.num_experts, parallel.expert_parallel
    mistakes.check_multiple("model.num_experts", experts, "parallel.expert_parallel", ranks)
    batch, parts = training.global_batch_size, training.gradient_accumulation
    mistakes.check_multiple("training.global_batch_size", batch, "training.gradient_accumulation", parts)
    for field, reason in SIZE_ONE_ONLY.items():
        size = getattr(parallel, field)
        if size != 1 and mistakes.none_in(f"parallel.{field}"):
            mistakes.add(f"parallel.{field}", size, f"1: {reason}")
    _check_schedule(training, mistakes)
    if training.final_lr > training.lr and mistakes.none_in("training.min_lr", "training.lr"):
        mistakes.add("training.min_lr", training.min_lr, f"at most training.lr ({training.lr})")


def _check_schedule(training: TrainingConfig, mistakes: _Mistakes) -> None:
    if not mistakes.none_in("training.schedule", "training.decay_steps", "training.decay_from", "training.steps"):
        return
    for field in ("decay_steps", "decay_from"):
        if training.schedule != "wsd" and getattr(training, field) is not None:
            mistakes.add(f"training.{field}", repr(getattr(training, field)), "none: training.schedule is not wsd")
    if (training.decay_steps or 0) > training.steps:
        mistakes.add("training.decay_steps", training.decay_steps, f"at most training.steps ({training.steps})")
    if training.decay_from is None:
        return
    name = Path(training.decay_from).name
    if not re.fullmatch(r"step_\d+", name):
        mistakes.add("training.decay_from", repr(training.decay_from), "a checkpoint's folder, .../checkpoints/step_N")
    elif int(name.removeprefix("step_")) >= training.steps:
        mistakes.add("training.decay_from", repr(name), f"a step before training.steps ({training.steps})")
    if training.decay_steps is not None:
        mistakes.add("training.decay_steps", training.decay_steps, "none: the decay lasts from decay_from to steps")
