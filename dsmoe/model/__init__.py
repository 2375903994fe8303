"""The model: a GPT from Megatron-Core's specs that runs on any device."""
