"""What one finished run shows: its end, its experts per token, and the compute it took.

Compute counts multiplications by weights, per token: parameters used. It takes the experts per token that each step
really had, so a dense start counts in full. `moe` is gate or scores and routed experts of all MoE layers, `model` adds
what every token passes: attention, norms, dense and shared layers, embedding (once, as the output layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from dsmoe.checkpoint.files import newest_checkpoint, read_manifest
from dsmoe.config import RunConfig, load_config
from dsmoe.data.identity import name_of
from dsmoe.errors import ConfigError
from dsmoe.model.size import ModelSize, model_size
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes
from dsmoe.training.metrics import FILE, read_lines
from dsmoe.training.schedule import decay_start

NEAR_TARGET = 0.01  # of density
BRANCH = "-length-"  # in the name of a folder, after that of the run that it branched off
END = 0.1  # the share of a run that counts as its end


@dataclass(frozen=True)
class RunResult:
    """Numbers of one run."""

    steps: int
    tokens: int
    learning_rate: float  # the highest
    val_loss: float  # nats per token
    val_bpb: float | None  # bits per byte
    val_experts: float  # per token, on held-out text
    val_experts_by_layer: list[float] | None
    end_experts: float  # per token, mean over the end of training
    mean_experts: float  # over all of it
    target_density: float | None  # None where none is aimed at
    last_third_density: float
    last_third_near_target: float | None  # share of steps; None without a target
    expert_imbalance: float  # max over mean, at the end
    no_expert: float  # share of tokens, at the end
    moe_compute: float
    model_compute: float
    tokens_per_second: float  # median


def run_lines(run_dir: Path) -> list[dict]:
    """The metrics of a run, step by step."""
    path = run_dir / FILE
    return read_lines(path) if path.exists() else []


def history(run_dir: Path, config: RunConfig) -> list[dict]:
    """The metrics of all steps that made a run's model: of one that branched off another, the other's up to there."""
    lines = run_lines(run_dir)
    if config.training.decay_from is None:
        return lines
    start = decay_start(config.training)
    trunk = run_dir.with_name(run_dir.name.partition(BRANCH)[0])
    return [line for line in run_lines(trunk) if line["step"] <= start] + lines


def run_config(run_dir: Path) -> RunConfig:
    """The resolved configuration that a run wrote."""
    return load_config(run_dir / "config.yaml", (), option_classes())


def trained_on(run_dir: Path) -> str | None:
    """What a run's training data is called in messages, from its newest checkpoint; None: it has none that tells."""
    newest = newest_checkpoint(run_dir)
    data = None if newest is None else read_manifest(newest).data
    return None if data is None else name_of(data["train"])


def same_data(first: dict[str, str], second: dict[str, str], place: str) -> dict[str, str]:
    """`data.path` -> data, of both. Raises `ConfigError` where one path was not the same data: losses on two corpora
    cannot be compared."""
    problems = [
        f"{path}: found {second[path]}, expected {first[path]}, which the cells before were trained on"
        for path in sorted(first.keys() & second.keys())
        if first[path] != second[path]
    ]
    if problems:
        raise ConfigError(problems, place)
    return first | second


def finished(lines: list[dict], steps: int) -> bool:
    """Whether a run came to its last step and was evaluated there."""
    return bool(lines) and lines[-1]["step"] == steps and "val_loss" in lines[-1]


def read_result(run_dir: Path) -> RunResult:
    """Summarise a finished run."""
    config = run_config(run_dir)
    lines = history(run_dir, config)
    last, size = lines[-1], model_size(config)
    end = lines[-max(1, round(END * len(lines))) :]
    third = [line["density"] for line in lines[-max(1, len(lines) // 3) :]]
    target = target_density(config)
    near = None if target is None else mean(abs(density - target) <= NEAR_TARGET for density in third)
    tokens = config.training.global_batch_size * config.model.sequence_length
    experts = mean(line["experts_per_token"] for line in lines)
    moe = len(lines) * tokens * moe_compute(config, experts)
    always = size.total - sum(config.model.moe_layers()) * (
        config.model.num_experts * size.expert + router_parameters(config)
    )
    return RunResult(
        steps=last["step"],
        tokens=last["tokens"],
        learning_rate=config.training.lr,
        val_loss=last["val_loss"],
        val_bpb=last.get("val_bpb"),
        val_experts=last["val_experts_per_token"],
        val_experts_by_layer=last.get("val_experts_per_token_by_layer"),
        end_experts=mean(line["experts_per_token"] for line in end),
        mean_experts=experts,
        target_density=target,
        last_third_density=mean(third),
        last_third_near_target=near,
        expert_imbalance=mean(line["expert_imbalance"] for line in end),
        no_expert=mean(line["no_expert"] for line in end),
        moe_compute=moe,
        model_compute=moe + len(lines) * tokens * always,
        tokens_per_second=median(line["tokens_per_second"] for line in lines),
    )


def moe_compute(config: RunConfig, experts_per_token: float) -> float:
    """Multiplications per token in all MoE layers. `experts_per_token` may be an array."""
    layers, expert = sum(config.model.moe_layers()), sized(config).expert
    return layers * (router_parameters(config) + experts_per_token * expert)


def flops_per_token(config: RunConfig, experts_per_token):
    """Training FLOPs for each token: 6 for each parameter that it uses, and attention's own products.

    Attention adds 6 S A for each layer, with S positions and A the width of all heads: 2 products of 2 S/2 A operations
    (a token sees half of the others on average), times 3 for forward and backward. `experts_per_token` may be an array.
    """
    size, model, layers = sized(config), config.model, sum(config.model.moe_layers())
    always = size.total - layers * model.num_experts * size.expert
    if not model.tie_embeddings:
        always -= (model.vocab_size or 0) * model.hidden_size  # a look-up multiplies nothing
    heads = model.num_attention_heads * (model.kv_channels or model.hidden_size // model.num_attention_heads)
    attention = 6.0 * model.num_layers * model.sequence_length * heads
    return 6.0 * (always + layers * experts_per_token * size.expert) + attention


def sized(config: RunConfig) -> ModelSize:
    """The model's size, before a run too, when the vocabulary is not settled; then without the embedding's rows."""
    if config.model.vocab_size is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 2})})
    return model_size(config)


def router_parameters(config: RunConfig) -> int:
    """Of one layer."""
    router = get(config.router.name)
    return router.parameter_count(config.model, router.Options.model_validate(config.router.options))


def target_density(config: RunConfig) -> float | None:
    """The density that the router's controller aims at, if it has such a one."""
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    controller = router.make_controller(options, sum(config.model.moe_layers()), config.model.num_experts)
    return None if controller is None else controller.target_density


def matching_steps(config: RunConfig, reference: RunResult) -> int:
    """Optimizer steps after which `config`, at its router's aim of experts, has used the reference's MoE compute."""
    router = get(config.router.name)
    aim = router.Options.model_validate(config.router.options).target_experts_per_token(config.model)
    tokens = config.training.global_batch_size * config.model.sequence_length
    return max(1, round(reference.moe_compute / (tokens * moe_compute(config, aim))))
