"""dsmoe: mixture-of-experts training with any router, on Megatron-Core and DeepSpeed."""

__version__ = "0.1.0"
