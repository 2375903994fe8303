"""The parts of a step for which dsmoe has kernels, beside the experts: each next to torch's operators, in turn."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from dsmoe import native
from dsmoe.lab.benchmark.step import StepJob
from dsmoe.model.attention import attention_candidates
from dsmoe.model.loss import loss_candidates
from dsmoe.model.native_norm import norm_candidates
from dsmoe.native.ways import measure
from dsmoe.routers.logits import logits_candidates
from dsmoe.runtime.device import on_gpu

ROTARY_BASE = 10000.0


def time_parts(job: StepJob, rounds: int) -> list[dict[str, Any]]:
    """A row for each part: forward and backward of what one of two ranks has in a step, on one thread, fp32 unless the
    name says otherwise; medians of `native` and `torch` in seconds. Empty where no kernel can run."""
    if on_gpu() or native.unavailable():
        return []
    sequences, size = job.sequences // 2, job.hidden // job.heads
    tokens = sequences * job.sequence
    parts: dict[str, dict] = {
        "attention with rotary embedding": attention_candidates(
            job.sequence, job.heads, job.heads, size, ROTARY_BASE, sequences
        ),
        "RMSNorm of tokens": norm_candidates(job.hidden, tokens * job.hidden),
        "RMSNorm of heads": norm_candidates(size, tokens * job.hidden),
        "vocabulary loss": loss_candidates(tokens, job.vocabulary, job.hidden, torch.float32),
        "vocabulary loss, bf16": loss_candidates(tokens, job.vocabulary, job.hidden, torch.bfloat16),
    }
    if job.experts % native.LANES == 0:
        parts["logits of a gate, bf16, forward"] = logits_candidates(tokens, job.experts, job.hidden)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [{"part": name, **measure(ways, rounds, math.inf, statistics.median)} for name, ways in parts.items()]
    finally:
        torch.set_num_threads(threads)
