"""Put secrets by their names into what is sent, and take them out of all that comes back."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from urllib.parse import quote, quote_plus

from pydantic import SecretStr

from agentray.errors import ConfigError

__all__ = ["SECRET", "Secrets"]

SECRET = re.compile(r"\$\{secret:([^}]*)\}")
"""Where a secret stands in a template; its group is the secret's name."""

# What is shorter is found in texts that have nothing to do with it.
_SHORTEST = 6


class Secrets:
    """The operator's secrets by name."""

    def __init__(self, values: Mapping[str, SecretStr]) -> None:
        self._values = {name: value.get_secret_value() for name, value in values.items()}
        forms = {
            form: name
            for name, value in self._values.items()
            for form in _forms(value)
            if len(form) >= _SHORTEST
        }
        # The longest first: one may be a part of another.
        self._forms = dict(sorted(forms.items(), key=lambda item: -len(item[0])))
        self._pattern = re.compile("|".join(map(re.escape, self._forms))) if forms else None

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

    def redact(self, text: str, *, cut: bool = False) -> str:
        """Return a text with the name of each secret in its place, however it is encoded.

        With ``cut``, the text ends where a secret may have begun: its beginning goes too.
        """
        if self._pattern is None:
            return text
        if cut:
            text = text.rstrip("\ufffd")
            begun = max(
                (
                    size
                    for form in self._forms
                    for size in range(1, len(form))
                    if text.endswith(form[:size])
                ),
                default=0,
            )
            text = text[: len(text) - begun]
        return self._pattern.sub(lambda match: f"[secret {self._forms[match[0]]}]", text)


def _forms(value: str) -> set[str]:
    """Return what a secret looks like in addresses, JSON and headers of Basic authorization."""
    found = {value, quote_plus(value), *(quote(value, safe=safe) for safe in ("", "/", ":"))}
    for ascii_only in (True, False):
        escaped = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        found |= {escaped, escaped.replace("/", "\\/")}
    # A user's name in front shifts it by up to two bytes; the ends depend on what is beside them.
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + value.encode()).decode().rstrip("=")
        found.add(encoded[-(-shift * 8 // 6) : -1])
    return found
