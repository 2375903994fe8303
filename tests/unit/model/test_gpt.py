"""The model is what its configuration says: size, initial weights, attention, causality, losses.

Models of other expert-parallel sizes are built in this one process with stand-ins for the groups: construction and
initialisation ask a group for its size and rank only.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dsmoe.config import validate_config
from dsmoe.model import rotary
from dsmoe.model.attention import CausalAttention, KeyValueCache
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors, parameter_pieces
from dsmoe.model.size import model_size
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_length=16, vocab_size=64,
    num_experts=4, moe_ffn_hidden_size=16,
)  # fmt: skip
RELU = {"name": "relu", "k": 1.0, "lambda_initial": 1e-2}
VARIANTS = {
    "plain": {},
    "as many key heads as query heads": {"num_query_groups": None},
    "one key head": {"num_query_groups": 1},
    "untied": {"tie_embeddings": False},
    "dense layers between": {"num_layers": 4, "moe_layer_freq": 2},
    "dense layers as listed": {"num_layers": 3, "moe_layer_freq": [0, 1, 0], "ffn_hidden_size": 40},
    "shared expert": {"moe_shared_expert_intermediate_size": 24},
    "qk norm": {"qk_layernorm": True},
    "one qk norm over all heads": {"qk_layernorm": "full"},
    "heads of another size": {"kv_channels": 12, "qk_layernorm": "full", "num_attention_heads": 6},
    "experts with biases": {"expert_activation": "geglu", "expert_bias": True},
    "all of it": {
        "num_layers": 3, "moe_layer_freq": [0, 1, 1], "tie_embeddings": False, "qk_layernorm": True,
        "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True, "add_qkv_bias": True,
    },
}  # fmt: skip


def config_of(router=RELU, **model):
    return validate_config({"model": SHAPE | model, "router": dict(router)}, option_classes())


def build(config, groups, seed: int = 5) -> LanguageModel:
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    return LanguageModel(config.model, (router_class, options), groups, seed)


def at_expert_parallel(groups, size: int, rank: int):
    """The groups of one rank of a job with that expert-parallel size, enough of them to build its model."""
    ep = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return dataclasses.replace(groups, ep=ep)


def text(config, sequences: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (sequences, config.model.sequence_length)
    return torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_experts_without_a_gate_are_a_third_smaller(groups):
    config, gated = config_of(expert_activation="relu2"), config_of()
    model = build(config, groups)
    assert model_size(config).total == sum(parameter.numel() for parameter in model.parameters())
    assert model_size(config).expert * 3 == model_size(gated).expert * 2


@pytest.mark.parametrize(
    "router", [RELU, {"name": "topk", "k": 2}, {"name": "aoe", "k": 2, "rank": 8}], ids=lambda options: options["name"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_size_is_that_of_the_built_model(groups, variant, router):
    config = config_of(router, **VARIANTS[variant])
    model = build(config, groups)
    parameters = list(model.parameters())
    size = model_size(config)
    assert size.total == sum(parameter.numel() for parameter in parameters)
    layers = sum(config.model.moe_layers())
    in_experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    expert = in_experts // (layers * config.model.num_experts)
    unused = round((config.model.num_experts - used_by(config)) * expert) * layers
    assert size.active == size.total - unused


def used_by(config) -> float:
    options = get(config.router.name).Options.model_validate(config.router.options)
    return options.target_experts_per_token(config.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_known_without_the_model(groups, variant):
    config = config_of(**VARIANTS[variant])
    built = {name: tuple(tensor.shape) for name, tensor in logical_tensors(build(config, groups))}
    assert logical_shapes(config.model, config.router) == built


@pytest.mark.parametrize("variant", ["plain", "all of it"])
def test_initial_weights_do_not_depend_on_expert_parallel(groups, variant):
    config = config_of(**VARIANTS[variant])
    expected = dict(logical_tensors(build(config, groups)))
    for size in (2, 4):
        seen = set()
        for rank in range(size):
            for name, tensor in logical_tensors(build(config, at_expert_parallel(groups, size, rank))):
                assert torch.equal(tensor, expected[name]), name
                seen.add(name)
        assert seen == expected.keys()


def test_initial_weights_do_not_depend_on_what_was_drawn_before_but_on_the_seed(groups):
    config = config_of()
    torch.manual_seed(1)
    first = dict(logical_tensors(build(config, groups)))
    torch.manual_seed(2)
    torch.randn(7)
    again, other = (dict(logical_tensors(build(config, groups, seed))) for seed in (5, 6))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, other[name]) == (tensor.dim() < 2), name


def test_a_layer_more_leaves_the_weights_of_the_others(groups):
    """Names seed the weights, not the order in which modules are built; only the residual's scale knows the depth."""
    two, three = (dict(logical_tensors(build(config_of(num_layers=layers), groups))) for layers in (2, 3))
    for name, tensor in two.items():
        into_residual = name.endswith(("linear_proj.weight", "down_proj"))
        expected = three[name] * (math.sqrt(3 / 2) if into_residual else 1.0)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=0)


def test_no_two_tensors_start_alike_and_spreads_are_as_told(groups):
    config = config_of(hidden_size=64, moe_ffn_hidden_size=64, init_std=0.05)
    tensors = [(name, t) for name, t in logical_tensors(build(config, groups)) if t.dim() >= 2]
    assert len({tuple(tensor.flatten()[:8].tolist()) for _, tensor in tensors}) == len(tensors)
    for name, tensor in tensors:
        into_residual = name.endswith(("linear_proj.weight", "down_proj"))
        expected = 0.05 / math.sqrt(4) if into_residual else 0.05
        # The standard deviation of n draws is known to about 1 / sqrt(2n).
        assert tensor.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * tensor.numel())), name


def test_pieces_cut_every_parameter_without_gap_or_overlap(groups):
    model = build(config_of(**VARIANTS["all of it"]), at_expert_parallel(groups, 2, 1))
    names = []
    for parameter, pieces in parameter_pieces(model):
        ends = [piece.start + piece.numel for piece in pieces]
        assert [piece.start for piece in pieces] == [0, *ends[:-1]]
        assert ends[-1] == parameter.numel()
        names += [piece.name for piece in pieces]
    assert len(names) == len(set(names))
    experts = {name.split(".experts.")[1].split(".")[0] for name in names if ".experts." in name}
    assert experts == {"2", "3"}  # rank 1 of 2 holds the second half


def plain_attention(query, key, value, scale):
    """Causal grouped-query attention, a softmax for each query by itself. [S, B, heads, d]"""
    length, batch, heads, _ = query.shape
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // key.size(2))
            for s in range(length):
                weights = (key[: s + 1, b, g] @ query[s, b, h] * scale).softmax(0)
                out[s, b, h] = weights @ value[: s + 1, b, g]
    return out.flatten(2)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_a_softmax_over_the_past(heads, key_heads, scale):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(7, 2, n, 6, generator=generator) for n in (heads, key_heads, key_heads))
    actual = CausalAttention(None, 1, None, "self", softmax_scale=scale)(query, key, value)
    torch.testing.assert_close(actual, plain_attention(query, key, value, scale or 6**-0.5), rtol=1e-5, atol=1e-5)


def test_an_attention_mask_is_added_to_causality():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(7, 2, 4, 6, generator=generator) for _ in range(3))
    attend = CausalAttention(None, 1, None, "self")
    nothing_hidden = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    torch.testing.assert_close(attend(query, key, value, nothing_hidden), attend(query, key, value))
    first_hidden = nothing_hidden.clone()
    first_hidden[..., 1:, 0] = True  # from all but itself
    actual = attend(query, key, value, first_hidden)[1:]
    torch.testing.assert_close(actual, attend(query[1:], key[1:], value[1:]))


@pytest.mark.parametrize("start", [0, 7])
def test_rotary_turns_pairs_by_the_angle_of_their_place(start):
    """As complex numbers: elements i and i + d / 2 are one, times e^(i place base^(-2 i / d))."""
    x = torch.randn(5, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    places = torch.arange(start, start + 5)
    actual = rotary.turn(x, rotary.angles(places, 16, 50.0))
    angle = places.double().unsqueeze(1) * 50.0 ** (-torch.arange(8).double() / 8)
    expected = (
        torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones(5, 8).double(), angle)[:, None, None]
    )
    torch.testing.assert_close(actual.double(), torch.cat((expected.real, expected.imag), dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_with_rotary_depends_on_distances_alone(key_heads):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, 2, n, 8, generator=generator) for n in (4, key_heads, key_heads))
    attend = CausalAttention(None, 1, None, "self", rotary_base=100.0)
    actual = attend(query, key, value)
    with_mask = attend(query, key, value, torch.zeros(2, 1, 9, 9, dtype=torch.bool))  # hides nothing; torch's way
    turned = [rotary.turn(x, rotary.angles(torch.arange(40, 49), 8, 100.0)) for x in (query, key)]
    expected = plain_attention(*turned, value, 8**-0.5)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_mask, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [1, 4])
def test_attention_goes_on_from_a_cache(first):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, 1, 2, 8, generator=generator) for _ in range(3))
    attend = CausalAttention(None, 1, None, "self", rotary_base=100.0)
    whole = attend(query, key, value)
    parts = []
    with KeyValueCache().of(attend) as cache:
        for low, high in ((0, first), (first, 8), (8, 9)):
            parts.append(attend(query[low:high], key[low:high], value[low:high]))
            assert cache.length == high
    torch.testing.assert_close(torch.cat(parts), whole)


def test_flash_attention_is_asked_for_in_training_and_for_each_new_token(groups, monkeypatch):
    """A mask, or keys repeated for grouped queries, would keep torch from it on a GPU."""
    asked = []

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, *args, plain=F.scaled_dot_product_attention, **how):
        dtypes = {x.dtype for x in (query, key, value)}
        asked.append((attn_mask, dropout_p, how["is_causal"], how["enable_gqa"], dtypes))
        return plain(query, key, value, attn_mask, dropout_p, *args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    config = config_of(num_layers=1)
    model = build(config, groups).bfloat16()
    tokens = text(config)
    model(tokens, tokens, padding_mask=torch.zeros_like(tokens, dtype=torch.bool))[0].backward()
    with KeyValueCache().of(model), torch.no_grad():
        model(tokens[:, :8]), model(tokens[:, 8:9])
    assert asked == [(None, 0.0, causal, True, {torch.bfloat16}) for causal in (True, True, False)]


class Plain:
    """The whole forward pass written out, for one sequence at a time and a router that was asked already."""

    def __init__(self, model: LanguageModel):
        self.weights = {name.removeprefix("gpt."): t for name, t in logical_tensors(model)}
        self.config = model.config

    def logits(self, tokens_S: torch.Tensor) -> torch.Tensor:
        x = self.weights["embedding.word_embeddings.weight"][tokens_S]
        for layer in range(self.config.num_layers):
            w = {n.split(".", 3)[3]: t for n, t in self.weights.items() if n.startswith(f"decoder.layers.{layer}.")}
            x = x + self._attend(self._norm(x, w["input_layernorm.weight"]), w)
            x = x + self._experts(self._norm(x, w["pre_mlp_layernorm.weight"]), w)
        x = self._norm(x, self.weights["decoder.final_layernorm.weight"])
        return x @ self.weights["embedding.word_embeddings.weight"].t()

    def _norm(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_epsilon).sqrt() * weight

    def _attend(self, x, w):
        heads, groups = self.config.num_attention_heads, self.config.key_value_heads
        head = self.config.hidden_size // heads
        # Megatron's layout: for each key head its queries, then the key, then the value.
        mixed = (x @ w["self_attention.linear_qkv.weight"].t()).view(len(x), groups, heads // groups + 2, head)
        query, key, value = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        query, key = self._turn(query), self._turn(key)
        out = plain_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), head**-0.5)[:, 0]
        return out @ w["self_attention.linear_proj.weight"].t()

    def _turn(self, x):
        length, _, head = x.shape
        angle = torch.arange(length)[:, None, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
        first, second = x.chunk(2, -1)
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)

    def _experts(self, x, w):
        scores = (x @ w["mlp.router.weight"].t()).relu()
        rows = []
        for t, row in enumerate(x):
            out = torch.zeros_like(row)
            for e in range(self.config.num_experts):
                if scores[t, e] > 0:
                    gate, up = w[f"mlp.experts.{e}.gate_up_proj"].chunk(2)
                    out = out + scores[t, e] * (w[f"mlp.experts.{e}.down_proj"] @ (F.silu(gate @ row) * (up @ row)))
            rows.append(out)
        return torch.stack(rows)


def test_logits_are_those_of_the_equations_written_out(groups):
    config = config_of(init_std=0.2)  # large weights, so that every part matters
    model = build(config, groups)
    tokens = text(config, sequences=2)
    with torch.no_grad():
        actual = model(tokens)
        for sequence, logits in zip(tokens, actual, strict=True):
            torch.testing.assert_close(logits, Plain(model).logits(sequence), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_never_changes_the_past(groups, variant):
    config = config_of(**VARIANTS[variant], init_std=0.2)
    model = build(config, groups).eval()
    tokens = text(config, sequences=1)
    with torch.no_grad():
        before = model(tokens)
        for place in (5, 15):
            changed = tokens.clone()
            changed[0, place] = (tokens[0, place] + 1) % config.model.vocab_size
            after = model(changed)
            # Not bit for bit: an expert's GEMM rounds its rows by how many there are.
            torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-5)
            assert (after[:, place:] - before[:, place:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("recompute", ["moe", "full"])
def test_recompute_changes_no_logit_and_no_gradient(groups, recompute):
    results = []
    for kind in ("none", recompute):
        config = config_of(recompute=kind, **VARIANTS["all of it"])
        model = build(config, groups)
        loss, _ = model(text(config), text(config, seed=1))
        loss.backward()
        results.append((model(text(config)), {name: p.grad for name, p in model.named_parameters()}))
    (expected, expected_gradients), (logits, gradients) = results
    assert torch.equal(logits, expected)
    assert [name for name in gradients if not torch.equal(gradients[name], expected_gradients[name])] == []


@pytest.mark.parametrize("chunks", [2, 7, 1000])
def test_tokens_in_parts_give_the_same_loss_and_gradients(groups, chunks):
    results = []
    for config in (config_of(), config_of(moe_chunks=chunks), config_of(moe_chunks=chunks, recompute="moe")):
        model = build(config, groups)
        loss, _ = model(text(config), text(config, seed=1))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for actual in results[1:]:
        for one, other in zip(actual, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_loss_is_the_cross_entropy_and_the_routers_part_comes_on_top(groups):
    config = config_of()
    model = build(config, groups)
    tokens, labels = text(config), text(config, seed=1)
    total, parts = model(tokens, labels)
    expected = -model(tokens).log_softmax(-1).gather(2, labels.unsqueeze(2)).mean()
    assert parts["lm"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(parts) == {"lm", "l1"} and parts["l1"] > 0
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()), rel=1e-6)
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())


def test_masked_labels_and_padding_count_nowhere(groups):
    """A sequence that is padding changes neither loss, nor gradient, nor counts, whatever its tokens are."""
    config = config_of()
    model = build(config, groups)
    tokens, labels = text(config, 2), text(config, 2, seed=1)
    loss, _ = model(tokens[:1], labels[:1])
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    counts = model.recorder.take()
    model.zero_grad()
    real = torch.tensor([[True], [False]]).expand_as(tokens)
    masked, _ = model(tokens, labels, loss_mask=real, padding_mask=~real)
    masked.backward()
    assert masked.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
    again = model.recorder.take()
    assert torch.equal(again.counts_LE, counts.counts_LE) and again.tokens == counts.tokens == 16


def test_a_saved_state_holds_tensors_only(groups):
    state = build(config_of(), groups).state_dict()
    assert state and all(isinstance(value, torch.Tensor) for value in state.values())
