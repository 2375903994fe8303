"""The model card of an export, README.md: what the model is, what was measured, what it cannot do, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dsmoe.config import RunConfig
from dsmoe.hf.card_picture import draw_routing
from dsmoe.hf.identity import Identity
from dsmoe.routers import get


@dataclass(frozen=True)
class Card:
    """What a card tells that the report does not.

    Attributes:
        dataset: name of the training data, where it has one.
        metrics: the line of metrics.jsonl of the last evaluation up to this checkpoint, if there is one.
        license, language: as the Hub spells them; of a run that was imported, where not given, those of its base.
        identity: of a run that was imported.
        routes: bool [L, T, E] of the held-out tokens; None without MoE layers.
    """

    dataset: str | None
    metrics: dict[str, Any] | None
    license: str | None = None
    language: str | None = None
    identity: Identity | None = None
    routes: Tensor | None = None


def write_card(folder: Path, config: RunConfig, report: dict[str, Any], card: Card) -> None:
    """Write README.md, and the picture that it shows.

    Args:
        config: of the run.
        report: content of export_report.json.
    """
    identity = card.identity
    front = {
        "license": card.license or (identity.license if identity else None),
        "language": card.language or (identity.language if identity else None),
        "base_model": identity.base_model if identity else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe", "dsmoe", config.router.name],
    }
    front = yaml.safe_dump({key: value for key, value in front.items() if value is not None}, sort_keys=False)
    sections = (
        _model(config, report),
        *_routing(folder, config, card.routes),
        _data(config, report, card.dataset, identity),
        _evaluation(report, card.metrics),
        _limits(config, report, identity, _fixed_experts(folder)),
        _loading(report),
    )
    text = f"---\n{front}---\n\n# {report['run']}\n\n" + "\n\n".join(sections) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def settings_in_words(changed: dict[str, dict[str, Any]]) -> list[str]:
    """Of `set` in the report: one line an option."""
    return [f"{name} {value['exported']:g}, trained with {value['trained']:g}" for name, value in changed.items()]


def _model(config: RunConfig, report: dict[str, Any]) -> str:
    model, held_out, size = config.model, report["held_out"], report["parameters"]
    layers = sum(model.moe_layers())
    shared = model.moe_shared_expert_intermediate_size
    rows = {
        "parameters": f"{size['total']:,}",
        "active for a token": f"{size['active_measured']:,} (at the measured experts per token)",
        "layers": f"{model.num_layers}, {layers} of them with experts",
        "experts of a layer": f"{model.num_experts}, {model.expert_activation} of width {model.moe_ffn_hidden_size}"
        + (" with biases" if model.expert_bias else "")
        + (f", and a shared one of width {shared}" if shared else ""),
        "experts per token": f"{held_out['experts_per_token']:.2f}, measured on {held_out['tokens']:,} held-out "
        f"tokens; by layer {', '.join(f'{mean:.2f}' for mean in held_out['experts_per_token_by_layer'])}",
        "hidden size, heads": f"{model.hidden_size}, {model.num_attention_heads} of size {model.head_size} "
        f"({model.key_value_heads} for keys and values)",
        "vocabulary": f"{model.vocab_size:,}",
        "sequence length": f"{model.sequence_length:,} tokens",
        "weights": f"{report['dtype']}, {report['weights']['bytes']:,} bytes",
    }
    if chosen := settings_in_words(report["set"]):
        rows["set for inference"] = "; ".join(chosen)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "A decoder-only language model with a mixture of experts, trained with dsmoe "
        f"{report['versions']['dsmoe']}.\n\n"
        f"{get(config.router.name).card_section(config.router.options)}\n\n| | |\n|---|---|\n{table}"
    )


def _routing(folder: Path, config: RunConfig, routes: Tensor | None) -> list[str]:
    if routes is None:
        return []
    layers = [layer for layer, is_moe in enumerate(config.model.moe_layers()) if is_moe]
    return [f"## Routing\n\n{draw_routing(folder, layers, routes)}"]


def _data(config: RunConfig, report: dict[str, Any], dataset: str | None, identity: Identity | None) -> str:
    tokens = report["sequences_trained"] * config.model.sequence_length
    name = f"`{dataset}`" if dataset else "not recorded by name"
    if identity is not None:
        before = f" and {identity.trained_elsewhere:,} with transformers before" if identity.trained_elsewhere else ""
        return (
            f"## Training\n\nFine-tuned from `{identity.base_model}`: {report['step']:,} optimizer steps{before}, "
            f"{tokens:,} tokens (repeated ones counted each time), in {config.training.precision}. Data: {name}."
        )
    return (
        f"## Training\n\nData: {name}. {report['step']:,} optimizer steps, {tokens:,} tokens "
        f"(repeated ones counted each time), in {config.training.precision}."
    )


def _evaluation(report: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    held_out = report["held_out"]

    def row(where: str, loss: float, bits: float | None) -> str:
        return f"| {where} | {loss:.4f} | {'' if bits is None else f'{bits:.4f}'} |"

    rows = [row(f"{held_out['tokens']:,} tokens, at export", held_out["loss"], held_out["bits_per_byte"])]
    if metrics is not None:
        trained = "".join(f", {name} {value['trained']:g}" for name, value in report["set"].items())
        where = f"by the trainer, at step {metrics['step']}{trained}"
        rows.append(row(where, metrics["val_loss"], metrics.get("val_bpb")))
    table = "\n".join(rows)
    return (
        "## Evaluation\n\nOn text of the same corpus that was held out of training. No other benchmark was run.\n\n"
        f"| held-out text | loss, nats per token | bits per byte |\n|---|---|---|\n{table}"
    )


def _fixed_experts(folder: Path) -> int | None:
    """Experts of every token, where a kernel for a fixed number of them can take the experts' place."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_experts_per_tok")


def _limits(config: RunConfig, report: dict[str, Any], identity: Identity | None, fixed: int | None) -> str:
    lines = [
        "It continues text; dsmoe does not tune to follow instructions or to be safe. It repeats what its data holds.",
        f"It was trained on sequences of {config.model.sequence_length:,} tokens; longer ones are untested.",
    ]
    if identity is None:
        lines.append(
            "No token is added to a text: a document was trained to begin after the end of another one "
            "(`bos_token` and `eos_token` are the same)."
        )
    else:
        lines.append("Tokenizer, special tokens and chat template are those of the model it was made from.")
    if report["architecture"] == "dsmoe":
        lines += [
            "Fine-tuning with this code has the language-model loss only: no router losses, no controller.",
            "Engines that replace experts by a kernel for a fixed number of experts per token cannot run it."
            if fixed is None
            else f"Every token takes {fixed} experts, in a module that engines may replace by a kernel, as vLLM's "
            "Transformers backend does; it was tried with a stand-in, not in such an engine.",
        ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _loading(report: dict[str, Any]) -> str:
    own = report["architecture"] == "dsmoe"
    trust = ", trust_remote_code=True" if own else ""
    note = (
        "The code beside the weights is loaded with them, hence `trust_remote_code`; it needs torch and transformers."
        if own
        else f"The architecture is transformers' own `{report['architecture']}`."
    )
    parity = report["parity"]["fp32"]
    return (
        f"## How to load it\n\n{note} Written with transformers {report['versions']['transformers']}.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})\n'
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```\n\n"
        f"Against the trainer's own model, on {report['parity']['tokens']:,} tokens in fp32: logits within "
        f"{parity['max_logit_difference']:.1e}, and the same {report['parity']['greedy_tokens']} greedy tokens "
        "(`export_report.json`)."
    )
