"""Find a setting by its key and say in words what it takes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from agentray.config.settings import Settings

__all__ = ["ANY_NAME", "ROOT", "Setting", "find", "leaves", "setting_of"]

ANY_NAME = "<name>"
"""Stands for the key of an entry that the user names, in paths that ``leaves`` yields."""


@dataclass(frozen=True)
class Setting:
    """What one key takes: ``kind`` is the type without None, ``limits`` are its constraints."""

    kind: Any
    limits: tuple[Any, ...] = ()
    optional: bool = False
    field: FieldInfo | None = None

    @property
    def section(self) -> type[BaseModel] | None:
        """The model, where the key is a section."""
        if isinstance(self.kind, type) and issubclass(self.kind, BaseModel):
            return self.kind
        return None

    @property
    def entries(self) -> Setting | None:
        """What each entry takes, where the key holds entries under names of the user's choice."""
        if get_origin(self.kind) is not dict or self.free:
            return None
        return _annotated(get_args(self.kind)[1])

    @property
    def free(self) -> bool:
        """Whether anything may stand here: what is below it is another program's to judge."""
        return self.kind is Any or (get_origin(self.kind) is dict and get_args(self.kind)[1] is Any)

    @property
    def secret(self) -> bool:
        """Whether the value must not be shown."""
        return self.kind is SecretStr

    @property
    def text(self) -> bool:
        """Whether the value is any text."""
        return self.kind in (str, SecretStr)

    def child(self, part: str | int) -> Setting | None:
        """Return the setting below this one, or None if there is none."""
        if self.section is not None:
            field = self.section.model_fields.get(str(part))
            return None if field is None else setting_of(field)
        if self.entries is not None:
            return self.entries
        if self.free:
            return Setting(Any)
        if get_origin(self.kind) is tuple:
            return _annotated(get_args(self.kind)[0])
        return None

    def expected(self) -> str:
        """Return what may stand here, e.g. ``a whole number from 1 to 65535``."""
        return self._words() + (", or null" if self.optional else "")

    def _words(self) -> str:
        if self.section is not None:
            return "a section with " + ", ".join(self.section.model_fields)
        if self.free:
            return "anything" if self.kind is Any else "a section"
        if self.entries is not None:
            return "a section of named entries"
        if get_origin(self.kind) is tuple:
            return "a list of texts"
        if get_origin(self.kind) is Literal:
            return "one of " + ", ".join(map(str, get_args(self.kind)))
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        return words.get(self.kind, "text") + self._range()

    def _range(self) -> str:
        bounds = {
            name: getattr(limit, name)
            for limit in self.limits
            for name in ("gt", "ge", "le")
            if getattr(limit, name, None) is not None
        }
        if "ge" in bounds and "le" in bounds:
            return f" from {bounds['ge']} to {bounds['le']}"
        if "ge" in bounds:
            return f" of at least {bounds['ge']}"
        return f" above {bounds['gt']}" if "gt" in bounds else ""


def _annotated(
    annotation: Any, limits: Sequence[Any] = (), field: FieldInfo | None = None
) -> Setting:
    found: list[Any] = list(limits)
    optional = False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *metadata = get_args(annotation)
            for item in metadata:
                found.extend(item.metadata if isinstance(item, FieldInfo) else [item])
        elif origin in (Union, types.UnionType):
            optional = True
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        else:
            return Setting(annotation, tuple(found), optional, field)


def setting_of(field: FieldInfo) -> Setting:
    """Return what a model's field takes."""
    return _annotated(field.annotation, field.metadata, field)


ROOT = Setting(Settings)


def find(path: Sequence[str | int]) -> Setting | None:
    """Return the setting at a path from the root, or None if there is no such key."""
    setting: Setting | None = ROOT
    for part in path:
        if setting is None:
            return None
        setting = setting.child(part)
    return setting


def leaves(setting: Setting = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every single value, with ``<name>`` for names of the user's choice."""
    if setting.section is not None:
        for name, field in setting.section.model_fields.items():
            yield from leaves(setting_of(field), (*path, name))
    elif setting.entries is not None:
        yield from leaves(setting.entries, (*path, ANY_NAME))
    else:
        yield path
