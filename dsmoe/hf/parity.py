"""The gate of every conversion: a run and a Hugging Face folder compute the same, on real text.

dsmoe's model runs in this process, the folder in one of its own where dsmoe cannot be imported
(`dsmoe/hf/observe.py`), one after the other, so that one model is in memory at a time. Both run in fp32 on the numbers
that the folder holds. A folder in bf16 is looked at once more in bf16, as it will be used, beside the fp32 weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.errors import ConversionError
from dsmoe.hf import observe
from dsmoe.hf.observe import SEQUENCES_AT_ONCE
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.routers.base import Router
from dsmoe.runtime.device import device_name

OBSERVE = Path(observe.__file__)
MAX_LOGIT_DIFFERENCE = 1e-4  # in fp32
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
    flipped = None
    if ours.routes is not None and theirs.routes is not None:
        flipped = (ours.routes ^ theirs.routes).sum().item() / max(1, (ours.routes.sum() + theirs.routes.sum()).item())
    equal = torch.equal(ours.written, theirs.written)
    return Agreement(largest, same / positions, max(0.0, divergence / positions), flipped, equal)


def check_parity(
    checkpoint: Path, folder: Path, sample: Sample, dtype: torch.dtype, dtype_of: DtypeOf
) -> tuple[dict[str, Any], Observation]:
    """Hold a folder to a checkpoint.

    Args:
        checkpoint: a complete one.
        folder: what `AutoModelForCausalLM.from_pretrained` is given; its code is run.
        dtype: float32, or bfloat16 to look at the folder in bf16 as well.
        dtype_of: in which dtype the folder holds each tensor.

    Returns:
        The figures of the report, and what dsmoe's model made of the sample with its fp32 weights.

    Raises:
        ConversionError: the folder cannot be loaded, or does not compute the same within the limits.
    """
    exact = observe_run(checkpoint, sample)
    rounded = exact if dtype == torch.float32 else observe_run(checkpoint, sample, dtype_of)
    agreement = compare(rounded, observe_folder(folder, sample, torch.float32))
    report: dict[str, Any] = {
        "tokens": sample.tokens.numel(),
        "prompt_tokens": sample.prompt.numel(),
        "greedy_tokens": GREEDY_TOKENS,
        "max_logit_difference_allowed": MAX_LOGIT_DIFFERENCE,
        "fp32": asdict(agreement),
    }
    if dtype != torch.float32:
        report["bf16"] = asdict(compare(exact, observe_folder(folder, sample, dtype)))
    problems = []
    if not agreement.max_logit_difference <= MAX_LOGIT_DIFFERENCE:
        problems.append(
            f"logits differ by up to {agreement.max_logit_difference:.3g}, allowed are {MAX_LOGIT_DIFFERENCE:g}"
        )
    if not agreement.greedy_equal:
        problems.append(f"the {GREEDY_TOKENS} likeliest tokens after a prompt differ")
    if problems:
        raise ConversionError(
            f"the converted model does not compute what its source does: {'; '.join(problems)} "
            f"(top-1 agreement {agreement.top1_agreement:.4f}, KL {agreement.kl_divergence:.3g} nats, "
            f"flipped routes {agreement.flipped_routes})"
        )
    return report, exact


def observe_run(checkpoint: Path, sample: Sample, dtype_of: DtypeOf | None = None) -> Observation:
    """Run dsmoe's own model in fp32, its weights first rounded to what `dtype_of` says."""
    model = TrainedModel.load(checkpoint).model
    for name, tensor in logical_tensors(model) if dtype_of else ():
        tensor.copy_(tensor.to(dtype_of(name)))
    return _observe(model, sample)


@torch.no_grad()
def _observe(model: LanguageModel, sample: Sample) -> Observation:
    device = device_name()

    def logits_of(tokens: Tensor) -> Tensor:
        found = model(tokens.to(device)).float()
        model.recorder.take()
        return found

    routes: dict[nn.Module, list[Tensor]] = {module: [] for module in model.modules() if isinstance(module, Router)}

    def note(module: nn.Module, inputs, output: tuple[Tensor, ...]) -> None:
        batch = inputs[0].size(1)
        routes[module].append(output[1].cpu().unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1))

    hooks = [module.register_forward_hook(note) for module in routes]
    logits = torch.cat([logits_of(part).cpu() for part in sample.tokens.split(SEQUENCES_AT_ONCE)])
    for hook in hooks:
        hook.remove()
    tokens = sample.prompt.unsqueeze(0)
    for _ in range(GREEDY_TOKENS):
        likeliest = logits_of(tokens)[:, -1:, : sample.vocab_size].argmax(-1).cpu()
        tokens = torch.cat((tokens, likeliest), dim=1)
    layers = [torch.cat(parts) for parts in routes.values()]
    return Observation(logits, torch.stack(layers) if layers else None, tokens[0, sample.prompt.numel() :])


def observe_folder(folder: Path, sample: Sample, dtype: torch.dtype) -> Observation:
    """Load a folder with transformers in a process of its own and run it. Raises `ConversionError` if that fails."""
    with tempfile.TemporaryDirectory(prefix="dsmoe-parity-") as place:
        source, target = Path(place) / "in.safetensors", Path(place) / "out.safetensors"
        given = {"tokens": sample.tokens, "prompt": sample.prompt.clone(), "steps": torch.tensor(GREEDY_TOKENS)}
        save_file(given, source)
        name, device = str(dtype).removeprefix("torch."), device_name()
        # The folder's code is copied before it is imported: to a place that goes away again.
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(place) / "modules"), "HF_HUB_OFFLINE": "1"}
        exit_code, output = run_observer([str(folder), str(source), str(target), name, device], environment)
        if exit_code:
            reason = output.strip().splitlines()[-1:] or [f"exit code {exit_code}"]
            raise ConversionError(f"transformers cannot load or run the folder: {reason[0]}")
        found = load_file(target)
    return Observation(found["logits"], found.get("routes"), found["written"])


def run_observer(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run `observe.py` in an interpreter of its own; its exit code and what it wrote to stderr."""
    command = [sys.executable, "-P", str(OBSERVE), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr
