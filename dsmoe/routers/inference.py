"""Fewer or more experts at inference: the option of a router that decides it, under the name of what it sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe.routers.base import Router, RouterOptions

SETTINGS = {"k": "k", "p": "p", "theta": "threshold"}  # of sweeps and exports -> `RouterOptions.inference_option`


def setting_of(options: RouterOptions) -> str | None:
    """k, p or theta, whichever these options have; None where no option decides."""
    return next((name for name, option in SETTINGS.items() if option == options.inference_option()), None)


@contextmanager
def routing_with(routers: Iterable[Router], change: dict[str, Any]) -> Iterator[None]:
    """Let the routers of a model route with other options meanwhile."""
    before = [(router, router.options) for router in routers]
    for router, options in before:
        router.options = options.model_copy(update=change)
    try:
        yield
    finally:
        for router, options in before:
            router.options = options
