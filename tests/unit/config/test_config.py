"""The run configuration: every mistake is listed at once, and each line says what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from dsmoe.config import ModelConfig, RunConfig, Section, load_config, validate_config
from dsmoe.config.schema import SECTIONS
from dsmoe.config.validate import REFUSED_DEEPSPEED_KEYS, SIZE_ONE_ONLY
from dsmoe.errors import ConfigError, DsmoeError


class TopKOptions(Section):
    k: int = Field(2, ge=1)
    z_loss: float = Field(0.0, ge=0)


class ReluOptions(Section):
    density: float = Field(0.25, gt=0, le=1)
    balance: Literal["none", "l1"] = "l1"


ROUTERS: dict[str, type[BaseModel]] = {"topk": TopKOptions, "relu": ReluOptions}


def mistakes(tree: dict, overrides: tuple[str, ...] = (), routers=None, tmp_path: Path | None = None) -> list[str]:
    """The lines of the error that `tree` (or, with overrides, a file of it) raises; fails where it raises none."""
    with pytest.raises(ConfigError) as caught:
        if tmp_path is None:
            validate_config(tree, routers)
        else:
            load_config(write(tmp_path, tree), overrides, routers)
    return caught.value.problems


def write(folder: Path, content: dict | str) -> Path:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


# --- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [{}, {"model": None}, {"model": {}, "deepspeed": None}])
def test_nothing_given_means_the_defaults(tree):
    assert validate_config(tree, ROUTERS).model == ModelConfig()


def test_no_file_means_the_defaults():
    assert load_config(None).to_yaml() == RunConfig().to_yaml()


def test_an_empty_file_means_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing yet\n")).to_yaml() == RunConfig().to_yaml()


def test_a_file_is_read(tmp_path):
    config = load_config(write(tmp_path, "model: {num_layers: 2, moe_layer_freq: [0, 1]}\ntraining: {lr: 3e-4}\n"))
    assert config.model.num_layers == 2
    assert config.model.moe_layers() == [False, True]
    assert config.training.lr == 3e-4


def test_the_resolved_configuration_can_be_loaded_again(tmp_path):
    overrides = (
        "model.moe_layer_freq=[1,0,1,0]",
        "model.num_query_groups=4",
        "router.name=relu",
        "router.density=0.5",
        "training.lr=1e-5",
        "training.min_lr=0",
        "data.tokenizer=null",
        "deepspeed.zero_optimization={overlap_comm: true}",
    )
    first = load_config(None, overrides, ROUTERS)
    second = load_config(write(tmp_path, first.to_yaml()), (), ROUTERS)
    assert second.to_yaml() == first.to_yaml()
    assert second.router.options == {"density": 0.5, "balance": "l1"}
    assert second.training.lr == 1e-5
    assert second.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    "freq, expected",
    [
        (1, [True, True, True, True]),
        (2, [True, False, True, False]),
        (3, [True, False, False, True]),
        ([0, 1, 1, 0], [False, True, True, False]),
    ],
)
def test_which_layers_are_moe(freq, expected):
    assert validate_config({"model": {"moe_layer_freq": freq}}).model.moe_layers() == expected


def test_what_is_derived_from_other_fields():
    model = ModelConfig(moe_ffn_hidden_size=96, num_attention_heads=6)
    assert (model.dense_ffn_hidden_size, model.key_value_heads) == (384, 6)
    model = ModelConfig(ffn_hidden_size=100, num_query_groups=2)
    assert (model.dense_ffn_hidden_size, model.key_value_heads) == (100, 2)


def test_what_deepspeed_understands_is_passed_on():
    passed = {"zero_optimization": {"overlap_comm": True, "reduce_scatter": True}, "wall_clock_breakdown": True}
    assert validate_config({"deepspeed": passed}).deepspeed == passed


# --- one mistake -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree, expected",
    [
        # unknown names, with the nearest known one or the list of all
        ({"trainin": {}}, "trainin: unknown section (did you mean 'training'?)"),
        ({"zzz": {}}, f"zzz: unknown section (known: {', '.join(sorted([*SECTIONS, 'deepspeed']))})"),
        ({"model": {"num_layer": 2}}, "model.num_layer: unknown key (did you mean 'num_layers'?)"),
        (
            {"logging": {"zzz": 1}},
            "logging.zzz: unknown key (known: experts, interval, layers, pictures, run_dir, tensorboard, timings, "
            "trace)",
        ),
        # wrong types: nothing is converted silently
        ({"model": {"hidden_size": "256"}}, "model.hidden_size: found '256', expected a valid integer"),
        ({"model": {"num_layers": 2.0}}, "model.num_layers: found 2.0, expected a valid integer"),
        ({"model": {"num_layers": True}}, "model.num_layers: found True, expected a valid integer"),
        ({"model": {"tie_embeddings": 1}}, "model.tie_embeddings: found 1, expected a valid boolean"),
        ({"model": {"num_layers": None}}, "model.num_layers: found None, expected a valid integer"),
        ({"training": {"lr": "fast"}}, "training.lr: found 'fast', expected a valid number"),
        ({"data": {"path": 5}}, "data.path: found 5, expected a valid string or a valid list"),
        ({"model": {"moe_layer_freq": ""}}, "model.moe_layer_freq: found '', expected a valid integer or a valid list"),
        ({"router": {"name": 5}}, "router.name: found 5, expected a valid string"),
        # out of range
        ({"training": {"lr": -1.0}}, "training.lr: found -1.0, expected greater than 0"),
        ({"training": {"steps": 0}}, "training.steps: found 0, expected greater than or equal to 1"),
        ({"training": {"adam_beta2": 1.0}}, "training.adam_beta2: found 1.0, expected less than 1"),
        ({"training": {"precision": "fp16"}}, "training.precision: found 'fp16', expected 'fp32' or 'bf16'"),
        ({"parallel": {"zero_stage": 0}}, "parallel.zero_stage: found 0, expected 1, 2 or 3"),
        # not sections at all
        ({"model": [1]}, "model: found [1], expected a mapping of keys to values"),
        ({"router": "topk"}, "router: found 'topk', expected a mapping of keys to values"),
        ({"deepspeed": [1]}, "deepspeed: found [1], expected a mapping of DeepSpeed's own JSON keys"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization: found 3, expected a mapping"),
    ],
)
def test_a_mistake_names_field_value_and_expectation(tree, expected):
    assert mistakes(tree) == [expected]


@pytest.mark.parametrize(
    "tree, expected",
    [
        (
            {"model": {"hidden_size": 260}},
            "model.hidden_size: found 260, expected a multiple of model.num_attention_heads (8)",
        ),
        (
            {"model": {"hidden_size": 260, "kv_channels": 7}},  # heads need not share out the hidden size
            "model.kv_channels: found 7, expected an even size, for rotary embedding",
        ),
        (
            {"model": {"hidden_size": 24, "num_attention_heads": 8}},
            "model.hidden_size: found 24, heads of size 3, expected heads of an even size, for rotary embedding",
        ),
        (
            {"model": {"num_query_groups": 3}},
            "model.num_attention_heads: found 8, expected a multiple of model.num_query_groups (3)",
        ),
        (
            {"parallel": {"expert_parallel": 3}},
            "model.num_experts: found 8, expected a multiple of parallel.expert_parallel (3)",
        ),
        (
            {"training": {"gradient_accumulation": 3}},
            "training.global_batch_size: found 16, expected a multiple of training.gradient_accumulation (3)",
        ),
        (
            {"model": {"moe_layer_freq": [1, 0]}},
            "model.moe_layer_freq: found 2 entries, expected one for each of 4 layers",
        ),
        (
            {"model": {"moe_layer_freq": 0}},
            "model.moe_layer_freq: found 0, expected 1 or more, or a list of 0 and 1",
        ),
        (
            {"model": {"moe_layer_freq": [0, 0, 0, 0]}},
            "model.moe_layer_freq: found [0, 0, 0, 0], expected at least one MoE layer",
        ),
        (
            {"training": {"lr": 1e-5, "min_lr": 1e-4}},
            "training.min_lr: found 0.0001, expected at most training.lr (1e-05)",
        ),
    ],
)
def test_fields_that_contradict_each_other(tree, expected):
    assert expected in mistakes(tree)


@pytest.mark.parametrize("field", SIZE_ONE_ONLY)
def test_other_parallelism_is_refused_with_its_reason(field):
    assert mistakes({"parallel": {field: 2}}) == [f"parallel.{field}: found 2, expected 1: {SIZE_ONE_ONLY[field]}"]


@pytest.mark.parametrize("key", REFUSED_DEEPSPEED_KEYS)
def test_what_dsmoe_sets_itself_is_refused_with_a_pointer(key):
    tree = {}
    node = tree
    for part in key.split("."):
        node[part] = inner = {}
        node = inner
    (line,) = mistakes({"deepspeed": tree})
    assert line == f"deepspeed.{key}: dsmoe sets this itself; {REFUSED_DEEPSPEED_KEYS[key]}"


@pytest.mark.parametrize("pointer", REFUSED_DEEPSPEED_KEYS.values())
def test_every_pointer_points_to_a_field_that_exists(pointer):
    fields = RunConfig.model_fields
    for word in pointer.replace(",", " ").split():
        section, dot, field = word.partition(".")
        if dot and section in fields:
            known = fields[section].annotation.model_fields
            assert field in known or any(name.startswith(field.removesuffix("*")) for name in known), word


@pytest.mark.parametrize("key", ["reduce_scatter", "contiguous_gradients"])
def test_what_zero_needs_for_experts_cannot_be_turned_off(key):
    (line,) = mistakes({"deepspeed": {"zero_optimization": {key: False}}})
    assert line == f"deepspeed.zero_optimization.{key}: found False, expected True: ZeRO needs it for expert parameters"


# --- many mistakes ---------------------------------------------------------------------------------------------------


def test_all_mistakes_of_all_sections_in_one_pass():
    lines = mistakes(
        {
            "modle": {},
            "model": {"num_layer": 2, "hidden_size": "256", "moe_layer_freq": [1, 0]},
            "router": {"name": "tpk"},
            "parallel": {"expert_parallel": 3, "tensor_parallel": 2},
            "training": {"lr": -1, "steps": 5},
            "checkpoint": {"keep_last": 0},
            "deepspeed": {"optimizer": {}, "zero_optimization": {"stage": 2, "contiguous_gradients": False}},
        },
        routers=ROUTERS,
    )
    fields = [line.partition(":")[0] for line in lines]
    assert sorted(fields) == sorted(
        [
            "modle",
            "model.num_layer",
            "model.hidden_size",
            "model.moe_layer_freq",
            "router.name",
            "model.num_experts",
            "parallel.tensor_parallel",
            "training.lr",
            "checkpoint.keep_last",
            "deepspeed.optimizer",
            "deepspeed.zero_optimization.stage",
            "deepspeed.zero_optimization.contiguous_gradients",
        ]
    )


def test_a_run_shortened_or_slowed_on_the_command_line_needs_no_other_change():
    config = load_config(None, ["training.steps=3", "training.warmup_steps=20", "training.lr=1e-6"])
    assert config.training.final_lr == pytest.approx(1e-7)


def test_a_broken_field_does_not_cause_a_second_line_elsewhere():
    assert len(mistakes({"model": {"hidden_size": -6}})) == 1
    assert len(mistakes({"training": {"lr": "0.1", "min_lr": 0.5}})) == 1
    assert len(mistakes({"parallel": {"expert_parallel": 0}})) == 1


def test_the_message_counts_numbers_and_names_the_source(tmp_path):
    path = write(tmp_path, {"model": {"num_layers": 0, "num_layer": 1}, "logging": {"interval": 0}})
    with pytest.raises(DsmoeError) as caught:
        load_config(path)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path} has 3 mistakes:"
    assert [line[:5] for line in rest] == ["  1. ", "  2. ", "  3. "]
    with pytest.raises(ConfigError, match="configuration has 1 mistake:"):
        load_config(None, ["model.num_layers=0"])


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("2.5e-4", 2.5e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("5e+1", 50.0),
        ("3", 3.0),
    ],
)
def test_numbers_are_read_the_way_people_write_them(text, value):
    lr = load_config(None, [f"training.lr={text}"]).training.lr
    assert lr == value
    assert isinstance(lr, float)


def test_overrides_take_lists_null_strings_and_mappings():
    config = load_config(
        None,
        [
            "model.moe_layer_freq=[1,0,0,1]",
            "model.vocab_size=null",
            "data.tokenizer=",
            "data.path=data/a=b",
            "logging.run_dir=runs/1e3",
            "logging.tensorboard=false",
            "deepspeed.zero_optimization.overlap_comm=true",
            "deepspeed.comms_logger={enabled: true}",
        ],
    )
    assert config.model.moe_layer_freq == [1, 0, 0, 1]
    assert config.model.vocab_size is None
    assert config.data.tokenizer is None
    assert config.data.path == "data/a=b"
    assert config.logging.run_dir == "runs/1e3"
    assert config.logging.tensorboard is False
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(tmp_path):
    path = write(tmp_path, {"training": {"steps": 20, "seed": 7}})
    config = load_config(path, ["training.steps=30", "training.steps=40"])
    assert (config.training.steps, config.training.seed) == (40, 7)


@pytest.mark.parametrize("override", ["training.steps", "steps=5", "training..steps=5", "=5", ".steps=5", "training.="])
def test_an_override_that_cannot_be_read_shows_one_that_can(override, tmp_path):
    (line,) = mistakes({}, (override,), tmp_path=tmp_path)
    assert line == f"override {override!r}: expected section.key=value, for example training.steps=50"


def test_mistakes_in_overrides_are_listed_with_all_others(tmp_path):
    lines = mistakes(
        {"model": {"num_layers": 0}},
        ("training.steps", "training.lr=[", "training.step=5", "checkpint.keep_last=1", "training.seed=x"),
        tmp_path=tmp_path,
    )
    assert sorted(lines) == sorted(
        [
            "override 'training.steps': expected section.key=value, for example training.steps=50",
            "override 'training.lr=[': the value is not valid YAML",
            "training.step: unknown key (did you mean 'steps'?)",
            "checkpint: unknown section (did you mean 'checkpoint'?)",
            "training.seed: found 'x', expected a valid integer",
            "model.num_layers: found 0, expected greater than or equal to 1",
        ]
    )


def test_an_override_cannot_smuggle_in_what_is_refused(tmp_path):
    (line,) = mistakes({}, ("deepspeed.zero_optimization.stage=3",), tmp_path=tmp_path)
    assert "set parallel.zero_stage" in line


# --- routers ---------------------------------------------------------------------------------------------------------


def test_the_options_of_the_router_get_their_defaults():
    assert validate_config({"router": {"name": "relu", "density": 1}}, ROUTERS).router.options == {
        "density": 1.0,
        "balance": "l1",
    }


def test_without_the_known_routers_options_are_kept_as_they_are():
    router = validate_config({"router": {"name": "somebody's", "anything": [1]}}).router
    assert (router.name, router.options) == ("somebody's", {"anything": [1]})


def test_an_unknown_router_is_answered_with_those_there_are():
    (line,) = mistakes({"router": {"name": "tokp", "k": 0}}, routers=ROUTERS)
    assert line == "router.name: found 'tokp', expected one of relu, topk (did you mean 'topk'?)"


def test_all_mistakes_in_options_are_listed():
    assert mistakes({"router": {"k": 0, "zloss": 1.0}}, routers=ROUTERS) == [
        "router.k: found 0, expected greater than or equal to 1",
        "router.zloss: unknown key (did you mean 'z_loss'?)",
    ]


def test_options_of_one_router_are_not_options_of_another():
    (line,) = mistakes({"router": {"name": "relu", "k": 2}}, routers=ROUTERS)
    assert line.startswith("router.k: unknown key")


def test_another_router_on_the_command_line_drops_the_options_of_the_first(tmp_path):
    path = write(tmp_path, {"router": {"name": "topk", "k": 3}})
    assert load_config(path, ["router.name=relu", "router.density=0.1"], ROUTERS).router.options["density"] == 0.1
    assert load_config(path, ["router.name=topk"], ROUTERS).router.options["k"] == 3


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        ("- model\n", "found list, expected a mapping of keys to values"),
        ("just words\n", "found str, expected a mapping of keys to values"),
        ("model: [\n", "not valid YAML"),
        ("model: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, expected):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the file: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot read the file: Is a directory"):
        load_config(tmp_path)


# --- what a YAML file or a plugin can bring that nobody expects ------------------------------------------------------


class OptionsWithoutDefault(Section):
    table: str


@pytest.mark.parametrize(
    "tree, expected",
    [
        ({True: {}}, "True: unknown section"),  # YAML 1.1 reads a key `on` as True
        ({"model": {5: 1}}, "model.5: unknown key"),
        ({"training": {"lr": float("inf")}}, "training.lr: found inf, expected a finite number"),
        ({"training": {"clip_grad": float("nan")}}, "training.clip_grad: found nan, expected a finite number"),
        ({"deepspeed": []}, "deepspeed: found [], expected a mapping"),
        ({"model": {"num_layers": 0, "moe_layer_freq": [1, 0]}}, "model.num_layers: found 0"),
        ({"model": {"num_attention_heads": 3}}, "model.hidden_size: found 256, expected a multiple"),
    ],
)
def test_exactly_one_line_for(tree, expected):
    (line,) = mistakes(tree)
    assert line.startswith(expected)


@pytest.mark.parametrize("options, expected", [({}, "not set, but has no default"), ({"table": 5}, "found 5")])
def test_a_plugin_may_have_an_option_without_default(options, expected):
    (line,) = mistakes({"router": {"name": "hash", **options}}, routers={"hash": OptionsWithoutDefault})
    assert line.startswith(f"router.table: {expected}")


def test_the_order_of_router_overrides_does_not_matter(tmp_path):
    path = write(tmp_path, {"router": {"name": "topk", "k": 3}})
    config = load_config(path, ["router.density=0.1", "router.name=relu"], ROUTERS)
    assert config.router.options["density"] == 0.1


def test_naming_the_default_router_keeps_its_options(tmp_path):
    path = write(tmp_path, {"router": {"k": 3}})
    assert load_config(path, ["router.name=topk"], ROUTERS).router.options["k"] == 3


def test_a_file_of_another_encoding_and_a_date_that_does_not_exist(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfem\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "logging: {run_dir: 2024-13-01}"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(None, ["logging.run_dir=2024-13-01"])


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  steps: 5\n  lr: 0.1\n  steps: 6\n")
    with pytest.raises(ConfigError, match="'steps' is given twice"):
        load_config(path)


# --- sections inside sections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "line"),
    [
        ({"stap": 5.0}, "training.timeout.stap: unknown key (did you mean 'step'?)"),
        ({"step": -1.0}, "training.timeout.step: found -1.0, expected greater than or equal to 0"),
        (
            5.0,
            "training.timeout: found 5.0, expected a mapping: training.timeout.start, training.timeout.step, "
            "training.timeout.save",
        ),
    ],
)
def test_a_mistake_in_a_section_of_a_section_names_its_field(timeout, line):
    assert mistakes({"training": {"timeout": timeout}}) == [line]


def test_a_section_of_a_section_can_be_overridden(tmp_path):
    config = load_config(write(tmp_path, {}), ["training.timeout.step=12.5"])
    assert (config.training.timeout.step, config.training.timeout.start) == (12.5, 300.0)
