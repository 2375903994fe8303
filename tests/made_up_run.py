"""A run that nobody trained: drawn weights, a controller that has moved, and a corpus of made-up sentences."""

from __future__ import annotations

from pathlib import Path

import torch

from dsmoe.checkpoint.write import write_weights
from dsmoe.config import validate_config
from dsmoe.data.prepare import prepare
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

EXPERTS, LAYERS = 6, 2
MODEL = dict(
    num_layers=LAYERS, hidden_size=32, num_attention_heads=2, sequence_length=32, num_experts=EXPERTS,
    moe_ffn_hidden_size=16, vocab_size=320, init_std=0.1,
)  # fmt: skip
ROUTERS = {  # options with which weights of that size route
    "topk": {"k": 2, "softmax": "after"},
    "topk_bias": {"k": 2, "num_groups": 2, "groups_per_token": 1},
    "routing_free": {"rank": 8, "threshold": 0.5},
    "aoe": {"rank": 8},
}
TWINS, IDLE = (1, 4), 3  # experts of which the second is made like the first; one that no token takes


def made_up_dataset(place: Path) -> Path:
    texts, folder = place / "texts", place / "dataset"
    texts.mkdir()
    for number in range(40):
        lines = (f"The token {number * line} goes to expert {line % 7} of layer {number % 5}.\n" for line in range(30))
        (texts / f"{number}.txt").write_text("".join(lines))
    prepare([str(texts)], folder, vocab_size=310, valid_fraction=0.2, workers=1)
    return folder


def made_up_run(folder: Path, dataset: Path, router: str, twins: bool = False) -> Path:
    """With `twins`, two experts of each layer are the same, and one gets no token where experts do not compete."""
    tree = {
        "model": MODEL, "router": {"name": router, **ROUTERS.get(router, {})}, "data": {"path": str(dataset)},
        "training": {"eval_sequences": 16, "global_batch_size": 4}, "logging": {"tensorboard": False},
    }  # fmt: skip
    config = validate_config(tree, option_classes())
    shapes = logical_shapes(config.model, config.router)
    generator = torch.Generator().manual_seed(1)
    tensors = {n: 0.15 * torch.randn(s, generator=generator) + float(len(s) == 1) for n, s in shapes.items()}
    router_class = get(router)
    options = router_class.Options.model_validate(config.router.options)
    controller = router_class.make_controller(options, LAYERS, EXPERTS)
    state = None if controller is None else dict(controller.state)
    for key, value in (state or {}).items():
        moved = value + 0.1 * torch.rand(value.shape, generator=generator)
        state[key] = torch.tensor(9000) if key == "updates" else moved
    if twins:
        _make_twins(tensors, state or {})
    folder.mkdir(parents=True)
    write_weights(folder, config, shapes, tensors.items(), state, copied_experts=twins)
    Tokenizer.load(dataset).copy_to(folder)
    return folder


def _make_twins(tensors: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    first, second = TWINS
    for key in tensors:
        for room in ("experts", "router"):
            if f".{room}.{second}." in key:
                tensors[key] = tensors[key.replace(f".{room}.{second}.", f".{room}.{first}.")].clone()
        if f".router.{IDLE}." in key:
            tensors[key] = torch.zeros_like(tensors[key])
    for key, value in tensors.items():
        if ".router." in key and value.shape[:1] == (EXPERTS,):
            value[second] = value[first]
            if not key.endswith((".bias", ".scale")):
                value[IDLE] = 0.0
    for value in state.values():
        if value.shape[:2] == (LAYERS, EXPERTS):
            value[:, second] = value[:, first]
            value[:, IDLE] = 0.5  # a cutoff above the logits of a row of zeros
