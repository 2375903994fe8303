"""A whole training step: `python -m dsmoe.lab.benchmark.step JOB.json REPLY` holds a model and steps when told to.

All models of a comparison are in memory at once and take turns: a process reads "step" on its standard input, takes
one optimizer step and answers on the pipe REPLY with its seconds. So a disturbed machine hurts all of them alike.

The model is the same everywhere, as far as the libraries go: a Qwen3-MoE (RMSNorm also on queries and keys, RoPE,
untied embeddings, top-k softmax renormalised), AdamW, gradient norm clipped, fp32, random tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe.config import RouterConfig
from dsmoe.runtime.device import synchronize, use_local_device

LEARNING_RATE = 1e-8  # so small that routes stay where they were set; the arithmetic of AdamW is the same


@dataclass(frozen=True)
class StepJob:
    """One model. `kind`: dsmoe, autoep, transformers, or matmuls (and attention): its matrix products alone.
    `huge_pages`: whether its CPU tensors lie on huge pages, which dsmoe sees to itself and no peer does."""

    name: str
    kind: str
    experts: int = 16
    ranks: int = 1
    router: str = RouterConfig().name
    layers: int = 4
    hidden: int = 256
    ffn: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 256
    sequences: int = 16  # over all ranks
    k: int = 2
    huge_pages: bool = True

    def check(self) -> None:
        """Raise `ConfigError` for sizes that cannot be measured."""
        from dsmoe.lab.benchmark.problem import mistake

        if self.sequences < 2 or self.sequences % 2:
            raise mistake(f"tokens: found {self.sequences} sequences of {self.sequence}, expected an even number")
        if self.hidden % self.heads:
            raise mistake(f"hidden: found {self.hidden}, expected a multiple of heads ({self.heads})")
        if self.experts % 2 or self.k > self.experts:
            raise mistake(f"experts: found {self.experts}, expected an even number, at least k ({self.k})")

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence

    def parameters(self) -> int:
        """About; of the whole model."""
        experts = self.layers * self.experts * 3 * self.hidden * self.ffn
        return experts + 2 * self.vocabulary * self.hidden + self.layers * 4 * self.hidden**2

    def matmul_flops(self) -> float:
        """Forward and backward of every linear layer; attention's own products left out."""
        layer = 4 * self.hidden**2 + self.k * 3 * self.hidden * self.ffn
        return 6.0 * self.tokens * (self.layers * layer + self.vocabulary * self.hidden)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> StepJob:
        return cls(**json.loads(path.read_text()))


Step = Callable[[], dict[str, float]]  # takes a step; seconds by stage, and mean_experts where it is not k exactly


def random_batch(job: StepJob, rank: int, number: int) -> Tensor:
    """Tokens and the next ones, int64 [B, S + 1], of one rank and step."""
    random = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randint(0, job.vocabulary, (job.sequences // job.ranks, job.sequence + 1), generator=random)


class Stopwatch:
    """Seconds between marks."""

    def __init__(self):
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now


def dsmoe_step(job: StepJob, rank: int) -> Step:
    """dsmoe's engine, as `dsmoe train` builds it."""
    from dsmoe.config import validate_config
    from dsmoe.parallel.groups import create_groups, start_processes
    from dsmoe.routers import get
    from dsmoe.training.engine import build_engine

    start_processes(timeout_minutes=30)
    router = get(job.router)
    options = router.benchmark_options(job.k, job.experts, latent_norm=1.0)
    tree = {
        "model": dict(
            num_layers=job.layers, hidden_size=job.hidden, num_attention_heads=job.heads, vocab_size=job.vocabulary,
            sequence_length=job.sequence, num_experts=job.experts, moe_ffn_hidden_size=job.ffn, tie_embeddings=False,
            qk_layernorm=True,
        ),
        "router": {"name": job.router, **options},
        "parallel": {"expert_parallel": job.ranks},
        "training": {"global_batch_size": job.sequences, "lr": LEARNING_RATE},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    # Options for the layer benchmark's tokens, which `hold_mean` adapts to these; they need not suit training.
    engine = build_engine(validate_config(tree), create_groups(job.ranks))
    engine.train()
    if router.Options.model_validate(options).fixed_experts_per_token() is None:
        hold_mean(engine.module, random_batch(job, rank, 0)[:, :-1], job.k)
    steps = iter(range(1, 1 << 30))

    def step() -> dict[str, float]:
        batch = random_batch(job, rank, next(steps)).to(engine.device)
        watch = Stopwatch()
        loss, _ = engine(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        watch.mark("forward")
        engine.backward(loss)
        watch.mark("backward")
        engine.step()
        watch.mark("optimizer")
        totals = engine.module.recorder.take()
        return watch.seconds | {"mean_experts": totals.density().item() * job.experts}

    return step


@torch.no_grad()
def hold_mean(model: Any, tokens: Tensor, k: float) -> None:
    """Set every router's threshold where this batch has k experts a token on average: untrained, they are far from it.

    Layer by layer in one forward pass, since a layer's tokens depend on the routes below it.
    """
    from dsmoe.routers.base import Router

    hooks = [
        module.register_forward_pre_hook(lambda router, inputs: router.calibrate(inputs[0].flatten(0, 1), k))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    model(tokens.to(next(model.parameters()).device))
    model.recorder.take()
    for hook in hooks:
        hook.remove()


def qwen3_moe(job: StepJob):
    """The same model from transformers, experts with grouped_mm."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=job.vocabulary, hidden_size=job.hidden, intermediate_size=job.ffn, moe_intermediate_size=job.ffn,
        num_hidden_layers=job.layers, num_attention_heads=job.heads, num_key_value_heads=job.heads,
        head_dim=job.hidden // job.heads, num_experts=job.experts, num_experts_per_tok=job.k, norm_topk_prob=True,
        max_position_embeddings=job.sequence, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").train()


def autoep_step(job: StepJob, rank: int) -> Step:
    """The Qwen3-MoE under DeepSpeed with AutoEP, ZeRO-1 like dsmoe's, torch's fused AdamW as well."""
    import deepspeed

    from dsmoe.lab.benchmark.peers import accept_registry_default
    from dsmoe.parallel.groups import start_processes

    start_processes(timeout_minutes=30)
    accept_registry_default()
    adam = {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True}
    settings = {
        "train_batch_size": job.sequences,
        "train_micro_batch_size_per_gpu": job.sequences // job.ranks,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_scatter": True},
        "optimizer": {"type": "AdamW", "params": adam},
        "expert_parallel": {"enabled": True, "autoep_size": job.ranks, "preset_model": "qwen3_moe"},
        "steps_per_print": 10**9,
    }
    model = qwen3_moe(job)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    engine.train()
    steps = iter(range(1, 1 << 30))

    def step() -> dict[str, float]:
        batch = random_batch(job, rank, next(steps))[:, :-1].contiguous().to(engine.device)
        watch = Stopwatch()
        loss = engine(input_ids=batch, labels=batch).loss
        watch.mark("forward")
        engine.backward(loss)
        watch.mark("backward")
        engine.step()
        watch.mark("optimizer")
        return watch.seconds

    return step


def transformers_step(job: StepJob, rank: int) -> Step:
    """The Qwen3-MoE in plain transformers and torch."""
    device = use_local_device()
    model = qwen3_moe(job).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps = iter(range(1, 1 << 30))

    def step() -> dict[str, float]:
        batch = random_batch(job, rank, next(steps))[:, :-1].contiguous().to(device)
        watch = Stopwatch()
        loss = model(input_ids=batch, labels=batch).loss
        watch.mark("forward")
        loss.backward()
        watch.mark("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.mark("optimizer")
        return watch.seconds

    return step


def matmuls_step(job: StepJob, rank: int) -> Step:
    """The products of all linear layers, forward and both of the backward pass, into memory that is there already; and,
    as a stage of its own, torch's attention.

    An expert's rows count as if all were one expert's: no layout of the same work multiplies less.
    """
    device = use_local_device()
    routes = job.tokens * job.k
    shapes = [
        (job.tokens, job.hidden, 3 * job.hidden, job.layers),
        (job.tokens, job.hidden, job.hidden, job.layers),
        (routes, job.hidden, 2 * job.ffn, job.layers),
        (routes, job.ffn, job.hidden, job.layers),
        (job.tokens, job.hidden, job.vocabulary, 1),
    ]
    work = []
    for rows, inner, outer, times in shapes:
        x, w, y = (torch.randn(shape, device=device) for shape in ((rows, inner), (outer, inner), (rows, outer)))
        work.append((x, w, y, torch.empty_like(x), torch.empty_like(w), torch.empty_like(y), times))
    heads = (job.sequences, job.heads, job.sequence, job.hidden // job.heads)
    query, key, value = (torch.randn(heads, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn(heads, device=device)

    def step() -> dict[str, float]:
        watch = Stopwatch()
        for x, w, y, dx, dw, out, times in work:
            for _ in range(times):
                torch.mm(x, w.t(), out=out)
                torch.mm(y, w, out=dx)
                torch.mm(y.t(), x, out=dw)
        watch.mark("matmuls")
        if job.kind == "matmuls and attention":
            for _ in range(job.layers):
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                torch.autograd.grad(out, (query, key, value), grad)
            watch.mark("attention")
        return watch.seconds

    return step


KINDS = {
    "dsmoe": dsmoe_step, "autoep": autoep_step, "transformers": transformers_step, "matmuls": matmuls_step,
    "matmuls and attention": matmuls_step,
}  # fmt: skip


def main() -> None:
    from dsmoe.lab.benchmark.worker import end_with_parent
    from dsmoe.runtime.command_line import quiet_libraries

    end_with_parent()
    quiet_libraries()
    job, reply = StepJob.load(Path(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")

    def answer(**fields) -> None:
        print(json.dumps(fields), file=reply, flush=True)

    try:
        step = KINDS[job.kind](job, int(os.environ.get("RANK", "0")))
        step()
        answer(ready=True)
        for line in sys.stdin:
            if line.strip() != "step":
                break
            answer(**step())
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300])
    os._exit(0)  # without waiting for ranks that have gone


if __name__ == "__main__":
    main()
