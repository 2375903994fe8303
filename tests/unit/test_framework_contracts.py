"""What dsmoe leans on in Megatron-Core, DeepSpeed and torch without having been promised it, one test for each.

A failure here after an upgrade says what changed and which part of dsmoe has to follow.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.config import validate_config
from dsmoe.routers.registry import option_classes

ROOT = Path(__file__).resolve().parents[2]
ROUTER = {"name": "relu", "lambda_initial": 1e-2}
MODEL = dict(
    num_layers=1, hidden_size=16, num_attention_heads=2, sequence_length=8, vocab_size=32, num_experts=4,
    moe_ffn_hidden_size=8,
)  # fmt: skip


def pins() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(line.split("==") for line in project["dependencies"] if "==" in line)


@pytest.mark.parametrize("package", ["deepspeed", "megatron-core"])
def test_the_installed_versions_are_the_pins(package):
    assert importlib.metadata.version(package) == pins()[package], (
        f"{package} is another version than pyproject.toml pins; everything this file tests was read in that one"
    )


# --- Megatron-Core ---------------------------------------------------------------------------------------------------


def megatron_config():
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4, moe_ffn_hidden_size=8,
        moe_router_load_balancing_type="none", add_bias_linear=False, use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather",
    )  # fmt: skip


def groups_of_one():
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    names = ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "tp_ep", "expt_tp", "expt_dp")
    return SimpleNamespace(**{name: alone for name in names})


class _Slot(nn.Module):
    """Takes the place of router or experts and remembers how it was built and called."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.built_with, self.called_with = (args, kwargs), None

    def forward(self, *args, **kwargs):
        self.called_with = args, kwargs
        return torch.zeros(1), torch.zeros(1, dtype=torch.bool)


@pytest.fixture
def moe_layer():
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    return MoELayer(megatron_config(), MoESubmodules(experts=_Slot, router=_Slot), 1, groups_of_one())


def test_moe_layer_builds_the_router_of_its_submodules(moe_layer):
    args, kwargs = moe_layer.router.built_with
    assert (args, set(kwargs)) == ((), {"config", "pg_collection"}), (
        "MoELayer no longer builds the router as router(config=, pg_collection=); dsmoe/routers/base.py:Router does"
    )


def test_moe_layer_calls_the_router_with_hidden_states_and_padding_mask(moe_layer):
    moe_layer.route("hidden", "mask")
    assert moe_layer.router.called_with == (("hidden", "mask"), {}), (
        "MoELayer.route no longer calls router(hidden_states, padding_mask); dsmoe/routers/base.py:Router.forward has "
        "that signature so that a plugin runs in a stock MoELayer"
    )


def test_moe_layer_builds_experts_with_their_number_and_groups(moe_layer):
    args, kwargs = moe_layer.experts.built_with
    assert args[:1] == (4,) and kwargs.keys() >= {"pg_collection"}, (
        "MoELayer builds its experts in another way; dsmoe/moe/experts.py:GroupedExperts.__init__ follows that contract"
    )


def test_moe_layer_has_what_its_subclass_uses(moe_layer):
    assert moe_layer.ep_group.size() == 1, "MoELayer.ep_group is gone; dsmoe/moe/layer.py plans routes over it"
    assert hasattr(moe_layer, "shared_experts_compute"), (
        "MoELayer.shared_experts_compute is gone; dsmoe/moe/layer.py adds the shared experts through it"
    )
    assert hasattr(moe_layer, "token_dispatcher"), (
        "MoELayer no longer keeps its dispatcher in token_dispatcher; dsmoe/moe/layer.py replaces it there"
    )


def test_a_moe_layer_subclass_needs_its_groups_in_the_spec():
    from megatron.core.transformer import transformer_layer

    source = inspect.getsource(transformer_layer.TransformerLayer.__init__)
    assert "submodules.mlp.module in (" in source, (
        "TransformerLayer no longer compares the MoE class by identity; if it now always passes pg_collection, "
        "dsmoe/model/gpt.py:_moe_spec would pass it twice"
    )


def test_the_router_base_makes_an_fp32_weight_and_leaves_two_methods_open():
    from megatron.core.transformer.moe.router import Router

    assert Router.__abstractmethods__ == {"routing", "forward"}, (
        "Megatron's Router has other abstract methods; dsmoe/routers/base.py:Router implements routing and forward"
    )

    class Bare(Router):
        routing = forward = None

    bare = Bare(megatron_config(), groups_of_one())
    assert bare.weight.shape == (4, 16) and bare.weight.dtype == torch.float32, (
        "Megatron's Router no longer creates an fp32 weight [E, H]; dsmoe/routers/base.py:Router.gating needs it"
    )
    assert bare.num_experts == 4, "Megatron's Router has no num_experts; every router of dsmoe reads it"


def test_the_auxiliary_loss_scaler_adds_a_gradient_and_changes_no_value():
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    probs, loss = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    out = MoEAuxLossAutoScaler.apply(probs, loss * 2)
    out.sum().backward()
    assert torch.equal(out, probs) and torch.equal(probs.grad, torch.ones(3)) and loss.grad == 2, (
        "MoEAuxLossAutoScaler no longer hands a loss its gradient; dsmoe/routers/base.py:_attach_losses relies on it "
        "in a stock MoELayer"
    )


def test_gpt_model_asks_one_method_for_the_loss():
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import GPTModel

    parameters = list(inspect.signature(LanguageModule.compute_language_model_loss).parameters)
    assert parameters == ["self", "labels", "logits"], (
        "compute_language_model_loss has another signature; dsmoe/model/gpt.py:_GPT replaces it"
    )
    assert "self.compute_language_model_loss(labels, logits)" in inspect.getsource(GPTModel), (
        "GPTModel no longer computes its loss through compute_language_model_loss; dsmoe/model/gpt.py:_GPT counts on it"
    )


def test_gpt_model_hands_the_padding_mask_down_to_the_router():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_layer import TransformerLayer

    for owner, method in ((GPTModel, "forward"), (TransformerLayer, "_forward_mlp")):
        assert "padding_mask" in inspect.signature(getattr(owner, method)).parameters, (
            f"{owner.__name__}.{method} no longer takes padding_mask; dsmoe/training/evaluate.py leaves out the "
            "samples that fill up a round with it"
        )


def test_gpt_model_can_leave_positions_to_its_attention():
    from megatron.core.models.gpt import GPTModel

    assert '"none"' in str(inspect.signature(GPTModel.__init__).parameters["position_embedding_type"]).replace(
        "'", '"'
    ), (
        'GPTModel no longer takes position_embedding_type="none"; dsmoe/model/gpt.py asks for it, since '
        "dsmoe/model/attention.py turns queries and keys itself"
    )


def test_transformer_layer_keeps_attention_in_a_method_of_its_own():
    from megatron.core.transformer.transformer_layer import TransformerLayer

    assert hasattr(TransformerLayer, "_forward_attention"), (
        "TransformerLayer._forward_attention is gone; dsmoe/model/attention.py:RecomputedAttentionLayer recomputes it"
    )


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def config_of(stage: int, precision: str = "fp32"):
    tree = {
        "model": MODEL,
        "router": dict(ROUTER),
        "parallel": {"zero_stage": stage},
        "training": {"global_batch_size": 2, "precision": precision, "steps": 2, "warmup_steps": 0},
        "logging": {"tensorboard": False},
    }
    return validate_config(tree, option_classes())


ENGINES = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda case: f"ZeRO {case[0]}, {case[1]}")
def stepped(request, groups):
    """An engine after one step, with its stage."""
    from dsmoe.training.engine import build_engine

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # the engine asks for it again
        engine = build_engine(config_of(*request.param), groups)
        engine.train()
        text = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
        loss, _ = engine(text[:, :-1].contiguous(), text[:, 1:].contiguous())
        engine.backward(loss)
        engine.step()
        yield engine, request.param[0]


def test_engine_takes_our_experts_for_moe(stepped):
    engine, _ = stepped
    assert engine.has_moe_layers, (
        "DeepSpeed's engine no longer recognises a subclass of AutoEPMoELayer; dsmoe/optim/deepspeed.py:ExpertModule "
        "is one so that expert gradients are reduced over the ranks that share them"
    )


def test_zero_keeps_what_a_checkpoint_reads(stepped):
    engine, stage = stepped
    optimizer = engine.optimizer
    where = "dsmoe/optim/deepspeed.py reads it to save what this rank owns"
    for parameter in engine.module.parameters():
        if stage == 3:
            for name in ("ds_id", "ds_shape", "ds_numel", "ds_tensor", "ds_zero_partition_rank"):
                assert hasattr(parameter, name), f"ZeRO-3 no longer keeps {name} on a parameter; {where}"
            group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
            assert optimizer._get_param_partition_rank(parameter) == 0, f"another partition rank; {where}"
            flat = optimizer.fp32_partitioned_groups_flat[group]
            master = flat[offset : offset + parameter.ds_numel]
            assert partition >= parameter.ds_numel, f"grad_position's third entry is no partition size; {where}"
            held = parameter.ds_tensor.data.view(-1)[: parameter.ds_numel]
        else:
            mapping = parameter._hp_mapping
            place, source = mapping.lp_fragment_address, mapping.hp_fragment_address
            assert (place.start, place.numel, source.numel) == (0, parameter.numel(), parameter.numel()), (
                f"_hp_mapping no longer says which part of a parameter this rank owns; {where}"
            )
            names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
            (flats,) = (getattr(optimizer, name) for name in names if hasattr(optimizer, name))
            flat = flats[mapping.param_group_index]
            master = flat[source.start : source.start + source.numel]
            held = parameter.data.view(-1)
        assert flat.dtype == torch.float32, f"master weights are no longer fp32; {where}"
        assert torch.equal(master.detach().to(held.dtype), held), f"the flat master weight is laid out anew; {where}"
        state = optimizer.optimizer.state[flat]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}, (
            f"the inner AdamW keeps {sorted(state)} for the flat master weight; {where}"
        )
        assert state["exp_avg"].shape == flat.shape, f"moments are no longer as flat as the master weight; {where}"


def test_zero_steps_report_the_gradient_norm(stepped):
    engine, _ = stepped
    assert float(engine.get_global_grad_norm()) > 0, (
        "engine.get_global_grad_norm() gives no norm after a step; dsmoe/training/loop.py reports and checks it"
    )


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_a_step_that_is_vetoed_or_not_finite_moves_nothing(stage, precision, groups, monkeypatch):
    """And the step after it is as if it had never been."""
    from dsmoe.optim.deepspeed import flat_master_weights, inner_optimizer, veto_steps
    from dsmoe.training.engine import build_engine

    monkeypatch.setenv("LOCAL_RANK", "0")
    engine = build_engine(config_of(stage, precision), groups)
    vetoed = [False]
    veto_steps(engine, lambda norm: vetoed[0])
    engine.train()
    parameter = next(p for name, p in engine.module.named_parameters() if name.endswith("linear_proj.weight"))

    def step(seed: int) -> list[torch.Tensor]:
        text = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(seed))
        loss, _ = engine(text[:, :-1].contiguous(), text[:, 1:].contiguous())
        engine.backward(loss)
        engine.step()
        inner = inner_optimizer(engine)
        return [
            value.clone()
            for flat in flat_master_weights(engine)
            for value in (flat.detach(), *(v for v in inner.state[flat].values()))
        ]

    before = step(0)
    vetoed[0] = True
    same = step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True)), "a vetoed step moved something"
    vetoed[0] = False
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    same = step(2)
    hook.remove()
    where = "dsmoe/optim/deepspeed.py:veto_steps asks DeepSpeed's _global_grad_norm, set before the inner step"
    assert not torch.isfinite(torch.tensor(float(engine.get_global_grad_norm()))), where
    assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True)), f"a bad step moved something; {where}"
    after = step(3)
    assert all(torch.isfinite(value).all() for value in after), "the bad gradient is still there"
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_moves_a_large_gradient_nowhere(stage, groups, monkeypatch):
    """It finds experts' gradients in their places, copies none, and gives the optimizer those places, the same in every
    step."""
    from dsmoe.training import engine as module

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(module, "SMALL_BUCKETS", {"reduce_bucket_size": 1})  # every gradient is reduced where it lies
    config = config_of(stage)
    native = config.model.model_copy(update={"experts_implementation": "native"})  # which writes gradients itself
    engine = module.build_engine(config.model_copy(update={"model": native}), groups)
    optimizer, places, stepped_on = engine.optimizer, [], []
    experts = {id(p) for name, p in engine.module.named_parameters() if ".experts." in name}
    copy, step = optimizer.copy_grads_in_partition, optimizer.optimizer.step
    where = "dsmoe/optim/deepspeed.py"

    def copied(parameter, group_idx=None):
        actual = optimizer.get_gradient_for_reduction(parameter).data_ptr()
        copy(parameter, group_idx)
        now = optimizer.get_gradient_for_reduction(parameter).data_ptr()
        if id(parameter) in experts:
            assert now == actual, f"ZeRO collects a gradient elsewhere than where experts wrote it; {where}"

    def stepped():
        stepped_on.extend(p.grad.data_ptr() for group in optimizer.optimizer.param_groups for p in group["params"])
        return step()

    optimizer.copy_grads_in_partition, optimizer.optimizer.step = copied, stepped
    engine.train()
    for _ in range(3):
        text = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
        loss, _ = engine(text[:, :-1].contiguous(), text[:, 1:].contiguous())
        memory = optimizer.grads_in_partition
        low, high = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        places.append(low)
        del memory
        engine.backward(loss)
        stepped_on.clear()
        engine.step()
        assert optimizer.grads_in_partition is None
        assert stepped_on and all(low <= place < high for place in stepped_on), f"ZeRO copies gradients; {where}"
    assert len(set(places)) == 1, f"ZeRO holds gradients beyond its step; {where}"


def test_a_module_hook_can_drop_what_cannot_be_saved(stepped):
    engine, _ = stepped
    assert not any(name.endswith("_extra_state") for name in engine.module.state_dict()), (
        "Megatron's _extra_state is back in the state dict; dsmoe/model/gpt.py:_drop_extra_state removes it"
    )


def test_expert_parameters_are_told_by_their_attribute():
    from deepspeed.moe.utils import is_moe_param

    from dsmoe.optim.deepspeed import mark_expert_parameter

    parameter = nn.Parameter(torch.zeros(1))
    assert not is_moe_param(parameter)
    mark_expert_parameter(parameter, SimpleNamespace(size=lambda: 2, rank=lambda: 0), 0)
    assert is_moe_param(parameter) and parameter.group_name == "ep_size_2", (
        "DeepSpeed no longer tells experts by `allreduce = False`; dsmoe/optim/deepspeed.py:mark_expert_parameter does"
    )


def test_parameter_groups_are_split_into_dense_and_expert_ones():
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    dense, expert = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    expert.allreduce, expert.group_name = False, "ep_size_2"
    split = split_params_into_different_moe_groups_for_optimizer(
        [{"name": "all", "params": [dense, expert], "weight_decay": 0.3}]
    )
    actual = {(group["name"], group.get("moe", False), len(group["params"]), group["weight_decay"]) for group in split}
    assert actual == {("all", False, 1, 0.3), ("ep_size_2", True, 1, 0.3)}, (
        "DeepSpeed splits parameter groups in another way; dsmoe/optim/groups.py:parameter_groups hands ZeRO groups "
        f"named after their expert-parallel group and marked moe, and gets {actual}"
    )


def test_groups_are_found_under_the_names_deepspeed_gives_them(groups):
    from deepspeed.utils import groups as of_deepspeed

    for getter in ("_get_expert_parallel_group", "_get_expert_data_parallel_group"):
        assert getattr(of_deepspeed, getter)("ep_size_1").size() == 1, (
            f"deepspeed.utils.groups.{getter} does not know 'ep_size_1'; "
            "dsmoe/optim/deepspeed.py:share_expert_groups puts it there"
        )
    assert of_deepspeed._get_data_parallel_group().size() == 1


def test_deepspeed_starts_no_other_programs(groups, monkeypatch):
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from dsmoe.optim.deepspeed import spare_probes

    def refuse(arguments, *_, **__):
        raise AssertionError(
            f"DeepSpeed starts {arguments}, which dsmoe/optim/deepspeed.py:spare_probes is to keep it from"
        )

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    spare_probes(local_ranks=3)
    assert CPU_Accelerator().device_count() == 3
    backend = importlib.import_module("deepspeed.comm.torch")
    assert backend.build_shm_op() is None
    assert "__compatible_ops__" in inspect.getsource(backend.build_shm_op), (
        "DeepSpeed no longer looks into __compatible_ops__ before it builds deepspeed_shm_comm at start-up; see "
        "dsmoe/optim/deepspeed.py:spare_probes"
    )


def test_autoep_layers_can_be_built_without_their_own_constructor():
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class Bare(AutoEPMoELayer):
        def __init__(self):
            nn.Module.__init__(self)

    assert isinstance(Bare(), nn.Module), (
        "AutoEPMoELayer needs its own constructor now; dsmoe/optim/deepspeed.py:ExpertModule calls nn.Module's only"
    )


PUBLIC_MODULES = {"deepspeed", "deepspeed.comm", "deepspeed.accelerator", "deepspeed.moe.utils"}
PUBLIC_OF_THE_ENGINE = {
    "backward", "device", "eval", "get_global_grad_norm", "module", "monitor", "optimizer", "step", "train",
}  # fmt: skip
MEASURED = ("deepspeed.moe.layer", "deepspeed.module_inject.auto_ep")  # products that the benchmark runs as peers
ONE_MODULE = ROOT / "dsmoe" / "optim" / "deepspeed.py"


def strings_of(call: ast.Call) -> set[str]:
    """What getattr(x, "NAME") and hasattr(x, "NAME") ask for."""
    if not isinstance(call.func, ast.Name) or call.func.id not in ("getattr", "hasattr"):
        return set()
    return {node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@functools.cache
def private_names() -> set[str]:
    """What the one module takes of DeepSpeed's objects."""
    owners = {"optimizer", "mapping", "partition", "parameter", "gradient", "block_norms", "deepspeed_groups"}
    taken = set()
    for node in ast.walk(ast.parse(ONE_MODULE.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
            taken.add(node.attr)
        if isinstance(node, ast.Call):
            taken |= strings_of(node)
    known = {*dir(torch.Tensor), *dir(torch.optim.Optimizer), *dir(nn.Module), "param_groups", "state", "optimizer"}
    return taken - known - {"first_expert"}


def trespasses(source: str) -> list[str]:
    """Where a module's source reaches for what DeepSpeed keeps to itself."""
    actual = []

    def check(name: str) -> None:
        if name in private_names() or re.match(r"ds_(id|tensor|numel|shape|status|zero)|_hp_|_z3_", name):
            actual.append(name)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            inside = [name for name in named if name and name.split(".")[0] == "deepspeed"]
            actual += [f"import {n}" for n in inside if n not in PUBLIC_MODULES and not n.startswith(MEASURED)]
        elif isinstance(node, ast.Call):
            for name in strings_of(node):
                check(name)
        elif isinstance(node, ast.Attribute):
            check(node.attr)
            owner = ast.unparse(node.value).removeprefix("self.")
            if owner == "engine" and node.attr not in PUBLIC_OF_THE_ENGINE:
                actual.append(f"engine.{node.attr}")
            if owner == "engine.optimizer" and node.attr != "param_groups":
                actual.append(f"engine.optimizer.{node.attr}")
    return actual


def test_one_module_knows_deepspeeds_private_names():
    assert {"_hp_mapping", "grad_position", "grads_in_partition", "_EXPERT_PARALLEL_GROUP"} <= private_names()
    actual = {
        str(path.relative_to(ROOT)): trespasses(path.read_text())
        for folder in ("dsmoe", "launch", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path != ONE_MODULE
    }
    assert {path: names for path, names in actual.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from deepspeed.utils import groups", "import deepspeed.runtime.engine", "x = parameter.ds_id",
        "x = hasattr(parameter, 'ds_tensor')", "engine.optimizer.optimizer.step()", "self.engine._config",
        "optimizer.grads_in_partition = None", "engine.optimizer.averaged_gradients",
    ],
)  # fmt: skip
def test_a_module_that_reaches_for_a_private_name_is_found(source):
    assert trespasses(source)


# --- torch -----------------------------------------------------------------------------------------------------------


def grouped(rows: int, ends: list[int]):
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(len(ends), 8, 16, requires_grad=True)
    return x, weight, F.grouped_mm(x, weight, offs=torch.tensor(ends, dtype=torch.int32))


def test_grouped_mm_gives_an_empty_group_a_gradient_of_zero():
    _, weight, out = grouped(3, [0, 2, 2, 3])
    out.backward(torch.ones_like(out))
    assert [bool(gradient.any()) for gradient in weight.grad] == [False, True, False, True], (
        "F.grouped_mm gives an empty group another gradient than 0; dsmoe/moe/experts.py:grouped_linear relies on it"
    )


@pytest.mark.parametrize("rows", [0, 3])
def test_grouped_mm_refuses_an_expanded_gradient(rows):
    """The gradient of a plain sum. A row of zeros that is cut off again gives 0 rows a gradient of their own."""
    _, _, out = grouped(rows, [0, rows])
    try:
        out.sum().backward()
    except RuntimeError:
        return
    pytest.fail("F.grouped_mm takes any gradient now; dsmoe/moe/experts.py:grouped_linear may call it with 0 rows too")


def test_an_optimizer_of_ours_is_taken_under_zero_without_a_warning(groups):
    """DeepSpeed asks for the class itself, and warns about a subclass of one that it knows."""
    from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

    from dsmoe.optim.deepspeed import accept_optimizer

    class Own(torch.optim.AdamW):
        pass

    optimizer = Own([torch.nn.Parameter(torch.ones(2))])
    assert not is_zero_supported_optimizer(optimizer)
    accept_optimizer(Own)
    where = "dsmoe/optim/deepspeed.py:accept_optimizer adds to a list that DeepSpeed does not read any more"
    assert is_zero_supported_optimizer(optimizer), where


def test_a_flat_tensor_is_a_key_of_the_optimizers_state():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(4)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["step"].dtype == torch.float32 and state["step"].shape == (), (
        "torch.optim.AdamW keeps its step in another form; dsmoe/optim/adamw.py:AdamW.shared_state makes one"
    )


def test_starting_a_process_does_not_load_a_compiler_or_a_monitor():
    """Megatron and DeepSpeed call `torch.compile` at import, and Megatron's inference engine imports W&B where there is
    one; `dsmoe/runtime/megatron.py` avoids that cost, and forbids no later import."""
    script = (
        "import sys, importlib.util as util, dsmoe.training.run;"
        "print(*({'torch._inductor.lowering', 'wandb'} & sys.modules.keys()), util.find_spec('wandb') is not None)"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == str(importlib.util.find_spec("wandb") is not None)
