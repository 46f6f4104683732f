"""Settings from defaults, then a YAML file, then flags: fills the dataclasses of arguments.py.

Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any


def default_of(f) -> Any:
    """Default of a dataclass field."""
    return f.default_factory() if f.default is MISSING else f.default


def _convert(source: str, name: str, value: Any, hint: Any) -> Any:
    """A YAML value as the type of its field. YAML reads 1e-3 as a string, and people write it."""
    kinds = [t for t in typing.get_args(hint) if t is not type(None)] or [hint]
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if value is None and optional:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is list:
        values = value if isinstance(value, list) else [value]
        return [_convert(source, name, v, typing.get_args(kind)[0]) for v in values]
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if (
        kind in (int, float)
        and isinstance(value, str | int | float)
        and not isinstance(value, bool)
    ):
        try:
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
        except ValueError:
            pass
    raise ValueError(f"{source}: `{name}` must be of type {kind.__name__}, got {value!r}.")


def read_yaml(path: str, cls: type) -> dict[str, Any]:
    """Settings from a YAML file, checked against the fields of `cls`.

    Raises:
        FileNotFoundError, ValueError: no such file, no mapping, an unknown key (with the nearest
            known one), a value of the wrong type.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no configuration file {path}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            way = (
                f"did you mean `{near[0]}`?"
                if near
                else f"known keys are {', '.join(sorted(known))}."
            )
            raise ValueError(f"{path}: unknown key `{key}`; {way}")
    return {key: _convert(path, key, value, hints[key]) for key, value in content.items()}


def merge(cls: type, config: str | None, flags: dict[str, Any]):
    """An instance of `cls`: defaults, then the YAML file `config`, then the flags that were
    given (not None).
    """
    settings = read_yaml(os.path.expanduser(config), cls) if config else {}
    settings.update({name: value for name, value in flags.items() if value is not None})
    return cls(**settings)
