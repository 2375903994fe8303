"""The model: a GPT from Megatron-Core's specs that runs on any device."""

import dsmoe.runtime.megatron  # noqa: F401  (before anything imports Megatron-Core)
