"""The MoE layer: route, plan, dispatch, compute, combine, for 0..E experts per token."""
