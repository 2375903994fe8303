"""Hugging Face: runs leave as a transformers model and come back; one key table serves both directions."""
