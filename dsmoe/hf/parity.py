"""The gate of every conversion: a run and a Hugging Face folder compute the same, on real text.

dsmoe's model runs in this process, the folder in one of its own where dsmoe cannot be imported
(`dsmoe/hf/observe.py`), one after the other, so that one model is in memory at a time. Both run in fp32 on the numbers
that the folder holds. A folder in bf16 is looked at once more in bf16, as it will be used, beside the fp32 weights.

Equal means equal up to rounding, which depends on the model: the logits' difference is measured in units of their
root mean square, and where it is more than a few units in the last place, against what rounding does to dsmoe's own
model, which is then run in fp64. Rounding may also decide between two experts or two tokens whose scores tie.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.errors import ConversionError
from dsmoe.hf import observe as observer
from dsmoe.hf.observe import SEQUENCES_AT_ONCE, take_routes
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.routers.base import Router
from dsmoe.routers.inference import routing_with
from dsmoe.runtime.device import device_name

OBSERVE = Path(observer.__file__)
EPSILON = torch.finfo(torch.float32).eps
CLOSE = 64 * EPSILON  # of the logits' root mean square: equal without a look at fp64
ROUNDINGS = 8  # times the error of dsmoe's own fp32 logits that the folder's may have
MAX_ROUNDING = 1e-3  # of the root mean square: beyond, fp32 says nothing about equality
MAX_FLIPPED = 1e-3  # of all routes, by ties
MAX_FLIPPED_WRITTEN = 1e-2  # of those of a short text, where later routes follow a flipped one
GREEDY_TOKENS = 64
PROMPT_TOKENS = 16
LOGITS_KEPT = 1 << 26  # numbers, 256 MiB: what bounds the text that is compared
TOKENS_COMPARED = 2048

DtypeOf = Callable[[str], torch.dtype]  # of a tensor in the folder, by its canonical name


@dataclass(frozen=True)
class Sample:
    """Text that two models are held to.

    Attributes:
        tokens: int64 [B, S], real text.
        vocab_size: ids that the tokenizer has; what is written stays below.
    """

    tokens: Tensor
    vocab_size: int

    @property
    def prompt(self) -> Tensor:
        return self.tokens[0, :PROMPT_TOKENS]


def sequences_compared(sequence_length: int, vocab_size: int) -> int:
    """How many sequences a `Sample` should have: enough to see something, few enough to keep all logits."""
    return max(1, tokens_compared(vocab_size) // sequence_length)


def tokens_compared(vocab_size: int) -> int:
    """How many tokens a `Sample` may have in all."""
    return max(PROMPT_TOKENS, min(TOKENS_COMPARED, LOGITS_KEPT // vocab_size))


@dataclass(frozen=True)
class Observation:
    """What a model makes of a sample."""

    logits: Tensor  # fp32 [B, S, V]
    routes: Tensor | None  # bool [L, B * S, E], the tokens of a sequence together; None without MoE layers
    written: Tensor  # int64 [GREEDY_TOKENS]
    written_from: Tensor | None = None  # fp32 [GREEDY_TOKENS, V], the logits that each token is the largest of
    routes_before: Sequence[Tensor] = ()  # bool [L, tokens, E] for each written token: of all that it follows


@dataclass(frozen=True)
class Agreement:
    """How near two observations are; see the fields of `export_report.json` in docs/huggingface.md."""

    max_logit_difference: float
    top1_agreement: float  # share of positions with the same likeliest token
    kl_divergence: float  # mean over positions, nats, of the second from the first
    flipped_routes: float | None  # routes that only one has, over the routes of both
    greedy_equal: bool


def compare(ours: Observation, theirs: Observation) -> Agreement:
    """`theirs` measured against `ours`."""
    if ours.logits.shape != theirs.logits.shape:
        raise ConversionError(f"logits {list(theirs.logits.shape)}, expected {list(ours.logits.shape)}")
    largest = same = divergence = 0.0
    for our_SV, their_SV in zip(ours.logits, theirs.logits, strict=True):
        largest = max(largest, (our_SV - their_SV).abs().nan_to_num(torch.inf).max().item())
        same += (our_SV.argmax(-1) == their_SV.argmax(-1)).double().sum().item()
        our_log, their_log = our_SV.double().log_softmax(-1), their_SV.double().log_softmax(-1)
        divergence += (our_log.exp() * (our_log - their_log)).sum().item()
    positions = ours.logits.shape[0] * ours.logits.shape[1]
    equal = torch.equal(ours.written, theirs.written)
    return Agreement(largest, same / positions, max(0.0, divergence / positions), _flipped(ours, theirs), equal)


@dataclass(frozen=True)
class Equality:
    """Whether a difference is rounding.

    Attributes:
        logit_scale: root mean square of the logits.
        difference: the largest of the compared logits; in fp32, or of the folder's from fp64 if that was needed.
        allowed: what it may be.
        rounding: the largest error of dsmoe's own fp32 logits; None where fp64 was not needed.
        compared: share of positions without a route that rounding flipped there or before, whose logits are compared.
        problems: why this is no rounding.
    """

    logit_scale: float
    difference: float
    allowed: float
    rounding: float | None
    compared: float
    problems: list[str]


def judge(ours: Observation, theirs: Observation, in_fp64: Callable[[], Observation]) -> Equality:
    """Hold `theirs` to `ours`, and to `in_fp64()`, the same model as `ours`, if fp32 alone cannot tell."""
    scale = torch.linalg.vector_norm(ours.logits, dtype=torch.float64).item() / math.sqrt(ours.logits.numel())
    settled_BS = _settled(ours, theirs)
    difference, allowed, rounding = _largest(ours, theirs, settled_BS), CLOSE * scale, None
    if not (difference <= allowed and _tied_at_most(ours, theirs) <= 2 * allowed):
        reference = in_fp64()
        rounding = _largest(ours, reference, _settled(ours, reference))
        settled_BS = _settled(theirs, reference)
        difference = _largest(theirs, reference, settled_BS)
        allowed = max(allowed, ROUNDINGS * min(rounding, MAX_ROUNDING * scale))
    problems = []
    if not difference <= allowed:
        problems.append(
            f"logits differ by up to {difference:.3g}, {difference / max(scale, 1e-300):.2g} of their size; rounding "
            f"explains {allowed:.3g}"
        )
    flipped, compared = _flipped(ours, theirs), settled_BS.double().mean().item()
    if flipped is not None and flipped > MAX_FLIPPED:
        problems.append(f"{flipped:.2%} of the routes differ, rounding explains {MAX_FLIPPED:.1%}")
    if not _tied_at_most(ours, theirs) <= 2 * allowed:
        problems.append(f"the {GREEDY_TOKENS} likeliest tokens after a prompt differ")
    return Equality(scale, difference, allowed, rounding, compared, problems)


def _settled(first: Observation, second: Observation) -> Tensor:
    """bool [B, S], positions before the first of their sequence where the routes differ, which later ones see."""
    batch, length = first.logits.shape[:2]
    if first.routes is None or second.routes is None:
        return torch.ones(batch, length, dtype=torch.bool)
    differs_BS = (first.routes ^ second.routes).any(-1).any(0).view(batch, length)
    return differs_BS.cumsum(1) == 0


def _largest(first: Observation, second: Observation, where_BS: Tensor) -> float:
    """The largest difference of logits; infinite where none is left to compare, or one is no number."""
    pairs = zip(first.logits, second.logits, where_BS, strict=True)
    differences = [(a_SV[where_S] - b_SV[where_S]).abs() for a_SV, b_SV, where_S in pairs if where_S.any()]
    return max((largest.nan_to_num(torch.inf).max().item() for largest in differences), default=torch.inf)


def _tied_at_most(ours: Observation, theirs: Observation) -> float:
    """By how much the first token that `theirs` wrote otherwise was less likely for `ours`; 0 if all are equal, or if
    rounding flipped a route of what it was written after, which may change any logit."""
    different = (ours.written != theirs.written).nonzero().flatten().tolist()
    if not different:
        return 0.0
    first = different[0]
    if ours.written_from is None or theirs.written[first] >= ours.written_from.size(1):
        return torch.inf
    if _flips_before(ours, theirs, first):
        return 0.0
    logits_V = ours.written_from[first]
    return (logits_V[ours.written[first]] - logits_V[theirs.written[first]]).item()


def _flips_before(ours: Observation, theirs: Observation, token: int) -> bool:
    """Whether few routes differ in what a written token follows, as by a tie: a broken cache changes many."""
    if not ours.routes_before or not theirs.routes_before:
        return False
    our_LTE, their_LTE = ours.routes_before[token], theirs.routes_before[token]
    flips = (our_LTE ^ their_LTE).sum().item()
    return 0 < flips <= max(2, MAX_FLIPPED_WRITTEN * (our_LTE.sum() + their_LTE.sum()).item())


def _flipped(first: Observation, second: Observation) -> float | None:
    """Routes that only one has, over the routes of both."""
    if first.routes is None or second.routes is None:
        return None
    return (first.routes ^ second.routes).sum().item() / max(1, (first.routes.sum() + second.routes.sum()).item())


def check_parity(
    checkpoint: Path, folder: Path, sample: Sample, dtype: torch.dtype, dtype_of: DtypeOf,
    options: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Observation]:  # fmt: skip
    """Hold a folder to a checkpoint.

    Args:
        checkpoint: a complete one.
        folder: what `AutoModelForCausalLM.from_pretrained` is given; its code is run.
        dtype: float32, or bfloat16 to look at the folder in bf16 as well.
        dtype_of: in which dtype the folder holds each tensor.
        options: of the router, in place of those of the checkpoint.

    Returns:
        The figures of the report, and what dsmoe's model made of the sample with its fp32 weights.

    Raises:
        ConversionError: the folder cannot be loaded, or does not compute the same within the limits.
    """
    exact = observe_run(checkpoint, sample, options=options)
    rounded = exact if dtype == torch.float32 else observe_run(checkpoint, sample, dtype_of, options=options)
    folder_in_fp32 = observe_folder(folder, sample, torch.float32)
    agreement = compare(rounded, folder_in_fp32)
    in_fp64 = partial(observe_run, checkpoint, sample, dtype_of, torch.float64, options)
    equality = judge(rounded, folder_in_fp32, in_fp64)
    report: dict[str, Any] = {
        "tokens": sample.tokens.numel(),
        "prompt_tokens": sample.prompt.numel(),
        "greedy_tokens": GREEDY_TOKENS,
        "equality": {key: value for key, value in asdict(equality).items() if key != "problems"},
        "fp32": asdict(agreement),
    }
    if dtype != torch.float32:
        report["bf16"] = asdict(compare(exact, observe_folder(folder, sample, dtype)))
    problems = equality.problems
    if problems:
        raise ConversionError(
            f"the converted model does not compute what its source does: {'; '.join(problems)} "
            f"(top-1 agreement {agreement.top1_agreement:.4f}, KL {agreement.kl_divergence:.3g} nats, "
            f"flipped routes {agreement.flipped_routes})"
        )
    return report, exact


def observe_run(
    checkpoint: Path, sample: Sample, dtype_of: DtypeOf | None = None, dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
) -> Observation:  # fmt: skip
    """Run dsmoe's own model, its weights first rounded to what `dtype_of` says and its router's options changed; in
    fp64 it writes nothing."""
    model = TrainedModel.load(checkpoint).model
    for name, tensor in logical_tensors(model) if dtype_of else ():
        tensor.copy_(tensor.to(dtype_of(name)))
    with routing_with(model.recorder.routers, options or {}):
        return observe(model.to(dtype), sample, GREEDY_TOKENS if dtype == torch.float32 else 0)


@torch.no_grad()
def observe(model: LanguageModel, sample: Sample, greedy_tokens: int) -> Observation:
    """What a model in evaluation mode makes of a sample."""
    device = device_name()

    def logits_of(tokens: Tensor) -> Tensor:
        logits = model(tokens.to(device))
        model.recorder.take()
        return logits

    routes: dict[nn.Module, list[Tensor]] = {module: [] for module in model.modules() if isinstance(module, Router)}

    def note(module: nn.Module, inputs, output: tuple[Tensor, ...]) -> None:
        batch = inputs[0].size(1)
        routes[module].append(output[1].cpu().unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1))

    hooks = [module.register_forward_hook(note) for module in routes]
    logits = torch.cat([logits_of(part).cpu() for part in sample.tokens.split(SEQUENCES_AT_ONCE)])
    sample_routes = take_routes(routes) if routes else None
    tokens, written_from, routes_before = sample.prompt.unsqueeze(0), [], []
    for _ in range(greedy_tokens):
        written_from.append(logits_of(tokens)[0, -1, : sample.vocab_size].cpu())
        tokens = torch.cat((tokens, written_from[-1].argmax().view(1, 1)), dim=1)
        if routes:
            routes_before.append(take_routes(routes))
    for hook in hooks:
        hook.remove()
    return Observation(
        logits, sample_routes, tokens[0, sample.prompt.numel() :], torch.stack(written_from) if written_from else None,
        routes_before,
    )  # fmt: skip


def observe_folder(folder: Path, sample: Sample, dtype: torch.dtype) -> Observation:
    """Load a folder with transformers in a process of its own and run it. Raises `ConversionError` if that fails."""
    with tempfile.TemporaryDirectory(prefix="dsmoe-parity-") as place:
        source, target = Path(place) / "in.safetensors", Path(place) / "out.safetensors"
        inputs = {"tokens": sample.tokens, "prompt": sample.prompt.clone(), "steps": torch.tensor(GREEDY_TOKENS)}
        save_file(inputs, source)
        name, device = str(dtype).removeprefix("torch."), device_name()
        # The folder's code is copied before it is imported: to a place that goes away again.
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(place) / "modules"), "HF_HUB_OFFLINE": "1"}
        exit_code, output = run_observer([str(folder), str(source), str(target), name, device], environment)
        if exit_code:
            reason = output.strip().splitlines()[-1:] or [f"exit code {exit_code}"]
            raise ConversionError(f"transformers cannot load or run the folder: {reason[0]}")
        outputs = load_file(target)
    routes_LTE, prompt = outputs.get("written_routes"), sample.prompt.numel()
    routes_before = [] if routes_LTE is None else [routes_LTE[:, : prompt + n] for n in range(GREEDY_TOKENS)]
    return Observation(outputs["logits"], outputs.get("routes"), outputs["written"], routes_before=routes_before)


def run_observer(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run `observe.py` in an interpreter of its own; its exit code and what it wrote to stderr."""
    command = [sys.executable, "-P", str(OBSERVE), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr
