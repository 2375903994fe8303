"""What a trained model's experts have become: how alike they are, who uses them, how steadily, and what that costs.

`python -m dsmoe.lab.study.probe RUN` writes RUN/probe.json:

    step, tokens        of the checkpoint; how many held-out tokens were read
    kinds               share of the tokens of each kind (`dsmoe.lab.study.probe.routes.kind_of`)
    layers              a list, MoE layer by MoE layer, each with
      experts_per_token, by_kind, by_position      means; positions in eight equal parts of a sequence
      load, dead, entropy, counts                  busiest expert over the mean; share without a token; entropy of the
                                                   load over log E; routes of each expert
      cosine, cka, weights                         {"mean", "max", "similar"} over pairs of experts: of outputs on the
                                                   same tokens, of their geometry, and of hidden units; `similar` is the
                                                   share of pairs above 0.9. `weights` also has `chance`, what random
                                                   units of that shape reach
      gradient_norm                                of each expert's weights on held-out tokens
      flips_checkpoint, flips_bf16                 share of routes that another choice was made for: against the
                                                   checkpoint before (missing if there is none), and with bf16 inputs
    latency             a list: `setting` of the router, its `experts_per_token` and held-out `loss`, and seconds to the
                        first token after half a sequence and for each one after that, at batch 1
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsmoe.checkpoint.files import complete_checkpoints, folder_of, step_of
from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.data.dataset import heldout, open_corpus
from dsmoe.errors import ConfigError
from dsmoe.lab.study.probe.latency import latencies
from dsmoe.lab.study.probe.routes import SeenLayer, flips, kinds_of, look, read_layers
from dsmoe.lab.study.probe.similarity import similarity
from dsmoe.training.experts import packed_experts

FILE = "probe.json"


def probe(run: Path, data: str | None = None, tokens: int = 4096) -> dict:
    """Read the newest checkpoint of a run, or a checkpoint, in one process.

    Args:
        data: a dataset as `data.path` takes it; None: the run's own.
        tokens: of held-out text, rounded to whole sequences.

    Raises:
        CheckpointError, DataError: the run or its data is not there.
        ConfigError: the model has no MoE layer, or there are fewer tokens than a sequence has.
    """
    trained = TrainedModel.load(run)
    length = trained.config.model.sequence_length
    if not any(trained.config.model.moe_layers()):
        raise ConfigError(["model.moe_layer_freq: found no MoE layer, and there is nothing else to read"], str(run))
    if tokens < length:
        raise ConfigError([f"--tokens: found {tokens}, expected at least a sequence ({length})"], "the probe")
    source = trained.config.data if data is None else trained.config.data.model_copy(update={"path": data})
    corpus = open_corpus(source)
    held = heldout(corpus, length, tokens // length)
    batch = held.batch(0, len(held))
    layers = look(trained.model, batch["tokens"])
    kinds = kinds_of(batch["tokens"], corpus.tokenizer)
    reports = read_layers(layers, kinds, (len(held), length))
    norms = gradient_norms(trained.model, batch)
    before = _before(trained, batch["tokens"])
    for place, (layer, report) in enumerate(zip(layers, reports, strict=True)):
        report |= similarity(layer.module, layer.hidden_TH)
        report["gradient_norm"] = norms[place].tolist()
        report["flips_bf16"] = flips(layer.map_TE, layer.rerouted(torch.bfloat16))
        if before is not None:
            report["flips_checkpoint"] = flips(layer.map_TE, before[place].map_TE)
    shares = {kind: float((kinds == number).mean()) for number, kind in enumerate(kinds.names)}
    return {
        "step": trained.step, "tokens": batch["tokens"].numel(), "kinds": shares, "layers": reports,
        "latency": latencies(trained, held),
    }  # fmt: skip


def gradient_norms(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """L2 norm of the training loss's gradient in each expert's weights: fp64 [L, E]."""
    packed = packed_experts(model)
    loss, _ = model(batch["tokens"], batch["labels"])
    gradients = torch.autograd.grad(loss, [weights.parameter for weights in packed])
    model.recorder.take()
    squares_LE = torch.zeros(len(model.recorder.routers), model.config.num_experts, dtype=torch.float64)
    for weights, gradient in zip(packed, gradients, strict=True):
        squares_LE[weights.layer] += torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).square()
    return squares_LE.sqrt()


def _before(trained: TrainedModel, tokens_BS: torch.Tensor) -> list[SeenLayer] | None:
    """The same tokens in the checkpoint before this one."""
    earlier = [path for path in complete_checkpoints(trained.run_dir) if step_of(path) < trained.step]
    if not earlier:
        return None
    newest = max(step_of(path) for path in earlier)
    return look(TrainedModel.load(folder_of(trained.run_dir, newest)).model, tokens_BS)
