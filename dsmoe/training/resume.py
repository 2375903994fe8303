"""Resuming with another configuration: what differs from the checkpoint's run, and whether that can be right.

Every difference is listed. What only changes the future is accepted: learning rate, steps, batch, layout, precision,
where logs go. What would make the checkpoint mean something else is refused with both values: the model (its shapes may
fit and its function differ: heads, rotary base, norm epsilon), what a router computes, tokenizer, training data, the
optimizer whose state there is. `training.resume_with` names keys or sections for which that is wanted.

The place in the data is a number of samples in the order of one seed and sequence length. Another batch reads on from
there. Under another seed or sequence length the same number means other text; only between two epochs, each of which
has an order of its own, is there a place that means the same: after n whole epochs. Anywhere else it is refused, or,
where `training.resume_with` allows it, the run continues with the next epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmoe.checkpoint.files import Manifest, Position
from dsmoe.config import ModelConfig, RunConfig, validate_config
from dsmoe.config.validate import is_allowed
from dsmoe.data.identity import name_of
from dsmoe.errors import CheckpointError, ConfigError
from dsmoe.routers.registry import option_classes

ORDER = ("model.sequence_length", "training.seed")  # what the order of samples depends on, beside the data
MEANT_FOR_THE_START = ("training.resume", "training.resume_with", "training.stop_at")  # never worth a line


@dataclass(frozen=True)
class Change:
    """A key whose value is not that of the checkpoint's run; `refusal` says why it cannot be right, if it cannot."""

    key: str
    before: Any
    after: Any
    refusal: str | None = None

    def __str__(self) -> str:
        reason = f": {self.refusal}" if self.refusal else ""
        return f"{self.key}: {self.before} in the checkpoint, {self.after} now{reason}"


def resume(manifest: Manifest, config: RunConfig, data: dict[str, Any]) -> tuple[Position, list[Change]]:
    """Where a run resumes from a checkpoint, and what differs from the run that saved it.

    Args:
        config: with vocabulary and precision settled.
        data: from `dsmoe.data.identity.data_identity`.

    Raises:
        CheckpointError: a difference that cannot be right, and that `training.resume_with` does not name.
    """
    try:
        saved = validate_config(manifest.config, option_classes())
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's configuration cannot be read: {error}") from error
    changes = [*_changed_keys(manifest, saved, config), *_changed_data(manifest, data)]
    position, refusal = _position(manifest, saved, config, data)
    if refusal:
        changes = [Change(c.key, c.before, c.after, refusal) if c.key in ORDER else c for c in changes]
    refused = [c for c in changes if c.refusal and not is_allowed(c.key, config.training.resume_with)]
    if refused:
        lines = "\n".join(f"  {number}. {change}" for number, change in enumerate(refused, 1))
        keys = ",".join(change.key for change in refused)
        raise CheckpointError(
            f"the run does not resume from step {manifest.step} with what has changed:\n{lines}\n"
            f"where this is wanted: training.resume_with=[{keys}]"
        )
    return position, [Change(c.key, c.before, c.after) for c in changes]


def _changed_keys(manifest: Manifest, saved: RunConfig, config: RunConfig) -> list[Change]:
    before, after = _flat(saved), _flat(config)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and key not in MEANT_FOR_THE_START:
            changes.append(Change(key, before.get(key), after.get(key), _refusal(key, manifest, config)))
    return changes


def _flat(config: RunConfig) -> dict[str, Any]:
    """`section.key` -> value."""
    tree = config.model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
    }  # fmt: skip


def _refusal(key: str, manifest: Manifest, config: RunConfig) -> str | None:
    section, _, name = key.partition(".")
    if section == "model" and name not in ModelConfig.RUNTIME_ONLY and key not in ORDER:
        return "the weights are of the model as it was"
    if section == "router" and not option_classes()[config.router.name].changes_only_the_future(name):
        return "the weights were trained with the router as it was"
    if key in ("training.optimizer", "training.optimizer_options") and manifest.step:
        return "the optimizer's state is of the optimizer as it was"
    return None


def _changed_data(manifest: Manifest, data: dict[str, Any]) -> list[Change]:
    if manifest.data is None:
        return [] if manifest.samples == 0 else [Change("data", "not recorded", name_of(data["train"]))]
    changes, before = [], manifest.data
    if _differ(before, data, "train"):
        reason = "the run's place in it means nothing in other data"
        changes.append(Change("data", name_of(before.get("train")), name_of(data["train"]), reason))
    if _differ(before, data, "valid"):
        changes.append(Change("held-out data", name_of(before.get("valid")), name_of(data["valid"])))
    if before.get("tokenizer") != data["tokenizer"]:
        reason = "the same ids stand for other text"
        was, now = (str(sha)[:12] if sha else "none" for sha in (before.get("tokenizer"), data["tokenizer"]))
        changes.append(Change("data.tokenizer", was, now, reason if before.get("tokenizer") else None))
    return changes


def _differ(before: dict[str, Any], data: dict[str, Any], split: str) -> bool:
    return before.get(split) != data[split]


def _position(
    manifest: Manifest, saved: RunConfig, config: RunConfig, data: dict[str, Any]
) -> tuple[Position, str | None]:
    """Where to go on, and why that place is not the same if it is not."""
    length, seed = saved.model.sequence_length, saved.training.seed
    tokens = manifest.samples * length if manifest.tokens is None else manifest.tokens

    def at(samples: int) -> Position:
        skipped, seconds = manifest.skipped_steps, manifest.seconds or 0.0
        return Position(manifest.step, samples, tokens, manifest.copied_experts, skipped, seconds)

    if manifest.data is not None and _differ(manifest.data, data, "train"):
        return at(0), None  # refused elsewhere; where it is wanted, from its beginning
    if (length, seed) == (config.model.sequence_length, config.training.seed) or manifest.samples == 0:
        return at(manifest.samples), None
    epoch_before, epoch_after = (
        max(1, (data["train"]["tokens"] - 1) // each) for each in (length, config.model.sequence_length)
    )
    epochs, rest = divmod(manifest.samples, epoch_before)
    if not rest:
        return at(epochs * epoch_after), None
    refusal = (
        f"the run is at sample {rest:,} of the {epoch_before:,} of epoch {epochs}, whose order depends on it; "
        "there is no same place in the new order before the epoch's end"
    )
    return at((epochs + 1) * epoch_after), refusal
