"""Put secrets by their names into what is sent, and take them out of all that comes back."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from pydantic import SecretStr

from agentray.errors import ConfigError

__all__ = ["SECRET", "Secrets"]

SECRET = re.compile(r"\$\{secret:([^}]*)\}")
"""Where a secret stands in a template; its group is the secret's name."""

# What is shorter is found in texts that have nothing to do with it.
_SHORTEST = 6
_JSON_ESCAPES = {'"': '\\"', "\\": "\\\\", "/": "\\/"}
_URL_SAFE = {"+": "-", "/": "_"}

_Form = Sequence[tuple[str, ...]]
"""A text, each of whose characters may be any of some."""


class Secrets:
    """The operator's secrets by name."""

    def __init__(self, values: Mapping[str, SecretStr]) -> None:
        self._values = {name: value.get_secret_value() for name, value in values.items()}
        found = [
            (form, name)
            for name, value in self._values.items()
            for form in _forms(value)
            if len(form) >= _SHORTEST
        ]
        # The longest first: one may be a part of another.
        found.sort(key=lambda item: -len(item[0]))
        self._forms = [form for form, _ in found]
        # As many groups as a form has ways to begin.
        self._names = [name for form, name in found for _ in form[0]]
        self._pattern = re.compile("|".join(map(_expression, self._forms))) if found else None

    def value(self, name: str) -> str:
        """Return a secret.

        Raises:
            ConfigError: there is none of this name, or it cannot be in a request.
        """
        value = self._values.get(name)
        if value is None:
            raise ConfigError(f"there is no secret {name!r} in tools.secrets")
        if len(value) < _SHORTEST:
            raise ConfigError(f"the secret {name!r} has fewer than {_SHORTEST} characters")
        if not value.isprintable():
            raise ConfigError(f"the secret {name!r} has characters that cannot be in a header")
        return value

    def within(self, text: str) -> bool:
        """Return whether a secret is in a text, as it is or encoded."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def redact(self, text: str, *, cut: bool = False) -> str:
        """Return a text with the name of each secret in its place, as it is or encoded: in
        percent encoding, JSON, or Base64, of either alphabet.

        With ``cut``, the text ends where a secret may have begun: its beginning goes too.
        """
        if self._pattern is None:
            return text
        if cut:
            text = text.rstrip("\ufffd")
            text = text[: min(_begun(text, form) for form in self._forms)]
        return self._pattern.sub(self._named, text)

    def _named(self, match: re.Match[str]) -> str:
        return f"[secret {self._names[(match.lastindex or 1) - 1]}]"


def _forms(value: str) -> Iterator[_Form]:
    """Yield what a secret looks like in texts, addresses and JSON, and in Base64 in these."""
    # Encoded first: of `%25` nothing is to be left.
    yield [(*_escaped(one), one) for one in value]
    # A user's name in front shifts it by up to two bytes; the ends depend on what is beside them.
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + value.encode()).decode().rstrip("=")
        kept = encoded[-(-shift * 8 // 6) : -1]
        yield [(*_escaped(one), one, *_URL_SAFE.get(one, "")) for one in kept]


def _escaped(one: str) -> Iterator[str]:
    """Yield what a character may be encoded as. Letters and digits of ASCII are left as they are
    by all that encode."""
    if one.isascii() and one.isalnum():
        return
    percent = quote(one, safe="") if one not in "-._~" else f"%{ord(one):02X}"
    units = one.encode("utf-16-be").hex()
    escapes = [units[at : at + 4] for at in range(0, len(units), 4)]
    yield from (percent, percent.lower())
    yield "".join(rf"\u{each}" for each in escapes)
    yield "".join(rf"\u{each.upper()}" for each in escapes)
    if one in _JSON_ESCAPES:
        yield _JSON_ESCAPES[one]
    if one == " ":
        yield "+"


def _expression(form: _Form) -> str:
    """Return the regular expression of a form, which ends in an empty group that tells it."""
    # Each alternative begins with a plain character: `re` passes over all places without one.
    rest = "".join(map(_alternatives, form[1:]))
    return "|".join(f"{re.escape(first)}{rest}()" for first in form[0])


def _alternatives(texts: Sequence[str]) -> str:
    escaped = list(map(re.escape, dict.fromkeys(texts)))
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"


def _begun(text: str, form: _Form) -> int:
    """Return where a form begins that the end of a text breaks off, or the text's length."""
    longest = sum(max(map(len, one)) for one in form)
    starts = range(max(0, len(text) - longest + 1), len(text))
    return next((start for start in starts if _breaks_off(text, start, form)), len(text))


def _breaks_off(text: str, start: int, form: _Form) -> bool:
    places = {start}
    for one in form:
        # Some places are reached in more than one way: `%25` is a percent sign, or three.
        following: set[int] = set()
        for place in places:
            for each in one:
                if text.startswith(each, place):
                    following.add(place + len(each))
                elif each.startswith(text[place:]):
                    return True
        if not following:
            return False
        places = following
    return False
