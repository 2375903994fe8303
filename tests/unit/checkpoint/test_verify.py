"""The verifier: it passes what is whole, names everything that is not, and says where equal experts are in order.

Checkpoints here are written by hand, as two expert-parallel ranks would, so that each can be wrong in its own way.
"""

from __future__ import annotations

import math
import pickle
import runpy
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from dsmoe.checkpoint import files
from dsmoe.checkpoint.files import Manifest
from dsmoe.checkpoint.verify import checkpoints_of, verify_checkpoint
from dsmoe.config import validate_config
from dsmoe.errors import CheckpointError
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers.registry import option_classes

MODEL = dict(
    num_layers=2, hidden_size=16, num_attention_heads=2, num_query_groups=1, sequence_length=16, vocab_size=64,
    num_experts=4, moe_ffn_hidden_size=8,
)  # fmt: skip
KINDS = ("weight", "exp_avg", "exp_avg_sq")
ROOT = Path(__file__).resolve().parents[3]


class Written:
    """A checkpoint before it is written: change it, then `write`."""

    def __init__(self, folder: Path, step: int = 2, router: str = "relu"):
        self.folder, self.step = folder, step
        self.config = validate_config({"model": MODEL, "router": {"name": router}}, option_classes())
        self.shapes = dict(logical_shapes(self.config.model, self.config.router))
        self.copied_experts = False
        self.state = {"lambda": torch.tensor(0.5)}
        generator = torch.Generator().manual_seed(0)
        self.values = {
            (kind, name): torch.rand(math.prod(shape), generator=generator)
            for name, shape in self.shapes.items()
            for kind in KINDS
        }
        self.ranks: list[dict] = [{}, {}]

    def cut(self) -> None:
        """Experts 0 and 1 to rank 0, 2 and 3 to rank 1; every other tensor half to each."""
        for (kind, name), value in self.values.items():
            middle = value.numel() // 2
            expert = name.split(".experts.")[1].partition(".")[0] if ".experts." in name else None
            parts = {0: value[:middle], middle: value[middle:]} if expert is None else {0: value}
            for rank, (start, part) in enumerate(parts.items()):
                owner = rank if expert is None else int(expert) // 2
                self.ranks[owner][f"{kind}|{name}|{start}"] = part.clone()

    def write(self) -> Path:
        self.folder.mkdir(parents=True)
        contents = {f"rank_{rank:05d}.safetensors": held for rank, held in enumerate(self.ranks)}
        for held in self.ranks:
            held["rng|cpu|0"] = torch.get_rng_state()
        if self.state:
            contents["state.safetensors"] = self.state
        for name, held in contents.items():
            save_file(held, self.folder / name)
        self.manifest({name: files.checksum(self.folder / name) for name in contents})
        return self.folder

    def manifest(self, listed: dict) -> None:
        Manifest(
            format=files.FORMAT, step=self.step, samples=8 * self.step, world_size=2, expert_parallel=2, zero_stage=2,
            config=self.config.model_dump(mode="json"), files=listed, copied_experts=self.copied_experts, serial=1,
            tensors={name: list(shape) for name, shape in self.shapes.items()},
        ).write(self.folder)  # fmt: skip


@pytest.fixture
def written(tmp_path) -> Written:
    made = Written(tmp_path / "checkpoints" / "step_00000002")
    made.cut()
    return made


def expert(number: int, own: str = "gate_up_proj", layer: int = 1) -> str:
    return f"gpt.decoder.layers.{layer}.mlp.experts.{number}.{own}"


def copy_expert(written: Written, source: int, target: int, kinds=KINDS) -> None:
    for kind in kinds:
        for own in ("gate_up_proj", "down_proj"):
            held = written.ranks[source // 2][f"{kind}|{expert(source, own)}|0"]
            written.ranks[target // 2][f"{kind}|{expert(target, own)}|0"] = held.clone()


def clear_moments(written: Written, *numbers: int) -> None:
    for number in numbers:
        for kind in KINDS[1:]:
            for own in ("gate_up_proj", "down_proj"):
                written.ranks[number // 2][f"{kind}|{expert(number, own)}|0"].zero_()


def problems(folder: Path) -> list[str]:
    return verify_checkpoint(folder).problems


def test_a_whole_checkpoint_is_whole(written):
    actual = verify_checkpoint(written.write())
    assert actual.problems == []
    assert actual.states == ("exp_avg", "exp_avg_sq")
    assert actual.elements == sum(value.numel() for (kind, _), value in written.values.items() if kind == "weight")
    assert actual.experts == {f"gpt.decoder.layers.{layer}.mlp.experts": 4 for layer in (0, 1)}
    assert actual.state == {"lambda": ()}


NORM = "gpt.decoder.final_layernorm.weight"


def _drop(written, key):
    actual = [held.pop(key) for held in written.ranks if key in held]
    assert len(actual) == 1


def _double(written):
    written.ranks[1][f"weight|{NORM}|4"] = written.values["weight", NORM][4:6].clone()


def _spoil(written, kind, number):
    for held in written.ranks:
        if f"{kind}|{NORM}|8" in held:
            held[f"{kind}|{NORM}|8"][3] = number


def _moments_of_one(written):
    for rank in (0, 1):
        for kind in KINDS[1:]:
            written.ranks[rank].pop(f"{kind}|{NORM}|{8 * rank}")


def _wider(written):
    written.shapes[NORM] = (17,)


def _half_precision(written):
    written.ranks[0][f"weight|{NORM}|0"] = written.ranks[0][f"weight|{NORM}|0"].half()


WRONG = {  # what a save did wrong, with checksums that are right; what must be named
    "a lost expert": (lambda w: _drop(w, f"weight|{expert(2)}|0"), [f"weight of {expert(2)} [0, 256)", "in no file"]),
    "a hole": (lambda w: _drop(w, f"exp_avg|{NORM}|8"), [f"exp_avg of {NORM} [8, 16)"]),
    "elements in two places": (_double, [f"weight of {NORM} [4, 6)", "more than one place"]),
    "elements beyond the end": (
        lambda w: w.ranks[1].update({f"weight|{NORM}|16": torch.ones(2)}), [f"weight of {NORM} [16, 18)"],
    ),
    "a tensor of another model": (
        lambda w: w.ranks[0].update({"weight|gpt.lm_head.weight|0": torch.ones(4)}), ["gpt.lm_head.weight", "not in"],
    ),
    "no moments of one tensor": (_moments_of_one, [f"exp_avg of {NORM} [0, 16)", f"exp_avg_sq of {NORM} [0, 16)"]),
    "infinity": (lambda w: _spoil(w, "exp_avg", math.inf), [f"exp_avg of {NORM}", "not finite"]),
    "not a number": (lambda w: _spoil(w, "weight", math.nan), [f"weight of {NORM}", "not finite"]),
    "a negative square": (lambda w: _spoil(w, "exp_avg_sq", -1.0), [NORM, "negative values of exp_avg_sq"]),
    "one rank's experts under another's names": (
        lambda w: (copy_expert(w, 0, 2), copy_expert(w, 1, 3)),
        ["layers.1.mlp.experts: experts 0, 2 are equal", "experts 1, 3 are equal", "equal optimizer states"],
    ),
    "one rank's moments under another's names": (
        lambda w: copy_expert(w, 0, 3, KINDS[1:]), ["layers.1.mlp.experts: experts 0, 3 have equal optimizer states"],
    ),
    "another shape": (_wider, [f"{NORM} [17] instead of [16]"]),
    "a tensor fewer": (lambda w: w.shapes.pop(NORM), [f"1 tensors of the configuration's model are missing: {NORM}"]),
    "a tensor more": (lambda w: w.shapes.update(new=(2,)), ["1 tensors do not belong", "new"]),
    "no controller": (lambda w: w.state.clear(), ["controller of router 'relu' has no state"]),
    "another controller": (lambda w: w.state.update(p=torch.ones(())), ["controller of router 'relu' holds", "'p'"]),
    "a controller gone mad": (lambda w: w.state["lambda"].fill_(math.nan), ["controller's lambda is not finite"]),
    "half precision": (_half_precision, ["rank_00000.safetensors", "is not fp32"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_save_is_named(written, case):
    damage, named = WRONG[case]
    damage(written)
    actual = problems(written.write())
    assert actual
    for words in named:
        assert any(words in problem for problem in actual), (words, actual)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _swap(folder: Path) -> None:
    first, second, spare = folder / "rank_00000.safetensors", folder / "rank_00001.safetensors", folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"samples": 16', '"samples": 24'))


DAMAGES = {
    "a flipped bit": (lambda f: _flip(f / "rank_00001.safetensors"), ["rank_00001.safetensors", "sha256 differs"]),
    "a missing rank": (lambda f: (f / "rank_00001.safetensors").unlink(), ["rank_00001.safetensors is missing"]),
    "a missing controller": (lambda f: (f / "state.safetensors").unlink(), ["state.safetensors is missing"]),
    "a truncated shard": (
        lambda f: (f / "rank_00000.safetensors").write_bytes((f / "rank_00000.safetensors").read_bytes()[:-100]),
        ["rank_00000.safetensors has", "truncated"],
    ),
    "swapped files": (_swap, ["rank_00000.safetensors", "rank_00001.safetensors"]),
    "an edited manifest": (lambda f: _edit(f / "manifest.json"), ["manifest.json is damaged", "sha256 differs"]),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["manifest.json is missing"]),
    "a file too many": (lambda f: (f / "rank_00002.safetensors").write_bytes(b"?"), ["rank_00002.safetensors is not"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_on_disk_is_named(written, case):
    damage, named = DAMAGES[case]
    folder = written.write()
    damage(folder)
    actual = problems(folder)
    for words in named:
        assert any(words in problem for problem in actual), (words, actual)


def test_every_problem_is_named_at_once(written):
    _drop(written, f"weight|{NORM}|0")
    _spoil(written, "exp_avg", math.inf)
    folder = written.write()
    _flip(folder / "state.safetensors")
    actual = "\n".join(problems(folder))
    for words in ("state.safetensors does not have the content", f"weight of {NORM} [0, 8)", f"exp_avg of {NORM}"):
        assert words in actual


def test_copies_may_be_equal_until_they_get_a_gradient(written):
    """Experts 0 and 2 began as copies and have not been trained; 1 and 3 have."""
    copy_expert(written, 0, 2)
    clear_moments(written, 0, 2)
    written.copied_experts = True
    actual = verify_checkpoint(written.write())
    assert (actual.problems, actual.untrained_copies) == ([], 2)


def test_copies_that_were_trained_are_not_equal(written):
    copy_expert(written, 0, 2)
    clear_moments(written, 2)
    written.copied_experts = True
    assert any("experts 0, 2 are equal" in problem for problem in problems(written.write()))


def test_equal_experts_are_wrong_in_a_run_that_began_with_others(written):
    copy_expert(written, 0, 2)
    clear_moments(written, 0, 2)
    assert any("experts 0, 2 are equal" in problem for problem in problems(written.write()))


@pytest.mark.parametrize(("step", "wrong"), [(0, False), (2, True)])
def test_only_a_run_that_has_not_begun_needs_no_moments(tmp_path, step, wrong):
    made = Written(tmp_path / f"step_{step:08d}", step=step)
    made.values = {key: value for key, value in made.values.items() if key[0] == "weight"}
    made.cut()
    assert any("no optimizer state" in problem for problem in problems(made.write())) == wrong


def test_a_router_without_a_controller_needs_no_state(tmp_path):
    made = Written(tmp_path / "step_00000002", router="topk")
    made.state = {}
    made.cut()
    assert problems(made.write()) == []


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(written, tmp_path):
    """A pickle in the place of a shard, with a manifest that agrees, is refused and not run."""
    folder = written.write()
    shard, mark = folder / "rank_00001.safetensors", tmp_path / "ran"
    shard.write_bytes(pickle.dumps(_Trap(mark)))
    listed = files.read_manifest(folder).files
    written.manifest({name: files.checksum(folder / name) for name in listed})
    assert any("rank_00001.safetensors cannot be read" in problem for problem in problems(folder))
    assert not mark.exists()
    pickle.loads(shard.read_bytes())
    assert mark.exists(), "the trap does not work"


def test_memory_stays_far_below_the_model(tmp_path, monkeypatch):
    """Tensors are read in pieces: with pieces of 4 KB, a tensor of 1 MB is never whole in memory."""
    monkeypatch.setitem(MODEL, "vocab_size", 16384)
    monkeypatch.setattr("dsmoe.checkpoint.verify.CHUNK", 1024)
    made = Written(tmp_path / "step_00000002")
    made.cut()
    folder = made.write()
    sizes = []
    read = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda part: (sizes.append(part.numel()), read(part))[1])
    tracemalloc.start()
    actual = verify_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert actual.problems == []
    assert max(sizes) == 1024
    assert peak < 5e5 < 4 * 16384 * 16


def test_of_a_run_the_newest_or_every_one(tmp_path):
    for serial, step in ((1, 7), (2, 3)):
        made = Written(tmp_path / "checkpoints" / f"step_{step:08d}", step=step)
        made.cut()
        made.write()
        manifest = files.read_manifest(made.folder)
        manifest.serial = serial
        manifest.write(made.folder)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step_00000003"]
    assert [path.name for path in checkpoints_of(tmp_path, every=True)] == ["step_00000003", "step_00000007"]
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        checkpoints_of(tmp_path / "checkpoints")


def test_the_command_prints_a_report_and_tells_by_its_exit_code(written, monkeypatch, capsys):
    command = runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))["main"]
    folder = written.write()
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "verify", str(folder.parent.parent)])
    assert not command()
    told = capsys.readouterr().out
    assert "whole" in told and "4 distinct in each of 2 places" in told
    _flip(folder / "rank_00000.safetensors")
    _flip(folder / "rank_00001.safetensors")
    assert command() == 2
    told = capsys.readouterr().out
    assert "2 problems" in told
    assert "rank_00000.safetensors does" in told and "rank_00001.safetensors does" in told


def test_a_report_names_what_was_read(written):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(verify_checkpoint(written.write()).report())
    text = console.export_text()
    for words in (
        "step 2",
        "router relu",
        "2 ranks, expert parallel 2, ZeRO 2",
        "lambda []",
        "adamw's exp_avg, exp_avg_sq",
    ):
        assert words in text
