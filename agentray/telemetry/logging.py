"""Log events: a constant name and fields, for people or as JSON lines.

``log = get_logger(__name__)``, then ``log.info("session_claimed", session=…, epoch=…)``. Never
prompts, outputs or secrets.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from agentray.config.settings import LogSettings

__all__ = ["Logger", "configure_logging", "get_logger"]


class Logger:
    """Logs events with the fields that were bound to it and those of the call."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: dict[str, Any]) -> None:
        self._logger = logger
        self._bound = bound

    def bind(self, **ids: Any) -> Logger:
        """Return a logger that adds ``ids`` to each event."""
        return Logger(self._logger, {**self._bound, **ids})

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, fields, trace=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], *, trace: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": {**self._bound, **fields}}
            # As an argument, so that a % in the event is no format.
            self._logger.log(level, "%s", event, extra=extra, exc_info=trace, stacklevel=3)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _Console(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(
            # A value of the outside must not look like a line or a field of its own.
            f" {key}={value if _plain(text := str(value)) else json.dumps(text)}"
            for key, value in getattr(record, "fields", {}).items()
        )
        level = record.levelname.lower()
        line = f"{clock} {level:<7} {record.name} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(text: str) -> bool:
    return text.isprintable() and text != "" and not set(text) & set(' "=')


class _Handler(logging.StreamHandler[Any]):
    """Ours, so that configuring again replaces it and leaves others' handlers alone."""


def get_logger(name: str) -> Logger:
    """Return the logger of a module: ``get_logger(__name__)``."""
    return Logger(logging.getLogger(name), {})


def configure_logging(settings: LogSettings) -> None:
    """Send this process's log to stderr as configured.

    agentray logs from ``settings.level`` up, everything else warnings and worse. Calling it
    again replaces what it set before.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_JsonLines() if settings.format == "json" else _Console())
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("agentray").setLevel(settings.level.upper())
