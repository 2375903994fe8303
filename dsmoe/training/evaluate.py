"""Held-out loss of a model. Changes nothing: not the weights, not a controller, not the data position."""

from __future__ import annotations

import math

import torch

from dsmoe.parallel.collectives import sum_over
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.runtime.device import device_name
from dsmoe.training.metrics import experts_per_token_by_layer, routing_metrics


@torch.no_grad()
def evaluate(engine, heldout, batch_size: int, groups: ParallelGroups, bytes_per_token: float | None) -> dict:
    """Loss per token and per byte over all held-out sequences; collective.

    Args:
        engine: DeepSpeed's engine around a `LanguageModel`; such a model alone; or what has its interface, and `None`
            for the routing totals where nothing is routed.
        heldout: a `dsmoe.data.dataset.HeldOut`, the same on every rank.
        batch_size: sequences per rank and forward pass.
        bytes_per_token: of the held-out text; None leaves `val_bpb` out.

    Returns:
        val_loss (nats per token), val_ppl, val_bpb (bits per byte), val_experts_per_token and the same by MoE layer, a
        list: val_experts_per_token_by_layer. The last two are left out where nothing is routed.
    """
    device = device_name()
    count, world, rank = len(heldout), groups.dp_size, groups.dp_rank
    total = torch.zeros((), dtype=torch.float64, device=device)
    model = getattr(engine, "module", engine)
    was_training = model.training
    engine.eval()
    try:
        for first in range(0, count, world * batch_size):
            real = min(count, first + world * batch_size) - first  # sequences of this round, on all ranks
            own = min(batch_size, max(0, real - rank * batch_size))
            # Every rank takes part in every round: one with nothing left sends a sample that counts as padding.
            batch = heldout.batch(first + rank * batch_size if own else 0, own or 1)
            tokens, labels = batch["tokens"].to(device), batch["labels"].to(device)
            present = torch.full(tokens.shape, own > 0, device=device)
            padding = None if real == world * batch_size else ~present
            _, parts = engine(tokens, labels, loss_mask=present, padding_mask=padding)
            total += parts["lm"].double() * real / world  # "lm" is this rank's part of the mean over `real` sequences
    finally:
        engine.train(was_training)
        routing = model.recorder.take()
    loss = (sum_over(groups.dp, total) / count).item()
    results: dict[str, float | list[float]] = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}
    if bytes_per_token is not None:
        results["val_bpb"] = loss / math.log(2) / bytes_per_token
    if routing is not None:
        results["val_experts_per_token"] = routing_metrics(routing, groups.ep_size)["experts_per_token"]
        results["val_experts_per_token_by_layer"] = experts_per_token_by_layer(routing)
    return results
