"""From text to training samples: tokenizer, corpus sources, prepared datasets and the streams that read them.

Nothing is imported here: the worker processes of `prepare` start in a fraction of a second because they never
load torch or Megatron-Core, which `dataset` needs.
"""
