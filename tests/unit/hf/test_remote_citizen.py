"""What a transformers user expects of any model: new weights, compilation, export, router outputs, classification."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dsmoe.hf.export import routing_file, write_code
from dsmoe.hf.remote import modeling_dsmoe
from dsmoe.hf.remote.configuration_dsmoe import DsmoeConfig
from dsmoe.hf.remote.modeling_dsmoe import DsmoeForCausalLM, DsmoeForSequenceClassification, load_balancing_loss
from dsmoe.routers import available, get

OWN = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
STD = 0.02
CONSTANTS = {"bias": 0.0, "scale": 1.0, "p": 1.0, "cutoffs": 0.0}  # of routers, as a fresh module has them


def config(router: str, **changes) -> DsmoeConfig:
    options = get(router).Options()
    values = dict(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, moe_intermediate_size=64, expert_rank=get(router).latent_rank(options),
        router={"name": router, **options.model_dump(mode="json")}, initializer_range=STD,
        num_experts_per_tok=get(router).fixed_experts_per_token(options), pad_token_id=0,
    )  # fmt: skip
    return DsmoeConfig(**values | changes)


@pytest.fixture(scope="module", params=OWN)
def router(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(router) -> DsmoeForCausalLM:
    torch.manual_seed(0)
    return DsmoeForCausalLM(config(router)).eval()


TOKENS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def assert_new(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            assert tensor.std() == pytest.approx(STD, rel=0.2) and tensor.mean().abs() < STD / 5, name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            assert (tensor == CONSTANTS[name.rpartition(".")[2]]).all(), name


def test_a_new_model_has_new_weights(model):
    assert_new(model.state_dict())


def test_weights_that_a_folder_lacks_begin_anew(model, tmp_path):
    """The whole MoE of the last layer, one tensor of the first, and the output layer's norm."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = [name for name in weights if "layers.1.mlp" in name or name == "model.norm.weight"]
    missing += [next(name for name in weights if "layers.0.mlp.routing" in name)]
    save_file({name: tensor for name, tensor in weights.items() if name not in missing}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    loaded = DsmoeForCausalLM.from_pretrained(tmp_path).state_dict()
    assert_new({name: loaded[name] for name in missing})
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items() if name not in missing)


@torch.no_grad()
def test_embeddings_are_resized_and_stay_tied(model, tmp_path):
    """Tied as they were: one matrix. Untied: two, and both grow."""
    for tied in (True, False):
        resized = copy.deepcopy(model)
        if not tied:
            resized.config.tie_word_embeddings = False
            resized.lm_head.weight = nn.Parameter(2 * model.lm_head.weight)
        expected = resized(TOKENS).logits
        resized.resize_token_embeddings(80, mean_resizing=False)
        resized.save_pretrained(tmp_path / str(tied))
        for changed in (resized, DsmoeForCausalLM.from_pretrained(tmp_path / str(tied))):
            assert (changed.lm_head.weight is changed.model.embed_tokens.weight) == tied
            assert changed.config.vocab_size == 80 and changed.get_output_embeddings().weight.shape == (80, 64)
            torch.testing.assert_close(changed(TOKENS).logits[..., :64], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in OWN]  # fixed k, any number, experts of a latent
    + [
        ("relu", {"expert_activation": "swigluoai", "expert_bias": True}),
        ("relu", {"expert_activation": "relu2", "expert_bias": True}),
        ("routing_free", {"expert_activation": "reglu", "expert_bias": True}),
        ("relu", {"dtype": torch.bfloat16}),
    ],
)
def test_it_compiles_in_one_graph(name, changes):
    """Training: loss, gradients of all weights. The compiler's own code is not at stake, so it is left out."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DsmoeForCausalLM(config(name, num_hidden_layers=1, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.data.normal_()
    bf16 = "dtype" in changes
    if bf16:  # but for the router, as from_pretrained has it
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if ".routing." in name else parameter.data.bfloat16()
    plain, compiled = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    losses = [m(TOKENS, labels=TOKENS).loss for m in (plain, graph)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if parameter.grad is not None:
            error, size = (parameter.grad - other.grad).norm(), parameter.grad.norm()
            assert error <= (0.02 if bf16 else 1e-4) * size + 1e-6, name


@torch.no_grad()
def test_it_compiles_for_evaluation():
    torch._dynamo.reset()
    model = DsmoeForCausalLM(config("expert_threshold", num_hidden_layers=1)).eval()
    graph = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(graph(TOKENS, use_cache=False).logits, model(TOKENS).logits, atol=1e-5)


@torch.no_grad()
def test_it_exports(model):
    program = torch.export.export(model, (TOKENS,), {"use_cache": False}, strict=False)
    out = program.module()(TOKENS, use_cache=False)
    assert torch.allclose(out.logits, model(TOKENS, use_cache=False).logits, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_agrees():
    """With a sequence that is padded on the left, and one that is not. transformers compiles it, once for all."""
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    for name in ("relu", "topk"):
        model = DsmoeForCausalLM(config(name)).eval()
        expected = model(TOKENS, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        actual = model(TOKENS, attention_mask=mask).logits
        assert torch.allclose(actual[mask.bool()], expected[mask.bool()], atol=1e-4), name


def test_router_outputs_and_balance_loss(router, model):
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    plain = model(TOKENS, attention_mask=mask, labels=TOKENS)
    assert plain.router_logits is None and plain.aux_loss is None
    routes = []
    hooks = [layer.mlp.routing.register_forward_hook(lambda m, i, out: routes.append(out[1])) for layer in
             model.model.layers]  # fmt: skip
    out = model(TOKENS, attention_mask=mask, labels=TOKENS, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    assert [scores.shape for scores in out.router_logits] == [(24, 8)] * 2
    real = mask.flatten().bool().repeat(2)
    scores, taken = torch.cat(out.router_logits)[real], torch.cat(routes)[real]
    expected = 8 * (taken.float().mean(0) * scores.softmax(-1).mean(0)).sum()
    assert out.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(plain.loss.item())  # a coefficient of 0
    weighted = copy.deepcopy(model)
    weighted.config.router_aux_loss_coef = 0.5
    weighted.config.output_router_logits = True
    total = weighted(TOKENS, attention_mask=mask, labels=TOKENS)
    assert total.loss.item() == pytest.approx(plain.loss.item() + 0.5 * expected.item(), rel=1e-5)
    total.aux_loss.backward()
    assert any(p.grad.abs().sum() > 0 for n, p in weighted.named_parameters() if ".routing." in n)


def test_the_balance_loss_of_top_k_is_that_of_transformers():
    generator = torch.Generator().manual_seed(2)
    scores = [torch.randn(12, 8, generator=generator) for _ in range(3)]
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    maps = [torch.zeros(12, 8, dtype=torch.bool).scatter(1, s.topk(2).indices, True) & mask.view(-1, 1).bool()
            for s in scores]  # fmt: skip
    ours = load_balancing_loss(
        tuple(modeling_dsmoe.router_balance(s, m, mask) for s, m in zip(scores, maps, strict=True))
    )
    assert ours.item() == pytest.approx(load_balancing_loss_func(tuple(scores), 8, 2, mask).item(), rel=1e-5)


def test_a_classifier_trains(router):
    torch.manual_seed(0)
    classifier = DsmoeForSequenceClassification(config(router, num_labels=3))
    mask = torch.ones_like(TOKENS)
    mask[0, 8:] = 0
    tokens = TOKENS.masked_fill(mask == 0, 0)
    out = classifier(tokens, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    out.loss.backward()
    assert classifier.score.weight.grad.abs().sum() > 0
    short = classifier(tokens[:1, :8]).logits
    assert torch.allclose(short, out.logits[:1], atol=1e-5)  # the last token that is no padding


class FusedKernel(nn.Module):
    """What vLLM's Transformers backend puts in the place of a module named `experts` with packed weights: it is called
    with each token's experts and their weights, positionally, and knows nothing else."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        assert experts.gate_up_proj.dim() == experts.down_proj.dim() == 3
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, hidden_states, topk_ids, topk_weights):
        out = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(topk_ids, topk_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2)
                out[token] += weight * F.linear(F.silu(gate) * up, self.down_proj[expert])
        return out


def attend_in_rows(module, query, key, value, mask, scaling=None, attention_instances=None, **kwargs):
    """What it registers as an attention: tokens in rows [S, heads * head_dim] without a batch, and an object of each
    layer that comes through the model's keyword arguments."""
    attention_instances[module.layer_idx].append(query.shape)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).reshape(query.size(2), -1), None


@torch.no_grad()
def test_a_fixed_k_serves_as_vllm_calls_it(router, model, tmp_path):
    """The base model, by its entry in auto_map."""
    if get(router).fixed_experts_per_token(get(router).Options()) is None:
        assert not any(name.endswith(".experts") for name, _ in model.named_modules())
        assert model.config.num_experts_per_tok is None
        return
    model.save_pretrained(tmp_path)
    write_code(tmp_path, routing_file(get(router)))
    content = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_dsmoe.DsmoeConfig", "AutoModel": "modeling_dsmoe.DsmoeModel"}
    (tmp_path / "config.json").write_text(json.dumps(content | {"auto_map": auto_map}))
    AttentionInterface.register("in rows", attend_in_rows)
    served = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, attn_implementation="in rows").eval()
    modules = [name for name, _ in served.named_modules() if name.endswith(".experts")]
    assert len(modules) == 2 and served.config.num_experts_per_tok and served.config.moe_intermediate_size
    for name in modules:
        served.set_submodule(name, FusedKernel(served.get_submodule(name)))
    calls = {0: [], 1: []}
    for tokens in TOKENS.split(1):
        hidden, *_ = served(
            input_ids=tokens, position_ids=torch.arange(12).unsqueeze(0), use_cache=False, return_dict=False,
            attention_instances=calls,
        )  # fmt: skip
        assert torch.allclose(model.lm_head(hidden), model(tokens).logits, atol=1e-5)
    assert calls == dict.fromkeys(calls, [(1, 4, 12, 16)] * 2)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["topk", "topk_bias"])
def test_experts_implementations_agree(name, implementation):
    torch.manual_seed(0)
    model = DsmoeForCausalLM(config(name)).eval()
    model.set_experts_implementation("eager")
    expected = model(TOKENS).logits
    model.set_experts_implementation(implementation)
    assert torch.allclose(model(TOKENS).logits, expected, atol=1e-5)


def test_auto_classes_know_them_all():
    from dsmoe.config import validate_config
    from dsmoe.hf.export import remote_config
    from dsmoe.routers.registry import option_classes

    run = validate_config({"model": {"num_experts": 4, "vocab_size": 64}, "router": {"name": "topk"}}, option_classes())
    content = remote_config(run, get("topk"), get("topk").Options())
    for name in content["auto_map"].values():
        module, _, cls = name.partition(".")
        assert module == "configuration_dsmoe" or hasattr(modeling_dsmoe, cls)
    assert "AutoModelForSequenceClassification" in content["auto_map"]
    assert AutoModelForCausalLM.__name__ in content["auto_map"]
