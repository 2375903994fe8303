"""Which differences from a checkpoint's run are accepted, which are refused, and where the run goes on."""

from __future__ import annotations

import copy

import pytest

from dsmoe.checkpoint.files import Manifest
from dsmoe.config import RunConfig, validate_config
from dsmoe.errors import CheckpointError
from dsmoe.routers.registry import option_classes
from dsmoe.training.resume import resume

TREE = {
    "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "sequence_length": 16, "vocab_size": 64},
    "router": {"name": "topk", "k": 2},
    "training": {"global_batch_size": 4, "steps": 100},
}
DATA = {
    "train": {"fingerprint": "a" * 64, "tokens": 16 * 40 + 1},  # an epoch is 40 samples of 16, 20 of 32
    "valid": {"fingerprint": "b" * 64, "tokens": 100},
    "tokenizer": "c" * 64,
}


def config_of(**sections) -> RunConfig:
    tree = copy.deepcopy(TREE)
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return validate_config(tree, option_classes())


def manifest_of(samples: int = 24, **values) -> Manifest:
    return Manifest(**{
        "format": 1, "step": samples // 4, "samples": samples, "world_size": 2, "expert_parallel": 1, "zero_stage": 1,
        "config": config_of().model_dump(mode="json"), "tensors": {}, "files": {}, "tokens": samples * 16,
        "data": copy.deepcopy(DATA), **values,
    })  # fmt: skip


def test_what_is_the_same_goes_on_where_it_was():
    position, changes = resume(manifest_of(), config_of(), DATA)
    assert (position.step, position.samples, position.tokens, changes) == (6, 24, 24 * 16, [])


FUTURE = [
    {"training": {"lr": 5e-4}}, {"training": {"steps": 200}}, {"training": {"global_batch_size": 8}},
    {"training": {"precision": "bf16"}}, {"parallel": {"zero_stage": 3}}, {"parallel": {"expert_parallel": 2}},
    {"router": {"balance_coefficient": 0.1}}, {"checkpoint": {"interval": 7}}, {"logging": {"run_dir": "elsewhere"}},
    {"model": {"recompute": "moe"}}, {"model": {"moe_chunks": 2}}, {"training": {"adam_beta2": 0.9}},
    {"training": {"tf32": True}},
    {"data": {"path": "moved"}}, {"deepspeed": {"steps_per_print": 5}},
]  # fmt: skip


@pytest.mark.parametrize("sections", FUTURE, ids=str)
def test_what_only_changes_the_future_is_accepted_and_listed(sections):
    position, changes = resume(manifest_of(), config_of(**sections), DATA)
    ((section, values),) = sections.items()
    ((key, value),) = values.items()
    assert [change.key for change in changes] == [f"{section}.{key}"]
    assert changes[0].after == value and str(value) in str(changes[0])
    assert (position.samples, position.tokens) == (24, 384)  # another batch reads on from the same sequence


STEERS = [
    ("relu", {"k": 2.0}), ("relu", {"lambda_factor": 1.1}), ("topk_bias", {"bias_update_rate": 0.01}),
    ("top_p", {"balance_scope": "rank"}), ("dtop_p", {"kp": 0.1}), ("top_p", {"expected_experts": 2.0}),
    ("routing_free", {"target_density": 0.1}), ("routing_free", {"lambda_rate": 0.1}), ("aoe", {"latent": "send"}),
]  # fmt: skip
COMPUTES = [
    ("relu", {"name": "topk"}), ("dtop_p", {"k": 3.0}), ("top_p", {"p": 0.5}), ("expert_threshold", {"decay": 0.9}),
    ("routing_free", {"threshold": 2.0}), ("aoe", {"k": 1}), ("topk_bias", {"route_scale": 1.0}),
]  # fmt: skip


def resume_with_options(router: str, options: dict) -> list:
    tree = {
        **copy.deepcopy(TREE),
        "router": {"name": router, **({"rescale": True} if router == "routing_free" else {})},
    }
    saved = validate_config(tree, option_classes())
    changed = validate_config({**tree, "router": {**tree["router"], **options}}, option_classes())
    return resume(manifest_of(config=saved.model_dump(mode="json")), changed, DATA)[1]


@pytest.mark.parametrize(("router", "options"), STEERS, ids=str)
def test_router_options_that_steer_training_are_accepted_and_listed(router, options):
    assert [change.key for change in resume_with_options(router, options)] == [f"router.{name}" for name in options]


@pytest.mark.parametrize(("router", "options"), COMPUTES, ids=str)
def test_router_options_that_change_what_it_computes_are_refused(router, options):
    with pytest.raises(CheckpointError, match=f"router.{next(iter(options))}: .*as it was"):
        resume_with_options(router, options)


REFUSED = [
    ({"model": {"num_attention_heads": 2}}, "model.num_attention_heads", "4 in the checkpoint, 2 now"),
    ({"model": {"rotary_base": 5e5}}, "model.rotary_base", "10000.0 in the checkpoint, 500000.0 now"),
    ({"model": {"norm_epsilon": 1e-6}}, "model.norm_epsilon", "1e-05 in the checkpoint, 1e-06 now"),
    ({"model": {"qk_layernorm": True}}, "model.qk_layernorm", "False in the checkpoint, True now"),
    ({"router": {"k": 3}}, "router.k", "2 in the checkpoint, 3 now"),
    ({"router": {"softmax": "after"}}, "router.softmax", "before in the checkpoint, after now"),
    ({"training": {"optimizer": "lion"}}, "training.optimizer", "adamw in the checkpoint, lion now"),
    ({"training": {"seed": 7}}, "training.seed", "1234 in the checkpoint, 7 now: the run is at sample 24 of the 40"),
    ({"model": {"sequence_length": 32}}, "model.sequence_length", "16 in the checkpoint, 32 now: the run is at"),
]


@pytest.mark.parametrize(("sections", "key", "named"), REFUSED, ids=[key for _, key, _ in REFUSED])
def test_what_cannot_be_right_is_refused_with_both_values_unless_it_is_wanted(sections, key, named):
    with pytest.raises(CheckpointError) as error:
        resume(manifest_of(), config_of(**sections), DATA)
    assert f"{key}: {named}" in str(error.value) and f"training.resume_with=[{key}]" in str(error.value)
    for wanted in (key, key.partition(".")[0]):
        merged = {**sections, "training": {**sections.get("training", {}), "resume_with": [wanted]}}
        _, changes = resume(manifest_of(), config_of(**merged), DATA)
        assert [change.key for change in changes] == [key]


def test_all_refusals_come_at_once():
    with pytest.raises(CheckpointError) as error:
        resume(manifest_of(), config_of(model={"rotary_base": 5e5, "norm_epsilon": 1e-6}, router={"k": 3}), DATA)
    assert all(f"  {number}. " in str(error.value) for number in (1, 2, 3))


OTHER_DATA = [
    ({"train": {"fingerprint": "d" * 64, "tokens": 999}}, "data: 641 tokens (aaaaaaaaaaaa) in the checkpoint, 999 tok"),
    ({"tokenizer": "e" * 64}, "data.tokenizer: cccccccccccc in the checkpoint, eeeeeeeeeeee now"),
]


@pytest.mark.parametrize(("other", "named"), OTHER_DATA)
def test_other_data_is_refused_unless_it_is_wanted(other, named):
    with pytest.raises(CheckpointError, match=r"training.resume_with=\[data") as error:
        resume(manifest_of(), config_of(), {**DATA, **other})
    assert named in str(error.value)
    position, _ = resume(manifest_of(), config_of(training={"resume_with": ["data"]}), {**DATA, **other})
    assert position.tokens == 24 * 16
    assert position.samples == (0 if "train" in other else 24)  # other data is read from its beginning


def test_other_held_out_data_is_only_said():
    _, changes = resume(manifest_of(), config_of(), {**DATA, "valid": {"fingerprint": "d" * 64, "tokens": 7}})
    assert [change.key for change in changes] == ["held-out data"]


@pytest.mark.parametrize(
    ("sections", "samples"), [({"training": {"seed": 7}}, 80), ({"model": {"sequence_length": 32}}, 40)]
)
def test_between_two_epochs_another_order_is_translated_exactly(sections, samples):
    position, changes = resume(manifest_of(samples=80), config_of(**sections), DATA)
    assert (position.samples, position.tokens) == (samples, 80 * 16)
    assert len(changes) == 1


def test_where_another_order_is_wanted_the_run_goes_on_with_the_next_epoch():
    wanted = {"resume_with": ["model.sequence_length"]}
    position, _ = resume(manifest_of(samples=44), config_of(model={"sequence_length": 32}, training=wanted), DATA)
    assert (position.samples, position.tokens) == (2 * 20, 44 * 16)


def test_a_checkpoint_of_before_there_were_fingerprints_resumes_and_says_so():
    position, changes = resume(manifest_of(data=None, tokens=None), config_of(), DATA)
    assert position.tokens == 24 * 16
    assert [str(change) for change in changes] == [
        "data: not recorded in the checkpoint, 641 tokens (aaaaaaaaaaaa) now"
    ]


def test_an_import_has_no_place_in_any_data():
    manifest = manifest_of(samples=0, data=None, tokens=None)
    position, _ = resume(manifest, config_of(model={"sequence_length": 32}, training={"seed": 7}), DATA)
    assert (position.step, position.samples, position.tokens) == (0, 0, 0)


def test_a_configuration_of_the_past_that_cannot_be_read_is_refused():
    with pytest.raises(CheckpointError, match="the checkpoint's configuration cannot be read"):
        resume(manifest_of(config={"model": {"num_layers": "two"}}), config_of(), DATA)


@pytest.mark.parametrize("name", ["modell", "training.sead", "data.nothing"])
def test_resume_with_names_what_there_is(name):
    from dsmoe.errors import ConfigError

    with pytest.raises(ConfigError, match="training.resume_with: found"):
        config_of(training={"resume_with": [name]})
