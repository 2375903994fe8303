"""Measure token dispatchers over two hosts with a slow link: `python tests/nodes/measure_dispatchers.py [ROUTER ...]`.

Four ranks, two on each host, share the experts. For each router and dispatcher: the median step of a short run, the
seconds of it inside exchanges, and the bytes that all ranks sent. Needs what tests/nodes needs, and tc.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from conftest import write_data
from hosts import Hosts, unavailable
from jobs import TRAIN, finish_all, metrics, torchrun

RATE = "100mbit"
STEPS, WARMUP = 7, 2
ROUTERS = {  # ReLU begins with about half of all experts for a token
    **{f"topk {k}": ["router.name=topk", f"router.k={k}"] for k in (2, 3, 4, 8)},
    "relu": ["router.name=relu", "router.k=2.0"],
}
RUN = [
    "model.num_layers=2", "model.hidden_size=256", "model.num_attention_heads=4", "model.sequence_length=128",
    "model.num_experts=16", "model.moe_ffn_hidden_size=256", "model.vocab_size=64", "parallel.expert_parallel=4",
    f"training.steps={STEPS}", "training.global_batch_size=32", "training.eval_interval=0",
    "training.eval_sequences=4", "checkpoint.interval=0", "logging.tensorboard=false", "logging.timings=true",
]  # fmt: skip


def measure(hosts: Hosts, data: Path, router: str, dispatcher: str) -> list[str]:
    run_dir = data.parent / f"{router.replace(' ', '-')}-{dispatcher}"
    keys = [f"data.path={data / 'text'}", f"logging.run_dir={run_dir}", *ROUTERS[router]]
    ended = finish_all(torchrun(hosts, 2, [TRAIN, *RUN, *keys, f"model.token_dispatcher={dispatcher}"]))
    if any(end.code for end in ended):
        raise SystemExit(ended[0].output)
    lines = metrics(run_dir)[WARMUP:]
    values = [
        median(line["experts_per_token"] for line in lines),
        median(line["seconds"] for line in lines),
        median(line["seconds_by_part"]["exchange"] for line in lines),
        median(line["all_to_all_bytes"] for line in lines) / 1e6,
        median(line["between_nodes_bytes"] for line in lines) / 1e6,
    ]
    return [router, dispatcher, *(f"{value:.2f}" for value in values), f"{lines[-1]['loss']:.6f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routers", nargs="*", metavar="ROUTER", default=[*ROUTERS], help=", ".join(ROUTERS))
    routers = parser.parse_args().routers
    if reason := unavailable():
        raise SystemExit(reason)
    columns = [
        "router",
        "dispatcher",
        "experts a token",
        "step s",
        "in exchanges s",
        "sent MB",
        "between hosts MB",
        "loss",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder)) as hosts:
        data = write_data(Path(folder) / "data")
        with hosts.slow(RATE):
            for router in routers:
                for dispatcher in ("all_to_all", "two_level"):
                    print(f"| {' | '.join(measure(hosts, data, router, dispatcher))} |", flush=True)


if __name__ == "__main__":
    main()
