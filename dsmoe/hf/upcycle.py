"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense model becomes an MoE whose experts are its own MLPs.

Attention, norms and embeddings stay. In every MoE layer each expert begins as the layer's MLP, and the router is drawn
anew, as in training from scratch. Where the gates of a token sum to 1 and experts are whole copies, the model computes
what the dense one did.

granularity G   An expert is 1/G of the MLP: expert e has the e mod G-th part of its inner neurons, and a down
                projection G times as large, so that the experts' mean is the MLP. Which parts a token gets is up to the
                router, so the model is the dense one only where it gets all of them in equal shares.
noise X         Adds N(0, X std(W)) to each expert's matrix W, so that experts differ from the start.
rank r          Experts that score themselves have their gate projection W in the form B A, with A drawn anew, since its
                norms are the scores. B is the best one in the least-squares sense, and keeps of W what lies in A's r
                directions: all of it only if r reaches the hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsmoe.config import RunConfig
from dsmoe.errors import ConversionError
from dsmoe.hf.table import LAYER
from dsmoe.model.initialize import generator_of
from dsmoe.model.skeleton import initial_router
from dsmoe.moe.expert_mlp import ExpertMLP
from dsmoe.routers import get
from dsmoe.routers.topk import TopKRouter

_MLP = re.compile(r"gpt\.decoder\.layers\.(\d+)\.mlp\.linear_fc([12])\.weight")
NUM_EXPERTS = 8
ROUTER = {
    "name": TopKRouter.name,
    "k": 2,
    "softmax": "after",
}  # gates sum to 1: the model starts as the dense one


@dataclass(frozen=True)
class UpcyclingOptions:
    """How a dense model becomes an MoE.

    Attributes:
        num_experts: E of each MoE layer.
        granularity: G, parts that the dense MLP is cut into.
        noise: standard deviation of what is added to experts, in units of each matrix's own.
    """

    num_experts: int = NUM_EXPERTS
    granularity: int = 1
    noise: float = 0.0

    def check(self, ffn_hidden_size: int) -> None:
        """Raises `ConversionError` for values that do not fit each other or the dense MLP's width."""
        problems = []
        if self.num_experts < 1:
            problems.append(f"--experts: found {self.num_experts}, expected 1 or more")
        if self.granularity < 1 or ffn_hidden_size % max(1, self.granularity):
            problems.append(
                f"--granularity: found {self.granularity}, expected a divisor of the MLP's width ({ffn_hidden_size})"
            )
        elif self.num_experts % self.granularity:
            problems.append(
                f"--experts: found {self.num_experts}, expected a multiple of --granularity {self.granularity}"
            )
        if not 0 <= self.noise < 10:
            problems.append(f"--noise: found {self.noise}, expected 0 or more, for example 0.01")
        if problems:
            raise ConversionError("; ".join(problems))

    @property
    def copies(self) -> bool:
        """Whether some experts of a layer are equal at the start."""
        return not self.noise and self.num_experts > self.granularity


@dataclass
class Upcycler:
    """Turns the tensors of the dense model, as they come, into those of the MoE.

    Args:
        config: of the MoE.

    Attributes:
        gate_kept: with self-scoring experts, for each expert the share of its gate projection's squared norm that the
            low-rank form holds.
    """

    config: RunConfig
    options: UpcyclingOptions
    gate_kept: list[float] = field(default_factory=list)

    def __post_init__(self):
        self._router_class = get(self.config.router.name)
        self._options = self._router_class.Options.model_validate(self.config.router.options)
        self._rank = self._router_class.latent_rank(self._options)
        if self.config.model.moe_shared_expert_intermediate_size:
            raise ConversionError(
                "model.moe_shared_expert_intermediate_size: upcycling makes routed experts only; leave it out"
            )
        if not ExpertMLP.of(self.config.model).is_plain_swiglu:
            raise ConversionError(
                "model.expert_activation, model.expert_bias: experts begin as the dense model's MLP, which is swiglu "
                "without biases; leave them out"
            )

    @property
    def keeps_the_function(self) -> bool:
        """Whether the MoE computes what the dense model does: whole copies, and gates that sum to 1 for every token."""
        whole_copies = self.options.granularity == 1 and not self.options.noise and not self._rank
        return whole_copies and self._options.gates_sum_to_one()

    def routers(self) -> Iterator[tuple[str, Tensor]]:
        """The new routers' tensors of all MoE layers."""
        for layer, is_moe in enumerate(self.config.model.moe_layers()):
            if is_moe:
                yield from self._router(layer).items()

    def _router(self, layer: int) -> dict[str, Tensor]:
        return initial_router(self.config.model, self.config.router, layer, self.config.training.seed)

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What a tensor of the dense model, fp32, becomes: itself, or a part of every expert of its layer."""
        match = _MLP.fullmatch(name)
        if match is None or not self.config.model.moe_layers()[int(match[1])]:
            yield name, tensor
            return
        layer, projection = int(match[1]), match[2]
        experts = f"{LAYER.format(layer=layer)}mlp.experts"
        latents = self._router(layer) if self._rank and projection == "1" else {}
        for expert in range(self.options.num_experts):
            part = expert % self.options.granularity
            if projection == "2":
                down = tensor.chunk(self.options.granularity, dim=1)[part] * self.options.granularity
                yield from self._noisy(f"{experts}.{expert}.down_proj", down)
                continue
            gate, up = (half.chunk(self.options.granularity)[part] for half in tensor.chunk(2))
            if self._rank:
                reduce_rH = latents[f"{LAYER.format(layer=layer)}mlp.router.{expert}.reduce_proj"]
                yield from self._noisy(f"{experts}.{expert}.gate_proj", self._through(reduce_rH, gate))
                yield from self._noisy(f"{experts}.{expert}.up_proj", up)
            else:
                yield from self._noisy(f"{experts}.{expert}.gate_up_proj", torch.cat((gate, up)))

    def _through(self, reduce_rH: Tensor, gate_FH: Tensor) -> Tensor:
        """B [F, r] for which B A is nearest to the gate projection, given A [r, H]."""
        latent_Fr = torch.linalg.lstsq(reduce_rH.double().t(), gate_FH.double().t()).solution.t().float()
        share = (latent_Fr @ reduce_rH).square().sum() / gate_FH.square().sum().clamp(min=1e-30)
        self.gate_kept.append(share.item())
        return latent_Fr

    def _noisy(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if self.options.noise:
            drawn = torch.empty(tensor.shape).normal_(generator=generator_of(self.config.training.seed, name))
            tensor = tensor + self.options.noise * tensor.std() * drawn
        yield name, tensor

    def report(self) -> dict[str, object]:
        """What was done, for import_report.json; after all tensors."""
        content = {
            "method": "sparse upcycling, arXiv 2212.05055",
            "experts": self.options.num_experts,
            "granularity": self.options.granularity,
            "expert_width": self.config.model.moe_ffn_hidden_size,
            "noise": self.options.noise,
            "routers": f"{self.config.router.name}, drawn with seed {self.config.training.seed}",
            "computes_what_the_dense_model_does": self.keeps_the_function,
        }
        if self.gate_kept:
            content["gate_projection_kept"] = sum(self.gate_kept) / len(self.gate_kept)
        return content
