"""The known limits of mixture-of-experts models at scale, and which measured quantities show each."""

from __future__ import annotations

LIMITS = {
    "routing": (), "memory": (), "communication": (), "starved": (), "redundant": (), "imbalance": (), "latency": (),
    "energy": (),
}  # fmt: skip
