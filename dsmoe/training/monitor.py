"""Routing in DeepSpeed's monitor: curves of single layers and their spread, heat maps, and a text in colours.

    dsmoe/layers/NAME/LAYER        of each MoE layer, every `logging.layers` steps: experts_per_token, expert_imbalance
                                   (max/mean), no_expert, dead_experts
    dsmoe/percentiles/NAME/p90     over the layers: p10, p50, p90, and their largest
    load of experts                picture, every `logging.pictures` steps: layers x experts, load over the layer's mean
    experts per token              picture, at each evaluation: the first held-out sequence, each token on the colour of
                                   how many experts it took, as an export would route it

Curves go to TensorBoard, W&B and CSV files, pictures to the first two. The text costs no forward pass of its own: its
routes are those of the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsmoe.config.schema import LoggingConfig
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.routers.recorder import RoutingTotals
from dsmoe.training.metrics import Warn, due
from dsmoe.training.pictures import coloured_text, load_heat_map

PERCENTILES = {"p10": 10, "p50": 50, "p90": 90, "max": 100}
# How TensorBoard's page of custom scalars groups the curves.
CHARTS = {
    "routing by layer": {
        name: ["Multiline", [f"dsmoe/layers/{name}/.*"]]
        for name in ("experts_per_token", "expert_imbalance", "no_expert", "dead_experts")
    },
    "routing over layers": {
        name: ["Margin", [f"dsmoe/percentiles/{name}/{percentile}" for percentile in ("p50", "p10", "p90")]]
        for name in ("experts_per_token", "expert_imbalance")
    },
}


# W&B's axis of each curve, by the start of its name. It drops what comes at a smaller step than its last, and DeepSpeed
# writes at numbers of samples where dsmoe writes at steps, so neither may be W&B's own.
AXES = {"Train/": "Train/Samples", "dsmoe/": "dsmoe/step"}


class FirstSequence:
    """Sees the routes of the first sequence of the forward passes inside its `with` block, on this rank.

    Attributes:
        experts_LS: int64, how many experts each token took, after the block.
    """

    def __init__(self, routers: list):
        self.routers = routers
        self._active: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> FirstSequence:
        self._hooks = [router.register_forward_hook(self._note) for router in self.routers]
        return self

    def _note(self, module, args, output) -> None:
        if len(self._active) < len(self.routers):
            batch = args[0].size(1)  # [S, B, H]
            self._active.append(output.map_TE.view(-1, batch, output.map_TE.size(1))[:, 0].sum(1))

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def experts_LS(self) -> Tensor:
        return torch.stack(self._active)


class RoutingMonitor:
    """What DeepSpeed's `MonitorMaster` gets of routing, on rank 0; nothing on others, or without a monitor.

    Args:
        monitor: the engine's, whose failures are forgiven (`dsmoe.training.metrics.MetricsWriter`).
        tokenizer: None: no text in colours.
    """

    def __init__(self, monitor, rank: int, logging: LoggingConfig, tokenizer: Tokenizer | None, warn: Warn):
        self.monitor = monitor if rank == 0 and monitor is not None and monitor.enabled else None
        self.logging, self.tokenizer, self._warn = logging, tokenizer, warn
        if (writer := self._tensorboard()) is not None:
            self.monitor.tb_monitor.write_events = partial(write_to_tensorboard, writer)
            if logging.layers:
                writer.add_custom_scalars(CHARTS)
        if (of_wandb := self._wandb()) is not None:
            import wandb

            for start, axis in AXES.items():
                wandb.define_metric(f"{start}*", step_metric=axis)
            of_wandb.write_events = write_to_wandb

    def _tensorboard(self):
        tensorboard = getattr(self.monitor, "tb_monitor", None)
        return None if tensorboard is None else tensorboard.summary_writer

    def _wandb(self):
        return getattr(self.monitor, "wandb_monitor", None)

    @property
    def draws(self) -> bool:
        """Whether there is a place for pictures."""
        wanted = self.monitor is not None and self.monitor.enabled and self.logging.pictures > 0
        return wanted and (self._tensorboard() is not None or self._wandb() is not None)

    def after_step(self, step: int, totals: RoutingTotals, layers: dict[str, list[float]]) -> None:
        """layers: of `dsmoe.training.metrics.layer_metrics`."""
        if self.monitor is None or not self.monitor.enabled:
            return
        if due(step, self.logging.layers):
            self.monitor.write_events(list(layer_events(step, layers)))
        if due(step, self.logging.pictures) and self.draws:
            self._draw("load of experts", load_heat_map(totals.counts_LE.cpu().numpy()), step)

    def wants_text(self) -> bool:
        return self.draws and self.tokenizer is not None

    def text(self, step: int, tokens_S: Tensor, experts_LS: Tensor) -> None:
        """A sequence and how many experts each of its tokens took in each layer."""
        values = experts_LS.double().mean(0).tolist()
        caption = (
            f"step {step}: experts per token, mean over {len(experts_LS)} MoE layers, from {min(values):.2f} (dark) to "
            f"{max(values):.2f} (light)"
        )
        self._draw(
            "experts per token", coloured_text(self.tokenizer.texts_of(tokens_S.tolist()), values, caption), step
        )

    def _draw(self, name: str, pixels: np.ndarray, step: int) -> None:
        try:
            if (writer := self._tensorboard()) is not None:
                writer.add_image(name, pixels, step, dataformats="HWC")
            if self._wandb() is not None:
                import wandb

                wandb.log({name: wandb.Image(pixels), AXES["dsmoe/"]: step})
        except Exception as error:  # a full disk, a deleted folder: a log never ends a run
            self.monitor.enabled = False
            self._warn(f"the monitor fails and is left out from now on: {error}")


def write_to_tensorboard(writer, events: Sequence[tuple[str, float, int]]) -> None:
    """(name, value, step) of curves. All that have a step in one record: DeepSpeed writes one for each, and TensorBoard
    checks each byte of a record in Python, which is most of what watching a small model costs."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for step, group in groupby(events, key=lambda event: event[2]):
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value, _ in group]
        writer.file_writer.add_summary(Summary(value=values), step)
    writer.flush()


def write_to_wandb(events: Sequence[tuple[str, float, int]]) -> None:
    """(name, value, step) of curves, each beside the value of its axis."""
    import wandb

    def place(event: tuple[str, float, int]) -> tuple[str, int]:
        return next((axis for start, axis in AXES.items() if event[0].startswith(start)), AXES["dsmoe/"]), event[2]

    for (axis, step), group in groupby(events, place):
        wandb.log({axis: step} | {name: value for name, value, _ in group})


def layer_events(step: int, layers: dict[str, list[float]]):
    """(name, value, step) of every curve."""
    for name, values in layers.items():
        for layer, value in enumerate(values):
            yield f"dsmoe/layers/{name}/{layer:02d}", value, step
        for percentile, value in zip(PERCENTILES, np.percentile(values, list(PERCENTILES.values()))):
            yield f"dsmoe/percentiles/{name}/{percentile}", float(value), step
