"""Text from a trained run: one process holds the whole model, whatever the run was trained on.

Every new token runs the model over the text so far (at most `sequence_length` tokens of it): there is no key/value
cache here, since Megatron-Core's needs CUDA. For serving, export the run to Hugging Face.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from dsmoe.checkpoint.files import find_checkpoint
from dsmoe.checkpoint.load import CheckpointReader, load_weights
from dsmoe.config import validate_config
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, ConfigError
from dsmoe.model.gpt import LanguageModel
from dsmoe.parallel.groups import create_groups, start_processes
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    tokens: int = 128
    temperature: float = 0.8  # 0: greedy
    top_p: float = 0.95
    seed: int = 0

    def check(self) -> None:
        """Raises `ConfigError` for values that mean nothing."""
        problems = []
        if self.tokens < 1:
            problems.append(f"--tokens: found {self.tokens}, expected 1 or more")
        if self.temperature < 0:
            problems.append(f"--temperature: found {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top-p: found {self.top_p}, expected more than 0 and at most 1")
        if problems:
            raise ConfigError(problems, "the command line")


class Generator:
    """A trained model and its tokenizer."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, path: str) -> Generator:
        """From a run folder or a checkpoint of it. Raises `CheckpointError` if there is none."""
        folder = find_checkpoint(path, Path(path))
        if folder is None:
            raise CheckpointError(f"{path} is not a run or checkpoint")
        start_processes()
        reader = CheckpointReader(folder)
        config = validate_config(reader.manifest.config, option_classes(), source=str(folder))
        router = get(config.router.name)
        options = router.Options.model_validate(config.router.options)
        model = LanguageModel(config.model, (router, options), create_groups(1), config.training.seed)
        load_weights(model, reader)
        device = get_accelerator().current_device_name()
        if model.controller is not None:
            model.controller.to(device)
        return cls(model.to(device), Tokenizer.load(folder.parent.parent / "tokenizer.model"))

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces of text that continue the prompt, until the end of the document or `sampling.tokens` tokens."""
        return self.tokenizer.decode_stream(self._ids(prompt, sampling))

    @torch.no_grad()
    def _ids(self, prompt: str, sampling: Sampling) -> Iterator[int]:
        generator = torch.Generator().manual_seed(sampling.seed)
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eod_id]  # documents follow an end of document
        for _ in range(sampling.tokens):
            window = torch.tensor([ids[-self.model.config.sequence_length :]], device=self.device)
            logits = self.model(window)[0, -1, : self.tokenizer.vocab_size].float().cpu()
            self.model.recorder.take()
            ids.append(choose(logits, sampling, generator))
            if ids[-1] == self.tokenizer.eod_id:
                return
            yield ids[-1]


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from fp32 logits [V]: temperature, then nucleus sampling (the token that crosses top_p is kept)."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs, ids = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs > sampling.top_p] = 0.0
    return int(ids[torch.multinomial(probs, 1, generator=generator)])
