"""What counts as equal after a conversion: rounding, measured in the logits' own size and against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch import Tensor

from dsmoe.errors import ConversionError
from dsmoe.hf import foreign, parity
from dsmoe.hf.importing import ImportOptions, import_model
from dsmoe.hf.parity import CLOSE, MAX_FLIPPED, Observation, judge

B, S, V, L, E = 4, 64, 50, 2, 8
FIXED_LIMIT = 1e-4  # what a limit that ignores the logits' size would be


def folder_of(place, **scales: float):
    """A tiny OLMoE whose tensors with these parts in their names are multiplied."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, intermediate_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            for part, scale in scales.items():
                parameter.mul_(scale if part in name else 1)
    model.save_pretrained(place)
    return place


def test_a_sound_model_with_large_logits_passes(groups, tmp_path):
    report = import_model(folder_of(tmp_path / "hf", lm_head=3e4), tmp_path / "run", ImportOptions())["parity"]
    assert report["fp32"]["max_logit_difference"] > 10 * FIXED_LIMIT  # a fixed limit refuses it
    equality = report["equality"]
    assert equality["difference"] <= equality["allowed"] < 1e-3 * equality["logit_scale"]


@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_a_wrong_model_fails_however_small_its_logits(groups, tmp_path, monkeypatch, scale):
    """Gates that the folder renormalises and the reader is made to overlook."""
    translate = foreign._translate

    def overlook(architecture, config):
        model, router = translate(architecture, config)
        return model, router | {"softmax": "before"}

    differences, compare = [], parity.compare

    def compared(*observations):
        differences.append(compare(*observations))
        return differences[-1]

    monkeypatch.setattr(foreign, "_translate", overlook)
    monkeypatch.setattr(parity, "compare", compared)
    with pytest.raises(ConversionError, match="logits differ by up to .* of their size; rounding explains"):
        import_model(folder_of(tmp_path / "hf", lm_head=scale), tmp_path / "run", ImportOptions())
    assert (differences[0].max_logit_difference < FIXED_LIMIT) == (scale < 1)  # a fixed limit lets the small one pass
    assert not (tmp_path / "run").exists()


# The judgement alone, on made-up observations.


def observation() -> Observation:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, S, V, generator=generator)
    routes = torch.rand(L, B * S, E, generator=generator) < 0.25
    written_from = torch.randn(8, V, generator=generator)
    return Observation(logits, routes, written_from.argmax(-1), written_from)


def with_error(one: Observation, size: float) -> Observation:
    noise = torch.rand(one.logits.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return dataclasses.replace(one, logits=one.logits + size * noise)


def never() -> Observation:
    raise AssertionError("fp64 was not needed")


def test_a_few_units_in_the_last_place_need_no_fp64():
    ours = observation()
    assert judge(ours, with_error(ours, CLOSE / 2), never).problems == []


@pytest.mark.parametrize(
    ("ours_off", "theirs_off", "fits"), [(1e-4, 3e-4, True), (1e-4, 3e-3, False), (0.1, 0.5, False)]
)
def test_more_is_held_to_what_rounding_does_to_our_own_model(ours_off, theirs_off, fits):
    exact = observation()
    actual = judge(with_error(exact, ours_off), with_error(exact, -theirs_off), lambda: exact)
    assert actual.rounding == pytest.approx(ours_off, rel=0.1) and (actual.problems == []) == fits


def flip(one: Observation, position: int) -> Observation:
    """Another expert at a position of the first sequence, which changes all that follows."""
    routes, logits = one.routes.clone(), one.logits.clone()
    routes[0, position] = ~routes[0, position]
    logits[0, position:] += 1
    return dataclasses.replace(one, routes=routes, logits=logits)


def test_a_tie_of_two_experts_is_no_difference():
    ours = observation()
    few = dataclasses.replace(ours, routes=torch.ones(L, B * S, E, dtype=torch.bool))
    actual = judge(few, flip(few, 60), never)
    assert actual.problems == [] and actual.compared == 1 - 4 / (B * S)
    assert parity._flipped(few, flip(few, 60)) < MAX_FLIPPED * 2


def test_many_flipped_routes_are_a_difference():
    ours = observation()
    routes: Tensor = ours.routes.clone()
    routes[:, 5::16] = ~routes[:, 5::16]
    actual = judge(ours, dataclasses.replace(ours, routes=routes), lambda: ours)
    assert any("of the routes differ" in problem for problem in actual.problems)
    nothing = judge(ours, dataclasses.replace(ours, routes=~ours.routes), lambda: ours)
    assert nothing.compared == 0 and nothing.difference == torch.inf and len(nothing.problems) == 2


@pytest.mark.parametrize(("gap", "fits"), [(1e-6, True), (1e-2, False)])
def test_tokens_that_tie_may_differ(gap, fits):
    ours = observation()
    second = ours.written_from.topk(2, dim=-1).indices[3, 1]
    ours.written_from[3, second] = ours.written_from[3].max() - gap
    written = ours.written.clone()
    written[3] = second
    actual = judge(ours, dataclasses.replace(ours, written=written), lambda: ours)
    assert (actual.problems == []) == fits


@pytest.mark.parametrize(("flips", "fits"), [(0, False), (1, True), (30, False)])
def test_a_token_after_a_flipped_route_may_differ_and_after_many_may_not(flips, fits):
    """One route that ties decides otherwise, and with it all that is written from there on."""
    ours = observation()
    written = ours.written.clone()
    written[3:] = (written[3:] + 1) % V
    theirs = [torch.rand(L, 16 + n, E, generator=torch.Generator().manual_seed(n)) < 0.25 for n in range(8)]
    ours_before = [routes.clone() for routes in theirs]
    ours_before[3].view(-1)[:flips] ^= True
    ours = dataclasses.replace(ours, routes_before=ours_before)
    equality = judge(ours, dataclasses.replace(ours, written=written, routes_before=theirs), lambda: ours)
    assert (equality.problems == []) == fits


def test_what_is_no_number_is_no_rounding():
    ours = observation()
    logits = ours.logits.clone()
    logits[1, 2, 3] = torch.nan
    assert judge(ours, dataclasses.replace(ours, logits=logits), lambda: ours).problems
