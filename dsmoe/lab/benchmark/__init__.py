"""What `dsmoe benchmark` measures: an MoE layer or a step, beside peers and beside the machine's limit."""
