"""The configuration of each cell of a study, with what is derived for it.

Width: such that router and experts of a layer multiply as often, for each token, as with a plain gate and
`compute.experts` experts of `compute.width`. A router that costs more gets narrower experts. Over E the gate's own cost
grows, and is not taken out of the experts: that is how the papers compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsmoe.config import RunConfig, load_config
from dsmoe.errors import ConfigError
from dsmoe.lab.study.grid import ACTIVE, BUDGET, GRANULARITY, SIZE, Cell, Compute, Preset, Study
from dsmoe.lab.study.results import flops_per_token, sized
from dsmoe.moe.expert_mlp import ExpertMLP
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes
from dsmoe.training.schedule import decay_start

ALWAYS = {"logging.tensorboard": False}  # a study reads metrics.jsonl
TOLERANCE = 0.02  # of active compute: a width is a whole number


def cell_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """All dotted keys that a cell sets beyond its file, the derived ones included. Raises `ConfigError`."""
    arm = study.arm(cell.arm)
    gate = study.gate.sizes[cell.gate] if cell.gate is not None else {}
    settings = {**ALWAYS, **study.set, **arm.set, **dict(cell.point), **gate, "training.seed": cell.seed}
    budget, size = settings.pop(BUDGET, None), settings.pop(SIZE, None)
    compute, preset = study.compute, study.preset
    if size is not None:
        scaled, scale = _scaled(study, cell, settings, size, preset or Preset(kind="ladder", sizes=[size, size + 1]))
        settings |= scaled
        compute = compute and Compute(experts=compute.experts, width=max(1, round(compute.width * scale)))
    settings = _at_equal_compute(study, cell, settings, compute)
    if preset is not None and cell.gate is None:
        settings |= _length(preset, _load(study, cell, settings), budget)
    return settings


def cell_overrides(study: Study, cell: Cell, out: Path, steps: int | None = None) -> list[str]:
    """What a cell's run adds to its file, as on a command line. `steps`: of an arm that matches another's compute."""
    settings = cell_settings(study, cell)
    if steps is not None:
        settings["training.steps"] = steps
    if cell.length != 1:
        whole = _load(study, cell, settings).training
        short = whole.model_copy(update={"steps": round(whole.steps * cell.length)})
        if whole.decay_steps is not None:
            short.decay_steps = round(whole.decay_steps * cell.length)
        start = decay_start(short)
        settings |= {
            "training.steps": short.steps,
            "training.decay_steps": None,
            "training.decay_from": str(cell.whole.folder(out) / "checkpoints" / f"step_{start:08d}"),
        }
    return _as_overrides({**settings, "logging.run_dir": str(cell.folder(out))})


def cell_config(study: Study, cell: Cell, out: Path, steps: int | None = None) -> RunConfig:
    """A cell's configuration. Raises `ConfigError`."""
    return load_config(config_file(study, cell), cell_overrides(study, cell, out, steps), option_classes())


def config_file(study: Study, cell: Cell) -> str:
    return study.arm(cell.arm).config or study.config


def _at_equal_compute(study: Study, cell: Cell, settings: dict[str, Any], compute: Compute | None) -> dict[str, Any]:
    parts = settings.pop(GRANULARITY, 1)
    active = settings.pop(ACTIVE, None if compute is None else compute.experts)
    if compute is None:
        return settings
    experts, width = active * parts, compute.width / parts
    base = _load(study, cell, settings, checked=False)
    settings["model.num_experts"] = total = base.model.num_experts * parts
    for option, value in get(base.router.name).Options.aim_at(experts, total).items():
        settings.setdefault(f"router.{option}", value)
    settings["model.moe_ffn_hidden_size"] = max(1, round(width))
    config = _load(study, cell, settings)
    router, model = get(config.router.name), config.model
    options = router.Options.model_validate(config.router.options)
    aim = options.target_experts_per_token(model)
    if abs(aim - experts) > 1e-6:
        problem = f"router {config.router.name!r} aims at {aim:g} experts per token, expected {experts}"
        raise ConfigError([problem], str(cell))
    if not study.arm(cell.arm).derive_width:
        return settings
    hidden, rank = model.hidden_size, router.latent_rank(options)
    wanted = total * hidden + experts * ExpertMLP.of(model).multiplications / model.moe_ffn_hidden_size * width
    each = experts * ExpertMLP.of(model, rank).multiplications / model.moe_ffn_hidden_size
    scores = router.parameter_count(model, options)
    fitting = round((wanted - scores) / each)
    if fitting < 1 or abs(scores + fitting * each - wanted) > TOLERANCE * wanted:
        problem = (
            f"active compute of {wanted:,.0f} multiplications per token and layer cannot be met: the router takes "
            f"{scores:,.0f} of them, which leaves experts of width {(wanted - scores) / each:.1f}"
        )
        raise ConfigError([problem], str(cell))
    return {**settings, "model.moe_ffn_hidden_size": fitting}


def _scaled(
    study: Study, cell: Cell, settings: dict[str, Any], size: int, preset: Preset
) -> tuple[dict[str, Any], float]:
    """What a model of another hidden size sets, and how many times the file's hidden size it is."""
    base = _load(study, cell, {**settings, GRANULARITY: None, ACTIVE: None}, checked=False)
    model, training = base.model, base.training
    head = model.hidden_size // model.num_attention_heads
    if size % head:
        raise ConfigError([f"size: found {size}, expected a multiple of a head's size ({head})"], str(cell))
    scale, heads = size / model.hidden_size, size // head
    sharing = model.num_attention_heads // model.key_value_heads
    return {
        "model.hidden_size": size,
        "model.num_layers": max(1, round(model.num_layers * scale)),
        "model.num_attention_heads": heads,
        "model.num_query_groups": heads // sharing if heads % sharing == 0 else heads,
        "model.init_std": model.init_std / scale**0.5,
        "training.lr": training.lr * scale**preset.lr_power,
        "training.min_lr": training.final_lr * scale**preset.lr_power,
    }, scale


def _length(preset: Preset, config: RunConfig, budget: float | None) -> dict[str, Any]:
    """The steps that a preset gives a run; the warm-up keeps its share of them. Raises `ConfigError`."""
    if config.model.vocab_size is None:
        problem = "model.vocab_size: not set, but a preset counts the compute of the output layer, too"
        raise ConfigError([problem], "the preset")
    router = get(config.router.name)
    experts = router.Options.model_validate(config.router.options).target_experts_per_token(config.model)
    step_tokens = config.training.global_batch_size * config.model.sequence_length
    if preset.kind == "isoflop":
        steps = budget / (step_tokens * flops_per_token(config, experts))
    else:
        steps = preset.tokens_per_parameter * sized(config).active / step_tokens
    steps = max(1, round(steps))
    warmup = round(config.training.warmup_steps * steps / config.training.steps)
    return {"training.steps": steps, "training.warmup_steps": warmup}


def _load(study: Study, cell: Cell, settings: dict[str, Any], checked: bool = True) -> RunConfig:
    """`checked=False`: before the router's own options are settled."""
    plain = {key: value for key, value in settings.items() if "." in key}
    if not checked:
        plain = {key: value for key, value in plain.items() if not key.startswith("router.") or key == "router.name"}
    return load_config(config_file(study, cell), _as_overrides(plain), option_classes() if checked else None)


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
