"""Figures that others published, beside what is predicted for the same model on the same devices under dsmoe.

They are of other software: theirs hides communication under arithmetic and has kernels of its own, and some split
layers over devices, which dsmoe does not. No coefficient was fitted to them. Batches that a source does not tell are
assumed, and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from dsmoe.config import load_config
from dsmoe.lab.planner.hardware import load_hardware
from dsmoe.lab.planner.predict import Prediction
from dsmoe.lab.planner.search import choices, search
from dsmoe.routers.registry import option_classes
from dsmoe.routers.relu import ReLURouter
from dsmoe.routers.topk import TopKRouter

MIXTRAL_8X22B = {
    "num_layers": 56, "hidden_size": 6144, "num_attention_heads": 48, "num_query_groups": 8, "kv_channels": 128,
    "sequence_length": 4096, "vocab_size": 32768, "num_experts": 8, "moe_ffn_hidden_size": 16384,
    "tie_embeddings": False,
}  # fmt: skip
QWEN2_57B = {
    "num_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_query_groups": 4, "kv_channels": 128,
    "sequence_length": 4096, "vocab_size": 151936, "num_experts": 64, "moe_ffn_hidden_size": 2560,
    "moe_shared_expert_intermediate_size": 20480, "tie_embeddings": False,
}  # fmt: skip
QWEN3_30B = {
    "num_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 128,
    "sequence_length": 4096, "vocab_size": 151936, "num_experts": 128, "moe_ffn_hidden_size": 768,
    "tie_embeddings": False, "qk_layernorm": True,
}  # fmt: skip


def _remoe(layers: int, hidden: int, heads: int, groups: int) -> dict:
    return {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups,
        "sequence_length": 1024, "vocab_size": 50304, "num_experts": 8, "moe_ffn_hidden_size": 4 * hidden,
        "tie_embeddings": False,
    }  # fmt: skip


@dataclass(frozen=True)
class Published:
    """TFLOP/s of one device, as a source reports it."""

    name: str
    source: str
    tflops: float
    hardware: str
    nodes: int
    model: dict
    experts: int  # a token
    batch: int  # sequences of a step
    fixed: dict[str, object]  # what the source says of its layout; the rest is searched
    note: str = ""
    router: str = TopKRouter.name


EP, RECOMPUTE = "parallel.expert_parallel", "model.recompute"
FIGURES = [
    Published(
        "Qwen3-30B-A3B, 8 H100", "NeMo Automodel's table, 277 TFLOP/s", 277, "h100", 1, QWEN3_30B, 8, 64,
        {EP: 8, RECOMPUTE: "none"}, "batch assumed",
    ),
    Published(
        "Mixtral 8x22B, 128 H100", "Parallel Folding (arXiv 2504.14960), MFU 49.3 %", 0.493 * 989, "h100", 16,
        MIXTRAL_8X22B, 2, 1024, {}, "theirs splits layers over devices; number of devices and batch assumed",
    ),
    Published(
        "Qwen2-57B-A14B, 64 H100", "Parallel Folding (arXiv 2504.14960), MFU 39.0 %", 0.390 * 989, "h100", 8, QWEN2_57B,
        8, 256, {}, "theirs splits layers over devices; number of devices and batch assumed",
    ),
    *(
        Published(
            f"ReMoE's {what}, {name}, 8 A100", "ReMoE (arXiv 2412.14711), table 7, training without tensor parallelism",
            tflops, "a100", 1, model, 1, 512, {EP: 1, RECOMPUTE: recompute}, "device assumed", router,
        )
        for name, model, recompute, reached in (
            ("182M", _remoe(12, 768, 12, 4), "moe", (103.49, 105.38)),
            ("469M", _remoe(24, 1024, 16, 16), "full", (138.58, 136.69)),
            ("978M", _remoe(24, 1536, 16, 16), "full", (160.46, 157.61)),
        )
        for what, router, tflops in (("top-1", TopKRouter.name, reached[0]), ("ReLU", ReLURouter.name, reached[1]))
    ),
]  # fmt: skip


def predicted(figure: Published, machines: Path) -> Prediction:
    """The fastest layout that fits, of those with what the source says; the nearest, where none fits.

    Args:
        machines: the folder of hardware files.
    """
    hardware = load_hardware(machines / f"{figure.hardware}.yaml")
    keys = {f"model.{name}": value for name, value in figure.model.items()}
    keys |= {"router.name": figure.router, "router.k": figure.experts, "training.precision": "bf16"}
    keys |= {"training.global_batch_size": figure.batch}
    assignments = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()]
    config = load_config(None, assignments, option_classes())
    result = search(config, hardware, figure.nodes * hardware.devices_per_node)
    for prediction in (*result.fitting, *result.too_large):
        if figure.fixed.items() <= choices(prediction.layout).items():
            return prediction
    raise ValueError(f"{figure.name}: no layout has {figure.fixed}")


def table(machines: Path) -> tuple[Table, list[dict]]:
    """Beside each other, and as JSON."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("figure", no_wrap=True)
    for column in ("TFLOP/s", "ours", "error", "memory"):
        shown.add_column(column, justify="right", no_wrap=True)
    rows = []
    for figure in FIGURES:
        prediction = predicted(figure, machines)
        error = prediction.tflops / figure.tflops - 1
        fits = f"{prediction.worst_memory / 2**30:.0f} GiB" + ("" if prediction.fits else " (too much)")
        shown.add_row(figure.name, f"{figure.tflops:.0f}", f"{prediction.tflops:.0f}", f"{error:+.0%}", fits)
        rows.append(
            {
                "figure": figure.name,
                "source": figure.source,
                "note": figure.note,
                "tflops": figure.tflops,
                "predicted_tflops": prediction.tflops,
                "error": error,
                "layout": choices(prediction.layout),
                "memory_bytes": prediction.worst_memory,
                "fits": prediction.fits,
            }
        )
    return shown, rows
