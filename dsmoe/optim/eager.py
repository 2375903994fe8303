"""torch's optimizers without torch's compiler.

Their methods are wrapped so that `torch.compile` leaves them alone, and the first call of any of them loads the whole
of torch._dynamo for that: two CPU seconds of every start and of every recovery. dsmoe does not compile optimizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch

WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


@cache
def eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer, with these methods as they are written."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})
