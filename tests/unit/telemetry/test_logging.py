import json
import logging

import pytest

from agentray.config.settings import LogSettings
from agentray.telemetry.logging import configure_logging, get_logger

log = get_logger("agentray.sessions.example")


@pytest.fixture(autouse=True)
def _restored():
    root, ours = logging.getLogger(), logging.getLogger("agentray")
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


def test_json_lines_hold_the_event_the_bound_ids_and_the_fields(capsys):
    configure_logging(LogSettings(format="json"))
    log.bind(session="s-1", epoch=3).bind(epoch=4).info("session_claimed", waited_s=0.5, odd={1})
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert abs(record.pop("at") - 1_800_000_000) < 1_000_000_000
    assert record == {
        "level": "info",
        "logger": "agentray.sessions.example",
        "event": "session_claimed",
        "session": "s-1",
        "epoch": 4,
        "waited_s": 0.5,
        "odd": "{1}",
    }


def test_a_value_from_outside_cannot_forge_a_console_line_or_field(capsys):
    configure_logging(LogSettings(format="console"))
    log.info("session_claimed", session="x y=1\nforged", user="", epoch=3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'session_claimed session="x y=1\nforged" user="" epoch=3')


@pytest.mark.parametrize("form", ["console", "json"])
def test_an_exception_is_logged_with_its_traceback(capsys, form):
    configure_logging(LogSettings(format=form))
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("sweep_failed", attempt=2)
    err = capsys.readouterr().err
    assert "sweep_failed" in err
    assert "ValueError: why" in err
    assert "test_logging.py" in err


def test_configuring_again_replaces_level_and_form(capsys):
    configure_logging(LogSettings(level="debug"))
    configure_logging(LogSettings(level="warning", format="json"))
    log.info("unseen")
    log.error("seen", share="100 %s")
    logging.getLogger("elsewhere").info("unseen")
    logging.getLogger("elsewhere").warning("seen %d", 2)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["seen", "seen 2"]
