"""Every kind of model is read as it computes: routes, weights and losses against the model's own, and against a plain
computation from its weights; and what cannot be inspected is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.errors import CheckpointError, ConfigError, ConversionError, DataError, DsmoeError
from dsmoe.hf.export import ExportOptions, export
from dsmoe.lab.inspect.models import open_model
from dsmoe.lab.inspect.reading import read
from dsmoe.lab.inspect.report import InspectOptions, inspect
from dsmoe.lab.inspect.sweep import Sweep, own_sweep, parse, run_sweep
from dsmoe.lab.inspect.texts import Text, read_texts, tokenize
from dsmoe.lab.study.probe.similarity import all_outputs
from dsmoe.moe.layer import VariableMoELayer
from dsmoe.routers.registry import option_classes

TEXT = "The token 12 goes to expert 3 of layer 4."
ROUTERS = sorted(name for name, options in option_classes().items() if options.__module__.startswith("dsmoe."))
OPTIONS = {"topk": {"k": 2}, "relu": {"k": 2}, "routing_free": {"rank": 8}, "aoe": {"rank": 8}}


def seen(path: Path, text: str = TEXT, windows: int = 1):
    model = open_model(path)
    tokens = tokenize(Text("text", text), model.tokenizer, model.context, model.vocab_size, windows)
    return model, tokens, read(model, [tokens])


@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_is_read_as_it_computes(run_of, router):
    """Losses are the run's own, counts those of its recorder, and expert weights give what its experts compute."""
    path = run_of(router, **OPTIONS.get(router, {}))
    model, tokens, reading = seen(path)
    trained = TrainedModel.load(path)
    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        _, parts = trained.model(ids[:, :-1], ids[:, 1:])
        trained.model.recorder.take()
        trained.model(ids)
    assert reading.mean_loss == pytest.approx(float(parts["lm"]), rel=1e-5)
    counts_LE = trained.model.recorder.take().counts_LE.numpy()
    np.testing.assert_array_equal(reading.map_LTE.sum(1), counts_LE)
    assert np.isnan(reading.next_loss_T[-1]) and np.isnan(reading.loss_T[0])
    assert ((reading.probs_LTE > 0) <= reading.map_LTE).all() and len(reading.experts_LT) == 2
    assert (model.router, model.kind, model.step, model.layers) == (router, "run", 0, [0, 1])
    layers = [module for module in trained.model.modules() if isinstance(module, VariableMoELayer)]
    for layer, module in enumerate(layers):
        rows = reading.hidden_LNH[layer]
        with torch.no_grad():
            torch.testing.assert_close(
                model.experts(layer).outputs(rows), all_outputs(module, rows), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen3_moe"])
def test_a_model_of_transformers(native_of, architecture):
    """Softmax, top-k and gates are taken again from the router logits that transformers returns."""
    folder = native_of(architecture)
    model, tokens, reading = seen(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        output = network(ids, labels=ids, output_router_logits=True)
        plain = F.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    assert reading.mean_loss == pytest.approx(float(plain), rel=1e-5)
    moe_layers = [1] if architecture == "qwen3_moe" else [0, 1]
    assert (model.router, model.k, model.layers, model.step) == ("topk", 2, moe_layers, None)
    renormalised = architecture != "olmoe"
    logits = [layer for layer in output.router_logits if layer is not None and layer.numel()]
    assert len(logits) == len(moe_layers)
    for layer, logits_TE in enumerate(logits):
        probs_TE = logits_TE.float().softmax(-1)
        for token, row in enumerate(probs_TE.tolist()):
            best = sorted(range(4), key=lambda expert: -row[expert])[:2]
            assert set(np.flatnonzero(reading.map_LTE[layer, token])) == set(best)
            total = sum(row[expert] for expert in best) if renormalised else 1.0
            for expert in best:
                assert reading.probs_LTE[layer, token, expert] == pytest.approx(row[expert] / total, rel=1e-4)
    # what the layer computes is the weighted sum of the outputs of its experts
    mlp = network.model.layers[moe_layers[0]].mlp
    rows = reading.hidden_LNH[0]
    weighted = (model.experts(0).outputs(rows) * torch.from_numpy(reading.probs_LTE[0]).T.unsqueeze(-1)).sum(0)
    with torch.no_grad():
        torch.testing.assert_close(mlp(rows.unsqueeze(0))[0], weighted, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def exports(run_of, dataset, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Run and export: of routers with a varying and a fixed k in our format, which brings code, and in a native one."""
    place = tmp_path_factory.mktemp("exports")
    runs = {
        "relu": run_of("relu", k=2), "routing_free": run_of("routing_free", rank=8),
        "topk": run_of("topk", k=2, softmax="after"), "native": run_of("topk", k=2, softmax="after"),
    }  # fmt: skip
    for name, run in runs.items():
        options = ExportOptions(data=str(dataset), format="auto" if name == "native" else "dsmoe")
        export(run, place / name, options)
    return {name: (run, place / name) for name, run in runs.items()}


@pytest.mark.parametrize("name", ["relu", "routing_free", "topk", "native"])
def test_an_export_shows_what_its_run_shows(exports, name):
    """Four runs are exported first, each held to what transformers computes."""
    run, folder = exports[name]
    assert (folder / "modeling_dsmoe.py").exists() == (name != "native")
    ours, _, run_reading = seen(run)
    theirs, _, reading = seen(folder)
    assert (theirs.kind, theirs.num_experts, theirs.k) == ("huggingface", 4, ours.k)
    np.testing.assert_array_equal(reading.map_LTE, run_reading.map_LTE)
    np.testing.assert_allclose(reading.probs_LTE, run_reading.probs_LTE, atol=1e-5)
    np.testing.assert_allclose(reading.next_loss_T, run_reading.next_loss_T, atol=1e-4)
    for layer in range(2):
        for part in ("gate_EFH", "up_EFH", "down_EHF"):
            torch.testing.assert_close(getattr(theirs.experts(layer), part), getattr(ours.experts(layer), part))
    assert theirs.inference_options == ours.inference_options
    for sweep in (own_sweep(ours), Sweep("k", (1.0,)), Sweep("theta", (0.4,)), Sweep("p", (0.5,))):
        both = [
            run_sweep(model, one, [tokenize(Text("text", TEXT), model.tokenizer, 32, 300, 1)], sweep)["settings"]
            for model, one in ((ours, run_reading), (theirs, reading))
        ]
        assert [entry["experts_per_token"] for entry in both[0]] == [entry["experts_per_token"] for entry in both[1]]
        assert [entry["loss"] for entry in both[0]] == pytest.approx([entry["loss"] for entry in both[1]], abs=1e-4)


def test_k_of_a_trained_top_k_is_its_option(run_of, native_of):
    """Twice the k is twice the experts, with gates of the router's own; and the model is as before afterwards."""
    for path in (run_of("topk", k=2), native_of("mixtral")):
        model, tokens, reading = seen(path)
        actual = run_sweep(model, reading, [tokens], Sweep("k", (1.0, 3.0, 4.0)))
        assert actual["is_option"] and [entry["value"] for entry in actual["settings"]] == [2, 1, 3, 4]
        assert [entry["experts_per_token"] for entry in actual["settings"]] == [2, 1, 3, 4]
        assert len({entry["loss"] for entry in actual["settings"]}) == 4
        again = read(model, [tokens])
        np.testing.assert_array_equal(again.next_loss_T, reading.next_loss_T)


def test_a_theta_drops_the_small_weights_and_changes_the_loss(run_of):
    """The loss under theta is that of a model whose ReLU gates are zeroed by hand below it."""
    path = run_of("relu", k=2)
    model, tokens, reading = seen(path)
    theta = float(np.median(reading.probs_LTE[reading.map_LTE]))
    actual = run_sweep(model, reading, [tokens], Sweep("theta", (theta,)))
    trained = TrainedModel.load(path)
    for router in trained.model.recorder.routers:
        router.gating = lambda hidden, gate=router.gating: (lambda r: torch.where(r >= theta, r, 0.0))(gate(hidden))
    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        _, parts = trained.model(ids[:, :-1], ids[:, 1:])
    assert actual["is_option"] and actual["settings"][1]["loss"] == pytest.approx(float(parts["lm"]), rel=1e-5)
    assert actual["settings"][1]["experts_per_token"] < actual["settings"][0]["experts_per_token"]
    assert own_sweep(model).name == "theta" and len(run_sweep(model, reading, [tokens], Sweep("theta"))["settings"]) > 3


def test_a_sweep_of_the_routers_own_threshold(run_of):
    model, tokens, reading = seen(run_of("routing_free", rank=8))
    actual = run_sweep(model, reading, [tokens], own_sweep(model))
    assert actual["name"] == "theta" and actual["is_option"] and actual["settings"][0]["value"] == 1
    values = sorted((entry["value"], entry["experts_per_token"]) for entry in actual["settings"])
    assert [experts for _, experts in values] == sorted((experts for _, experts in values), reverse=True)


def test_windows_are_read_each_by_itself(run_of):
    """A text of three windows; each position's loss is that of its own window alone, and none is missing between."""
    text = "".join(f"The token {n} goes to expert {n % 7}.\n" for n in range(9))
    path = run_of("relu", k=2)
    model, tokens, reading = seen(path, text, windows=9)
    assert len(tokens.ids) > 64 and reading.position_T.max() == 31
    for first in range(0, len(tokens.ids), 32):
        ids = tokens.ids[first : first + 32]
        logits, _ = model.read(ids)
        following = tokens.ids[first + 1 : first + 33]
        for place, token in enumerate(following):
            plain = -float(logits[place].log_softmax(-1)[token])
            assert reading.next_loss_T[first + place] == pytest.approx(plain, abs=1e-4)
    assert np.isnan(reading.next_loss_T).sum() == np.isnan(reading.loss_T).sum() == 1
    np.testing.assert_array_equal(reading.loss_T[1:], reading.next_loss_T[:-1])


def test_two_texts_do_not_touch(run_of):
    model = open_model(run_of("relu", k=2))
    texts = [Text("one", TEXT), Text("other", "Nowhere else, and the layer.")]
    both = [tokenize(text, model.tokenizer, model.context, model.vocab_size, 1) for text in texts]
    joint, alone = read(model, both), read(model, both[1:])
    here = joint.text_T == 1
    np.testing.assert_array_equal(joint.next_loss_T[here], alone.next_loss_T)
    np.testing.assert_array_equal(joint.loss_T[here], alone.loss_T)
    np.testing.assert_array_equal(joint.map_LTE[:, here], alone.map_LTE)


def test_tokens_join_to_their_text(tokenizer):
    """Bytes of one character stand with the last of them."""
    text = "The token é … 語 goes\n\tto 🦜 \u2581 expert 3."
    ids = tokenizer.encode(text)
    texts = tokenizer.texts_of(ids)
    assert "".join(texts) == text and len(texts) == len(ids) and "" in texts
    assert texts[[number for number, piece in enumerate(texts) if "🦜" in piece][0] - 1] == ""


def test_bf16_is_asked_for(run_of):
    exact = seen(run_of("relu", k=2))[2].next_loss_T
    model = open_model(run_of("relu", k=2), dtype="bf16")
    tokens = tokenize(Text("text", TEXT), model.tokenizer, 32, 300, 1)
    rounded = read(model, [tokens]).next_loss_T
    assert 0 < np.nanmax(abs(rounded - exact)) < 1


# ---- mistakes


def refused(error: type[DsmoeError], message: str, path: Path, *texts: str, **options) -> None:
    with pytest.raises(error, match=message):
        inspect(path, InspectOptions(texts=texts or (TEXT,), **options))


def test_mistakes_with_the_text(run_of, tmp_path):
    run = run_of("relu", k=2)
    refused(ConfigError, "--text: text is empty", run, "  \n")
    refused(ConfigError, "text is one token; at least 2", run, "3")
    refused(ConfigError, r"has \d+ tokens, more than the context of 32; give less, or --windows \d", run, TEXT * 5)
    refused(ConfigError, r"more than 2 windows of 32; give less, or --windows \d", run, TEXT * 5, windows=2)
    refused(DataError, "there is no file notes/nothing.txt", run, "notes/nothing.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    refused(DataError, "latin.txt is not UTF-8 text", run, str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text("")
    refused(ConfigError, "--text: empty.txt is empty", run, TEXT, str(tmp_path / "empty.txt"))
    refused(ConfigError, "--windows: found 0", run, windows=0)
    assert [text.name for text in read_texts(["a b", "c d"])] == ["text 1", "text 2"]


def test_mistakes_with_the_model(run_of, native_of, tmp_path, tokenizer):
    run = run_of("relu", k=2)
    refused(CheckpointError, "has no checkpoint of step 7; there are: 0", run, step=7)
    refused(CheckpointError, "has no checkpoints of a training", native_of("olmoe"), step=7)
    refused(CheckpointError, "neither a run that has a checkpoint nor a checkpoint", tmp_path)
    refused(CheckpointError, "neither a run", run, compare=tmp_path)
    dense = tmp_path / "dense"
    transformers.LlamaConfig(vocab_size=300).save_pretrained(dense)
    refused(ConfigError, "the model is dense: it has no experts to inspect", dense)
    other = tmp_path / "other"
    transformers.GPT2Config().save_pretrained(other)
    refused(ConversionError, "model_type 'gpt2' cannot be inspected", other)
    bare = tmp_path / "bare"
    transformers.MixtralConfig().save_pretrained(bare)
    refused(DataError, "holds no tokenizer", bare)


def test_mistakes_with_a_sweep(run_of):
    run = run_of("relu", k=2)
    refused(ConfigError, r"found 'teta' \(did you mean 'theta'\?\)", run, sweeps=("teta=1",))
    refused(ConfigError, "found 'k=1.5', expected whole numbers", run, sweeps=("k=1.5",))
    refused(ConfigError, "found 'p=2', expected numbers above 0", run, sweeps=("p=2",))
    refused(ConfigError, "found 'theta=-1'", run, sweeps=("theta=-1",))
    refused(ConfigError, "found k=9, and", run, sweeps=("k=9",))
    assert parse("p=0.5,1") == Sweep("p", (0.5, 1.0)) and parse("k") == Sweep("k")
