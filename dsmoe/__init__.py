"""dsmoe: mixture-of-experts training with any router, on Megatron-Core and DeepSpeed."""

import os

__version__ = "0.1.0"

# Before torch's first tensor: huge pages for large CPU tensors. A step frees and allocates every gradient anew, and
# the kernel's zeroing of 4-KiB pages can cost more than the arithmetic (docs/performance.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
