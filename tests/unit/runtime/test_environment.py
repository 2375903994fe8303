"""The environment report names everything it looked at, and no installed package can make it fail."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dsmoe.model.native_norm import RMSNorm
from dsmoe.runtime import accelerations
from dsmoe.runtime import environment as env
from dsmoe.runtime.accelerations import find_accelerations, rms_norm_class
from dsmoe.runtime.device import on_gpu

ACCELERATIONS = [
    "CUDA device",
    "Transformer Engine",
    "NVIDIA Apex",
    "grouped GEMM",
    "attention",
    "C++ kernels",
    "fused AdamW",
    "core binding",
    "MPI library",
    "C++ compiler, ninja",
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes importable files; what they shadow and what they import is undone afterwards."""
    fakes = ("apex", "amp_C", "fused_layer_norm_cuda", "transformer_engine")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in fakes}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in fakes]:
        del sys.modules[name]
    sys.modules.update(before)


def acceleration(name: str) -> accelerations.Acceleration:
    return next(actual for actual in find_accelerations() if actual.name == name)


def with_cuda(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr(accelerations, "on_gpu", lambda: available)


APEX_OF_NVIDIA = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "class FusedRMSNorm: pass",
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
}
TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch.py": "class RMSNorm: pass",
}
APEX_IMPOSTOR = {
    "apex/__init__.py": "raise SystemExit('the code of an impostor must not run')",
    "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n"
    "Summary: For Pyramid\n",
}


# --- accelerations ---------------------------------------------------------------------------------------------------


def test_every_acceleration_is_named_with_a_reason():
    actual = find_accelerations()
    assert [acceleration.name for acceleration in actual] == ACCELERATIONS
    assert all(acceleration.reason for acceleration in actual)


def test_importing_the_module_imports_nothing_heavy():
    heavy = {"torch", "deepspeed", "megatron", "mpi4py", "apex", "rich"}
    program = f"import sys, dsmoe.runtime.accelerations; print({heavy} & set(sys.modules) or 'none')"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "none"


def test_torch_itself_brings_grouped_gemm_and_fused_adamw():
    assert acceleration("grouped GEMM").active
    assert acceleration("fused AdamW").active


def test_torch_without_grouped_gemm_names_the_setting_to_use(monkeypatch):
    monkeypatch.delattr("torch.nn.functional.grouped_mm")
    actual = acceleration("grouped GEMM")
    assert not actual.active
    assert "model.experts_implementation=loop" in actual.reason


def test_attention_on_a_cpu_is_the_faster_of_two(monkeypatch):
    with_cuda(monkeypatch, False)
    assert "dsmoe's C++ kernel or" in acceleration("attention").reason
    monkeypatch.setattr("dsmoe.native.unavailable", lambda: "no compiler")
    assert acceleration("attention").reason == "torch's operators, on cpu"


def test_attention_on_a_gpu_names_what_torch_picks_and_what_it_has_against_flash(monkeypatch):
    """With a stand-in for torch's answers: flash for small heads, the plain formula beyond."""
    asked = []

    def choice(query, key, value, *, is_causal, enable_gqa):
        asked.append((query.dtype, query.requires_grad, query.size(1) > key.size(1), is_causal, enable_gqa))
        return 1 if query.size(-1) <= largest else 0

    def refuse(params, debug):
        warnings.warn(f"Flash attention requires at most {largest}", stacklevel=1)
        return False

    with_cuda(monkeypatch, True)
    monkeypatch.setattr("torch._fused_sdp_choice", choice)
    monkeypatch.setattr("torch.backends.cuda.can_use_flash_attention", refuse)
    largest = 256
    actual = acceleration("attention")
    assert actual.active and actual.reason.endswith(": flash for heads of 64, 128, 256")
    largest = 128
    actual = acceleration("attention")
    assert not actual.active
    assert "flash for heads of 64, 128; math for heads of 256 (Flash attention requires at most 128)" in actual.reason
    assert set(asked) == {(torch.bfloat16, True, True, True, True)}


def test_an_impostor_of_apex_is_named_and_not_run(packages):
    packages(APEX_IMPOSTOR)
    actual = acceleration("NVIDIA Apex")
    assert not actual.active
    assert actual.version == "0.9.10.dev0"
    assert actual.reason.startswith("impostor: apex 0.9.10.dev0 (For Pyramid)")
    assert "pip uninstall apex" in actual.reason


def test_an_impostor_that_pip_does_not_know_is_named_by_its_place(packages, tmp_path):
    packages({"apex/__init__.py": ""})
    actual = acceleration("NVIDIA Apex")
    assert actual.reason.startswith(f"impostor: {tmp_path / 'apex'}")
    assert "pip uninstall" not in actual.reason


def test_apex_without_its_kernels_is_not_used(packages, monkeypatch):
    packages({name: text for name, text in APEX_OF_NVIDIA.items() if name.startswith("apex/")})
    with_cuda(monkeypatch, True)
    actual = acceleration("NVIDIA Apex")
    assert not actual.active
    assert "amp_C, fused_layer_norm_cuda" in actual.reason


def test_a_package_that_breaks_while_imported_is_an_answer(packages, monkeypatch):
    broken = "raise OSError('libcudart.so.12\\nmore')"
    packages({**TRANSFORMER_ENGINE, "transformer_engine/pytorch.py": broken})
    with_cuda(monkeypatch, True)
    actual = accelerations._probe("Transformer Engine")
    assert not actual.active
    assert actual.reason == "the check failed with OSError: libcudart.so.12"


@pytest.mark.parametrize("variable, expected", [("", "hides every GPU"), ("0", "finds no GPU or no driver")])
def test_the_reason_for_no_gpu_names_its_cause(monkeypatch, variable, expected):
    with_cuda(monkeypatch, False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert expected in acceleration("CUDA device").reason


def test_mpi_that_aborts_is_an_answer(monkeypatch):
    aborted = subprocess.CompletedProcess([], -6, stdout="", stderr="starting\nPMIX ERROR: no such server\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: aborted)
    actual = accelerations._probe("MPI library")
    assert not actual.active
    assert "PMIX ERROR: no such server" in actual.reason


def test_many_measured_shapes_are_counted():
    few = {"experts, H=8, 2 threads": "native 1.00 ms, loop 2.00 ms"}
    assert accelerations._measured(few) == ["experts, H=8, 2 threads: native 1.00 ms, loop 2.00 ms"]
    many = {f"experts, H={n}": f"{'native' if n % 3 else 'loop'} 1.00 ms, blocked 2.00 ms" for n in range(30)}
    assert accelerations._measured(many | {"loss, T=4": "torch 1.00 ms"}) == [
        "experts, 30 shapes: native 20, loop 10", "loss, 1 shapes: torch 1"
    ]  # fmt: skip


def test_no_compiler_is_said_with_what_needs_it(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    actual = accelerations._probe("C++ compiler, ninja")
    assert not actual.active
    assert actual.reason == "no C++ compiler and no ninja; dsmoe's kernels and DeepSpeed's optional ops need it"


# --- which norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, cuda, expected",
    [
        ({}, False, "dsmoe.model.native_norm"),
        ({**APEX_OF_NVIDIA, **TRANSFORMER_ENGINE}, False, "dsmoe.model.native_norm"),
        ({**APEX_OF_NVIDIA, **TRANSFORMER_ENGINE}, True, "apex.normalization"),
        ({**APEX_IMPOSTOR, **TRANSFORMER_ENGINE}, True, "transformer_engine.pytorch"),
    ],
)
def test_the_fastest_norm_is_chosen(packages, monkeypatch, files, cuda, expected):
    packages(files)
    with_cuda(monkeypatch, cuda)
    assert rms_norm_class(RMSNorm).__module__ == expected


def test_the_chosen_norm_is_a_norm():
    import torch

    norm = rms_norm_class(RMSNorm)(16, eps=1e-5)
    device = norm.weight.device
    hidden = torch.randn(3, 16, device=device)
    torch.testing.assert_close(norm(hidden), hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt())


# The constructors of NVIDIA Apex's master and of Transformer Engine 2.20.2: names, order and defaults.
SIGNATURES = {
    "apex/normalization/__init__.py": """
import torch
class FusedRMSNorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        assert isinstance(normalized_shape, int) and elementwise_affine and not memory_efficient
        self.normalized_shape, self.eps = torch.Size((normalized_shape,)), eps
        self.weight = torch.nn.Parameter(torch.ones(*self.normalized_shape))
    def forward(self, input):
        return torch.nn.functional.rms_norm(input, self.normalized_shape, self.weight, self.eps)
""",
    "transformer_engine/pytorch.py": """
import torch
class RMSNorm(torch.nn.Module):
    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
                 zero_centered_gamma=False, hidden_size=None, **kwargs):
        super().__init__()
        assert isinstance(normalized_shape, int) and hidden_size is None and not kwargs, "deprecated"
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape))
    def forward(self, input):
        return torch.nn.functional.rms_norm(input, self.weight.shape, self.weight, self.eps)
""",
}


@pytest.mark.parametrize(
    ("library", "files"), [("NVIDIA Apex", APEX_OF_NVIDIA), ("Transformer Engine", TRANSFORMER_ENGINE)]
)
def test_norms_of_other_libraries_are_called_as_they_are_declared(packages, monkeypatch, groups, library, files):
    """Every norm of a model, with query and key norms in both forms; and `dsmoe env` names the library."""
    import torch

    from dsmoe.config import validate_config
    from dsmoe.model.gpt import LanguageModel
    from dsmoe.routers import get

    config = validate_config({"model": dict(
        num_layers=1, hidden_size=16, num_attention_heads=2, sequence_length=8, num_experts=2, vocab_size=32,
        moe_ffn_hidden_size=16, qk_layernorm="full",
    )})  # fmt: skip
    router = get("topk"), get("topk").Options()
    tokens = torch.arange(8).view(1, 8)
    expected = LanguageModel(config.model, router, groups, seed=1).eval()(tokens)
    packages({**files, **{name: text for name, text in SIGNATURES.items() if name in files}})
    with_cuda(monkeypatch, True)
    assert acceleration(library).active and acceleration(library).reason.startswith("fused RMSNorm")
    norm = rms_norm_class(RMSNorm)
    with_cuda(monkeypatch, False)
    monkeypatch.setattr("dsmoe.model.gpt.rms_norm_class", lambda on_cpu: norm)
    model = LanguageModel(config.model, router, groups, seed=1).eval()
    assert sum(isinstance(module, norm) for module in model.modules()) == 5
    torch.testing.assert_close(model(tokens), expected)


# --- the report ------------------------------------------------------------------------------------------------------


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dsmoe.env", *arguments], capture_output=True, text=True, timeout=200)


def test_json_parses_and_says_what_deepspeed_chooses():

    shown = report("--json")
    tree = json.loads(shown.stdout)
    assert shown.returncode == 0
    assert shown.stderr == ""
    names = {package["name"] for package in tree["packages"]}
    assert {"python", "dsmoe", "torch", "deepspeed", "megatron-core", "transformers", "sentencepiece"} <= names
    assert all(package["fits"] for package in tree["packages"])
    assert tree["host"]["cores"] >= 1 and tree["host"]["memory_bytes"] > 2**28
    expected = ("cuda", "nccl") if on_gpu() else ("cpu", "gloo")
    assert (tree["deepspeed"]["accelerator"], tree["deepspeed"]["backend"]) == expected
    assert [actual["name"] for actual in tree["accelerations"]] == ACCELERATIONS


def environment(**changes) -> env.Environment:
    fields = {
        "packages": [env.Package("torch", "2.13.0+cpu", ">=2.11"), env.Package("deepspeed", "0.19.8", "==0.19.8")],
        "host": env.Host("Some CPU", 2, 24 * 2**30, [env.Gpu("Some GPU", 80 * 2**30)]),
        "deepspeed": env.DeepSpeedDevice("cpu", "gloo", 1),
        "accelerations": find_accelerations(),
    }
    return env.Environment(**{**fields, **changes})


def test_the_tables_name_everything_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    env.show(environment())
    shown = capsys.readouterr().out
    for name in ("torch", "2.13.0+cpu", "deepspeed", "Some CPU, 2 cores", "24 GiB", "Some GPU, 80 GiB", "gloo"):
        assert name in shown
    assert all(name in shown for name in ACCELERATIONS)
    assert max(map(len, shown.splitlines())) <= 80
    assert "Every package fits." in shown


def test_brackets_in_the_words_of_others_are_shown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    env.show(environment(deepspeed=env.DeepSpeedDevice(error="failed at [/usr/lib]")))
    shown = capsys.readouterr().out
    assert "failed at [/usr/lib]" in shown
    assert "dsmoe[gpu]" in shown or acceleration("Transformer Engine").version


@pytest.mark.parametrize("actual, word", [("0.18.0", "does not fit"), (None, "missing")])
def test_a_package_that_does_not_fit_is_flagged_and_fails(monkeypatch, capsys, actual, word):
    misfit = environment(packages=[env.Package("deepspeed", actual, "==0.19.8")])
    monkeypatch.setattr(env, "find_environment", lambda: misfit)
    assert env.main([]) == 1
    shown = capsys.readouterr().out
    assert word in shown
    assert "Does not fit: deepspeed." in shown


@pytest.mark.parametrize(
    "actual, required, fits",
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.12.0.dev1", ">=2.11", True),
        ("2.10.1", ">=2.11", False),
        ("6.0", ">=5,<6", False),
        ("1", "", True),
        (None, "", False),
    ],
)
def test_versions_are_compared_the_way_pip_does(actual, required, fits):
    assert env.Package("some", actual, required).fits is fits


def test_every_requirement_of_dsmoe_is_listed_and_no_extra_is():
    names = [package.name for package in env.find_packages()]
    assert names[:2] == ["python", "dsmoe"]
    assert "megatron-core" in names and "mpi4py" in names
    assert "pytest" not in names and "openmpi" not in names


def test_without_an_installed_dsmoe_the_report_says_so(monkeypatch):
    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    packages = env.find_packages()
    assert [(package.name, package.fits) for package in packages] == [("python", True), ("dsmoe", False)]


def test_a_deepspeed_that_cannot_be_imported_is_named(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nImportError: no deepspeed\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert env.find_deepspeed_device() == env.DeepSpeedDevice(error="ImportError: no deepspeed")
