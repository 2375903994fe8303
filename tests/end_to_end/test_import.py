"""A Hugging Face model becomes a run by the real command, and two processes with half the experts each train it; it
leaves as what it was fine-tuned from, and comes back with another router."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from commands import TRAIN, forked, metrics

CONVERT = "tools/convert_checkpoint.py"
SEQUENCE, HELD_OUT = 32, 6


@pytest.fixture(scope="module")
def folder(place, corpus):
    """A tiny Qwen3-MoE of transformers, with the tokenizer of the corpus."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=24, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        mlp_only_layers=[0], max_position_embeddings=SEQUENCE, initializer_range=0.2, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    path = place / "a model of the hub"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="50KB")
    shutil.copyfile(corpus / "tokenizer.model", path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def imported(place, folder):
    run_dir = place / "runs" / "imported"
    options = ["--set", "parallel.expert_parallel=2", "--set", "training.global_batch_size=4"]
    result = forked(CONVERT, "import", str(folder), str(run_dir), *options)
    assert result.code == 0, result.output
    return run_dir, result


def test_the_import_is_held_to_transformers_on_real_text(imported):
    run_dir, result = imported
    report = json.loads((run_dir / "import_report.json").read_text())
    parity = report["parity"]
    assert parity["gate"] and parity["text"] == "source of Python's argparse.py"
    assert parity["fp32"]["max_logit_difference"] <= 1e-4 and parity["fp32"]["top1_agreement"] == 1.0
    assert parity["fp32"]["kl_divergence"] < 1e-8 and parity["fp32"]["greedy_equal"]
    assert "as transformers' model: logits within" in result.output and str(run_dir / "config.yaml") in result.output
    assert (run_dir / "tokenizer.model").is_file()


def test_an_imported_run_trains_on_at_another_layout(imported, folder, corpus):
    """With next to no learning rate the loss on held-out text after one step is that of transformers' model."""
    run_dir, _ = imported
    arguments = ["--config", str(run_dir / "config.yaml"), f"data.path={corpus}", "training.steps=1"]
    small = [
        "training.lr=1e-12",
        "training.warmup_steps=0",
        f"training.eval_sequences={HELD_OUT}",
        "logging.tensorboard=false",
    ]
    trained = forked(TRAIN, *arguments, *small, processes=2)
    assert trained.code == 0, trained.output
    assert "step_00000000" in trained.output and "expert parallel 2" in trained.output
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000001"
    assert metrics(run_dir)[-1]["val_loss"] == pytest.approx(loss_of_transformers(folder, corpus), abs=1e-4)
    verified = forked(CONVERT, "verify", str(run_dir), "--all")
    assert verified.code == 0, verified.output


def test_a_trained_import_leaves_and_comes_back_with_another_router(imported, place, corpus):
    """Steps count as fine-tuning of the model that each run was imported from. Two exports, which run their models."""
    run_dir, _ = imported
    if not (run_dir / "checkpoints" / "step_00000001").is_dir():  # the test before trains it
        train(run_dir, corpus, 1)
    assert "held to the run" in convert("export", run_dir, place / "imported again" / "exported")
    card = (place / "imported again" / "exported" / "README.md").read_text()
    assert "Fine-tuned from `a model of the hub`: 1 optimizer steps, 128 tokens" in card
    operated = place / "runs" / "operated"
    options = ["--router", "relu", "--skip-check", "--set", "training.global_batch_size=4"]
    assert "router relu from the gates of topk" in convert(
        "import", place / "imported again" / "exported", operated, *options
    )
    train(operated, corpus, 2)
    assert [line["step"] for line in metrics(operated)] == [1, 2]
    convert("export", operated, place / "of relu")
    report = json.loads((place / "of relu" / "export_report.json").read_text())
    assert (report["router"], report["step"], report["fine_tuned_from"]) == ("relu", 2, "exported")
    assert report["parity"]["fp32"]["greedy_equal"] and report["held_out"]["experts_per_token"] > 0
    card = (place / "of relu" / "README.md").read_text()
    assert "Fine-tuned from `exported`: 2 optimizer steps, 256 tokens" in card and "base_model: exported" in card


def convert(*arguments) -> str:
    result = forked(CONVERT, *map(str, arguments), loaded=True)
    assert result.code == 0, result.output
    return result.output


def train(run_dir, corpus, steps: int) -> None:
    options = [f"data.path={corpus}", f"training.steps={steps}", "training.eval_sequences=2"]
    parallel = "parallel.expert_parallel=1"
    result = forked(TRAIN, "--config", str(run_dir / "config.yaml"), parallel, "logging.tensorboard=false", *options)
    assert result.code == 0, result.output


@torch.no_grad()
def loss_of_transformers(folder, corpus) -> float:
    from transformers import AutoModelForCausalLM

    from dsmoe.config import DataConfig
    from dsmoe.data.dataset import heldout, open_corpus

    held = heldout(open_corpus(DataConfig(path=str(corpus))), SEQUENCE, HELD_OUT)
    batch = held.batch(0, len(held))
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(batch["tokens"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
