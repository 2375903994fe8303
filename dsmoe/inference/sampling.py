"""Options of generation, apart from the model, so that a mistake in them is named before anything is imported."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.errors import ConfigError


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
