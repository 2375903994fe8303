"""Checkpoints that do not know the layout they were saved from: canonical names, safetensors, atomic."""
