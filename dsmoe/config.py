"""The typed run configuration: one YAML file, dotted overrides, every mistake listed at once.

A run is described by eight sections; each is a small pydantic model whose comments say what a field means and in
which unit. Mistakes are collected over the whole file (unknown keys with the nearest known name, wrong types,
values out of range, sections that contradict each other) and raised together as one `ConfigError`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmoe.errors import ConfigError


class Section(BaseModel):
    """A part of the configuration: unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The transformer: Megatron-Core's names, RMSNorm, RoPE and SwiGLU throughout."""

    num_layers: int = Field(4, ge=1)
    hidden_size: int = Field(256, ge=8)
    num_attention_heads: int = Field(8, ge=1)
    num_query_groups: int | None = Field(None, ge=1)  # key/value heads of GQA; None: as many as attention heads
    sequence_length: int = Field(256, ge=2)  # tokens
    vocab_size: int | None = Field(None, ge=2)  # None: the tokenizer's size, rounded up to a multiple of 64
    ffn_hidden_size: int | None = Field(None, ge=1)  # width of a dense layer's SwiGLU; None: 4 x moe_ffn_hidden_size
    num_experts: int = Field(8, ge=1)
    moe_ffn_hidden_size: int = Field(512, ge=1)  # width of one expert's SwiGLU
    moe_layer_freq: int | list[Literal[0, 1]] = 1  # n: every n-th layer, from the first, is MoE; list: 1 = MoE, 0 = dense
    moe_shared_expert_intermediate_size: int | None = Field(None, ge=1)  # an expert every token uses; None: no such expert
    tie_embeddings: bool = True  # one matrix for the input embedding and the output layer
    qk_layernorm: bool = False  # RMSNorm on queries and keys, per head
    rotary_base: float = Field(10000.0, gt=0)
    norm_epsilon: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0)  # normal init; projections into the residual use init_std / sqrt(2 num_layers)
    recompute: Literal["none", "moe", "full"] = "none"  # redone in backward: nothing; dispatch + experts; and attention too
    experts_implementation: Literal["grouped_mm", "loop"] = "grouped_mm"  # "loop" is the plain reference

    def moe_layers(self) -> list[bool]:
        """For each layer, whether it is an MoE layer."""
        if isinstance(self.moe_layer_freq, list):
            return [bool(flag) for flag in self.moe_layer_freq]
        return [layer % self.moe_layer_freq == 0 for layer in range(self.num_layers)]

    @property
    def dense_ffn_hidden_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.moe_ffn_hidden_size

    @property
    def key_value_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads


class RouterConfig(BaseModel):
    """Which router, and its own options: the plugin's `Options` class says which there are."""

    model_config = ConfigDict(extra="allow")

    name: str = "topk"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ParallelConfig(Section):
    """How the processes share the work. Data parallelism is what remains: every process is a data rank."""

    expert_parallel: int = Field(1, ge=1)  # ranks that share one copy of the experts
    zero_stage: Literal[1, 2, 3] = 1
    tensor_parallel: int = Field(1, ge=1)  # only 1
    pipeline_parallel: int = Field(1, ge=1)  # only 1
    context_parallel: int = Field(1, ge=1)  # only 1


class DataConfig(Section):
    """What is read: a folder made by tools/prepare_data.py, or any Megatron .bin/.idx prefix."""

    path: str = "data/corpus"  # folder with dataset.json, or PREFIX of PREFIX.bin and PREFIX.idx
    valid_path: str | None = None  # held-out PREFIX, when `path` is a prefix
    valid_fraction: float = Field(0.02, gt=0, lt=1)  # held out by document, when `path` is a prefix without `valid_path`
    tokenizer: str | None = None  # SentencePiece model; None: the one in the dataset's folder
    cache_dir: str | None = None  # where Megatron's sample indices are kept; None: beside the data


class TrainingConfig(Section):
    """One optimizer step sees `global_batch_size` sequences, in `gradient_accumulation` parts, over all ranks."""

    steps: int = Field(100, ge=1)  # optimizer steps of the whole run, resumed parts included
    stop_at: int | None = Field(None, ge=1)  # save and stop after this step; schedules stay those of `steps`
    global_batch_size: int = Field(16, ge=1)  # sequences per optimizer step, over all ranks
    gradient_accumulation: int = Field(1, ge=1)  # micro-steps per optimizer step
    precision: Literal["fp32", "bf16"] = "fp32"  # routers, losses and optimizer state are fp32 in both
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.1, ge=0)  # on matrices; never on norms and biases
    decay_embeddings: bool = False  # whether weight decay also touches embedding and output matrices
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)  # global gradient norm; 0: no clipping
    eval_interval: int = Field(50, ge=0)  # optimizer steps between evaluations; 0: only at the end
    eval_sequences: int = Field(64, ge=1)  # held-out sequences per evaluation
    seed: int = Field(1234, ge=0)
    resume: str = "auto"  # auto: newest complete checkpoint of the run; never: start anew; PATH: a checkpoint or run


class CheckpointConfig(Section):
    """When a checkpoint is written and which ones stay."""

    interval: int = Field(100, ge=0)  # optimizer steps; 0: only at the end and on a signal
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)  # also keep every checkpoint whose step is a multiple of this; 0: none


class LoggingConfig(Section):
    """Where a run leaves its traces."""

    run_dir: str = "runs/run"
    interval: int = Field(1, ge=1)  # optimizer steps between lines of metrics.jsonl
    tensorboard: bool = True


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "router": RouterConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}


class RunConfig(Section):
    """All of a run: the seven typed sections, and `deepspeed`, which goes to DeepSpeed as it is."""

    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = {}

    def to_yaml(self) -> str:
        """The resolved configuration, loadable again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# DeepSpeed's own keys that dsmoe sets itself, and where to say it instead.
REFUSED_DEEPSPEED_KEYS = {
    "train_batch_size": "set training.global_batch_size",
    "train_micro_batch_size_per_gpu": "it follows from training.global_batch_size, training.gradient_accumulation and the number of ranks",
    "gradient_accumulation_steps": "set training.gradient_accumulation",
    "optimizer": "set training.lr, training.weight_decay and training.adam_*",
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
    "tensor_parallel": "Megatron-Core's tensor-parallel MoE needs sequence parallelism, whose norms need Transformer Engine",
    "pipeline_parallel": "Megatron-Core's pipeline schedules do not run under DeepSpeed's engine",
    "context_parallel": "the SDPA attention used here does not exchange keys and values between ranks",
}


def load_config(
    path: str | Path | None,
    overrides: list[str] | tuple[str, ...] = (),
    routers: Mapping[str, type[BaseModel]] | None = None,
) -> RunConfig:
    """Read, override and validate a configuration.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: dotted assignments such as `training.steps=50`; the value is read as YAML.
        routers: options class of every known router; with it the router's name and options are checked too.

    Raises:
        ConfigError: with every mistake found, each naming field, value, expectation and the nearest known name.
    """
    tree = _read_yaml(path)
    problems = _apply_overrides(tree, overrides)
    return validate_config(tree, routers, problems, source=str(path) if path else "configuration")


def validate_config(
    tree: dict[str, Any],
    routers: Mapping[str, type[BaseModel]] | None = None,
    problems: list[str] | None = None,
    source: str = "configuration",
) -> RunConfig:
    """Validate a tree of plain values in one pass. Raises `ConfigError` with all mistakes."""
    problems = list(problems or [])
    valid: dict[str, BaseModel] = {}
    broken: set[str] = set()  # fields that already have a line of their own
    for name in map(str, tree):
        if name not in SECTIONS and name != "deepspeed":
            problems.append(f"{name}: unknown section{_nearest(name, [*SECTIONS, 'deepspeed'])}")
    for name, section in SECTIONS.items():
        value = tree.get(name)
        valid[name] = _validate_section(name, section, {} if value is None else value, problems, broken)
    if routers is not None:
        valid["router"] = _validate_router(valid["router"], routers, valid["model"], problems, broken)
    deepspeed = {} if tree.get("deepspeed") is None else tree["deepspeed"]
    _check_deepspeed(deepspeed, problems)
    _check_together(valid["model"], valid["parallel"], valid["training"], problems, broken)
    if problems:
        raise ConfigError(problems, source)
    return RunConfig.model_construct(**valid, deepspeed=deepspeed)


def _validate_section(
    name: str, section: type[BaseModel], value: Any, problems: list[str], broken: set[str]
) -> BaseModel:
    """The section; where fields are wrong, the section without them, so that the other checks can go on."""
    if not isinstance(value, dict):
        problems.append(f"{name}: found {value!r}, expected a mapping of keys to values")
        return section.model_construct()
    try:
        return section.model_validate({str(key): item for key, item in value.items()})  # YAML's keys may be numbers
    except ValidationError as error:
        explained = _explain(error, name, list(section.model_fields))
        problems.extend(explained.values())
        broken.update(explained)
        wrong = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        return section.model_construct(**{str(k): v for k, v in value.items() if str(k) not in wrong})


def _validate_router(
    router: RouterConfig, routers: Mapping[str, type[BaseModel]], model: ModelConfig, problems: list[str], broken: set[str]
) -> RouterConfig:
    if router.name not in routers:
        problems.append(
            f"router.name: found {router.name!r}, expected one of {', '.join(sorted(routers))}"
            f"{_nearest(router.name, list(routers))}"
        )
        return router
    options = _validate_section("router", routers[router.name], router.options, problems, broken)
    if not any(field.startswith(("router.", "model.")) for field in broken) and hasattr(options, "problems"):
        problems.extend(options.problems(model))
    return RouterConfig(name=router.name, **options.model_dump())


def _explain(error: ValidationError, section: str, known: list[str]) -> dict[str, str]:
    """A line for each field that pydantic complains about: field, value, expectation, nearest known name."""
    lines: dict[str, str] = {}
    for item in error.errors():
        field = ".".join(str(part) for part in (section, *item["loc"][:1]))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            lines[field] = f"{field}: unknown key{_nearest(key, known)}"
        elif item["type"] == "missing":
            lines[field] = f"{field}: not set, but has no default"
        else:
            expectation = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            previous = lines.get(field)
            lines[field] = f"{previous} or {expectation}" if previous else f"{field}: found {item['input']!r}, expected {expectation}"
    return lines


def _nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)', or the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"


def _check_deepspeed(deepspeed: Any, problems: list[str]) -> None:
    if not isinstance(deepspeed, dict):
        problems.append(f"deepspeed: found {deepspeed!r}, expected a mapping of DeepSpeed's own JSON keys")
        return
    zero = deepspeed.get("zero_optimization")
    nested = [f"zero_optimization.{key}" for key in zero] if isinstance(zero, dict) else []
    for key in [*deepspeed, *nested]:
        if key in REFUSED_DEEPSPEED_KEYS:
            problems.append(f"deepspeed.{key}: dsmoe sets this itself; {REFUSED_DEEPSPEED_KEYS[key]}")
    if isinstance(zero, dict):
        for key in ("reduce_scatter", "contiguous_gradients"):
            if zero.get(key) is False:
                problems.append(f"deepspeed.zero_optimization.{key}: found False, expected True: ZeRO needs it for expert parameters")
    elif zero is not None:
        problems.append(f"deepspeed.zero_optimization: found {zero!r}, expected a mapping")


def _check_together(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, problems: list[str], broken: set[str]
) -> None:
    """What no field can know alone."""

    def divides(divisor_field: str, divisor: int, field: str, value: int) -> None:
        if not {divisor_field, field} & broken and value % divisor:
            problems.append(f"{field}: found {value}, expected a multiple of {divisor_field} ({divisor})")

    divides("model.num_attention_heads", model.num_attention_heads, "model.hidden_size", model.hidden_size)
    divides("model.num_query_groups", model.key_value_heads, "model.num_attention_heads", model.num_attention_heads)
    divides("parallel.expert_parallel", parallel.expert_parallel, "model.num_experts", model.num_experts)
    divides("training.gradient_accumulation", training.gradient_accumulation, "training.global_batch_size", training.global_batch_size)
    head_size = model.hidden_size // model.num_attention_heads
    whole = model.hidden_size % model.num_attention_heads == 0  # otherwise it has a line already
    if whole and head_size % 2 and not {"model.hidden_size", "model.num_attention_heads"} & broken:
        problems.append(f"model.hidden_size: gives heads of size {head_size}, expected an even size for rotary embedding")
    if "model.moe_layer_freq" not in broken:
        freq = model.moe_layer_freq
        if isinstance(freq, list) and len(freq) != model.num_layers and "model.num_layers" not in broken:
            problems.append(f"model.moe_layer_freq: found a list of {len(freq)}, expected model.num_layers ({model.num_layers}) entries")
        elif isinstance(freq, int) and freq < 1:
            problems.append(f"model.moe_layer_freq: found {freq}, expected 1 or more, or a list of 0 and 1")
        elif not any(model.moe_layers()):
            problems.append("model.moe_layer_freq: no layer is an MoE layer, expected at least one 1")
    for field, reason in SIZE_ONE_ONLY.items():
        size = getattr(parallel, field)
        if size != 1 and f"parallel.{field}" not in broken:
            problems.append(f"parallel.{field}: found {size}, expected 1: {reason}")
    if training.warmup_steps > training.steps and not {"training.warmup_steps", "training.steps"} & broken:
        problems.append(f"training.warmup_steps: found {training.warmup_steps}, expected at most training.steps ({training.steps})")
    if training.min_lr > training.lr and not {"training.min_lr", "training.lr"} & broken:
        problems.append(f"training.min_lr: found {training.min_lr}, expected at most training.lr ({training.lr})")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3 and makes a string of the rest) and refuses a key
    that is given twice (YAML's last one would silently win)."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\d[\d_]*\.[\d_]*|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _read_yaml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"cannot read the file: {error.strerror or error}"], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(["cannot read the file: it is not UTF-8 text"], str(path)) from error
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, such as 2024-13-01
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"found {type(tree).__name__}, expected a mapping of sections"], str(path))
    return tree


def _apply_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> list[str]:
    """Write `section.key=value` into the tree; return what could not be read."""
    problems = []
    # A new router drops the other one's options, so it is named before its own are set, in whatever order they came.
    for override in sorted(overrides, key=lambda override: not override.startswith("router.name=")):
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or len(parts) < 2 or not all(parts):
            problems.append(f"override {override!r}: expected section.key=value, for example training.steps=50")
            continue
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError):
            problems.append(f"override {override!r}: the value is not valid YAML")
            continue
        _override_router_name(tree, parts, value)
        node = tree
        for part in parts[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[parts[-1]] = value
    return problems


def _override_router_name(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    """A new router.name on the command line drops the options the file gave to the other router."""
    router = tree.get("router")
    if parts == ["router", "name"] and isinstance(router, dict) and router.get("name", RouterConfig().name) != value:
        tree["router"] = {}
