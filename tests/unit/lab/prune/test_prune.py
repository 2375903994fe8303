"""Fewer experts, for every router: which go, what stays as it was, and that the result is a run or export as any."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TRAIN, forked
from made_up_run import EXPERTS, IDLE, LAYERS, TWINS, made_up_dataset, made_up_run

from dsmoe.checkpoint.files import find_checkpoint
from dsmoe.checkpoint.load import CheckpointReader, saved_config
from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.cli import main
from dsmoe.errors import ConfigError
from dsmoe.hf.export import ExportOptions, export
from dsmoe.lab.prune.choose import plan_layers
from dsmoe.lab.prune.prune import PruneOptions, prune
from dsmoe.routers import available, get

pytestmark = pytest.mark.slow

ADDITIVE = ["relu", "routing_free", "expert_threshold", "quantile"]  # a token's experts do not compete


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return made_up_dataset(tmp_path_factory.mktemp("corpus"))


def read(run: Path) -> tuple[CheckpointReader, dict[str, torch.Tensor]]:
    reader = CheckpointReader(find_checkpoint(str(run), run))
    shapes = reader.manifest.tensors
    return reader, {n: reader.read("weight", n, 0, int(np.prod(s))).view(s) for n, s in shapes.items()}


@pytest.mark.parametrize("name", sorted(name for name, r in available().items() if r.__module__.startswith("dsmoe.")))
def test_experts_that_stay_are_what_they_were(name, dataset, groups, tmp_path):
    """With their row of the router and their controller's state, under their new numbers."""
    run, out = made_up_run(tmp_path / "run", dataset, name), tmp_path / "out"
    report = prune(run, out, PruneOptions(experts=4))
    assert report["experts"] == {"before": EXPERTS, "after": 4}
    assert not verify_checkpoint(find_checkpoint(str(out), out)).problems
    (before, theirs), (after, ours) = read(run), read(out)
    for place, layer in enumerate(report["layers"]):
        gone = {*layer["dropped"], *(expert for cluster in layer["merged"] for expert in cluster[1:])}
        alone = set(range(EXPERTS)) - gone - {cluster[0] for cluster in layer["merged"]}
        new_number = {old: new for new, old in enumerate(expert for expert in range(EXPERTS) if expert not in gone)}
        assert len(gone) == 2 and len(alone) >= 2
        prefix = f"gpt.decoder.layers.{place}.mlp."
        for room in ("experts", "router"):  # in which a router that scores by experts has a tensor for each
            for own in [key.rpartition(".")[2] for key in theirs if key.startswith(f"{prefix}{room}.0.")]:
                for old in alone:
                    now = ours[f"{prefix}{room}.{new_number[old]}.{own}"]
                    assert torch.equal(now, theirs[f"{prefix}{room}.{old}.{own}"])
        for key in [key for key in theirs if re.match(rf"{re.escape(prefix)}router\.[a-z]", key)]:
            per_expert = theirs[key].shape[:1] == (EXPERTS,)
            for old in alone if per_expert else ():
                torch.testing.assert_close(ours[key][new_number[old]], theirs[key][old])
            assert per_expert or torch.equal(ours[key], theirs[key])
        for key, value in before.controller_state().items():
            for old in alone if value.shape[:2] == (LAYERS, EXPERTS) else ():
                torch.testing.assert_close(after.controller_state()[key][place, new_number[old]], value[place, old])
    config = saved_config(after.manifest, out)
    options = get(name).Options.model_validate(config.router.options)
    old_options = get(name).Options.model_validate(saved_config(before.manifest, run).router.options)
    aims = [o.target_experts_per_token(config.model) for o in (options, old_options)]
    if name == "routing_free":  # its option is a density
        aims[1] = old_options.target_experts_per_token(saved_config(before.manifest, run).model)
    if name != "top_p":  # whose flat softmax needs fewer of fewer
        assert aims[0] == pytest.approx(aims[1])


def logits_of(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return TrainedModel.load(run).model(tokens)


@pytest.mark.parametrize("name", ADDITIVE)
def test_twins_and_idle_experts_go_without_a_trace(name, dataset, groups, tmp_path):
    """Both twins took the same tokens, so the one that stays has to do what both did."""
    run, out = made_up_run(tmp_path / "run", dataset, name, twins=True), tmp_path / "out"
    report = prune(run, out, PruneOptions())
    assert report["experts"]["after"] == EXPERTS - 2
    for layer in report["layers"]:
        assert layer["dropped"] == [IDLE] and layer["merged"] == [list(TWINS)]
    tokens = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits_of(out, tokens), logits_of(run, tokens), rtol=1e-3, atol=1e-4)
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
    assert after["experts_per_token"] < before["experts_per_token"]


@pytest.mark.parametrize("name", ["expert_threshold", "routing_free", "topk_bias"])
def test_the_result_trains_and_exports(name, dataset, groups, tmp_path, capsys):
    run, out = made_up_run(tmp_path / "run", dataset, name), tmp_path / "out"
    assert main(["prune", str(run), "--out", str(out), "--experts", "4"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 6 -> 4 experts a layer" in said and "held-out loss" in said
    export(out, tmp_path / "exported", ExportOptions())  # which holds it to the run
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["num_experts"] == 4
    options = ["training.steps=2", "training.eval_interval=0", "parallel.expert_parallel=2"]
    trained = forked(TRAIN, "--config", str(out / "config.yaml"), *options, processes=2)
    assert trained.code == 0, trained.output
    assert (out / "checkpoints" / "step_00000002").is_dir()


def test_an_export_becomes_an_export(dataset, groups, tmp_path):
    run = made_up_run(tmp_path / "run", dataset, "relu")
    export(run, tmp_path / "exported", ExportOptions())
    with pytest.raises(ConfigError, match="--data"):
        prune(tmp_path / "exported", tmp_path / "out", PruneOptions(experts=3))
    report = prune(tmp_path / "exported", tmp_path / "out", PruneOptions(experts=3, data=str(dataset)))
    assert report == json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 3
    assert (tmp_path / "out" / "export_report.json").is_file()


def test_what_cannot_be_is_refused_and_leaves_nothing(dataset, groups, tmp_path):
    run = made_up_run(tmp_path / "run", dataset, "topk")
    for options, said in (
        (PruneOptions(), "no expert to spare"),
        (PruneOptions(experts=6), "--experts: found 6, expected 1 to 5"),
        (PruneOptions(experts=1), "router.k: found 2, expected at most model.num_experts"),
        (PruneOptions(dead=-1, similar=2), "--dead"),
    ):
        with pytest.raises(ConfigError, match=said):
            prune(run, tmp_path / "out", options)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_the_order_in_which_experts_go():
    counts = np.array([[10, 0, 5, 8, 0, 9], [10, 4, 5, 8, 0, 9]])
    cosine = np.eye(6) + 0.1
    for a, b, value in ((0, 2, 0.95), (2, 3, 0.92), (0, 3, 0.5)):
        cosine[a, b] = cosine[b, a] = value
    cosines = np.stack([cosine, cosine])
    plans = plan_layers(counts, cosines, 1, None, dead=0, similar=0.9)
    assert [plan.dropped for plan in plans] == [[1, 4], [4]]  # as many in each layer: the second merges instead
    assert [plan.merged for plan in plans] == [[], [[0, 2]]]
    np.testing.assert_allclose(plans[1].shares_NE(whole=False)[0], [2 / 3, 0, 1 / 3, 0, 0, 0])
    assert plans[1].shares_NE(whole=True)[0].tolist() == [1, 0, 0, 0, 0, 0]
    (plan, _) = plan_layers(counts, cosines, 1, 2, dead=0, similar=0.9)
    assert len(plan.clusters) == 2 and plan.dropped == [1, 4]
    in_groups = plan_layers(counts, cosines, 2, 4, dead=0, similar=0.9)
    assert [plan.dropped for plan in in_groups] == [[1, 4], [4]]
    assert in_groups[1].merged == [[0, 2]], "one of each group"
    with pytest.raises(ConfigError, match="a multiple of the router's 2 groups"):
        plan_layers(counts, cosines, 2, 3, dead=0, similar=0.9)
