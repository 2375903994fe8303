"""Training, evaluation, generation and checkpoints on pretended CUDA: each rank on its own device from the first, equal
to the CPU in fp32, resumed bit for bit, and every operand of every grouped GEMM as CUDA's kernel takes it.

About 60 s: two jobs of two ranks that train and resume, two that step at odd widths under every ZeRO stage.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pretended
import pretended_model as pm
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from ranks import once, run_ranks

from dsmoe.config import validate_config
from dsmoe.routers.registry import option_classes

pytestmark = pretended.needs_cpu_torch
RUNS = {"ZeRO 1, topk": (1, "topk"), "ZeRO 2, dtop_p": (2, "dtop_p"), "ZeRO 3, relu": (3, "relu")}
ODD = dict(
    num_layers=1, hidden_size=72, num_attention_heads=2, num_query_groups=2, num_experts=6, moe_ffn_hidden_size=40
)
VOCABULARY = 256


def config_of(place: Path, name: str, stage: int, router: str, overlap: bool = False, **training):
    tree = {
        "model": pm.SIZES | {"vocab_size": VOCABULARY}, "router": {"name": router},
        "parallel": {"expert_parallel": 2, "zero_stage": stage},
        "data": {"path": str(place / "tokens"), "valid_fraction": 0.1},
        "training": {"steps": 3, "global_batch_size": 4, "eval_interval": 2, "eval_sequences": 5, "warmup_steps": 1}
        | training,
        "checkpoint": {"interval": 2}, "deepspeed": {"zero_optimization": {"overlap_comm": overlap}},
        "logging": {"run_dir": str(place / name), "tensorboard": False, "experts": 2, "trace": 2},
    }  # fmt: skip
    return validate_config(tree, option_classes())


def losses(place: Path, name: str) -> list[float]:
    from dsmoe.training.metrics import read_lines

    return [line["loss"] for line in read_lines(place / name / "metrics.jsonl")]


def train_on_cpu(place: Path) -> dict:
    from dsmoe.training.run import train

    results: dict = {}
    for name, (stage, router) in RUNS.items():
        summary = train(config_of(place, f"cpu {name}", stage, router, precision="fp32"))
        results[name] = {"cpu": losses(place, f"cpu {name}"), "cpu held-out": summary.metrics["val_loss"]}
    return results | {"generated on the cpu": generate(place / "cpu ZeRO 1, topk")}


def train_on_gpu(place: Path) -> dict:
    from dsmoe.training.run import train

    pretended.start()
    results: dict = {}
    for name, (stage, router) in RUNS.items():
        with pretended.watching() as watch:
            summary = train(config_of(place, f"gpu {name}", stage, router, precision="fp32"))
        train(config_of(place, f"bf16 {name}", stage, router, overlap=True))
        train(config_of(place, f"half {name}", stage, router, stop_at=2, tf32=True))  # bf16: changes no product here
        tf32 = [torch.backends.cuda.matmul.fp32_precision]
        resumed = train(config_of(place, f"half {name}", stage, router))
        tf32.append(torch.backends.cuda.matmul.fp32_precision)
        results[name] = {
            "gpu": losses(place, f"gpu {name}"), "gpu held-out": summary.metrics["val_loss"],
            "bf16": losses(place, f"bf16 {name}"), "resumed": losses(place, f"half {name}"),
            "finished": resumed.finished, "tf32": tf32, "waits": watch.where("sync", "h2d", "wait"),
            "never waited": watch.where("never waited"), "concurrent": watch.where("concurrent"),
            "collectives": [(event.op, *event.detail.split("|")) for event in watch.of("communicator")],
        }  # fmt: skip
    return results | {
        "generated on a gpu": generate(place / "cpu ZeRO 1, topk"),
        "evaluated on a gpu": evaluate(place / "cpu ZeRO 1, topk"),
        "asked too early": get_accelerator().asked_too_early,
        "groups": pretended.groups,
        "device": get_accelerator().current_device_name(),
    }


def generate(run: Path) -> list[int]:
    """Greedy, twelve tokens, with the key/value cache."""
    from dsmoe.checkpoint.restore import TrainedModel
    from dsmoe.inference.generate import Reader

    reader, ids = Reader(TrainedModel.load(run).model.eval()), [1, 2, 3]
    for _ in range(12):
        ids.append(int(reader.logits(ids).argmax()))
    return ids


def evaluate(run: Path) -> float:
    """Of a run, with a batch that leaves one rank nothing but padding."""
    from dsmoe.inference.evaluate import EvaluationOptions
    from dsmoe.inference.evaluate import evaluate as evaluate_run

    return evaluate_run(run, EvaluationOptions(sequences=5, batch_size=2))["val_loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[dict]:
    from dsmoe.lab.planner.measure import _random_corpus

    pretended.library()
    place = tmp_path_factory.mktemp("pretended")
    _random_corpus(place / "tokens", VOCABULARY, 20_000)
    on_cpu = run_ranks(2, train_on_cpu, place, deadline=300)
    on_gpu = run_ranks(2, train_on_gpu, place, deadline=400)
    for here, there in zip(on_cpu, on_gpu, strict=True):
        for name, value in here.items():
            there[name] = {**there[name], **value} if name in RUNS else value
    return on_gpu


def test_every_rank_uses_its_own_device_and_none_asks_for_one_before_it_is_set(trained):
    """At 0031a16 every rank built its controller, batches and sums on cuda:0."""
    for rank, results in enumerate(trained):
        assert results["device"] == f"cuda:{rank}"
        assert results["asked too early"] == []


@pytest.mark.parametrize("name", RUNS)
def test_training_in_fp32_is_the_cpus(name, trained):
    for results in trained:
        actual = results[name]
        assert actual["gpu"] == pytest.approx(actual["cpu"], abs=2e-5)
        assert actual["gpu held-out"] == pytest.approx(actual["cpu held-out"], abs=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_bf16_is_what_a_gpu_gets_unless_fp32_is_asked_for(name, trained):
    for results in trained:
        actual = results[name]
        assert actual["bf16"] == pytest.approx(actual["gpu"], abs=1e-2) and actual["bf16"] != actual["gpu"]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_one_that_never_stopped_and_overlapped_its_reductions(name, trained):
    for results in trained:
        actual = results[name]
        assert actual["finished"] and actual["resumed"] == actual["bf16"]
        assert actual["tf32"] == ["tf32", "ieee"]  # as each configuration asks


def test_evaluation_and_generation_on_a_gpu_are_the_cpus(trained):
    for results in trained:
        assert results["generated on a gpu"] == results["generated on the cpu"]
        assert results["evaluated on a gpu"] == pytest.approx(results["ZeRO 1, topk"]["cpu held-out"], abs=2e-5)


# Where dsmoe makes the host wait in an optimizer step, by file, and how often at most: the plan of each of two layers;
# losses, counts and a controller's value, each for what was queued before its copy; and the gradient norm, before the
# optimizer moves. At 0031a16 the losses were read before the optimizer's part and all else after it.
WAITS_OF_A_STEP = {"runtime/device.py": 4, "optim/deepspeed.py": 1}
# Beside steps: evaluations, checkpoints, and what is written at an interval.
BESIDE = ("dsmoe/training/evaluate.py", "dsmoe/training/experts.py", "dsmoe/training/trace.py", "dsmoe/checkpoint/")


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_the_device_where_it_must_and_nowhere_else(name, trained):
    steps, evaluations = 3, 2
    for results in trained:
        assert not results[name]["never waited"]
        waits = Counter()
        for line in results[name]["waits"]:
            chain = line.split(" at ")[1].split(" < ")
            if chain[0].startswith("dsmoe/") and not any(frame.startswith(BESIDE) for frame in chain):
                waits[chain[0].removeprefix("dsmoe/").split(":")[0]] += 1
        padding = waits.pop("routers/base.py", 0)  # where the last batch of an evaluation has some
        assert padding <= evaluations
        assert waits.keys() <= WAITS_OF_A_STEP.keys()
        for file, most in WAITS_OF_A_STEP.items():
            assert waits[file] <= most * (steps + 2 * evaluations * (file == "runtime/device.py")), (file, waits)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_leave_through_pinned_memory(name, trained):
    """The host waits for events of a stream that copies, not for a copy. At 0031a16 every copy was one that blocks."""
    for results in trained:
        waits = [line for line in results[name]["waits"] if "dsmoe/checkpoint/save.py" in line]
        assert waits and all(line.startswith("wait event") for line in waits), waits


@pytest.mark.parametrize("name", RUNS)
def test_collectives_keep_nccls_rules(name, trained):
    """The ranks of a communicator begin the same collectives in the same order, of equal dtypes and of sizes that they
    have agreed on, and from one thread at a time. What else NCCL refuses raises where it is called."""
    by_group: list[dict[str, list]] = []
    for results in trained:
        assert results[name]["concurrent"] == []
        groups: dict[str, list] = {}
        for op, group, size, rank, dtype, sizes in results[name]["collectives"]:
            groups.setdefault(group, []).append((op, int(size), int(rank), dtype, sizes))
        by_group.append(groups)
    shared = by_group[0].keys() & by_group[1].keys()
    assert shared and all(calls[0][1] == 1 for groups in by_group for g, calls in groups.items() if g not in shared)
    exchanged = 0
    for group in shared:
        for first, second in zip(by_group[0][group], by_group[1][group], strict=True):
            assert first[0] == second[0] and first[3] == second[3], (first, second)
            assert (first[2], second[2]) == (0, 1)
            if first[4].startswith(" "):
                (out_first, in_first), (out_second, in_second) = (splits(call[4]) for call in (first, second))
                assert in_first[1:] == out_second[:1] and in_second[:1] == out_first[1:], (first, second)
                exchanged += 1
            else:
                assert first[4] == second[4], (first, second)
    assert exchanged > 20


def splits(text: str) -> list[list[int]]:
    """What a rank gets from and sends to each rank; nothing where all are equal."""
    return [[int(number) for number in part.strip("[] ").split(",") if number.strip()] for part in text.split("] [")]


def test_groups_are_made_once(trained):
    """Also over several runs in one process; at 0031a16 every rank took part in making one group for each rank."""
    for rank, results in enumerate(trained):
        made = results["groups"]  # DeepSpeed's are made by all ranks
        assert len(made) == len(set(made)) <= 4, made
        assert all(rank in ranks for ranks, alone in made if alone)


def step_at_odd_widths(ep: int) -> dict:
    """One bf16 step for each router and ZeRO stage; what does not suit CUDA's grouped GEMM raises."""
    from dsmoe.parallel.groups import create_groups, start_processes
    from dsmoe.training.engine import build_engine

    pretended.start()
    start_processes()
    actual = {}
    for stage in (1, 2, 3):
        for router in pm.ROUTERS:
            training = {"precision": "bf16", "global_batch_size": 2}
            config = pm.config_of(router, ep, training, **ODD)
            config.parallel.zero_stage = stage
            config.logging.tensorboard = False
            engine = build_engine(config, create_groups(ep))
            engine.train()
            tokens, labels = pm.to_device(*pm.tokens_of(torch.distributed.get_rank(), rows=1))
            with pretended.watching() as watch:
                loss, _ = engine(tokens, labels)
                engine.backward(loss)
                engine.step()
            actual[stage, router] = (loss.item(), watch.kernels["_grouped_mm"], float(engine.get_global_grad_norm()))
    return actual


@once
def odd(ep: int) -> list[dict]:
    pretended.library()
    return run_ranks(2, step_at_odd_widths, ep, deadline=300)


@pytest.mark.parametrize("ep", [1, 2])
def test_every_grouped_gemm_of_a_step_keeps_cudas_contract(ep):
    """At 0031a16 ZeRO-3 with one rank an expert group multiplied weights that lie on no 16 bytes."""
    for results in odd(ep):
        assert len(results) == 3 * len(pm.ROUTERS)
        for loss, products, norm in results.values():
            assert 3.5 < loss < 6 and norm > 0 and products >= 6
