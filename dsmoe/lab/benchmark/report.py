"""What was measured, for people (tables) and programs (JSON)."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsmoe.runtime.environment import find_host, find_packages

ROOT = Path(__file__).resolve().parents[3]


INSTRUCTIONS = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "sve",
)  # fmt: skip


def processor() -> dict[str, Any]:
    """Its instruction sets that matrix products may use, what torch makes of them, and the ways that were chosen by
    measurement so far, with the seconds of each."""
    import torch

    from dsmoe import native
    from dsmoe.native.ways import choices

    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return {
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.unavailable() or "compiled",
        "ways": choices(),
    }


def show_circumstances(tree: dict[str, Any], console: Console) -> None:
    """The machine, in a few lines."""
    machine, chip = tree["machine"], tree["processor"]
    instructions = ", ".join(chip["instructions"]) or "no instruction sets known"
    console.print(
        f"{machine['cores']} cores of {machine['cpu']} ({instructions}; torch: {chip['torch_capability']}); "
        f"commit {tree['commit']}; C++ kernels: {chip['kernels']}"
    )
    show_ways(chip["ways"], "bf16 products", console)


def show_ways(ways: dict[str, str], about: str, console: Console) -> None:
    """What was chosen by measurement, fastest first, where its kernel and shape name `about`."""
    for key, seconds in ways.items():
        if about in key:
            console.print(f"[dim]chosen for {escape(key)}: {seconds}[/]")


def circumstances(command: list[str]) -> dict[str, Any]:
    """When, what, where: date, commit, machine, versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "machine": asdict(find_host()) | {"load_average": os.getloadavg()},
        "processor": processor(),
        "versions": {package.name: package.found for package in find_packages()},
    }


def _commit() -> str | None:
    """The checkout's commit, with "+" where tracked files have changed since; None outside a checkout."""
    if not (ROOT / ".git").exists():  # installed, perhaps somewhere inside another repository
        return None
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Numbers that are none become null, so that any JSON reader takes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(_plain(tree), indent=1, allow_nan=False) + "\n")
    unfinished.rename(path)


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and value - value != 0 else value


def show_rows(rows: list[dict], console: Console) -> None:
    """A table for each load of one job, its limit above it and errors below."""
    for load in dict.fromkeys(row["load"] for row in rows):
        chosen = [row for row in rows if row["load"] == load]
        first = chosen[0]
        console.print(
            f"[bold]{first['experts']} experts, {first['dtype']}, EP={first['ranks']}, {load or 'any'} load[/], "
            f"{first['tokens']} tokens, H={first['hidden']}, F={first['ffn']}, mean k={first['k']}"
        )
        timed = [row for row in chosen if "error" not in row]
        if timed:
            console.print(_limit_line(timed))
            console.print(_layer_table(timed))
        for row in chosen:
            if "error" in row:
                console.print(f"[red]{row['name']}[/]: {escape(row['error'])}\n")


def _limit_line(rows: list[dict]) -> str:
    limit = next(row["limit"] for row in rows if row["kind"] == "limit")
    products = [row for row in rows if row["name"] == "experts' products alone"]
    alone = "".join(
        f"; experts' products alone, as torch does them, {row['median_ms']:.1f} ms ({row['over_limit']:.2f})"
        for row in products
    )
    return (
        f"limit {1e3 * limit['seconds']:.1f} ms: all products at {limit['flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({limit['best_product']}) {1e3 * limit['compute_seconds']:.1f} ms, to stream "
        f"{limit['streamed_bytes'] / 1e6:.0f} MB at {limit['copy_bytes_per_second'] / 1e9:.1f} GB/s "
        f"{1e3 * limit['stream_seconds']:.1f} ms; dense SwiGLU {1e3 * limit['dense_seconds']:.1f} ms{alone}"
    )


def _layer_table(rows: list[dict]) -> Table:
    table = _table("forward + backward", "ms", "/ limit", "GFLOP/s", "mean k", "memory", "sent MB", "syncs")
    for row in rows:
        if row["kind"] in ("peer", "ours"):
            memory = f"{row['memory_over_ideal']:.2f}" if "memory_over_ideal" in row else "-"
            table.add_row(
                row["name"], f"{row['median_ms']:.1f}", f"{row['over_limit']:.2f}",
                f"{row['flops_per_second'] / 1e9:.1f}", f"{row['mean_experts']:.2f}",
                memory, f"{row['sent_bytes'] / 1e6:.1f}", str(row["host_syncs"]),
            )  # fmt: skip
    parts = [row for row in rows if row["kind"] == "part"]
    whole = sum(row["median_ms"] for row in parts)
    for row in parts:
        table.add_row(
            f"[dim]  topk: {row['name']}[/]", f"{row['median_ms']:.1f}", f"[dim]{row['median_ms'] / whole:.0%}[/]"
        )
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, min_width=max(6, len(column)))
    return table


def show_summary(rows: list[dict], console: Console) -> None:
    """Time over the limit by number of experts, for each precision, expert-parallel size and load."""
    groups = dict.fromkeys((row["dtype"], row["ranks"], row["load"]) for row in rows if row["kind"] in ("peer", "ours"))
    for dtype, ranks, load in groups:
        chosen = [row for row in rows if (row["dtype"], row["ranks"], row["load"]) == (dtype, ranks, load)]
        counts = sorted({row["experts"] for row in chosen})
        console.print(f"[bold]Time over the limit: {dtype}, EP={ranks}, {load} load[/]")
        table = _table("experts", *map(str, counts))
        for name in dict.fromkeys(row["name"] for row in chosen if row["kind"] in ("peer", "ours")):
            by_experts = {row["experts"]: row for row in chosen if row["name"] == name}
            table.add_row(name, *[_ratio(by_experts.get(count)) for count in counts])
        console.print(table)


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    return "[red]error[/]" if "error" in row else f"{row['over_limit']:.2f}"


def show_parts(rows: list[dict], console: Console) -> None:
    """A table of the parts of a step, by dsmoe's kernels and by torch's operators."""
    table = _table("part of a step, one thread", "native", "torch", "torch / native")
    for row in rows:
        native, other = (f"{1e3 * row[name]:.2f} ms" for name in ("native", "torch"))
        table.add_row(row["part"], native, other, f"{row['torch'] / row['native']:.2f}")
    console.print(table)


def show_steps(title: str, rows: list[dict], console: Console) -> None:
    """A table of whole training steps; the share is of what the matrix products alone would allow."""
    limit = next((row["tokens_per_second"] for row in rows if row["kind"] == "matmuls" and "error" not in row), None)
    console.print(f"[bold]{title}[/]")
    table = _table("training step", "tokens/s", "of matmuls", "forward", "backward", "optimizer", "mean k")
    for row in rows:
        if "error" in row:
            continue
        share = f"{row['tokens_per_second'] / limit:.0%}" if limit else ""
        stages = [row["stage_seconds"].get(name) for name in ("forward", "backward", "optimizer")]
        shown = ["" if value is None else f"{1e3 * value:.0f} ms" for value in stages]
        table.add_row(row["name"], f"{row['tokens_per_second']:.0f}", share, *shown, f"{row['mean_experts']:.2f}")
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"[red]{row['name']}[/]: {escape(row['error'])}\n")
