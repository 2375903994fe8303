"""Record the routes of a trained run as the benchmark's real load: `python -m dsmoe.lab.benchmark.trace RUN`.

Held-out text goes through the run's model, whose router must give every token the same number of experts. The layer
whose load is least even is kept: experts of 4096 tokens in reading order, with which experts go together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from dsmoe.errors import DataError
from dsmoe.lab.benchmark.problem import TRACES
from dsmoe.runtime.command_line import run

TOKENS = 4096


@torch.no_grad()
def record(path: Path, tokens: int = TOKENS, data: str | None = None) -> tuple[np.ndarray, int, int]:
    """Routes int16 [tokens, k] of the least evenly loaded MoE layer, its number (of the MoE layers), and E.

    Raises `DataError` where tokens have different numbers of experts or the held-out text is too short.
    """
    from dsmoe.checkpoint.restore import TrainedModel
    from dsmoe.data.dataset import heldout, open_corpus
    from dsmoe.routers.base import Router

    trained = TrainedModel.load(path)
    source = trained.config.data if data is None else trained.config.data.model_copy(update={"path": data})
    length = trained.config.model.sequence_length
    held = heldout(open_corpus(source), length, -(-tokens // length))
    if len(held) * length < tokens:
        raise DataError(f"{source.path} holds out {len(held) * length} tokens, expected at least {tokens}")
    routers = [module for module in trained.model.modules() if isinstance(module, Router)]
    maps: list[list[torch.Tensor]] = [[] for _ in routers]
    for router, layer_maps in zip(routers, maps, strict=True):
        router.register_forward_hook(
            lambda module, args, output, layer_maps=layer_maps: layer_maps.append(output[1].cpu())
        )
    for number in range(len(held)):
        trained.model(held.batch(number, 1)["tokens"])
    maps_LTE = torch.stack([torch.cat(layer_maps)[:tokens] for layer_maps in maps])
    per_token = maps_LTE.sum(2).unique()
    if len(per_token) > 1:
        raise DataError(f"{path}: tokens have {per_token.tolist()} experts, expected the same number for all")
    layer = int(maps_LTE.sum(1).amax(1).argmax())
    routes = maps_LTE[layer].nonzero()[:, 1].view(tokens, -1)
    return routes.numpy().astype(np.int16), layer, maps_LTE.size(2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dsmoe.lab.benchmark.trace", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument("--data", metavar="PATH", help="prepared text, where it is not where the run had it")
    parser.add_argument("--output", type=Path, default=TRACES / "routes.npz", metavar="FILE")
    arguments = parser.parse_args()
    routes, layer, experts = record(arguments.run, data=arguments.data)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output, routes=routes, experts=experts)
    counts = np.bincount(routes.ravel(), minlength=experts)
    print(
        f"{arguments.output}: {len(routes)} tokens of MoE layer {layer}, {routes.shape[1]} of {experts} experts; "
        f"the fullest has {counts.max() / counts.mean():.2f} times the mean load"
    )


if __name__ == "__main__":
    run(main)
