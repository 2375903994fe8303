"""Verify: is a checkpoint whole, and the model that its configuration describes?

Everything is read once and nothing is trusted: every file's checksum; of every tensor that the configuration's model
has, and no other, each element exactly once, as weight and as each state of the optimizer; finite values; as many
distinct experts in every layer as there should be; the state that a run resumes from. One process, no process groups,
and no more than a few MB of tensors in memory at a time.

Experts are drawn apart and stay apart, so two equal ones mean that a save wrote one rank's experts under the names of
another's, as happened to several trainers (DeepSpeed #6589, KempnerForge #202, MegaBlocks #160). One exception: where
the manifest says that a run began with copies of one MLP (`copied_experts`), experts that have never had a gradient
may still be equal.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

from dsmoe.checkpoint import files
from dsmoe.checkpoint.files import Manifest
from dsmoe.checkpoint.load import CheckpointReader, saved_config
from dsmoe.config import RunConfig
from dsmoe.errors import CheckpointError, DsmoeError
from dsmoe.model.skeleton import logical_shapes
from dsmoe.optim.base import Optimizer
from dsmoe.optim.registry import optimizer_class
from dsmoe.routers import get

CHUNK = 1 << 20  # elements read at a time
NAMED = 5  # names in a message; more are counted

Shapes = dict[str, tuple[int, ...]]
Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


@dataclass
class Verification:
    """What was found. A checkpoint without `problems` is whole."""

    folder: Path
    manifest: Manifest | None = None  # None if it cannot be read
    tensors: int = 0  # logical tensors of the model
    elements: int = 0  # of one kind: parameters
    optimizer: str = ""
    states: tuple[str, ...] = ()  # of the optimizer, in the files
    experts: dict[str, int] = field(default_factory=dict)  # module -> distinct experts
    untrained_copies: int = 0  # experts that are equal to another one and may be
    state: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the router's controller: name -> shape
    problems: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(expected["bytes"] for expected in self.manifest.files.values()) if self.manifest else 0

    def report(self) -> Table:
        """For a rich console: what was read, and every problem."""
        table = Table.grid(padding=(0, 2))
        verdict = f"[red]{len(self.problems)} problems[/]" if self.problems else "[green]whole[/]"
        table.add_row(f"[bold]{escape(self.folder.name)}[/]", verdict)
        for heading, text in self._rows() if self.manifest else ():
            table.add_row(heading, escape(text))
        for number, problem in enumerate(self.problems, 1):
            table.add_row(f"[red]{number}[/]", escape(problem))
        return table

    def _rows(self) -> Iterator[tuple[str, str]]:
        saved, router = self.manifest, self.manifest.config.get("router", {}).get("name")
        layout = f"{saved.world_size} ranks, expert parallel {saved.expert_parallel}, ZeRO {saved.zero_stage}"
        yield "saved", f"step {saved.step}, {saved.samples:,} samples, router {router}; by {layout}"
        yield "files", f"{len(saved.files)}, {self.bytes / 1e6:,.1f} MB"
        states = f"{self.optimizer}'s {', '.join(self.states)}" if self.states else "no optimizer state"
        yield "tensors", f"{self.tensors:,}, {self.elements:,} parameters; weights, {states}"
        if self.experts:
            counts = sorted(set(self.experts.values()))
            each = " or ".join(map(str, counts))
            copies = f"; {self.untrained_copies} untrained copies" if self.untrained_copies else ""
            yield "experts", f"{each} distinct in each of {len(self.experts)} places{copies}"
        if self.state:
            yield "controller", ", ".join(f"{name} {list(shape)}" for name, shape in self.state.items())


def verify_checkpoint(folder: Path, progress: Progress = lambda done, total: None) -> Verification:
    """Read all of a checkpoint and list everything that is wrong with it; what is wrong raises nothing."""
    result = Verification(folder)
    try:
        manifest = result.manifest = files.read_manifest(folder)
    except CheckpointError as error:
        result.problems.append(str(error))
        return result
    # Files are read twice: their bytes, then their values.
    meter = _Meter(progress, 2 * result.bytes)
    result.problems += _file_problems(folder, manifest, meter)
    reader = _reader(folder, manifest, result.problems)
    shapes = {name: tuple(shape) for name, shape in manifest.tensors.items()}
    optimizer, result.optimizer = None, manifest.optimizer
    try:
        config = saved_config(manifest, folder)
        expected = _shapes_of(config)
        result.problems += _shape_problems(shapes, expected)
        result.problems += _state_problems(folder, manifest, config, result.state)
        shapes, optimizer = expected, optimizer_class(config.training)
    except DsmoeError as error:
        result.problems.append(f"{error}; so tensors are held against the manifest's own list only")
    result.tensors, result.elements = len(shapes), sum(math.prod(shape) for shape in shapes.values())
    kinds = _kinds(reader, manifest, optimizer, result)
    whole = _coverage(reader, shapes, kinds, result.problems)
    values = _check_values(reader, shapes, kinds, whole, result, meter)
    for state in optimizer.states if optimizer else ():
        below = [name for (kind, name), value in values.items() if kind == state.name and value.negative]
        if state.non_negative and below:
            result.problems.append(_counted(below, f"tensors have negative values of {state.name}"))
    return result


def _shapes_of(config: RunConfig) -> Shapes:
    try:
        return logical_shapes(config.model, config.router)
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:  # sizes that nothing has
        raise CheckpointError(f"the configuration's model cannot be built: {error}") from error


def _kinds(
    reader: CheckpointReader, manifest: Manifest, optimizer: type[Optimizer] | None, result: Verification
) -> tuple[str, ...]:
    """What each element should be there as: weight, and the optimizer's states after the first step."""
    there = reader.kinds() - {"weight"}
    expected = optimizer.kinds()[1:] if optimizer else tuple(sorted(there))
    result.states = tuple(name for name in expected if name in there)
    if odd := sorted(there - {*expected}):
        result.problems.append(f"{', '.join(odd)}: files hold it, but {result.optimizer} keeps no such state")
    if manifest.step and expected and not result.states:
        result.problems.append(
            f"no optimizer state ({', '.join(expected)} of {result.optimizer}), but the checkpoint is of step "
            f"{manifest.step}"
        )
    return ("weight", *expected) if result.states else ("weight",)


def checkpoints_of(path: Path, every: bool = False) -> list[Path]:
    """A checkpoint itself; of a run its newest one, or every one.

    Raises:
        CheckpointError: there is none.
    """
    if files.is_checkpoint(path) or files.is_checkpoint_name(path.name):
        return [path]
    if every:
        there = path / "checkpoints"
        checkpoints = (
            [folder for folder in there.iterdir() if files.is_checkpoint_name(folder.name)] if there.is_dir() else []
        )
    else:
        checkpoints = [folder for folder in [files.newest_checkpoint(path)] if folder]
    if not checkpoints:
        raise CheckpointError(f"{path} is neither a checkpoint (a folder with {files.MANIFEST}) nor a run that has one")
    return sorted(checkpoints, key=files.step_of)


class _Meter:
    """Counts bytes for a progress display."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def add(self, count: int) -> None:
        self.done += count
        self.progress(min(self.done, self.total), self.total)


def _file_problems(folder: Path, manifest: Manifest, meter: _Meter) -> list[str]:
    problems = []
    for name, expected in sorted(manifest.files.items()):
        problems.append(files.check_file(folder, name, expected))
        meter.add(expected["bytes"])
    listed = {*manifest.files, files.MANIFEST}
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    problems += [f"{name} is not in the manifest" for name in there if name not in listed]
    return [problem for problem in problems if problem]


def _reader(folder: Path, manifest: Manifest, problems: list[str]) -> CheckpointReader:
    """Of all files that can be opened; those that are missing are in `problems` already."""
    reader = CheckpointReader(folder, [])
    for name in sorted(manifest.files):
        if name.startswith("rank_") and (folder / name).is_file():
            try:
                reader.add(name)
            except CheckpointError as error:
                problems.append(str(error))
    return reader


def _shape_problems(saved: Shapes, expected: Shapes) -> list[str]:
    missing = [name for name in expected if name not in saved]
    extra = [name for name in saved if name not in expected]
    other = [
        f"{name} {list(saved[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if saved.get(name, shape) != shape
    ]
    differences = [
        ("tensors of the configuration's model are missing", missing),
        ("tensors do not belong to the configuration's model", extra),
        ("tensors have another shape than the configuration says", other),
    ]
    return [_counted(names, what) for what, names in differences if names]


def _state_problems(folder: Path, manifest: Manifest, config: RunConfig, state: Shapes) -> list[str]:
    """What a run resumes from, apart from tensors. Fills in the controller's state."""
    problems = []
    if manifest.step < 0 or manifest.samples < 0 or (manifest.step > 0) != (manifest.samples > 0):
        problems.append(f"step {manifest.step} after {manifest.samples} samples: one of them is wrong")
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    controller = router.make_controller(options, sum(config.model.moe_layers()), config.model.num_experts)
    expected = {} if controller is None else {name: tuple(value.shape) for name, value in controller.state.items()}
    if expected or files.CONTROLLER in manifest.files:
        try:
            with safe_open(folder / files.CONTROLLER, framework="pt") as file:
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except Exception as error:
            problems.append(f"the controller of router {router.name!r} has no state that can be read: {error}")
        else:
            state.update((name, tuple(value.shape)) for name, value in values.items())
            if state != expected:
                problems.append(
                    f"the controller of router {router.name!r} holds {expected}, {files.CONTROLLER} {state}"
                )
            odd = [name for name, value in values.items() if not torch.isfinite(value).all()]
            problems += [f"the controller's {name} is not finite" for name in odd]
    if manifest.step:
        problems += _random_state_problems(folder, manifest)
    return problems


def _random_state_problems(folder: Path, manifest: Manifest) -> list[str]:
    lacking = []
    for rank in range(manifest.world_size):
        name = f"rank_{rank:05d}.safetensors"
        try:
            with safe_open(folder / name, framework="pt") as file:
                if "rng|cpu|0" not in file.keys():  # noqa: SIM118  (no mapping)
                    lacking.append(name)
        except Exception:
            if name not in manifest.files:
                lacking.append(name)  # otherwise it is named as missing or damaged already
    return [_counted(lacking, "files lack the random state of their rank")] if lacking else []


def _coverage(reader: CheckpointReader, shapes: Shapes, kinds: tuple[str, ...], problems: list[str]) -> set:
    """Whether the ranges in files are each element of each tensor exactly once; the (kind, name) for which they are."""
    whole = set()
    by_problem: dict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        ranges = reader.ranges(kind)
        by_problem[f"tensors in files are not in the model ({kind})"] += [name for name in ranges if name not in shapes]
        for name, shape in shapes.items():
            faults = list(_faults(ranges.get(name, []), math.prod(shape)))
            for what, place in faults:
                by_problem[what].append(f"{kind} of {name} {place}")
            if not faults:
                whole.add((kind, name))
    problems += [_counted(names, what) for what, names in by_problem.items() if names]
    return whole


def _faults(ranges: list[tuple[int, int]], numel: int) -> Iterator[tuple[str, str]]:
    reached = 0
    for low, high in [*ranges, (numel, numel)]:
        if low > reached:
            yield "ranges of elements are in no file", f"[{reached}, {min(low, numel)})"
        elif low < reached and low < numel:
            yield "ranges of elements are in more than one place", f"[{low}, {min(reached, high)})"
        reached = max(reached, high)
    if reached > numel:
        yield "ranges reach beyond their tensor", f"[{numel}, {reached})"


@dataclass
class _Values:
    """What reading a tensor of one kind tells."""

    sha256: bytes
    finite: bool
    negative: bool
    zero: bool


def _check_values(
    reader: CheckpointReader, shapes: Shapes, kinds: tuple[str, ...], whole: set, result: Verification, meter: _Meter
) -> dict[tuple[str, str], _Values]:
    """All values, one tensor after another."""
    values: dict[tuple[str, str], _Values] = {}
    for name in shapes:
        for kind in kinds:
            if (kind, name) in whole:
                values[kind, name] = _read_values(reader, kind, name, math.prod(shapes[name]), meter)
    odd = [f"{kind} of {name}" for (kind, name), value in values.items() if not value.finite]
    result.problems += [_counted(odd, "tensors hold values that are not finite")] if odd else []
    for module, experts in _expert_tensors(shapes).items():
        _check_experts(module, experts, kinds, values, result)
    return values


def _read_values(reader: CheckpointReader, kind: str, name: str, numel: int, meter: _Meter) -> _Values:
    digest, finite, negative, zero = hashlib.sha256(), True, False, True
    for low in range(0, numel, CHUNK):
        part = reader.read(kind, name, low, min(low + CHUNK, numel))
        digest.update(part.numpy())  # type: ignore[arg-type]
        smallest, largest = (value.item() for value in part.aminmax())  # both are nan if any element is
        finite = finite and math.isfinite(smallest) and math.isfinite(largest)
        negative = negative or smallest < 0
        zero = zero and smallest == largest == 0
        meter.add(4 * part.numel())
    return _Values(digest.digest(), finite, negative, zero)


def _expert_tensors(shapes: Shapes) -> dict[str, dict[int, list[str]]]:
    """Module -> id of an expert -> its matrices, wherever a module holds one tensor for each expert.

    Only matrices, which are drawn one by one: vectors may all begin as ones.
    """
    modules: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, shape in shapes.items():
        module, _, own = name.rpartition(".")
        module, _, number = module.rpartition(".")
        if number.isdecimal() and own and len(shape) >= 2:
            modules[module][int(number)].append(name)
    return modules


def _check_experts(
    module: str, experts: dict[int, list[str]], kinds: tuple[str, ...], values: dict, result: Verification
) -> None:
    """That no two experts of a module are equal, in weights or in the optimizer's states."""
    readable = {n: names for n, names in experts.items() if all((k, name) in values for k in kinds for name in names)}
    states = kinds[1:]
    trained = {n for n, names in readable.items() if any(not values[k, name].zero for k in states for name in names)}

    def alike(kinds: tuple[str, ...], among) -> list[list[int]]:
        groups = defaultdict(list)
        for number in among:
            groups[tuple(values[kind, name].sha256 for kind in kinds for name in readable[number])].append(number)
        return [sorted(group) for group in groups.values() if len(group) > 1]

    equal = alike(("weight",), readable)
    result.experts[module] = len(readable) - sum(len(group) - 1 for group in equal)
    for group in equal:
        if result.manifest.copied_experts and not trained.intersection(group):
            result.untrained_copies += len(group)
        else:
            result.problems.append(f"{module}: experts {_listed(group)} are equal; each should have weights of its own")
    for group in alike(states, trained) if states else ():
        equal_states = f"experts {_listed(group)} have equal optimizer states"
        result.problems.append(f"{module}: {equal_states}; each should have its own")


def _counted(names: list[str], what: str) -> str:
    return f"{len(names)} {what}: {_listed(names)}"


def _listed(names: list) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + rest
