"""Settings to JSON and back, refusing every key and every value that is not understood.

`config.json` of a run folder is written from here and read back as the same record: what repeats a run is this file.
"""

import difflib
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dsv3.config.run import PretrainConfig
from dsv3.errors import ConfigError

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain data: one dict for each record, in the order of its fields; tuples become lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def from_dict(cls: type[Config], values: dict[str, Any], *, path: str = "") -> Config:
    """Build a config from plain data, checking every key and every type.

    Keys that are left out take their default. A whole number may be written as a float (`1e9`), since JSON of other
    programs often is; nothing else is converted, so `"8"` is not 8 and `true` is not 1.

    `path` is the dotted name of the record within a larger one, for the error messages.

    Raises:
        ConfigError: an unknown key (named with its nearest neighbour), a value of the wrong type, or values that
            the record itself refuses.
    """
    hints = type_hints(cls)
    required = {field.name for field in _fields(cls) if field.default is MISSING and field.default_factory is MISSING}
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(unknown_key_message(cls, key=key, path=path))
        read[key] = _read(value, hint=hints[key], path=join(path, key))
    if missing := sorted(required - read.keys()):
        raise ConfigError(f"{path or cls.__name__} lacks {', '.join(repr(name) for name in missing)}")
    try:
        return cls(**read)
    except ConfigError as error:
        raise ConfigError(f"in '{path}': {error}" if path else str(error)) from None


def write_config(config: Any, *, path: Path) -> None:
    """Write a config as JSON, so that a reader finds either the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(to_dict(config), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # whatever kept us from writing may keep us from tidying up; the first error counts
            partial.unlink()
        raise ConfigError(f"cannot write the settings to {path}: {error.strerror}") from error


def read_config(path: Path) -> PretrainConfig:
    """Read the `config.json` that a run wrote, or one like it written by hand.

    Raises:
        ConfigError: the file is missing, is not JSON, or holds something other than the settings of a run; a
            published model's `config.json` is recognised and named as such.
    """
    values = read_json(path)
    if "model_type" in values or "architectures" in values:
        raise ConfigError(f"{path} is the config.json of a published model; the settings of a run are wanted")
    try:
        return from_dict(PretrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; a ConfigError says what is wrong with any other."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # also what undecodable bytes and absurdly long numbers raise
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; settings are an object, {{...}}")
    return values


def leaves(config: Any, *, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting; lists and absent groups count as one setting."""
    for field in fields(config):
        value = getattr(config, field.name)
        name = join(path, field.name)
        if is_dataclass(value):
            yield from leaves(value, path=name)
        else:
            yield name, value


def dotted_names(cls: type, *, path: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting and group of settings below a config class, absent groups included."""
    for name, hint in type_hints(cls).items():
        yield join(path, name)
        if (group := group_class(hint)) is not None:
            yield from dotted_names(group, path=join(path, name))


def type_hints(cls: Any) -> dict[str, Any]:
    """Return the annotation of each field of a config class."""
    return _resolved_hints(cls)


_resolved_hints = cache(get_type_hints)


def group_class(hint: Any) -> type | None:
    """Return the record that a field holds when it holds one, as `YarnConfig` for `YarnConfig | None`."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def unknown_key_message(cls: type, *, key: str, path: str) -> str:
    """Say that `key` is no setting of `cls`, which sits at the dotted `path`, and which one may have been meant."""
    siblings = difflib.get_close_matches(key, type_hints(cls), n=1)
    if siblings:
        return f"unknown key '{join(path, key)}'; did you mean '{join(path, siblings[0])}'?"
    # The right name may have been put into the wrong group, as `optim.peak` for `optim.learning_rate.peak`; look
    # below this group first, then everywhere.
    for names in (list(dotted_names(cls, path=path)), list(dotted_names(PretrainConfig))):
        by_last_part = {name.rpartition(".")[2]: name for name in reversed(names)}
        if near := difflib.get_close_matches(key, by_last_part, n=1, cutoff=0.7):
            return f"unknown key '{join(path, key)}'; did you mean '{by_last_part[near[0]]}'?"
    return f"unknown key '{join(path, key)}'; {f'{path!r} has' if path else 'there are'} {', '.join(type_hints(cls))}"


def join(path: str, name: str) -> str:
    """Append a name to a dotted path that may be empty."""
    return f"{path}.{name}" if path else name


def _fields(cls: Any) -> tuple[Any, ...]:
    return fields(cls)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _read(value: Any, *, hint: Any, path: str) -> Any:
    """Check one value against the annotation of its field."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        return _read(value, hint=next(option for option in get_args(hint) if option is not types.NoneType), path=path)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} = {value!r}; it must be a list, [...]")
        return tuple(_read(item, hint=get_args(hint)[0], path=f"{path}[{place}]") for place, item in enumerate(value))
    if is_dataclass(hint):
        assert isinstance(hint, type)
        if not isinstance(value, dict):
            raise ConfigError(f"{path} = {value!r}; it must be a group of settings, {{...}}")
        return from_dict(hint, value, path=path)
    return _READERS[hint](value, path)


def _read_bool(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{path} = {value!r}; it must be true or false")
    return value


def _read_int(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ConfigError(f"{path} = {value!r}; it must be a whole number")
    return int(value)


def _read_float(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{path} = {value!r}; it must be a finite number")
    return float(value)


def _read_str(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{path} = {value!r}; it must be text")
    return value


_READERS: dict[Any, Any] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}
