"""modeling_dsmoe.py against dsmoe's own model: the same logits for every router and shape; and what transformers asks
of a model: cache, padding, labels, checkpointing, dtypes."""

from __future__ import annotations

import pytest
import torch

from dsmoe.config import validate_config
from dsmoe.hf.export import packed_experts_per_token, remote_config
from dsmoe.hf.remote.configuration_dsmoe import DsmoeConfig
from dsmoe.hf.remote.modeling_dsmoe import DsmoeForCausalLM, DsmoeRoutedExperts, grouped_linear, loop_linear
from dsmoe.hf.table import PACKED, TABLES, links, routing_name
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_length=24, vocab_size=64,
    num_experts=4, moe_ffn_hidden_size=16, init_std=0.2,
)  # fmt: skip
ROUTERS = {
    "topk": {"k": 2},
    "topk_bias": {"k": 2},
    "top_p": {"p": 0.6},
    "dtop_p": {"k": 2.0},
    "relu": {"k": 1.0},
    "expert_threshold": {"k": 2.0},
    "quantile": {"k": 2.0},
    "aoe": {"k": 2, "rank": 8},
    "routing_free": {"rank": 8},
}
SHAPES = {
    "as many key heads as query heads": {"num_query_groups": None},
    "untied": {"tie_embeddings": False},
    "dense layers": {"num_layers": 4, "moe_layer_freq": [0, 1, 0, 1], "ffn_hidden_size": 40},
    "shared expert": {"moe_shared_expert_intermediate_size": 24},
    "shared expert with a gate, biases": {
        "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True, "add_qkv_bias": True,
    },
    "qk norm": {"qk_layernorm": True},
    "qk norm over all heads": {"qk_layernorm": "full"},
    "experts without a gate": {"expert_activation": "relu2"},
    "experts of another gate with biases": {"expert_activation": "swigluoai", "expert_bias": True},
    "wide heads": {"kv_channels": 16, "rotary_base": 500.0},
}  # fmt: skip


def both_models(groups, router: str, **shape) -> tuple[LanguageModel, DsmoeForCausalLM]:
    """dsmoe's model with a controller that has moved, and the stand-alone one with what an export holds of it."""
    tree = {"model": SHAPE | shape, "router": {"name": router, **ROUTERS[router]}}
    config = validate_config(tree, option_classes())
    router_class = get(router)
    options = router_class.Options.model_validate(config.router.options)
    ours = LanguageModel(config.model, (router_class, options), groups, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    if ours.controller is not None:
        state = {
            name: torch.tensor(5000)
            if name == "updates"
            else value + 0.1 * torch.rand(value.shape, generator=generator)
            for name, value in ours.controller.state.items()
        }
        ours.controller.load(state)
    tensors = dict(logical_tensors(ours))
    for name, tensor in tensors.items():
        if name.endswith("_bias"):  # of experts, which begins at 0
            tensor.data.normal_(generator=generator)
        if name.endswith("linear_qkv.bias"):  # 0 at first
            tensor.data.uniform_(-1, 1, generator=generator)
    rows = PACKED if packed_experts_per_token(config, router_class, options) else TABLES
    plan = links(rows["dsmoe"], config.model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    state = {}
    for link in plan:
        state |= link.to_theirs([tensors[name] for name in link.ours])
    for place, layer in enumerate(i for i, is_moe in enumerate(config.model.moe_layers()) if is_moe):
        for name, tensor in router_class.inference_state(ours.controller, place).items():
            state[routing_name(layer, name)] = tensor
    if config.model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs = DsmoeForCausalLM(DsmoeConfig(**remote_config(config, router_class, options))).eval()
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def text(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(ours: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    actual = ours(tokens)
    ours.recorder.take()
    return actual


@pytest.fixture(scope="module", params=ROUTERS)
def models(request, groups):
    return both_models(groups, request.param)


@pytest.fixture(scope="module")
def relu(groups):
    """One model for what does not depend on the router."""
    return both_models(groups, "relu")[1]


@torch.no_grad()
def test_logits_are_dsmoes(models):
    ours, theirs = models
    tokens = text(3, 24)
    assert (theirs(tokens).logits - logits_of(ours, tokens)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_dsmoes_in_every_shape(groups, shape):
    ours, theirs = both_models(groups, "expert_threshold", **SHAPES[shape])
    tokens = text(2, 24)
    assert (theirs(tokens).logits - logits_of(ours, tokens)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("router", ["topk", "aoe"])  # a fixed k, which SwiGLU has kernels for; experts of a latent
def test_logits_are_dsmoes_with_biases(groups, router):
    ours, theirs = both_models(groups, router, expert_activation="geglu", expert_bias=True)
    tokens = text(2, 24)
    assert (theirs(tokens).logits - logits_of(ours, tokens)).abs().max() < 1e-5


@torch.no_grad()
def test_padding_changes_nothing(models):
    """Sequences of three lengths in one batch, padded on the left or on the right, and each alone."""
    _, theirs = models
    rows = [text(1, length, seed=length) for length in (20, 13, 5)]
    alone = [theirs(row).logits[0] for row in rows]
    for left in (True, False):
        tokens, mask = torch.full((3, 20), 7), torch.zeros(3, 20, dtype=torch.int64)
        places = [slice(20 - row.size(1), 20) if left else slice(0, row.size(1)) for row in rows]
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            tokens[i, place], mask[i, place] = row[0], 1
        together = theirs(tokens, attention_mask=mask).logits
        for i, place in enumerate(places):
            assert (together[i, place] - alone[i]).abs().max() < 1e-5


@torch.no_grad()
def test_padding_gets_no_expert(relu):
    routed = []
    hook = relu.model.layers[0].mlp.routed_experts.register_forward_hook(
        lambda m, inputs, out: routed.append(inputs[2])
    )
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :4] = 0
    relu(text(2, 6), attention_mask=mask)
    hook.remove()
    map_BSE = routed[0].view(2, 6, -1)
    assert not map_BSE[1, :4].any() and map_BSE[0].any() and map_BSE[1, 4:].any()


@torch.no_grad()
def test_a_cache_gives_what_the_whole_text_gives(models):
    _, theirs = models
    tokens = text(2, 16)
    whole = theirs(tokens).logits
    first = theirs(tokens[:, :9], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for place in range(9, 16):
        step = theirs(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
        steps.append(step.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_generate_takes_the_likeliest_of_dsmoes_own_model(models):
    ours, theirs = models
    tokens = text(1, 6)
    written = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    for _ in range(12):
        tokens = torch.cat((tokens, logits_of(ours, tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, tokens)


@torch.no_grad()
def test_generate_in_a_padded_batch_is_generate_alone(relu):
    rows = [text(1, 9, seed=1), text(1, 4, seed=2)]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = [relu.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.size(1) :] for row in rows]
    tokens, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, 9 - row.size(1) :], mask[i, 9 - row.size(1) :] = row[0], 1
    together = relu.generate(tokens, attention_mask=mask, **options)[:, 9:]
    assert torch.equal(together, torch.stack(alone))


GENERATED_FROM = pytest.mark.parametrize("models", ["topk", "relu", "routing_free"], indirect=True)


@torch.no_grad()
@GENERATED_FROM
def test_beams_have_the_scores_of_dsmoes_own_model(models):
    """Prompts of two lengths in one batch; a beam that takes over another's cache has what it would have alone."""
    ours, theirs = models
    prompts, tokens, mask = [text(1, 6), text(1, 4, seed=1)], torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6)
    tokens[0], tokens[1, 2:], mask[1, :2] = prompts[0], prompts[1], 0
    out = theirs.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, num_beams=4, num_return_sequences=4,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert out.beam_indices[:, :8].diff().any()  # beams took over others'
    for i, (written, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        prompt, new = prompts[i // 4], written[None, 6:]
        logits = logits_of(ours, torch.cat((prompt, new), dim=1))[:, prompt.size(1) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).mean()
        assert score.item() == pytest.approx(expected.item(), abs=1e-4)


@torch.no_grad()
@GENERATED_FROM
def test_samples_are_drawn_from_dsmoes_own_distribution(models):
    ours, theirs = models
    tokens = text(2, 6)
    torch.manual_seed(5)
    written = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=True, temperature=0.7, top_k=0
    )
    torch.manual_seed(5)
    for _ in range(8):
        probs = (logits_of(ours, tokens)[:, -1] / 0.7).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(probs, 1)), dim=1)
    assert torch.equal(written, tokens)


@torch.no_grad()
@GENERATED_FROM
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=["static cache", "prompt in chunks", "prompt lookup", "no cache"],
)
def test_every_way_to_be_greedy_writes_the_same(models, options):
    """The text repeats itself, so that its prompt has something to look up."""
    _, theirs = models
    tokens = text(1, 6).repeat(1, 2)
    common = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(tokens, **common, **options), theirs.generate(tokens, **common))


@torch.no_grad()
def test_labels_give_the_loss_of_the_next_token(relu):
    tokens = text(2, 10)
    labels = tokens.clone()
    labels[0, :5] = -100
    output = relu(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected)


@torch.no_grad()
def test_logits_to_keep(relu):
    tokens = text(2, 10)
    whole = relu(tokens).logits
    for kept, expected in ((1, whole[:, -1:]), (torch.tensor([2, 5]), whole[:, [2, 5]])):
        actual = relu(tokens, logits_to_keep=kept).logits
        assert actual.shape == expected.shape
        assert torch.allclose(actual, expected, atol=1e-6)


@torch.no_grad()
def test_hidden_states_attentions_and_embeddings(relu):
    tokens = text(2, 10)
    output = relu(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.attentions is None
    assert torch.equal(relu(inputs_embeds=relu.get_input_embeddings()(tokens)).logits, output.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        relu()


@torch.no_grad()
def test_plain_attention_is_the_same(relu):
    tokens, mask = text(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    expected = relu(tokens, attention_mask=mask).logits
    relu.set_attn_implementation("eager")
    actual = relu(tokens, attention_mask=mask, output_attentions=True)
    relu.set_attn_implementation("sdpa")
    real = mask.bool()
    assert (actual.logits[real] - expected[real]).abs().max() < 1e-5
    assert actual.attentions[0].shape == (2, 4, 10, 10)


def test_gradients_are_the_same_with_checkpointing(models):
    _, theirs = models
    tokens, actual = text(2, 12), []
    for checkpointing in (False, True):
        theirs.train()
        if checkpointing:
            theirs.gradient_checkpointing_enable()
        theirs(tokens, labels=tokens).loss.backward()
        actual.append({name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None})
        theirs.gradient_checkpointing_disable()
        theirs.zero_grad()
        theirs.eval()
    plain, again = actual
    assert plain.keys() == again.keys() and any("experts" in name for name in plain)
    assert any(".routing." in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-6), name


def test_grouped_and_loop_agree_and_so_do_their_gradients():
    """Among the experts one without rows."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([3, 3, 10, 12], dtype=torch.int32)
    results = []
    for linear in (grouped_linear, loop_linear):
        rows = torch.randn(12, 16, generator=generator.manual_seed(2), requires_grad=True)
        weight = torch.randn(4, 8, 16, generator=generator.manual_seed(3), requires_grad=True)
        out = linear(rows, weight, ends)
        (out * torch.arange(96).view(12, 8)).sum().backward()
        results.append((out, rows.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_a_token_without_experts_gets_exactly_zero(backend):
    config = DsmoeConfig(hidden_size=16, num_experts=4, moe_intermediate_size=8, experts_backend=backend)
    experts = DsmoeRoutedExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden, probs = torch.randn(5, 16), torch.rand(5, 4)
    route_map = torch.zeros(5, 4, dtype=torch.bool)
    assert torch.equal(experts(hidden, probs, route_map, None), torch.zeros(5, 16))
    route_map[2] = True
    out = experts(hidden, probs, route_map, None)
    assert torch.equal(out[[0, 1, 3, 4]], torch.zeros(4, 16)) and out[2].abs().min() > 0


def test_sizes_that_grouped_mm_does_not_take():
    """Rows of 6 floats are no multiple of 16 bytes; "auto" sees that."""
    config = DsmoeConfig(hidden_size=6, num_experts=2, moe_intermediate_size=5)
    experts = DsmoeRoutedExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden, probs, route_map = torch.randn(3, 6), torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool)
    expected = torch.zeros(3, 6)
    for e in range(2):
        gate, up = (hidden @ experts.gate_up_proj[e].t()).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        expected += probs[:, e : e + 1] * (inner @ experts.down_proj[e].t())
    assert torch.allclose(experts(hidden, probs, route_map, None), expected, atol=1e-5)


@torch.no_grad()
def test_saved_and_loaded_in_bf16_the_router_stays_fp32(models, tmp_path):
    """Through transformers' own save_pretrained and from_pretrained."""
    _, theirs = models
    theirs.save_pretrained(tmp_path)
    again, loading = DsmoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    tokens = text(2, 10)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    half = DsmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    routing = dict(half.model.layers[0].mlp.routing.state_dict())
    assert {tensor.dtype for tensor in routing.values()} == {torch.float32}
    for name, tensor in theirs.model.layers[0].mlp.routing.state_dict().items():
        assert torch.equal(routing[name], tensor)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert half(tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_act": "gelu"}, "only silu"),
        ({"router_dtype": "bfloat16"}, "float32"),
        ({"experts_backend": "fast"}, "auto, grouped_mm or loop"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "only 'default'"),
    ],
)
def test_what_the_code_cannot_do_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DsmoeConfig(**wrong)
