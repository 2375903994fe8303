"""Where the time of an optimizer step goes: five steps of a configuration on random tokens, under torch.profiler.

Writes TRACE, for chrome://tracing or ui.perfetto.dev, and as JSON the ten operators that took the most time of the GPU,
or of the CPU where there is none. One process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dsmoe.runtime.command_line import run, user_path

WARM, STEPS, OPERATORS = 2, 5, 10


def profile(config, trace: Path) -> dict:
    """Milliseconds over all steps: `total`, and of each operator, without what it calls, with its share and calls."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    from dsmoe.parallel.groups import create_groups, start_processes
    from dsmoe.runtime.device import device_name, on_gpu, synchronize
    from dsmoe.training.engine import build_engine

    start_processes()
    engine = build_engine(config, create_groups(1))
    engine.train()
    random = torch.Generator().manual_seed(0)
    sequences = config.training.global_batch_size // config.training.gradient_accumulation
    shape = (sequences, config.model.sequence_length + 1)

    def step() -> None:
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=random).to(device_name())
        loss, _ = engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        engine.backward(loss)
        engine.step()
        totals = engine.module.recorder.take()
        if engine.module.controller is not None:
            engine.module.controller.update(totals)

    for _ in range(WARM):
        step()
    synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        synchronize()
    profiler.export_chrome_trace(str(trace))
    kind, clock = (DeviceType.CUDA, "self_device_time_total") if on_gpu() else (DeviceType.CPU, "self_cpu_time_total")
    rows = [row for row in profiler.key_averages() if not row.is_user_annotation]
    total = sum(getattr(row, clock) for row in rows if row.device_type == kind)
    operators = [row for row in rows if row.device_type == DeviceType.CPU]
    operators.sort(key=lambda row: getattr(row, clock), reverse=True)
    return {
        "steps": STEPS, "device": device_name(), "total_ms": total / 1e3,
        "operators": [
            {
                "name": row.key, "ms": getattr(row, clock) / 1e3, "share": getattr(row, clock) / total,
                "calls": row.count,
            }
            for row in operators[:OPERATORS]
        ],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML, with model.vocab_size")
    parser.add_argument("--trace", type=user_path, required=True, help="where the trace goes, .json or .json.gz")
    parser.add_argument("--json", type=user_path, required=True, help="where the operators go")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="instead of the configuration's")
    arguments = parser.parse_args()
    from dsmoe.config import load_config
    from dsmoe.routers.registry import option_classes

    config = load_config(arguments.config, arguments.overrides, option_classes())
    arguments.json.write_text(json.dumps(profile(config, arguments.trace), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
