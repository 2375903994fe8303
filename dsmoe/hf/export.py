"""A run as a Hugging Face model: weights, configuration, code, tokenizer, model card, and a report of how exact it is.

Weights pass through a few tensors at a time, in memory of two shards and a layer at most. The folder is written under
another name and takes its own when everything has been checked: `dsmoe.hf.parity` runs both models on held-out text.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe import __version__
from dsmoe.checkpoint import files
from dsmoe.checkpoint.load import CheckpointReader, saved_config
from dsmoe.checkpoint.verify import Verification, verify_checkpoint
from dsmoe.config import RouterConfig, RunConfig
from dsmoe.data.dataset import Blend, Corpus, heldout, open_corpus
from dsmoe.data.tokenizer import TOKENIZER_FILES, Tokenizer
from dsmoe.errors import CheckpointError, ConversionError, DataError, one_of
from dsmoe.hf.card import Card, settings_in_words, write_card
from dsmoe.hf.identity import Identity
from dsmoe.hf.native import HOSTS, native_config, native_host
from dsmoe.hf.parity import Observation, Sample, check_parity, sequences_compared, tokens_compared
from dsmoe.hf.settings import chosen_options
from dsmoe.hf.shards import ShardReader, ShardWriter, new_folder, parse_size, track
from dsmoe.hf.table import PACKED, TABLES, Link, check_tensors, links, routing_name
from dsmoe.hf.tokenizer import check_tokenizer, encode_alike, write_tokenizer
from dsmoe.model.size import model_size
from dsmoe.moe import activations
from dsmoe.moe.expert_mlp import ExpertMLP
from dsmoe.routers import get
from dsmoe.routers.base import Router

REPORT = "export_report.json"
TRAINING_STATE = "training_state.json"
REMOTE = Path(__file__).with_name("remote")
ROUTING_FILE, ACTIVATIONS_FILE = "routing_dsmoe.py", "activations_dsmoe.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """How a run is exported.

    Attributes:
        format: "dsmoe", any router, with code of its own; one of `dsmoe.hf.native.HOSTS`; "auto", whichever of those
            holds the model exactly.
        dtype: of the weights. With format dsmoe, routers stay fp32.
        max_shard_size: of one weight file, such as "5GB".
        data: prepared dataset with the held-out text for the checks; None: the run's.
        license, language: for the model card, as the Hub spells them.
        settings: `NAME=VALUE` with which the router decides at inference (`dsmoe.hf.settings`).
    """

    format: str = "dsmoe"
    dtype: Literal["fp32", "bf16"] = "fp32"
    max_shard_size: str = "5GB"
    data: str | None = None
    license: str | None = None
    language: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint that is whole, and what lies beside it."""

    reader: CheckpointReader
    verification: Verification
    config: RunConfig
    router: type[Router]
    tokenizer: Tokenizer | None
    corpus: Corpus | Blend
    run_dir: Path
    identity: Identity | None  # of a run that was imported
    changed: dict[str, Any]  # options of the router, in `config` already, that the checkpoint has otherwise

    @classmethod
    def open(cls, path: Path, data: str | None, settings: tuple[str, ...] = ()) -> Source:
        """From a run folder or a checkpoint. Raises `DsmoeError` for what is missing, damaged or does not fit."""
        folder = files.find_checkpoint(str(path), path)
        verification = verify_checkpoint(folder)
        if verification.problems:
            raise CheckpointError(f"{folder} is damaged: {'; '.join(verification.problems)}")
        reader = CheckpointReader(folder)
        config = saved_config(reader.manifest, folder)
        changed = chosen_options(settings, config.router, config.model)
        router = RouterConfig(name=config.router.name, **config.router.options | changed)
        config = config.model_copy(update={"router": router})
        run_dir = folder.parent.parent
        identity = Identity.of_run(run_dir)
        present = any((run_dir / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = Tokenizer.load(run_dir) if present else None
        corpus = _open_text(config, data)
        if tokenizer is not None and corpus.tokenizer is not None and not encode_alike(tokenizer, corpus.tokenizer):
            raise DataError(f"{data or config.data.path} was made with another tokenizer than the run {run_dir}")
        corpus.check_vocabulary(config.model.vocab_size)
        return cls(reader, verification, config, get(router.name), tokenizer, corpus, run_dir, identity, changed)

    @property
    def options(self):
        """Of the router, validated."""
        return self.router.Options.model_validate(self.config.router.options)

    def controller(self):
        """The router's controller as the checkpoint left it, or None."""
        model = self.config.model
        controller = self.router.make_controller(self.options, sum(model.moe_layers()), model.num_experts)
        if controller is not None:
            controller.load(self.reader.controller_state())
        return controller

    def read(self, name: str) -> Tensor:
        """A whole fp32 tensor by its canonical name."""
        shape = self.reader.manifest.tensors[name]
        return self.reader.read("weight", name, 0, math.prod(shape)).view(shape)


def _open_text(config: RunConfig, data: str | None) -> Corpus | Blend:
    section = config.data.model_copy(update={"path": data, "valid_path": None, "tokenizer": None} if data else {})
    try:
        return open_corpus(section)
    except DataError as error:
        raise DataError(
            f"an export is checked on held-out text: {error} (or name a prepared dataset with --data)"
        ) from (error)


class Target:
    """The architecture that is written: names, configuration, and what else lies in the folder."""

    def __init__(self, source: Source, options: ExportOptions):
        self.source, self.dtype = source, DTYPES[options.dtype]
        self.architecture: str = options.format
        if options.format != "dsmoe":
            self.architecture = native_host(source.config, options.format)
        else:
            self.routing_file = routing_file(source.router)

    @property
    def is_native(self) -> bool:
        return self.architecture != "dsmoe"

    def dtype_of(self, name: str) -> torch.dtype:
        """In which dtype the tensor of that canonical name is written."""
        return torch.float32 if not self.is_native and ".mlp.router." in name else self.dtype

    def links(self) -> list[Link]:
        manifest = self.source.reader.manifest
        shapes = {name: tuple(shape) for name, shape in manifest.tensors.items()}
        config, router = self.source.config, self.source.router
        packed = not self.is_native and packed_experts_per_token(config, router, self.source.options)
        return links((PACKED if packed else TABLES)[self.architecture], config.model, shapes)

    def buffers(self) -> dict[str, Tensor]:
        """The controller's state that decides routes, by name in the folder."""
        if self.is_native:
            return {}
        controller, router = self.source.controller(), self.source.router
        layers = [layer for layer, is_moe in enumerate(self.source.config.model.moe_layers()) if is_moe]
        return {
            routing_name(layer, name): tensor.to(torch.float32)
            for place, layer in enumerate(layers)
            for name, tensor in router.inference_state(controller, place).items()
        }

    def config_json(self) -> dict[str, Any]:
        config, tokenizer = self.source.config, self.source.tokenizer
        end = tokenizer.eod_id if tokenizer is not None else None
        common = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "transformers_version": metadata.version("transformers"),
            # A document follows the end of another one: that token begins a text, too.
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        if self.source.identity is not None:
            common |= {
                key: value
                for key, value in self.source.identity.token_ids.items()
                if value is not None or key != "eos_token_id"
            }
        if self.is_native:
            return native_config(self.architecture, config) | common
        return remote_config(config, self.source.router, self.source.options) | common

    def write_code(self, folder: Path) -> None:
        if self.is_native:
            return
        write_code(folder, self.routing_file)


def write_code(folder: Path, routing: Path) -> None:
    """The stand-alone files of a model of architecture dsmoe."""
    sources = {path.name: path for path in REMOTE.glob("*_dsmoe.py")}
    for name, path in (sources | {ACTIVATIONS_FILE: Path(activations.__file__), ROUTING_FILE: routing}).items():
        shutil.copyfile(path, folder / name)


def packed_experts_per_token(config: RunConfig, router: type[Router], options) -> int | None:
    """k, where transformers and vLLM have kernels for the experts: SwiGLU without biases, as many for each token."""
    return router.fixed_experts_per_token(options) if ExpertMLP.of(config.model).is_plain_swiglu else None


def routing_file(router: type[Router]) -> Path:
    """The stand-alone file with which a router decides in an export. Raises `ConversionError` if it has none."""
    file = vars(router).get("inference_file")  # not an inherited one: a subclass may route differently
    if file is None:
        raise ConversionError(
            f"router {router.name!r} ({router.__module__}) cannot be exported: it has no stand-alone file that routes "
            "without dsmoe. Give its class an attribute `inference_file` with the path of a file that defines "
            "build_routing(config); docs/routers.md says what that returns"
        )
    if not Path(file).is_file():
        raise ConversionError(f"router {router.name!r}: its inference_file {file} does not exist")
    return Path(file)


def remote_config(config: RunConfig, router: type[Router], options) -> dict[str, Any]:
    """config.json of architecture dsmoe, everything explicit."""
    model = config.model
    return {
        "model_type": "dsmoe",
        "architectures": ["DsmoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_dsmoe.DsmoeConfig",
            "AutoModel": "modeling_dsmoe.DsmoeModel",
            "AutoModelForCausalLM": "modeling_dsmoe.DsmoeForCausalLM",
            "AutoModelForSequenceClassification": "modeling_dsmoe.DsmoeForSequenceClassification",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in model.moe_layers()],
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "expert_activation": model.expert_activation,
        "expert_bias": model.expert_bias,
        "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "shared_expert_gate": model.moe_shared_expert_gate,
        "qkv_bias": model.add_qkv_bias,
        "expert_rank": router.latent_rank(options),
        "router": {"name": config.router.name, **options.model_dump(mode="json")},
        "num_experts_per_tok": packed_experts_per_token(config, router, options),
        "output_router_logits": False,
        "router_aux_loss_coef": router.switch_loss_coefficient(options, sum(model.moe_layers())),
        "router_dtype": "float32",
        "qk_norm": model.qk_layernorm,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "max_position_embeddings": model.sequence_length,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "experts_backend": "auto",
    }


def export(path: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a run, or one of its checkpoints, as a Hugging Face model folder.

    Returns:
        The content of `export_report.json`.

    Raises:
        DsmoeError: nothing to export, a damaged checkpoint, a model that the format cannot hold, `out` exists, no
            held-out text; or the result does not compute what the run does. No folder is left then.
    """
    shard_size = parse_size(options.max_shard_size)
    formats = ("dsmoe", "auto", *HOSTS)
    if options.format not in formats:
        raise ConversionError(f"--format: found {options.format!r}, expected {one_of(options.format, formats)}")
    with new_folder(out) as folder:
        source = Source.open(path, options.data, options.settings)
        target = Target(source, options)
        plan = target.links()
        weights = _write_weights(target, plan, folder, shard_size)
        _write_json(folder / "config.json", target.config_json())
        _write_json(folder / "generation_config.json", _generation_config(source))
        _write_json(folder / TRAINING_STATE, _training_state(source))
        target.write_code(folder)
        if source.tokenizer is not None:
            if source.identity is not None and source.identity.has_tokenizer:
                source.identity.write_tokenizer(source.run_dir, folder)
            else:
                write_tokenizer(source.tokenizer, folder, source.config.model.sequence_length)
        results, routes = _check(target, folder)
        report = {
            "format_version": 1,
            "architecture": target.architecture,
            "dtype": options.dtype,
            "run": source.run_dir.resolve().name,
            "step": source.reader.manifest.step,
            "sequences_trained": source.reader.manifest.samples,
            "router": source.config.router.name,
            "set": _set(source),
            "fine_tuned_from": None if source.identity is None else source.identity.base_model,
            "weights": weights,
            **results,
            "versions": {"dsmoe": __version__}
            | {p: metadata.version(p) for p in ("torch", "transformers", "tokenizers")},
        }
        names = [part.description.name for part in source.corpus.parts if part.description is not None]
        dataset = ", ".join(names) if len(names) == len(source.corpus.parts) and not options.data else None
        metrics = _last_evaluation(source)
        card = Card(dataset, metrics, options.license, options.language, source.identity, routes)
        write_card(folder, source.config, report, card)
        _write_json(folder / REPORT, report)
    return report


def summary(report: dict[str, Any]) -> str:
    """A report in a few lines."""
    weights, parity, held_out = report["weights"], report["parity"], report["held_out"]
    fp32, half = parity["fp32"], parity.get("bf16")
    lines = [
        f"{report['architecture']}, {weights['parameters']:,} parameters in {weights['tensors']} tensors, "
        f"{weights['files']} file(s), {report['dtype']}",
        f"held to the run on {parity['tokens']:,} tokens of held-out text, in fp32: logits within "
        f"{fp32['max_logit_difference']:.1e}, top-1 {fp32['top1_agreement']:.2%}, KL {fp32['kl_divergence']:.1e} nats, "
        f"{parity['greedy_tokens']} greedy tokens equal",
    ]
    lines += [f"set: {text}" for text in settings_in_words(report["set"])]
    if half is not None:
        flipped = "none recorded" if half["flipped_routes"] is None else f"{half['flipped_routes']:.2%}"
        lines.append(
            f"in bf16 beside fp32: flipped routes {flipped}, top-1 {half['top1_agreement']:.2%}, "
            f"KL {half['kl_divergence']:.1e} nats"
        )
    if report["tokenizer"] is not None:
        lines.append(f"tokenizer: {report['tokenizer']['tokens']:,} tokens encoded alike and decoded back")
    lines.append(f"experts per token: {held_out['experts_per_token']:.2f}; held-out loss {held_out['loss']:.4f}")
    return "\n  ".join(lines)


def _write_weights(target: Target, plan: list[Link], folder: Path, shard_size: int) -> dict[str, Any]:
    """Every tensor into shards, a row of the key table at a time; then the files hold what the plan says."""
    source, buffers = target.source, target.buffers()
    expected = {name: shape for link in plan for name, shape in link.theirs.items()}
    expected |= {name: tuple(tensor.shape) for name, tensor in buffers.items()}
    with ShardWriter(folder, shard_size) as writer:
        for link in track(plan, len(plan), "weights"):
            tensors = [source.read(name) for name in link.ours]
            dtype = target.dtype_of(link.ours[0])
            for name, tensor in link.to_theirs(tensors).items():
                writer.add(name, tensor.to(dtype))
        for name, tensor in buffers.items():
            writer.add(name, tensor)
    check_tensors(expected, ShardReader(folder).shapes, str(folder))
    return {
        "tensors_of_the_run": sum(len(link.ours) for link in plan),
        "tensors": len(expected),
        "parameters": writer.parameters,
        "bytes": writer.bytes,
        "files": len(list(folder.glob("*.safetensors"))),
        "distinct_experts": source.verification.experts,
    }


def _set(source: Source) -> dict[str, dict[str, float]]:
    """What was chosen for inference, beside what the run was trained with."""
    if not source.changed:
        return {}
    trained = saved_config(source.reader.manifest, source.reader.folder).router.options
    options = source.router.Options.model_validate(trained)
    return {name: {"trained": getattr(options, name), "exported": value} for name, value in source.changed.items()}


def _check(target: Target, folder: Path) -> tuple[dict[str, Any], Tensor | None]:
    """The gate, and what held-out text shows of the model, with its routes bool [L, T, E]."""
    source = target.source
    config, tokenizer = source.config, source.tokenizer
    length = min(config.model.sequence_length, tokens_compared(config.model.vocab_size))
    held = heldout(source.corpus, length, sequences_compared(length, config.model.vocab_size))
    batch = held.batch(0, len(held))
    vocab_size = tokenizer.vocab_size if tokenizer is not None else config.model.vocab_size
    sample = Sample(batch["tokens"], vocab_size)
    results: dict[str, Any] = {"tokenizer": None}
    if tokenizer is not None:
        texts = [tokenizer.decode(row) for row in batch["tokens"].tolist()]
        has_own_tokenizer = source.identity is not None and source.identity.has_tokenizer
        results["tokenizer"] = check_tokenizer(tokenizer, folder, texts, as_text=has_own_tokenizer)
    results["parity"], seen = check_parity(
        source.reader.folder, folder, sample, target.dtype, target.dtype_of, source.changed
    )
    loss = _loss(seen, batch["labels"])
    size, bytes_per_token = model_size(config), source.corpus.bytes_per_token
    by_layer = [] if seen.routes is None else seen.routes.sum(-1).double().mean(-1).tolist()
    mean = sum(by_layer) / len(by_layer) if by_layer else 0.0
    unused = (config.model.num_experts - mean) * len(by_layer) * size.expert
    results["held_out"] = {
        "tokens": sample.tokens.numel(),
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "experts_per_token": mean,
        "experts_per_token_by_layer": by_layer,
    }
    results["parameters"] = {
        "total": size.total,
        "active_measured": round(size.total - unused),
        "active_aim": size.active,
    }
    return results, seen.routes


def _loss(seen: Observation, labels_BS: Tensor) -> float:
    """Mean nats per token."""
    losses = [F.cross_entropy(logits.double(), labels) for logits, labels in zip(seen.logits, labels_BS, strict=True)]
    return torch.stack(losses).mean().item()


def _generation_config(source: Source) -> dict[str, Any]:
    content: dict[str, Any] = {"transformers_version": metadata.version("transformers")}
    if source.tokenizer is not None:
        end, ids = source.tokenizer.eod_id, source.tokenizer.vocab_size
        content |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        content |= {} if source.identity is None else source.identity.generation_config(source.run_dir)
        if ids < source.config.model.vocab_size:  # rows that fill the embedding up to a round size; no token has them
            content["suppress_tokens"] = list(range(ids, source.config.model.vocab_size))
    return content


def _training_state(source: Source) -> dict[str, Any]:
    """What training continues from and inference has no use for: averages, integrals and loss coefficients too."""
    manifest, controller = source.reader.manifest, source.controller()
    state = {} if controller is None else {name: tensor.tolist() for name, tensor in controller.state.items()}
    return {"step": manifest.step, "samples": manifest.samples, "router": source.router.name, "controller": state}


def _last_evaluation(source: Source) -> dict[str, Any] | None:
    """The line of metrics.jsonl with the last held-out loss up to this checkpoint."""
    path, step = source.run_dir / "metrics.jsonl", source.reader.manifest.step
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return next((line for line in reversed(lines) if "val_loss" in line and line["step"] <= step), None)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
