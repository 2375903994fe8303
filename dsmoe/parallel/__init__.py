"""Process groups and collectives: DeepSpeed makes them, Megatron-Core is handed them."""
