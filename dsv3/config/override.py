"""`--set a.b=c`: change settings of a recipe by their dotted names."""

import json
from typing import Any, TypeVar

from dsv3.config.files import from_dict, group_class, join, to_dict, type_hints, unknown_key_message
from dsv3.errors import ConfigError

Config = TypeVar("Config")


def apply_overrides(config: Config, *, assignments: list[str]) -> Config:
    """Return `config` with every `a.b=c` applied, in order.

    `c` is JSON (`3`, `1e-3`, `true`, `null`, `["a", "b"]`, `{"factor": 40}`); a text setting takes it as it stands,
    so `runtime.device=cpu` needs no quotes. An object for a whole group changes the settings it names and leaves the
    others of the group alone. Settings below a group that is absent make it, its other settings at their defaults:
    `model.rope_scaling.factor=40`.

    The record is checked once, after the last assignment, so that settings which bind one another may be changed
    together.

    Raises:
        ConfigError: an assignment without '=', an unknown key (named with its nearest neighbour), a value of the wrong
            type, or values that do not go together.
    """
    values = to_dict(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"cannot read the setting '{assignment}'; write it as name=value, such as runtime.seed=1")
        _assign(values, cls=type(config), key=key.strip(), text=text.strip())
    return from_dict(type(config), values)


def _assign(values: dict[str, Any], *, cls: type, key: str, text: str) -> None:
    """Put one value into the nested dict of a whole config."""
    *parents, last = key.split(".")
    path = ""
    for name in parents:
        hint = _hint(cls, name=name, path=path)
        group = group_class(hint)
        path = join(path, name)
        if group is None:
            raise ConfigError(f"unknown key '{key}'; '{path}' is a single setting and has no parts")
        if values[name] is None:
            values[name] = to_dict(group())
        values, cls = values[name], group
    hint = _hint(cls, name=last, path=path)
    value = _parse(text, hint=hint)
    group = group_class(hint)
    if group is None or value is None:
        values[last] = value
        return
    if not isinstance(value, dict):
        names = list(type_hints(group))
        raise ConfigError(
            f"'{key}' is a group of settings ({', '.join(names)}); set one of them, such as {key}.{names[0]}={text}, "
            f'or several at once with {key}={{"{names[0]}": ...}}'
        )
    if values[last] is None:
        values[last] = to_dict(group())
    for name, part in value.items():
        _hint(group, name=name, path=key)
        _merge(values[last], name=name, part=part)


def _merge(values: dict[str, Any], *, name: str, part: Any) -> None:
    if isinstance(part, dict) and isinstance(values.get(name), dict):
        for inner_name, inner in part.items():
            _merge(values[name], name=inner_name, part=inner)
    else:
        values[name] = part


def _hint(cls: type, *, name: str, path: str) -> Any:
    hints = type_hints(cls)
    if name not in hints:
        raise ConfigError(unknown_key_message(cls, key=name, path=path))
    return hints[name]


def _parse(text: str, *, hint: Any) -> Any:
    """Read the right-hand side: JSON where it is JSON, and bare text otherwise."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if hint is str and not isinstance(value, str) else value
