"""The MoE layer: route, plan, dispatch, compute, combine, for 0..E experts per token."""

import dsmoe.runtime.megatron  # noqa: F401  (before anything imports Megatron-Core)
