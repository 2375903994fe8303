"""Names that the plugin API had in dsmoe 0.1: a plugin that still uses one is told the new name."""

from __future__ import annotations

from functools import wraps

from dsmoe.errors import RouterError

OPTION_METHODS = {
    "problems": "validate_for_model",
    "more_than_all": "at_most_num_experts",
    "mean_experts": "target_experts_per_token",
    "first_experts": "initial_experts_per_token",
}


def refuse_old_methods(cls: type, renamed: dict[str, str]) -> None:
    """Raises `RouterError` if the class itself defines a method under an old name."""
    for old, new in renamed.items():
        if callable(vars(cls).get(old)):
            raise RouterError(f"{cls.__module__}.{cls.__qualname__}.{old} is now called {new}; rename the method")


def refuse_old_fields(**renamed: str):
    """Class decorator for a dataclass: `RouterError` where an old field is given or read."""

    def decorate(cls):
        def error(old: str) -> RouterError:
            return RouterError(f"{cls.__name__}.{old} is now called {renamed[old]}")

        def refused_property(old: str) -> property:
            def read(self):
                raise error(old)

            return property(read)

        plain_init = cls.__init__

        @wraps(plain_init)
        def init(self, *args, **kwargs):
            if old := renamed.keys() & kwargs.keys():
                raise error(min(old))
            plain_init(self, *args, **kwargs)

        cls.__init__ = init
        for old in renamed:
            setattr(cls, old, refused_property(old))
        return cls

    return decorate
