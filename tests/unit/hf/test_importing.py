"""Imported runs compute what transformers' models do; what cannot be carried over exactly is refused by name.

Everything here is one process with tiny models; the gate, which runs transformers in a process of its own, is left to
tests/end_to_end/test_import.py but for one case.
"""

from __future__ import annotations

import functools
import json
import weakref

import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from dsmoe.checkpoint.load import CheckpointReader
from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.checkpoint.write import write_weights
from dsmoe.config import load_config, validate_config
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, ConfigError, ConversionError, DsmoeError
from dsmoe.hf import importing
from dsmoe.hf.export import remote_config
from dsmoe.hf.importing import REPORT, ImportOptions, import_model
from dsmoe.hf.native import native_config
from dsmoe.hf.shards import SINGLE, ShardReader, ShardWriter
from dsmoe.hf.table import TABLES, links, routing_name
from dsmoe.hf.upcycle import UpcyclingOptions
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.routers import available, get
from dsmoe.routers.registry import option_classes

COMMON = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-3, **ROPE}
DOTS1 = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 24,
    "n_shared_experts": 2, "routed_scaling_factor": 2.5, "sliding_window": None, **ROPE,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, **MOE | {"num_local_experts": 4}, intermediate_size=16),
    "mixtral, wide heads": lambda: transformers.MixtralConfig(**COMMON, **MOE, intermediate_size=16, head_dim=12),
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, **MOE, intermediate_size=16),
    "olmoe, renormalised": lambda: transformers.OlmoeConfig(**COMMON, **MOE, intermediate_size=16, norm_topk_prob=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **MOE, moe_intermediate_size=16, head_dim=16),
    "qwen3_moe, dense layer, tied": lambda: transformers.Qwen3MoeConfig(
        **COMMON, **MOE, moe_intermediate_size=16, intermediate_size=24, mlp_only_layers=[0], norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON, **MOE, moe_intermediate_size=16, intermediate_size=24, shared_expert_intermediate_size=20,
    ),
    "qwen2_moe, no biases, dense layer, renormalised": lambda: transformers.Qwen2MoeConfig(
        **COMMON, **MOE, moe_intermediate_size=16, intermediate_size=24, shared_expert_intermediate_size=20,
        mlp_only_layers=[1], qkv_bias=False, norm_topk_prob=True,
    ),
    "dots1": lambda: transformers.Dots1Config(**COMMON, **DOTS1, first_k_dense_replace=1, norm_topk_prob=True),
    "dots1, groups": lambda: transformers.Dots1Config(
        **COMMON, **DOTS1 | {"n_routed_experts": 8}, n_group=4, topk_group=2
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, **ROPE, intermediate_size=32),
    "qwen3": lambda: transformers.Qwen3Config(
        **COMMON, **ROPE, intermediate_size=24, head_dim=16, tie_word_embeddings=True
    ),
}  # fmt: skip
ROUTERS = {name: router for name, router in available().items() if router.__module__.startswith("dsmoe.")}
UNCHECKED = ImportOptions(check=False)
TOKENS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def random_model(case: str):
    """A transformers model in which every part matters: weights of order 1, norms away from 1."""
    torch.manual_seed(0)
    config = CONFIGS[case]()
    if case == "mixtral, wide heads":
        config.num_local_experts = 4
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model.eval()


def saved(case: str, folder, original: bool = True):
    model = random_model(case)
    model.save_pretrained(folder, save_original_format=original, max_shard_size="20KB")
    return model


@torch.no_grad()
def logits_of(run) -> torch.Tensor:
    return TrainedModel.load(run).model(TOKENS)


@torch.no_grad()
def assert_equal_logits(run, model) -> None:
    torch.testing.assert_close(logits_of(run), model(TOKENS).logits, rtol=0, atol=1e-4)


def problems_of(run) -> list[str]:
    return verify_checkpoint(run / "checkpoints" / "step_00000000").problems


MOE_CASES = [case for case in CONFIGS if case.split(",")[0] not in ("llama", "qwen3")]


@pytest.mark.parametrize("original", [True, False], ids=["hub names", "packed"])
@pytest.mark.parametrize("case", MOE_CASES)
def test_an_imported_model_has_the_same_logits(groups, tmp_path, case, original):
    model = saved(case, tmp_path / "hf", original)
    report = import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert_equal_logits(tmp_path / "run", model)
    assert problems_of(tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / REPORT).read_text()) == report
    assert report["parity"] == "not checked" and report["architecture"] == case.split(",")[0]


def test_a_selection_bias_comes_along(groups, tmp_path):
    """It is no parameter, and a reader that drops it still computes something."""
    model = saved("dots1", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    state = CheckpointReader(tmp_path / "run" / "checkpoints" / "step_00000000").controller_state()
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.abs().min() > 0 and torch.equal(state["bias"], bias.unsqueeze(0))


def test_the_run_is_complete_and_says_where_it_is(groups, tmp_path):
    saved("qwen3_moe", tmp_path / "hf")
    options = ImportOptions(check=False, overrides=("training.lr=1e-3", "parallel.expert_parallel=2"))
    import_model(tmp_path / "hf", tmp_path / "run", options)
    config = load_config(tmp_path / "run" / "config.yaml", routers=option_classes())
    assert config.logging.run_dir == str(tmp_path / "run")
    assert (config.training.lr, config.parallel.expert_parallel) == (1e-3, 2)
    assert config.model.rotary_base == 500.0 and config.model.norm_epsilon == 1e-3 and config.model.kv_channels == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]  # nothing half-made is left


def test_a_run_that_computes_something_else_does_not_appear(groups, tmp_path, monkeypatch):
    """The gate is the last word: here the folder's gates are renormalised and the reader is made to overlook it."""
    from dsmoe.hf import foreign

    saved("olmoe, renormalised", tmp_path / "hf")
    translate = foreign._translate

    def overlook(architecture, config):
        model, router = translate(architecture, config)
        return model, router | {"softmax": "before"}

    monkeypatch.setattr(foreign, "_translate", overlook)
    with pytest.raises(ConversionError, match="logits differ by up to"):
        import_model(tmp_path / "hf", tmp_path / "run", ImportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bf16_weights_are_carried_over_bit_for_bit(groups, tmp_path):
    model = random_model("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", save_original_format=True)
    import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    trained = dict(logical_tensors(TrainedModel.load(tmp_path / "run").model))
    expected = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].float()
    for expert in range(4):
        assert torch.equal(trained[f"gpt.decoder.layers.1.mlp.experts.{expert}.gate_up_proj"], expected[expert])


def add_tokenizer(folder, words: int) -> None:
    """A byte-level tokenizer.json of 256 bytes, some words and the end of a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257 + words, special_tokens=["<end>"], initial_alphabet=library.pre_tokenizer.alphabet()
    )
    library.train_from_iterator(["the router of the experts"] * 9, trainer)
    library.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_comes_along(groups, tmp_path):
    config = CONFIGS["olmoe"]()
    config.vocab_size = 264
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", 4)
    report = import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    probes = report["tokenizer"]["texts"]
    assert probes > 20
    assert report["tokenizer"] == {"texts": probes, "round_trip": probes, "same_ids_as_transformers": probes}
    config = load_config(tmp_path / "run" / "config.yaml", routers=option_classes())
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "run").sha256 == Tokenizer.load(tmp_path / "hf").sha256


def test_a_tokenizer_with_more_ids_than_the_embedding_is_of_another_model(groups, tmp_path):
    saved("olmoe", tmp_path / "hf")  # 64 rows
    add_tokenizer(tmp_path / "hf", 0)
    with pytest.raises(ConversionError, match="257 ids, more than the model's embedding .64."):
        import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)


@pytest.mark.parametrize("original", [True, False], ids=["hub names", "packed"])
def test_weights_pass_through_a_row_at_a_time(groups, tmp_path, monkeypatch, original):
    """Two rows of what was read are in memory, this one and the last; files have the size that they may have."""
    saved("mixtral", tmp_path / "hf", original)
    alive, most = [0], [0]

    def free(size: int) -> None:
        alive[0] -= size

    def read(self, name: str):
        tensor = read_as_is(self, name)
        alive[0] += tensor.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, free, tensor.nbytes)
        return tensor

    read_as_is = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", read)
    monkeypatch.setattr(importing, "write_weights", functools.partial(write_weights, file_size=20_000))
    import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    embedding, gate_up = 64 * 32 * 4, 2 * 16 * 32 * 4  # bytes, of one expert
    assert 0 < most[0] <= 2 * max(embedding, gate_up * (1 if original else 4))
    sizes = [path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*/rank_*.safetensors")]
    assert len(sizes) > 5 and max(sizes) < 20_000 + 5_000  # and a header


# Round trips: our model out, and in again.

OWN = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_length=16, vocab_size=64,
    num_experts=4, moe_ffn_hidden_size=16,
)  # fmt: skip


def own_model(groups, model: dict, router: dict):
    config = validate_config({"model": OWN | model, "router": router}, option_classes())
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    built = LanguageModel(config.model, (router_class, options), groups, seed=7).eval()
    if built.controller is not None:  # as if it had been trained
        generator = torch.Generator().manual_seed(1)
        for name, value in built.controller.state.items():
            moved = value + 3 if name == "updates" else value + 0.1 * torch.rand(value.shape, generator=generator)
            built.controller.state[name] = moved
        built.controller.load(dict(built.controller.state))
    return config, options, built


def export(architecture: str, content: dict, config, model, folder) -> None:
    tensors = dict(logical_tensors(model))
    router, folder_config = get(config.router.name), content | {"pad_token_id": None, "bos_token_id": None}
    folder.mkdir()
    with ShardWriter(folder, 20_000) as writer:
        for link in links(TABLES[architecture], config.model, {name: t.shape for name, t in tensors.items()}):
            for name, tensor in link.to_theirs([tensors[name] for name in link.ours]).items():
                writer.add(name, tensor)
        if architecture == "dsmoe":
            layers = [layer for layer, is_moe in enumerate(config.model.moe_layers()) if is_moe]
            for place, layer in enumerate(layers):
                for name, value in router.inference_state(model.controller, place).items():
                    writer.add(routing_name(layer, name), value)
    (folder / "config.json").write_text(json.dumps(folder_config | {"eos_token_id": None}))
    state = {} if model.controller is None else {n: value.tolist() for n, value in model.controller.state.items()}
    (folder / "training_state.json").write_text(json.dumps({"controller": state}))


def assert_same_run(run, model) -> None:
    """Bit for bit: tensors, controller, and so logits."""
    reader = CheckpointReader(run / "checkpoints" / "step_00000000")
    tensors = dict(logical_tensors(model))
    assert reader.manifest.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(reader.read("weight", name, 0, tensor.numel()), tensor.flatten()), name
    expected = {} if model.controller is None else model.controller.state
    actual = reader.controller_state()
    assert actual.keys() == expected.keys()
    assert all(
        torch.equal(actual[name], value) and actual[name].dtype == value.dtype for name, value in expected.items()
    )
    with torch.no_grad():
        assert torch.equal(logits_of(run), model(TOKENS))


@pytest.mark.parametrize("router", ROUTERS)
def test_an_export_of_ours_comes_back_bit_for_bit(groups, tmp_path, router):
    shapes = dict(
        num_layers=3, moe_layer_freq=[0, 1, 1], qk_layernorm=True, moe_shared_expert_intermediate_size=8,
        moe_shared_expert_gate=True, add_qkv_bias=True, kv_channels=12, expert_activation="geglu", expert_bias=True,
    )  # fmt: skip
    options = {"name": router} | ({"threshold": 0.01} if router == "routing_free" else {})
    config, router_options, model = own_model(groups, shapes, options)
    content = remote_config(config, get(router), router_options)
    export("dsmoe", content, config, model, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert_same_run(tmp_path / "run", model)
    again = load_config(tmp_path / "run" / "config.yaml", routers=option_classes())
    assert again.router == config.router
    same = again.model.model_dump() | {"ffn_hidden_size": None}
    assert same == config.model.model_dump()


@pytest.mark.parametrize(
    ("host", "shapes", "router"),
    [
        ("qwen3_moe", dict(qk_layernorm=True, moe_layer_freq=[1, 0], kv_channels=12), {}),
        ("olmoe", dict(qk_layernorm="full", tie_embeddings=False), {"softmax": "after"}),
        ("mixtral", dict(tie_embeddings=False), {"renormalize": True}),
        (
            "qwen2_moe",
            dict(moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True, add_qkv_bias=True),
            {"softmax": "after"},
        ),
    ],
)
def test_a_native_export_comes_back_bit_for_bit(groups, tmp_path, host, shapes, router):
    config, _, model = own_model(groups, shapes, {"name": "topk", "k": 2, **router})
    export(host, native_config(host, config), config, model, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert_same_run(tmp_path / "run", model)
    again = load_config(tmp_path / "run" / "config.yaml", routers=option_classes())
    assert again.router.balance_coefficient == pytest.approx(config.router.balance_coefficient)


def test_a_controller_that_is_of_other_weights_is_noticed(groups, tmp_path):
    config, options, model = own_model(groups, {}, {"name": "topk_bias"})
    export("dsmoe", remote_config(config, get("topk_bias"), options), config, model, tmp_path / "hf")
    path = tmp_path / "hf" / "training_state.json"
    state = json.loads(path.read_text())
    state["controller"]["bias"][1][2] += 1.0
    path.write_text(json.dumps(state))
    with pytest.raises(ConversionError, match="layers.1.mlp.routing.bias differ"):
        import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)


# Upcycling.


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        ImportOptions(check=False),
        ImportOptions(check=False, overrides=("router.k=3", "model.moe_layer_freq=[0, 1]")),
        ImportOptions(
            "topk_bias",
            UpcyclingOptions(num_experts=6),
            ("router.route_scale=1.0", "router.sequence_coefficient=0.0"),
            check=False,
        ),
        ImportOptions("dtop_p", check=False),
    ],
    ids=["topk", "topk, a dense layer", "topk_bias", "dtop_p"],
)  # fmt: skip
def test_with_whole_copies_and_gates_that_sum_to_one_an_upcycled_model_is_the_dense_one(
    groups, tmp_path, case, options
):
    model = saved(case, tmp_path / "hf")
    report = import_model(tmp_path / "hf", tmp_path / "run", options)
    assert report["upcycling"]["computes_what_the_dense_model_does"]
    assert_equal_logits(tmp_path / "run", model)
    assert problems_of(tmp_path / "run") == []


@pytest.mark.parametrize("router", ROUTERS)
def test_a_dense_model_is_upcycled_with_any_router(groups, tmp_path, router):
    saved("qwen3", tmp_path / "hf")
    overrides = ("router.rescale=true",) if router == "routing_free" else ()
    options = ImportOptions(router, UpcyclingOptions(num_experts=4, noise=0.01), overrides, check=False)
    report = import_model(tmp_path / "hf", tmp_path / "run", options)
    assert problems_of(tmp_path / "run") == []  # among others: all experts differ
    assert logits_of(tmp_path / "run").isfinite().all()
    assert not report["upcycling"]["computes_what_the_dense_model_does"]


def test_parts_of_an_mlp_are_the_mlp_where_a_token_gets_all_of_them(groups, tmp_path):
    """Granularity 4, all 8 experts in equal shares: the mean of the parts, each 4 times as large, is the MLP."""
    model = saved("llama", tmp_path / "hf")
    options = ImportOptions(None, UpcyclingOptions(num_experts=8, granularity=4), ("router.k=8",), check=False)
    report = import_model(tmp_path / "hf", tmp_path / "run", options)
    assert report["upcycling"]["expert_width"] == 8
    trained = TrainedModel.load(tmp_path / "run").model
    with torch.no_grad():
        for name, tensor in logical_tensors(trained):
            if name.endswith("router.weight"):
                tensor.zero_()
        torch.testing.assert_close(trained(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rank", "lowest", "highest"), [(32, 0.9999, 1.0001), (4, 0.02, 0.5)])
def test_a_self_scoring_expert_keeps_of_its_gate_what_its_latent_can_hold(groups, tmp_path, rank, lowest, highest):
    saved("llama", tmp_path / "hf")
    options = ImportOptions("aoe", UpcyclingOptions(num_experts=4), (f"router.rank={rank}",), check=False)
    report = import_model(tmp_path / "hf", tmp_path / "run", options)
    assert lowest < report["upcycling"]["gate_projection_kept"] < highest
    tensors = dict(logical_tensors(TrainedModel.load(tmp_path / "run").model))
    dense = load_all(tmp_path / "hf")["model.layers.1.mlp.gate_proj.weight"]
    layer = "gpt.decoder.layers.1.mlp"
    for expert in range(4):
        gate = tensors[f"{layer}.experts.{expert}.gate_proj"] @ tensors[f"{layer}.router.{expert}.reduce_proj"]
        kept = (gate.square().sum() / dense.square().sum()).item()
        assert lowest - 0.1 < kept < highest + 0.1
        # What is left is orthogonal to all that the latent can see.
        left = (dense - gate) @ tensors[f"{layer}.router.{expert}.reduce_proj"].t()
        assert left.abs().max() < 1e-4


def test_a_new_router_is_that_of_training_from_scratch(groups, tmp_path):
    saved("llama", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run", ImportOptions(check=False, overrides=("training.seed=9",)))
    upcycled = TrainedModel.load(tmp_path / "run")
    options = get("topk").Options.model_validate(upcycled.config.router.options)
    fresh = dict(logical_tensors(LanguageModel(upcycled.config.model, (get("topk"), options), groups, seed=9)))
    routers = {name: tensor for name, tensor in logical_tensors(upcycled.model) if ".router." in name}
    assert len(routers) == 2
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in routers.items())


def test_noise_is_of_the_size_it_was_told(groups, tmp_path):
    saved("llama", tmp_path / "hf")
    options = ImportOptions(upcycling=UpcyclingOptions(num_experts=4, noise=0.1), check=False)
    import_model(tmp_path / "hf", tmp_path / "run", options)
    tensors = dict(logical_tensors(TrainedModel.load(tmp_path / "run").model))
    dense = load_all(tmp_path / "hf")["model.layers.0.mlp.down_proj.weight"]
    for expert in range(4):
        added = tensors[f"gpt.decoder.layers.0.mlp.experts.{expert}.down_proj"] - dense
        assert (added.std() / dense.std()).item() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ImportOptions(upcycling=UpcyclingOptions(granularity=5)), "--granularity: found 5"),
        (ImportOptions(upcycling=UpcyclingOptions(num_experts=6, granularity=4)), "a multiple of --granularity 4"),
        (ImportOptions(upcycling=UpcyclingOptions(num_experts=0, noise=-1)), "--experts: found 0.*--noise: found -1"),
        (ImportOptions(overrides=("model.num_experts=4",)), "model.num_experts: found 4, expected 8"),
        (ImportOptions(overrides=("model.hidden_size=64",)), "model.hidden_size: found 64, expected 32"),
        (ImportOptions(overrides=("router.q=4",)), "router.q: unknown key"),
        (ImportOptions("tokp"), "did you mean 'topk'"),
        (ImportOptions(overrides=("model.moe_shared_expert_intermediate_size=8",)), "routed experts only"),
    ],
)
def test_options_that_do_not_fit_are_refused(groups, tmp_path, options, named):
    saved("llama", tmp_path / "hf")
    with pytest.raises(DsmoeError, match=named):
        import_model(tmp_path / "hf", tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ImportOptions(upcycling=UpcyclingOptions()),
        ImportOptions(overrides=("router.name=relu",)),
        ImportOptions(overrides=("model.rotary_base=7.0",)),
    ],
)
def test_a_mixture_of_experts_is_not_upcycled_or_changed(groups, tmp_path, options):
    saved("mixtral", tmp_path / "hf")
    with pytest.raises((ConversionError, ConfigError), match="already|router.name: found relu|model.rotary_base"):
        import_model(tmp_path / "hf", tmp_path / "run", options)


# Damaged folders, and features that have no place here.


def load_all(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change_tensors(folder, change) -> None:
    tensors = load_all(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / SINGLE)


LAST = "model.layers.1.mlp.experts.3.down_proj.weight"
DAMAGE = {
    "a lost expert": (lambda t: t.pop(LAST), f"missing: 1 tensor ({LAST})"),
    "a tensor nobody asks for": (lambda t: t.update(strange=torch.zeros(1)), "not used by this architecture"),
    "another shape": (lambda t: t.update({LAST: torch.zeros(2, 2)}), f"{LAST} [2, 2] (expected [32, 16])"),
    "an expert too many": (
        lambda t: t.update({LAST.replace(".3.", ".4."): torch.zeros(32, 16)}), "experts.4.down_proj.weight",
    ),
    "not finite": (lambda t: t.update({LAST: t[LAST] * torch.inf}), "values that are not finite"),
    "quantized": (lambda t: t.update({LAST: t[LAST].to(torch.int8)}), f"{LAST} torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused_by_name(groups, tmp_path, damage):
    change, named = DAMAGE[damage]
    saved("olmoe", tmp_path / "hf")
    change_tensors(tmp_path / "hf", change)
    with pytest.raises((CheckpointError, ConversionError)) as error:
        import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert named in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


FEATURES = {
    "mixtral": {
        "router_jitter_noise": 0.1,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    },
    "olmoe": {"clip_qkv": 8.0, "attention_bias": True, "attention_dropout": 0.1},
    "qwen3_moe": {
        "use_sliding_window": True, "sliding_window": 8, "hidden_act": "gelu", "auto_map": {"AutoModel": "x.Y"},
    },
    "qwen2_moe": {
        "use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
        "attention_dropout": 0.1, "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    },
    "dots1": {
        "attention_bias": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "llama": {"mlp_bias": True, "quantization_config": {"quant_method": "gptq", "bits": 4}},
}  # fmt: skip
ALWAYS = {
    "deepseek_v2": (transformers.DeepseekV2Config, ["kv_lora_rank 512 (multi-head latent attention"]),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        ["kv_lora_rank 512 (multi-head latent", "num_nextn_predict_layers 1"],
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        ["sinks (", "a bias of the router", "attention_bias True", "rope_type 'yarn'", "sliding_window 128"],
    ),
}
NAMES = {
    "rope_parameters": ("rope_type 'yarn'", "partial_rotary_factor 0.5"), "use_sliding_window": ("sliding_window 8",),
    "layer_types": ("sliding_window 8",),
}  # fmt: skip


@pytest.mark.parametrize("case", FEATURES)
def test_features_without_a_place_are_all_refused_by_name(tmp_path, case):
    config = CONFIGS[case]()
    config.save_pretrained(tmp_path / "hf")  # no weights: they are not needed to refuse
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FEATURES[case]))
    with pytest.raises(ConversionError) as error:
        import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    for feature in FEATURES[case]:
        assert any(name in str(error.value) for name in NAMES.get(feature, (feature,))), feature


@pytest.mark.parametrize("family", ALWAYS)
def test_a_family_that_has_no_place_is_refused_with_its_reasons(tmp_path, family):
    config, named = ALWAYS[family]
    config(architectures=["X"]).save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match="cannot express") as error:
        import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert [name for name in named if name not in str(error.value)] == []


def test_a_window_that_is_never_reached_is_none(groups, tmp_path):
    model = saved("mixtral", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 16}))
    import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert_equal_logits(tmp_path / "run", model)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "cannot be read"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"model_type": "gpt2"}', "'gpt2' cannot be imported; mixtral, olmoe, qwen2_moe, qwen3_moe, dots1 and"),
        ('{"model_type": "llama", "num_attention_heads": "many"}', "is damaged"),
    ],
)
def test_a_config_that_says_nothing_usable(tmp_path, content, named):
    folder = tmp_path / "hf"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ConversionError, match=named):
        import_model(folder, tmp_path / "run", UNCHECKED)


def test_a_tied_output_matrix_may_be_stored_twice_but_not_differ(groups, tmp_path):
    model = saved("qwen3_moe, dense layer, tied", tmp_path / "hf")
    embedding = load_all(tmp_path / "hf")["model.embed_tokens.weight"]
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": embedding.clone(), inverse: torch.ones(4)}))
    report = import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
    assert sorted(report["left_out"]) == ["lm_head.weight", inverse]
    assert_equal_logits(tmp_path / "run", model)
    change_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ConversionError, match="tie_word_embeddings is true, but lm_head.weight"):
        import_model(tmp_path / "hf", tmp_path / "other", UNCHECKED)


def test_a_run_is_never_overwritten(groups, tmp_path):
    saved("olmoe", tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({}))
    with pytest.raises(CheckpointError, match="exists already"):
        import_model(tmp_path / "hf", tmp_path / "run", UNCHECKED)
