"""Text from a trained run: one process holds the whole model, whatever the run was trained on.

A key/value cache (dsmoe's own: Megatron-Core's needs CUDA) makes each new token cost one token. For serving many
users, export the run to Hugging Face.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.inference.sampling import Sampling
from dsmoe.model.attention import KeyValueCache
from dsmoe.model.gpt import LanguageModel


class Generator:
    """A trained model and its tokenizer."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, path: str) -> Generator:
        """From a run folder or a checkpoint of it. Raises `CheckpointError` or `DataError` for what is not there."""
        trained = TrainedModel.load(path)
        return cls(trained.model, Tokenizer.load(trained.run_dir))

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces of text that continue the prompt, until the end of the document or `sampling.tokens` tokens."""
        ids = self.tokenizer.encode(prompt)
        return self.tokenizer.decode_stream(self.ids(ids, sampling), after=ids)

    def ids(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Token ids that continue those of the prompt; the end of the document is not among them."""
        generator = torch.Generator().manual_seed(sampling.seed)
        ids = list(prompt) or [self.tokenizer.eod_id]  # documents follow an end of document
        reader = Reader(self.model)
        for _ in range(sampling.tokens):
            ids.append(choose(reader.logits(ids)[: self.tokenizer.vocab_size].cpu(), sampling, generator))
            if ids[-1] == self.tokenizer.eod_id:
                return
            yield ids[-1]


class Reader:
    """A model that reads a growing text and computes every token once.

    A model knows positions up to S, its `sequence_length`. It sees the whole of a text of up to S tokens; of a longer
    one, what follows `window_start`: when the window is full its older half is dropped, and the rest is read anew from
    position 0. So the logits are those of the model over that window alone, and a token costs less than two on average.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.device = model, next(model.parameters()).device
        self._start = 0
        self._cache = KeyValueCache()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """fp32 logits [V] of the token after `ids`, which begin with those of the last call."""
        start = window_start(len(ids), self.model.config.sequence_length)
        if start != self._start:
            self._start, self._cache = start, KeyValueCache()
        new = torch.tensor([ids[start + self._cache.length :]], device=self.device)
        with self._cache.of(self.model):
            logits_BSV = self.model(new)
        self.model.recorder.take()
        return logits_BSV[0, -1].float()


def window_start(length: int, size: int) -> int:
    """The first token that a model of sequence length `size` sees of a text of `length` tokens: 0 while all of it fits,
    then the smallest multiple of half the size that leaves at most `size` tokens."""
    half = max(1, size // 2)
    return max(0, -(-(length - size) // half) * half)


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from fp32 logits [V]: temperature, then nucleus sampling (the token that crosses top_p is kept)."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs, ids = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs > sampling.top_p] = 0.0
    return int(ids[torch.multinomial(probs, 1, generator=generator)])
