"""Training: DeepSpeed's engine around the model, the loop, evaluation and what a run writes down."""

from dsmoe.runtime.megatron import uncompiled

with uncompiled():
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (DeepSpeed's engine imports it)
