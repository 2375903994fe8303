"""A run or an export with fewer experts: read, choose, merge, write, and the loss before and after on held-out text.

Experts are chosen on training text, the losses are of held-out text. A run becomes a run of step 0 that trains and
exports like any other; its optimizer starts without state. An export becomes an export: it is imported, pruned and
exported again.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.checkpoint.files import find_checkpoint, read_manifest
from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.checkpoint.write import write_weights
from dsmoe.config import RunConfig, validate_config
from dsmoe.data.dataset import Blend, Corpus, heldout, training_stream
from dsmoe.data.tokenizer import TOKENIZER_FILES, Tokenizer
from dsmoe.errors import ConfigError
from dsmoe.hf.export import ExportOptions, export
from dsmoe.hf.hosted import is_hugging_face
from dsmoe.hf.importing import ImportOptions, import_model
from dsmoe.hf.shards import new_folder
from dsmoe.inference.evaluate import open_data
from dsmoe.lab.prune.choose import LayerPlan, plan_layers
from dsmoe.lab.prune.merge import fill
from dsmoe.lab.prune.observe import LayerSeen, observe
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.model.size import model_size
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes
from dsmoe.runtime.files import write_atomically
from dsmoe.training.evaluate import evaluate

REPORT = "prune_report.json"
BATCH = 8


@dataclass(frozen=True)
class PruneOptions:
    """What may go, and on which text that is judged.

    Attributes:
        experts: how many stay in a layer; None: as few as the two limits allow.
        dead: an expert with at most this share of the mean load is dropped; 0: one without any token.
        similar: experts whose outputs have at least this cosine are merged.
        data: prepared dataset; None: the run's own.
        sequences: of training text, to choose by.
    """

    experts: int | None = None
    dead: float = 0.0
    similar: float = 0.9
    data: str | None = None
    sequences: int = 32

    def check(self, path: Path) -> None:
        """Raises `ConfigError`."""
        problems = []
        if self.dead < 0:
            problems.append(f"--dead: found {self.dead:g}, expected a share of the mean load, 0 or more")
        if not 0 < self.similar <= 1:
            problems.append(f"--similar: found {self.similar:g}, expected a cosine, above 0 and up to 1")
        if self.sequences < 1:
            problems.append(f"--sequences: found {self.sequences}, expected 1 or more")
        if is_hugging_face(path) and self.data is None:
            problems.append(
                "--data: a Hugging Face model does not say on what; name a prepared dataset of its tokenizer"
            )
        if problems:
            raise ConfigError(problems, "the command line")


def prune(path: Path, out: Path, options: PruneOptions) -> dict[str, Any]:
    """Write the pruned run or export. Returns the content of `prune_report.json`.

    Raises:
        DsmoeError: nothing to prune, options that do not fit, no data, `out` exists. Nothing is left then.
    """
    options.check(path)
    if not is_hugging_face(path):
        return _prune_run(path, out, options)
    architecture = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    with tempfile.TemporaryDirectory(prefix="dsmoe-prune-") as place:
        run, pruned = Path(place, path.resolve().name), Path(place, "pruned", out.name)
        import_model(path, run, ImportOptions(check=False))
        report = _prune_run(run, pruned, options) | {"source": str(path)}
        format = "dsmoe" if architecture == "dsmoe" else "auto"
        export(pruned, out, ExportOptions(format=format, data=options.data))
    write_atomically(out / REPORT, json.dumps(report, indent=2).encode())
    return report


def _prune_run(path: Path, out: Path, options: PruneOptions) -> dict[str, Any]:
    with new_folder(out) as place:
        trained = TrainedModel.load(path)
        config = trained.config
        if config.model.num_experts == 1:
            raise ConfigError([f"{path} has one expert a layer, and nothing to prune"], "the command line")
        data = config.data if options.data is None else config.data.model_copy(
            update={"path": options.data, "valid_path": None, "tokenizer": None}
        )  # fmt: skip
        corpus = open_data(data, trained.run_dir, config.model.vocab_size)
        stream = training_stream(corpus, config.model.sequence_length, config.training.seed, config.data.cache_dir)
        seen = observe(trained.model, stream.batch(0, options.sequences)["tokens"])
        router = get(config.router.name)
        router_options = router.Options.model_validate(config.router.options)
        plans = plan_layers(
            np.stack([layer.counts_E.cpu().numpy() for layer in seen]),
            np.stack([layer.cosine_EE().cpu().numpy() for layer in seen]),
            router.expert_groups(router_options), options.experts, options.dead, options.similar,
        )  # fmt: skip
        new_config = pruned_config(config, len(plans[0].clusters), out)
        model = _build(new_config, trained)
        fill(model, trained.model, seen, plans)
        losses = [_held_out(config, corpus, each, trained) for each in (trained.model, model)]
        tensors = dict(logical_tensors(model))
        source = read_manifest(find_checkpoint(str(path), path))
        write_weights(
            place, new_config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.items(),
            None if model.controller is None else model.controller.state, copied_experts=source.copied_experts,
        )  # fmt: skip
        if any((trained.run_dir / name).is_file() for name in TOKENIZER_FILES):
            Tokenizer.load(trained.run_dir).copy_to(place)
        write_atomically(place / "config.yaml", new_config.to_yaml().encode())
        report = _report(path, trained, new_config, seen, plans, losses)
        write_atomically(place / REPORT, json.dumps(report, indent=2).encode())
    return report


def pruned_config(config: RunConfig, experts: int, out: Path) -> RunConfig:
    """The configuration of a run in `out` with so many experts. Raises `ConfigError` where the router needs more."""
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    tree = config.model_dump(mode="json")
    tree["model"]["num_experts"] = experts
    tree["router"] |= router.options_for_experts(options, config.model.num_experts, experts)
    tree["parallel"]["expert_parallel"] = math.gcd(config.parallel.expert_parallel, experts)
    tree["logging"]["run_dir"] = str(out)
    tree["training"] |= {"resume": "auto", "decay_from": None}
    return validate_config(tree, option_classes(), [], source=f"the configuration with {experts} experts a layer")


def _build(config: RunConfig, trained: TrainedModel) -> LanguageModel:
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    model = LanguageModel(config.model, (router, options), trained.groups, config.training.seed)
    device = next(trained.model.parameters()).device
    if model.controller is not None:
        model.controller.to(device)
    return model.to(device).eval()


def _held_out(config: RunConfig, corpus: Corpus | Blend, model: LanguageModel, trained: TrainedModel) -> dict[str, Any]:
    held = heldout(corpus, config.model.sequence_length, config.training.eval_sequences)
    metrics = evaluate(model, held, BATCH, trained.groups, corpus.bytes_per_token)
    names = ("loss", "bpb", "experts_per_token", "experts_per_token_by_layer")
    return {name: metrics[f"val_{name}"] for name in names if f"val_{name}" in metrics}


def _report(
    path: Path, trained: TrainedModel, config: RunConfig, seen: list[LayerSeen], plans: list[LayerPlan],
    losses: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    before, after = losses
    return {
        "format_version": 1,
        "source": str(path),
        "step": trained.step,
        "router": config.router.name,
        "experts": {"before": trained.config.model.num_experts, "after": config.model.num_experts},
        "parameters": {"before": model_size(trained.config).total, "after": model_size(config).total},
        "held_out": {"before": before, "after": after},
        "layers": [
            {"dropped": plan.dropped, "merged": plan.merged, "tokens": plan.counts_E.tolist()} for plan in plans
        ],
    }


def summary(out: Path, report: dict[str, Any]) -> str:
    """What was pruned, in a few lines."""
    experts, parameters = report["experts"], report["parameters"]
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    dropped = sum(len(layer["dropped"]) for layer in report["layers"])
    merged = sum(len(cluster) for layer in report["layers"] for cluster in layer["merged"])
    into = sum(len(layer["merged"]) for layer in report["layers"])
    return (
        f"{out}: {experts['before']} -> {experts['after']} experts a layer, {parameters['before']:,} -> "
        f"{parameters['after']:,} parameters\n"
        f"  over {len(report['layers'])} MoE layers {dropped} dropped, {merged} merged into {into}\n"
        f"  held-out loss {before['loss']:.4f} -> {after['loss']:.4f}; experts per token "
        f"{before['experts_per_token']:.2f} -> {after['experts_per_token']:.2f}"
    )
