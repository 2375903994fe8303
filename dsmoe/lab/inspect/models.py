"""What can be inspected, behind one interface: a run of ours, an export of ours, a Mixtral, OLMoE or Qwen3-MoE.

Routes are read with forward hooks, on the tensors that the model itself continues with, and a hook may change them:
that is how a sweep drops routes (`Setting`).

Shapes: S tokens of one sequence, E experts, k routes of a token, H hidden, F expert width, r latent width,
V vocabulary.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsmoe.checkpoint.files import complete_checkpoints, folder_of, is_checkpoint, step_of
from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, ConfigError, ConversionError
from dsmoe.hf.hosted import HostedModel, is_hugging_face
from dsmoe.hf.native import HOSTS
from dsmoe.moe.activations import ACTIVATIONS, Activation
from dsmoe.moe.layer import moe_layers_of
from dsmoe.parallel.groups import create_groups, start_processes
from dsmoe.routers import get
from dsmoe.routers.base import RouterOptions
from dsmoe.routers.inference import SETTINGS, routing_with, setting_of
from dsmoe.routers.routing import RoutingResult
from dsmoe.routers.top_p import top_p_map
from dsmoe.runtime.device import device_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One value of a sweep. `is_option`: it replaces the option of the router that decides; else it drops routes that
    the router chose."""

    name: str  # of SETTINGS
    value: float
    is_option: bool

    def cut(self, probs_SE: Tensor, map_SE: Tensor) -> Tensor:
        """The routes that stay, bool [S, E]; weights of the others become 0, and nothing is renormalized.

        theta: routes of at least that weight. k: of each token the k with the largest weights. p: of each token the
        fewest, largest first, whose share of its weights is more than p.
        """
        if self.name == "theta":
            return map_SE & (probs_SE >= self.value)
        if self.name == "k":
            largest = probs_SE.topk(min(int(self.value), probs_SE.size(1)), dim=-1).indices
            return map_SE & torch.zeros_like(map_SE).scatter(1, largest, True)
        share_SE = probs_SE / probs_SE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return map_SE & top_p_map(share_SE, self.value, "above")


@dataclass(frozen=True)
class LayerRoutes:
    """One MoE layer on one sequence."""

    hidden_SH: Tensor  # what router and experts read
    probs_SE: Tensor  # fp32, 0 where inactive
    map_SE: Tensor  # bool


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of a layer, fp32: down(function(gate x, up x)). A gate of low rank is multiplied out.

    Attributes:
        up_EFH: None where the activation has no gate, and `gate_EFH` is all that it takes.
        biases: of gate, up and down [E, N], as far as there are.
    """

    gate_EFH: Tensor
    up_EFH: Tensor | None
    down_EHF: Tensor
    function: Activation = ACTIVATIONS["swiglu"]
    biases: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, experts: nn.Module, reduce_ErH: Tensor | None) -> ExpertWeights:
        weights = {name: tensor.detach().float() for name, tensor in experts.named_parameters()}
        function = ACTIVATIONS[getattr(getattr(experts, "mlp", experts), "activation", "swiglu")]

        def inputs(suffix: str) -> list[Tensor]:
            """Of the activation."""
            if "gate_up_proj" in weights:
                return list(weights[f"gate_up_proj{suffix}"].chunk(2, dim=1))
            return [weights[name + suffix] for name in ("gate_proj", "up_proj") if name in weights]

        gate, *up = inputs("")
        if reduce_ErH is not None:
            gate = gate @ reduce_ErH.detach().float()
        biases = (*inputs("_bias"), weights["down_proj_bias"]) if "down_proj_bias" in weights else ()
        return cls(gate, up[0] if up else None, weights["down_proj"], function, biases)

    @property
    def parts(self) -> list[Tensor]:
        """[E, F, H] each: what a hidden unit looks for (gate and up) and what it writes (down)."""
        return [part for part in (self.gate_EFH, self.up_EFH, self.down_EHF.mT) if part is not None]

    def outputs(self, rows_NH: Tensor) -> Tensor:
        """Every expert on the same rows with weight 1: [E, N, H]."""
        *projections, _ = self.parts
        biases: list[Any] = [bias_EN.unsqueeze(1) for bias_EN in self.biases] or [0] * (len(projections) + 1)
        h = [rows_NH.float() @ part.mT + bias for part, bias in zip(projections, biases, strict=False)]
        return self.function.forward(*h) @ self.down_EHF.mT + biases[-1]

    def units(self, expert: int) -> Tensor:
        """[F, 3H], or 2H without a gate; without biases."""
        return torch.cat([part[expert] for part in self.parts], dim=-1)


class InspectedModel(ABC):
    """A whole model in this process.

    Attributes:
        name: the path that was given.
        kind: "run" or "huggingface".
        architecture, router: for the report.
        step: optimizer steps behind a run's weights; None for a folder of transformers, which does not say.
        context: the longest sequence, in tokens.
        vocab_size: rows of its embedding.
        layers: numbers of the MoE layers in the model.
        k: experts of every token, or None where the number varies.
    """

    name: str
    kind: str
    architecture: str
    router: str
    step: int | None
    context: int
    vocab_size: int
    num_experts: int
    layers: list[int]
    k: int | None
    tokenizer: Tokenizer

    def __init__(self) -> None:
        self._routes: list[LayerRoutes] = []
        self._cut: Setting | None = None

    @torch.no_grad()
    def read(self, ids: list[int]) -> tuple[Tensor, list[LayerRoutes]]:
        """fp32 logits [S, V] and the routes of every MoE layer, first layer first."""
        self._routes = []
        logits_SV = self._logits(torch.tensor([ids], device=device_name()))[0].float()
        return logits_SV, self._routes

    def _note(self, hidden: Tensor, probs_SE: Tensor, map_SE: Tensor) -> Tensor:
        """Keep what a router decided; the routes that stay."""
        if self._cut is not None:
            map_SE = self._cut.cut(probs_SE, map_SE)
        self._routes.append(LayerRoutes(hidden.detach().flatten(0, -2), probs_SE * map_SE, map_SE))
        return map_SE

    def setting(self, name: str, value: float) -> Setting:
        return Setting(name, value, SETTINGS[name] in self.inference_options)

    @contextmanager
    def set_to(self, setting: Setting) -> Iterator[None]:
        """Route so meanwhile."""
        if not setting.is_option:
            self._cut = setting
            try:
                yield
            finally:
                self._cut = None
            return
        with self._option(SETTINGS[setting.name], int(setting.value) if setting.name == "k" else setting.value):
            yield

    @property
    @abstractmethod
    def inference_options(self) -> dict[str, float]:
        """The option of the router that decides at inference how many experts a token gets, with its value."""

    @abstractmethod
    def _option(self, name: str, value: float): ...

    @abstractmethod
    def _logits(self, ids_1S: Tensor) -> Tensor: ...

    @abstractmethod
    def experts(self, layer: int) -> ExpertWeights:
        """Of an MoE layer, by its place in `layers`."""


def inference_options(options: RouterOptions) -> dict[str, float]:
    name = setting_of(options)
    return {} if name is None else {SETTINGS[name]: float(getattr(options, SETTINGS[name]))}


class InspectedRun(InspectedModel):
    """The newest checkpoint of a run, or a checkpoint."""

    kind = "run"

    def __init__(self, path: Path, dtype: torch.dtype | None = None):
        super().__init__()
        trained = TrainedModel.load(path)
        model = trained.config.model
        self.name, self.step, self.run_dir = str(path), trained.step, trained.run_dir
        self.architecture, self.router = "dsmoe", trained.config.router.name
        self.context, self.vocab_size, self.num_experts = model.sequence_length, model.vocab_size, model.num_experts
        self.layers = [number for number, is_moe in enumerate(model.moe_layers()) if is_moe]
        _require_experts(self.layers, path)
        self.tokenizer = Tokenizer.load(trained.run_dir)
        self._model = trained.model if dtype is None else trained.model.to(dtype)
        self._modules = moe_layers_of(self._model)
        self.k = self._modules[0].router.options.fixed_experts_per_token()
        for module in self._modules:
            module.router.register_forward_hook(self._hook)

    def _hook(self, module, args, output: RoutingResult) -> RoutingResult:
        map_SE = self._note(args[0], output.probs_TE, output.map_TE)
        return RoutingResult((output.probs_TE * map_SE, map_SE, *output[2:]))

    @property
    def inference_options(self) -> dict[str, float]:
        return inference_options(self._modules[0].router.options)

    @contextmanager
    def _option(self, name: str, value: float) -> Iterator[None]:
        with routing_with([module.router for module in self._modules], {name: value}):
            yield

    def _logits(self, ids_1S: Tensor) -> Tensor:
        logits = self._model(ids_1S)
        self._model.recorder.take()
        return logits

    def experts(self, layer: int) -> ExpertWeights:
        module = self._modules[layer]
        return ExpertWeights.of(module.experts, getattr(module.router, "own_reduce_erH", None))


class InspectedFolder(InspectedModel):
    """A folder of transformers: an export of ours, or one of the architectures that `dsmoe.hf.native` knows."""

    kind = "huggingface"
    step = None

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False):
        super().__init__()
        self.architecture = _architecture(folder)
        self.tokenizer = Tokenizer.load(folder)
        hosted = HostedModel(folder, dtype, create_groups(1), trust_remote_code).to(device_name()).eval()
        self._network, config = hosted.network, hosted.network.config
        self.name, self.context = str(folder), config.max_position_embeddings
        self.vocab_size = self._network.get_input_embeddings().num_embeddings
        self._mlps = [
            (number, layer.mlp)
            for number, layer in enumerate(self._network.model.layers)
            if hasattr(layer.mlp, "routing") or hasattr(layer.mlp, "gate")
        ]
        self.layers = [number for number, _ in self._mlps]
        _require_experts(self.layers, folder)
        if self.architecture == "dsmoe":
            router = get(config.router["name"])
            given = {name: value for name, value in config.router.items() if name != "name"}
            options = router.Options.model_validate(given)
            self.router, self.k, self.num_experts = router.name, options.fixed_experts_per_token(), config.num_experts
            known = inference_options(options).items()
            self._inference_options = {name: value for name, value in known if name in given}  # by the folder's code
        else:
            gate = self._mlps[0][1].gate
            self.router, self.k, self.num_experts = "topk", int(gate.top_k), int(gate.num_experts)
            self._inference_options = {"k": float(self.k)}
        for _, mlp in self._mlps:
            if self.architecture == "dsmoe":
                mlp.routing.register_forward_hook(self._hook)
            else:
                mlp.gate.register_forward_hook(self._native_hook)

    def _hook(self, module, args, output):
        probs_SE, map_SE, *others = output
        map_SE = self._note(args[0], probs_SE, map_SE)
        return (probs_SE * map_SE, map_SE, *others)

    def _native_hook(self, module, args, output):
        """(logits [S, E], weights [S, k], experts [S, k]); its experts are given k of each token, so a route that is
        dropped gets weight 0."""
        logits_SE, weight_Sk, expert_Sk = output
        probs_SE = torch.zeros_like(logits_SE, dtype=torch.float32).scatter(1, expert_Sk, weight_Sk.float())
        map_SE = torch.zeros_like(logits_SE, dtype=torch.bool).scatter(1, expert_Sk, True)
        kept_SE = self._note(args[0], probs_SE, map_SE)
        return logits_SE, weight_Sk * kept_SE.gather(1, expert_Sk), expert_Sk

    @property
    def inference_options(self) -> dict[str, float]:
        return self._inference_options

    @contextmanager
    def _option(self, name: str, value: float) -> Iterator[None]:
        # An export of ours with a fixed k has it twice: in its routing and where experts are called.
        places: list[tuple[Any, str]] = []
        for _, mlp in self._mlps:
            if self.architecture == "dsmoe":
                places.append((mlp.routing.options, name))
                places += [(mlp, "top_k")] if name == "k" and mlp.top_k else []
            else:
                places.append((mlp.gate, "top_k"))
        before = [getattr(owner, attribute) for owner, attribute in places]
        for owner, attribute in places:
            setattr(owner, attribute, value)
        try:
            yield
        finally:
            for (owner, attribute), old in zip(places, before, strict=True):
                setattr(owner, attribute, old)

    def _logits(self, ids_1S: Tensor) -> Tensor:
        return self._network(ids_1S, use_cache=False).logits

    def experts(self, layer: int) -> ExpertWeights:
        mlp = self._mlps[layer][1]
        experts = mlp.routed_experts if hasattr(mlp, "routed_experts") else mlp.experts
        return ExpertWeights.of(experts, getattr(getattr(mlp, "routing", None), "reduce_proj", None))


def open_model(
    path: Path, step: int | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> InspectedModel:
    """A run, one of its checkpoints, or a folder of transformers.

    Args:
        step: a checkpoint of the run; None: the newest.
        dtype: "fp32" or "bf16", to compute in; None: fp32 for a run, the folder's own for the others.

    Raises:
        CheckpointError, ConversionError, DataError: what is missing, damaged, or not one of these.
        ConfigError: a model without experts, or several processes.
    """
    start_processes()
    if dist.get_world_size() > 1:
        raise ConfigError(["a model is inspected whole, in one process; start it without a launcher"], "dsmoe inspect")
    compute = None if dtype is None else DTYPES[dtype]
    if is_hugging_face(path):
        if step is not None:
            raise CheckpointError(f"--step: {path} is a folder of transformers, which has no checkpoints of a training")
        return InspectedFolder(path, compute, trust_remote_code)
    return InspectedRun(path if step is None else checkpoint_of(path, step), compute)


def checkpoint_of(run: Path, step: int) -> Path:
    """Raises `CheckpointError` that lists the run's checkpoints if there is none of that step."""
    steps = [step_of(folder) for folder in complete_checkpoints(run)]
    if step in steps:
        return folder_of(run, step)
    if is_checkpoint(run):
        raise CheckpointError(f"--step: {run} is a checkpoint already; give the run's folder, or leave --step out")
    there = ", ".join(map(str, steps)) or "none"
    raise CheckpointError(f"--step: {run} has no checkpoint of step {step}; there are: {there}")


def _architecture(folder: Path) -> str:
    """Raises `ConversionError` for one that is not read, `ConfigError` for one that has no experts."""
    try:
        model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f"cannot read {folder / 'config.json'}: {error}") from error
    if model_type in ("dsmoe", *HOSTS):
        return model_type
    from dsmoe.hf.foreign import DENSE

    if model_type in DENSE:
        _require_experts([], folder)
    raise ConversionError(
        f"{folder}: model_type {model_type!r} cannot be inspected; exports of dsmoe and {', '.join(HOSTS)} can"
    )


def _require_experts(layers: list[int], path: Path) -> None:
    if not layers:
        raise ConfigError(["the model is dense: it has no experts to inspect"], str(path))
