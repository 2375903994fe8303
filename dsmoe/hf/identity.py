"""Who an imported model is, so that it leaves as the same one: special tokens, chat template, licence, its base.

A run that was imported keeps these small files of its folder in `huggingface/`. An export of the run has them again:
the tokenizer as it came, the ids of special tokens, and in the model card the licence and `base_model`. Its steps are
fine-tuning.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsmoe.errors import ConversionError

FOLDER, DESCRIPTION = "huggingface", "identity.json"
TOKENIZER_PARTS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Identity:
    """What a run keeps of the model that it was.

    Attributes:
        base_model: its identifier on the Hub where one is known, else the name of its folder.
        architecture: its `model_type`.
        license, language: of its card.
        token_ids: of config.json, by key: beginning and end of a text, padding.
        trained_elsewhere: optimizer steps that transformers' Trainer says the folder had.
        has_tokenizer: whether its tokenizer is kept, all of it.
    """

    base_model: str
    architecture: str
    license: str | None = None
    language: Any = None
    token_ids: dict[str, Any] = field(default_factory=dict)
    trained_elsewhere: int = 0
    has_tokenizer: bool = False

    @classmethod
    def keep(cls, source: Path, run: Path) -> Identity:
        """Read a folder's, and copy its files into a run's folder."""
        config, card = _json(source / "config.json"), _front_matter(source / "README.md")
        place = run / FOLDER
        place.mkdir()
        names = [name for name in (*TOKENIZER_PARTS, GENERATION) if (source / name).is_file()]
        for name in names:
            shutil.copyfile(source / name, place / name)
        identity = cls(
            base_model=_name_of(source, config),
            architecture=str(config.get("model_type")),
            license=card.get("license"),
            language=card.get("language"),
            token_ids={key: config.get(key) for key in IDS},
            trained_elsewhere=int(_json(source / "trainer_state.json").get("global_step") or 0),
            has_tokenizer="tokenizer.json" in names,
        )
        (place / DESCRIPTION).write_text(json.dumps(asdict(identity), indent=2) + "\n", encoding="utf-8")
        return identity

    @classmethod
    def of_run(cls, run: Path) -> Identity | None:
        """Of a run that was imported; None of others. Raises `ConversionError` where it is damaged."""
        path = run / FOLDER / DESCRIPTION
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConversionError(f"{path} is damaged ({error}); restore it, or remove {path.parent}") from error

    def write_tokenizer(self, run: Path, folder: Path) -> None:
        """Give an export the tokenizer as it came."""
        for name in TOKENIZER_PARTS:
            if (run / FOLDER / name).is_file():
                shutil.copyfile(run / FOLDER / name, folder / name)

    def generation_config(self, run: Path) -> dict[str, Any]:
        """Of the model as it came: how it is generated from, its special tokens."""
        ids = {key: value for key, value in self.token_ids.items() if value is not None}
        return ids | _json(run / FOLDER / GENERATION)


def _name_of(folder: Path, config: dict[str, Any]) -> str:
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(folder.resolve()))
    if cached is not None:  # a folder of the Hub's cache
        return f"{cached[1]}/{cached[2]}"
    name = str(config.get("_name_or_path") or "")
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else folder.resolve().name


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        content = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
