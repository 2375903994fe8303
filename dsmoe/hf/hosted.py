"""A Hugging Face causal language model behind the interface that `dsmoe.training.evaluate` asks of a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.errors import ConversionError
from dsmoe.hf.observe import record_routes
from dsmoe.moe import activations
from dsmoe.parallel.collectives import sum_over
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers import available
from dsmoe.routers.recorder import RoutingTotals

REMOTE = Path(__file__).with_name("remote")


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a model of transformers."""
    return (folder / "config.json").is_file()


class HostedModel(nn.Module):
    """The whole model on every process; each reads its own sequences.

    Args:
        folder: with config.json and weights; an export of dsmoe, or any causal language model of transformers.
        dtype: to compute in; None: as the folder says.
        groups: the processes that share the evaluation.
        trust_remote_code: run Python files of the folder that are not dsmoe's own.

    Raises:
        ConversionError: the folder cannot be loaded, or brings code that was not allowed.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype | None, groups: ParallelGroups, trust_remote_code: bool = False
    ):
        super().__init__()
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        foreign = [] if trust_remote_code else foreign_code(folder)
        if foreign:
            raise ConversionError(
                f"{folder} brings code that is not dsmoe's own ({', '.join(foreign)}); read it, and allow it to "
                "run with --trust-remote-code"
            )
        try:
            self.network, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", trust_remote_code=True, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise ConversionError(f"{folder} cannot be loaded as a causal language model: {error}") from error
        wrong = {what: sorted(map(str, names)) for what, names in loading.items() if names}
        if wrong:
            raise ConversionError(f"the weights of {folder} do not fit its model: {wrong}")
        self.groups = groups
        self.recorder = _RouteCounter(self.network, groups)

    def forward(self, tokens: Tensor, labels: Tensor, loss_mask: Tensor, padding_mask: Tensor | None = None):
        """As `LanguageModel.forward` with labels: (None, {"lm": this rank's part of the mean over all ranks}).

        Args:
            tokens, labels: int64 [B, S]; labels[:, i] follows tokens[:, i].
            loss_mask: [B, S], weight of each label.
            padding_mask: bool [B, S], True where a token is padding.
        """
        logits_BSV = self.network(tokens, use_cache=False).logits
        self.recorder.count(tokens.new_ones(tokens.shape).bool() if padding_mask is None else ~padding_mask)
        loss_BS = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        loss_mask = loss_mask.to(loss_BS.dtype)
        everywhere = sum_over(self.groups.dp, loss_mask.sum())
        return None, {"lm": (loss_BS * loss_mask).sum() * (self.groups.dp_size / everywhere.clamp(min=1))}


class _RouteCounter:
    """In the place of a `RoutingRecorder`: counts what the routers of a network leave behind."""

    def __init__(self, network: nn.Module, groups: ParallelGroups):
        self._routes, self._groups = record_routes(network), groups
        self._counts: list[Tensor] = []
        self._tokens: Tensor | int = 0
        self._without: Tensor | int = 0

    def count(self, real_BS: Tensor) -> None:
        """Close a forward pass of which only the tokens in `real_BS` exist."""
        real_T = real_BS.flatten().cpu()
        maps_LTE = [torch.cat(parts) & real_T.unsqueeze(1) for parts in self._routes.values()]
        for parts in self._routes.values():
            parts.clear()
        if maps_LTE:
            self._counts.append(torch.stack([map_TE.sum(0) for map_TE in maps_LTE]))
            self._without += torch.stack([real_T.sum() - map_TE.any(1).sum() for map_TE in maps_LTE])
            self._tokens += real_T.sum()

    def take(self) -> RoutingTotals | None:
        """Totals over all ranks since the last call; None where the network has no routers. Collective."""
        if not self._counts:
            return None
        counts_LE = torch.stack(self._counts).sum(0)
        counts_LE, tokens, without_L = (
            sum_over(self._groups.dp, torch.as_tensor(part)) for part in (counts_LE, self._tokens, self._without)
        )
        totals = RoutingTotals(counts_LE, tokens, without_L, passes=len(self._counts))
        self._counts, self._tokens, self._without = [], 0, 0
        return totals


def foreign_code(folder: Path) -> list[str]:
    """Python files that loading the folder would run, and that neither dsmoe nor an installed router plugin wrote."""
    try:
        classes = json.loads((folder / "config.json").read_bytes()).get("auto_map")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not classes:
        return []
    known = {path.read_bytes() for path in (*REMOTE.glob("*.py"), Path(activations.__file__))}
    known |= {Path(router.inference_file).read_bytes() for router in available().values() if router.inference_file}
    return sorted(path.name for path in folder.glob("**/*.py") if path.read_bytes() not in known)
