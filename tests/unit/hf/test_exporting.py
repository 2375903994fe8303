"""An export from start to end in this process: what lies in the folder, what is refused, and that a folder which does
not compute what the run does never appears. Runs are made up, not trained."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dsmoe.checkpoint.load import CheckpointReader
from dsmoe.checkpoint.write import write_weights
from dsmoe.config import RunConfig, validate_config
from dsmoe.data.prepare import prepare
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, ConversionError, DataError
from dsmoe.hf.card_picture import draw_routing
from dsmoe.hf.export import ExportOptions, export, summary
from dsmoe.hf.importing import ImportOptions, import_model
from dsmoe.hf.parity import Agreement, Observation, compare
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes
from dsmoe.routers.relu import ReLURouter

pytestmark = pytest.mark.slow

MODEL = dict(
    num_layers=2, hidden_size=32, num_attention_heads=2, sequence_length=32, num_experts=4, moe_ffn_hidden_size=16,
    vocab_size=320, init_std=0.1,
)  # fmt: skip
FILES = {
    "README.md", "config.json", "activations_dsmoe.py", "configuration_dsmoe.py", "modeling_dsmoe.py",
    "routing_dsmoe.py", "routing.png", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "generation_config.json", "export_report.json", "training_state.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Forty documents of made-up sentences, prepared."""
    texts, folder = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "dataset"
    for number in range(40):
        lines = (f"The token {number * line} goes to expert {line % 7} of layer {number % 5}.\n" for line in range(30))
        (texts / f"{number}.txt").write_text("".join(lines))
    prepare([str(texts)], folder, vocab_size=310, valid_fraction=0.2, workers=1)
    return folder


def made_up_run(folder: Path, dataset: Path, router: dict, logit_scale: float = 1.0, **model) -> RunConfig:
    """A run folder with a checkpoint of drawn weights, and a controller that has moved. `logit_scale`: of an output
    matrix of its own."""
    tree = {"model": MODEL | model, "router": router, "data": {"path": str(dataset)}}
    config = validate_config(tree, option_classes())
    shapes = logical_shapes(config.model, config.router)
    generator = torch.Generator().manual_seed(1)
    tensors = (
        (name, _scale(name, logit_scale) * 0.15 * torch.randn(shape, generator=generator) + float(len(shape) == 1))
        for name, shape in shapes.items()
    )
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    controller = router_class.make_controller(options, sum(config.model.moe_layers()), config.model.num_experts)
    state = None
    if controller is not None:
        drawn = torch.Generator().manual_seed(2)
        state = {
            name: torch.tensor(9000) if name == "updates" else value + 0.1 * torch.rand(value.shape, generator=drawn)
            for name, value in controller.state.items()
        }
    folder.mkdir(parents=True)
    write_weights(folder, config, shapes, tensors, state)
    Tokenizer.load(dataset).copy_to(folder)
    return config


def _scale(name: str, logit_scale: float) -> float:
    return logit_scale if name == "gpt.output_layer.weight" else 1.0


@pytest.fixture(scope="module")
def exported(tmp_path_factory, dataset, groups) -> tuple[Path, Path, dict]:
    """Run, folder and report of a router with state, in bf16, in several shards."""
    place = tmp_path_factory.mktemp("exported")
    made_up_run(place / "run", dataset, {"name": "expert_threshold", "k": 2}, moe_shared_expert_intermediate_size=8)
    report = export(place / "run", place / "out", ExportOptions(dtype="bf16", max_shard_size="20KB", license="mit"))
    return place / "run", place / "out", report


def test_the_folder_has_all_it_needs(exported):
    _, out, report = exported
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == FILES | {"model.safetensors.index.json"}
    assert len(shards) == report["weights"]["files"] > 2
    tensors = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == index["metadata"]["total_parameters"]
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if ".routing." in name else torch.bfloat16), name
    assert json.loads((out / "export_report.json").read_text()) == report


def test_the_report_says_how_exact_it_is(exported):
    _, _, report = exported
    fp32, half = report["parity"]["fp32"], report["parity"]["bf16"]
    assert fp32["max_logit_difference"] <= 1e-4 and fp32["greedy_equal"] and fp32["flipped_routes"] == 0
    assert fp32["top1_agreement"] == 1 and fp32["kl_divergence"] < 1e-9
    assert (
        0 < half["max_logit_difference"] < 3 and 0 < half["kl_divergence"] < 0.1 and 0 <= half["flipped_routes"] < 0.1
    )
    assert report["tokenizer"]["tokens"] > 1000
    assert report["weights"]["distinct_experts"] == {
        "gpt.decoder.layers.0.mlp.experts": 4, "gpt.decoder.layers.1.mlp.experts": 4
    }  # fmt: skip
    held_out, parameters = report["held_out"], report["parameters"]
    mean = sum(held_out["experts_per_token_by_layer"]) / 2
    assert held_out["experts_per_token"] == pytest.approx(mean) and 0 < mean < 4
    assert parameters["active_measured"] == round(parameters["total"] - 2 * (4 - mean) * 3 * 32 * 16)
    assert "flipped routes" in summary(report)


def test_config_and_state(exported):
    run, out, _ = exported
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_dsmoe.DsmoeForCausalLM"
    assert config["dtype"] == "bfloat16" and config["router"]["k"] == 2.0 and config["router"]["decay"] == 0.999
    assert config["eos_token_id"] == Tokenizer.load(run).eod_id == config["bos_token_id"]
    suppressed = json.loads((out / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == list(range(310, 320))
    saved = load_file(run / "checkpoints/step_00000000/state.safetensors")
    state = json.loads((out / "training_state.json").read_text())
    assert state["router"] == "expert_threshold" and state["step"] == 0
    assert {name: torch.tensor(value) for name, value in state["controller"].items()}.keys() == saved.keys()
    assert torch.equal(torch.tensor(state["controller"]["average"]), saved["average"])


def test_the_card(exported):
    _, out, report = exported
    card = (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: mit" in front and "library_name: transformers" in front and "- expert_threshold" in front
    assert f"{report['held_out']['experts_per_token']:.2f}, measured on" in card
    assert f"{report['parameters']['total']:,}" in card and "trust_remote_code=True" in card
    assert str(out.parent) not in card and "2603.11535" in card
    assert '<img src="routing.png"' in card and card.index("## Routing") < card.index("## Training")
    assert "a fixed number of experts per token cannot run it" in card and "vLLM" not in card


def test_the_card_of_a_fixed_k_names_the_engines_that_may_run_it(tmp_path, dataset, groups):
    made_up_run(tmp_path / "run", dataset, {"name": "topk", "k": 3})
    export(tmp_path / "run", tmp_path / "out", ExportOptions())
    card = (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 3
    assert "Every token takes 3 experts" in card and "vLLM's Transformers backend" in card
    assert "cannot run it" not in card


def test_the_picture_says_what_the_routes_are(tmp_path):
    """Its words, its colours and its width: two layers of three experts, one of them without a token."""
    routes = torch.zeros(2, 4, 3, dtype=torch.bool)
    routes[0, :, 0], routes[1, :, :2] = True, True
    markdown = draw_routing(tmp_path, [1, 3], routes)
    assert "experts per token, 1.00 to 2.00" in markdown and "at most 3.0 times the mean" in markdown
    assert "on 4 held-out tokens; an expert has 2 of them" in markdown
    assert "Vermilion: without a token here (3 of 6)" in markdown
    pixels = plt.imread(tmp_path / "routing.png")[..., :3]
    assert pixels.shape[1] == 880 and (tmp_path / "routing.png").stat().st_size < 60_000

    def area(colour) -> int:
        return int((abs(pixels * 255 - torch.tensor(colour).numpy()).max(-1) < 2).sum())

    assert area((213, 94, 0)) == pytest.approx(
        3 * area((253, 231, 37)), rel=0.1
    )  # idle cells; the one at 3 times the mean
    assert "Vermilion" not in draw_routing(tmp_path, [0], torch.ones(1, 4, 3, dtype=torch.bool))


def test_a_plain_top_k_model_needs_no_code(tmp_path, dataset, groups):
    """Which architecture holds which model, and exactly: test_native.py."""
    model = {"qk_layernorm": True, "moe_layer_freq": [0, 1], "num_query_groups": 1}
    made_up_run(tmp_path / "run", dataset, {"name": "topk", "k": 2}, **model)
    report = export(tmp_path / "run", tmp_path / "out", ExportOptions(format="auto"))
    assert report["architecture"] == "qwen3_moe" and report["parity"]["fp32"]["flipped_routes"] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {name for name in FILES if not name.endswith(".py")} | {"model.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" not in card


@pytest.mark.parametrize(
    ("router", "activation", "bias"),
    [({"name": "topk", "k": 2}, "reglu", True), ({"name": "relu", "k": 1}, "relu2", False)],
)
def test_other_experts_leave_and_come_back(tmp_path, dataset, groups, router, activation, bias):
    """Both ways are held to transformers' own logits."""
    model = {"expert_activation": activation, "expert_bias": bias}
    made_up_run(tmp_path / "run", dataset, router, **model)
    with pytest.raises(
        ConversionError, match=f"model.expert_activation is {activation}, model.expert_bias {str(bias).lower()}"
    ):
        export(tmp_path / "run", tmp_path / "native", ExportOptions(format="auto"))
    report = export(tmp_path / "run", tmp_path / "out", ExportOptions())
    assert report["parity"]["fp32"]["max_logit_difference"] <= 1e-4
    assert f"{activation} of width 16" in (tmp_path / "out" / "README.md").read_text()
    report = import_model(tmp_path / "out", tmp_path / "again", ImportOptions())
    assert report["parity"]["fp32"]["max_logit_difference"] <= 1e-4
    readers = [CheckpointReader(tmp_path / name / "checkpoints" / "step_00000000") for name in ("run", "again")]
    tensors = readers[0].manifest.tensors
    assert tensors == readers[1].manifest.tensors and any(name.endswith("_bias") for name in tensors) == bias
    for name, shape in tensors.items():
        first, second = (reader.read("weight", name, 0, math.prod(shape)) for reader in readers)
        assert torch.equal(first, second), name


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset) -> Path:
    """A run that no test changes."""
    folder = tmp_path_factory.mktemp("source") / "run"
    made_up_run(folder, dataset, {"name": "relu", "k": 1})
    return folder


def test_what_computes_something_else_never_appears(run, tmp_path, monkeypatch, groups):
    """A router file that differs a little: the gate finds it, and nothing is left."""
    altered, code = tmp_path / "altered.py", ReLURouter.inference_file.read_text()
    altered.write_text(code.replace("probs_TE = F.relu(", "probs_TE = 1.001 * F.relu("))
    monkeypatch.setattr(ReLURouter, "inference_file", altered)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ConversionError, match="does not compute what its source does: logits differ by up to"):
        export(run, target / "out", ExportOptions())
    assert list(target.iterdir()) == []


def test_a_sound_run_with_large_logits_is_exported(tmp_path, dataset, groups):
    """What rounding is follows the logits' size; to a fixed limit of 1e-4 they differ."""
    made_up_run(tmp_path / "run", dataset, {"name": "relu", "k": 1}, logit_scale=3e4, tie_embeddings=False)
    parity = export(tmp_path / "run", tmp_path / "out", ExportOptions())["parity"]
    assert parity["fp32"]["max_logit_difference"] > 1e-3
    equality = parity["equality"]
    assert equality["difference"] <= equality["allowed"] < 1e-3 * equality["logit_scale"]


def test_code_that_does_not_load_is_named(run, tmp_path, monkeypatch, groups, new_observers):
    altered = tmp_path / "altered.py"
    altered.write_text("import dsmoe\n")
    monkeypatch.setattr(ReLURouter, "inference_file", altered)
    with pytest.raises(ConversionError, match="transformers cannot load or run the folder: .*dsmoe"):
        export(run, tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_before_any_work(run, tmp_path, monkeypatch):
    def attempt(path=run, out=tmp_path / "new" / "out", **options):
        export(path, out, ExportOptions(**options))

    with pytest.raises(CheckpointError, match="neither a complete checkpoint"):
        attempt(path=tmp_path)
    with pytest.raises(CheckpointError, match="shard size: found 'big'"):
        attempt(max_shard_size="big")
    with pytest.raises(CheckpointError, match="exists already"):
        attempt(out=run)
    with pytest.raises(DataError, match="checked on held-out text.*--data"):
        attempt(data=str(tmp_path / "nowhere"))
    with pytest.raises(ConversionError, match="router.name is relu"):
        attempt(format="mixtral")
    with pytest.raises(ConversionError, match=r"--format: found 'mixtrel', expected one of dsmoe, .*'mixtral'"):
        attempt(format="mixtrel")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = next(copy.glob("checkpoints/*/rank_00000.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="rank_00000.safetensors does not have the content that was saved"):
        export(copy, tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()


def test_a_router_of_another_package_brings_its_own_file(tmp_path, dataset, plugin_router, monkeypatch, groups):
    made_up_run(tmp_path / "run", dataset, {"name": "sigmoid_threshold"})
    report = export(tmp_path / "run", tmp_path / "out", ExportOptions())
    assert report["router"] == "sigmoid_threshold" and report["parity"]["fp32"]["flipped_routes"] == 0
    assert (tmp_path / "out" / "routing_dsmoe.py").read_text() == plugin_router.inference_file.read_text()
    assert "Router `sigmoid_threshold`: sigmoid gates above a threshold" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(plugin_router, "inference_file", tmp_path / "its_file.py")
    with pytest.raises(ConversionError, match="its_file.py does not exist"):
        export(tmp_path / "run", tmp_path / "other", ExportOptions())
    monkeypatch.delattr(plugin_router, "inference_file")
    with pytest.raises(ConversionError, match="'sigmoid_threshold'.* cannot be exported.*`inference_file`"):
        export(tmp_path / "run", tmp_path / "other", ExportOptions())


def test_compare_measures_what_it_says():
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]])
    routes = torch.tensor([[[True, False], [True, True]]])
    written = torch.arange(4)
    one = Observation(logits, routes, written)
    assert compare(one, one) == Agreement(0.0, 1.0, 0.0, 0.0, True)
    changed = logits.clone()
    changed[0, 0, 0] = 2.5  # the likeliest now
    other_routes = routes.clone()
    other_routes[0, 0] = torch.tensor([False, True])  # one route for another: 2 of 6
    actual = compare(one, Observation(changed, other_routes, written.flip(0)))
    divergence = nn.functional.kl_div(changed.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum")
    assert actual.max_logit_difference == 2.5 and actual.top1_agreement == 0.5 and not actual.greedy_equal
    assert actual.kl_divergence == pytest.approx(divergence.item() / 2, rel=1e-5)
    assert actual.flipped_routes == pytest.approx(2 / 6)
    broken = logits.clone()
    broken[0, 1, 1] = torch.nan
    assert compare(one, Observation(broken, None, written)).max_logit_difference == torch.inf
    with pytest.raises(ConversionError, match="expected"):
        compare(one, Observation(logits[:, :1], routes, written))
