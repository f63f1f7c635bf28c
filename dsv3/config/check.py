"""The sentences of a refused setting, so that every config refuses in the same words."""

from collections.abc import Sequence

from dsv3.errors import ConfigError


def require_positive(owner: object, *fields: str) -> None:
    """Raise ConfigError unless every named field of `owner` is greater than zero."""
    for field in fields:
        value = getattr(owner, field)
        if not value > 0:
            raise ConfigError(f"{field} = {value}; it must be greater than 0")


def require_fraction(owner: object, *fields: str) -> None:
    """Raise ConfigError unless every named field of `owner` lies in [0, 1]."""
    for field in fields:
        value = getattr(owner, field)
        if not 0 <= value <= 1:
            raise ConfigError(f"{field} = {value}; it must lie between 0 and 1")


def require_not_negative(owner: object, *fields: str) -> None:
    """Raise ConfigError unless every named field of `owner` is zero or more."""
    for field in fields:
        value = getattr(owner, field)
        if not value >= 0:
            raise ConfigError(f"{field} = {value}; it must be 0 or more")


def require_choice(owner: object, field: str, *, choices: Sequence[str]) -> None:
    """Raise ConfigError unless the named field of `owner` is one of `choices`."""
    value = getattr(owner, field)
    if value not in choices:
        raise ConfigError(f"{field} = {value!r}; choose one of {', '.join(repr(choice) for choice in choices)}")
