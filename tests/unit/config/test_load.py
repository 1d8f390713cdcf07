import re
from pathlib import Path

import pytest

from agentray.config import Settings, load_settings
from agentray.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "agentray.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path | None, env: dict[str, str] | None = None, **kwargs) -> list[str]:
    """The problems that stop the start, with the file shown as FILE."""
    with pytest.raises(ConfigError) as caught:
        load_settings(path, env or {}, **kwargs)
    return [line.replace(str(path), "FILE") for line in caught.value.message.splitlines()]


def test_without_a_file_everything_has_its_default():
    assert load_settings(None, {"HOME": "/"}) == Settings()


def test_an_empty_file_is_no_different_from_none(write):
    assert load_settings(write("# nothing yet\n"), {}) == Settings()


def test_each_kind_of_mistake_is_named_with_file_key_found_and_expected(write):
    path = write(
        """
        http: {prot: 80, port: 99999, host: 5}
        postgres: {url: 1234567}
        redis:
        sessions: {beat_s: fast, hosts: true, term_s: .inf}
        models: {endpoints: {m: {api_key: k}}}
        agents: {a: {tools: echo}, b: {tools: [echo, 1]}}
        log: {level: loud}
        """
    )
    assert sorted(problems(path)) == [
        "FILE: agents.a.tools: found 'echo'; expected a list of texts",
        "FILE: agents.b.tools.1: found 1; expected text",
        "FILE: http.host: found 5; expected text",
        "FILE: http.port: found 99999; expected a whole number from 1 to 65535",
        (
            "FILE: http.prot: unknown key; did you mean port? expected one of host, port, "
            "max_body_bytes, stream_write_timeout_s, keepalive_s"
        ),
        "FILE: log.level: found 'loud'; expected one of debug, info, warning, error",
        "FILE: models.endpoints.m.url: is missing; expected text",
        "FILE: postgres.url: found a value that is not shown; expected text, or null",
        (
            "FILE: redis: found nothing; expected a section with url, timeout_s, hot_ttl_s; leave "
            "the key out for the defaults"
        ),
        "FILE: sessions.beat_s: found 'fast'; expected a number above 0",
        "FILE: sessions.hosts: found true; expected a whole number of at least 1, or null",
        "FILE: sessions.term_s: found inf; expected a number above 0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http: [1", "FILE: line 1, column 9: not valid YAML: .*"),
        ("http: {}\nhttp: {}", "FILE: line 2, column 1: .*'http' is there twice"),
        ("http: {? {a: b} : c}", "FILE: line 1, column 10: .*a key must be text"),
        ("http: &a [*a]", "FILE: http: nested too deeply"),
        ("[" * 5000, "FILE: nested too deeply"),
        ("- http", "FILE: found a list; expected a section with data_dir, .*"),
        ("agents: {1: {}}", "FILE: agents.1: found 1 as a key; expected text.*"),
        ("x: !!python/name:os.system ''", "FILE: .*could not determine a constructor.*"),
        ("data_dir: 2026-13-01", "FILE: not valid YAML: month.*"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_clear_error(write, text, message):
    (line,) = problems(write(text))
    assert re.fullmatch(message, line)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "latin").write_bytes(b"data_dir: caf\xe9")
    assert problems(tmp_path / "none") == ["FILE: there is no such file"]
    assert problems(tmp_path) == ["FILE: cannot be read: Is a directory"]
    assert problems(tmp_path / "latin") == ["FILE: expected text in UTF-8"]


def test_variables_of_the_environment_replace_references_in_texts(write):
    path = write(
        """
        data_dir: ${HOME}/rays/$${HOME}/$HOME
        http: {port: "${PORT}"}
        models: {endpoints: {m: {url: "https://${HOST}/v1", api_key: "${KEY}"}}}
        """
    )
    settings = load_settings(path, {"HOME": "/root", "PORT": "81", "HOST": "h", "KEY": "k${X}"})
    assert settings.data_dir == "/root/rays/${HOME}/$HOME"
    assert settings.http.port == 81
    endpoint = settings.models.endpoints["m"]
    assert endpoint.url == "https://h/v1"
    assert endpoint.api_key is not None
    assert endpoint.api_key.get_secret_value() == "k${X}"  # values are not looked into again


def test_a_missing_variable_stops_the_start_and_is_named(write):
    path = write(
        """
        postgres: {url: "${PG}"}
        redis: {url: "${REDIS:-redis://x}"}
        models: {endpoints: {m: {url: "http://x", api_key: "${KEY}"}}}
        """
    )
    assert problems(path, {"KEY": ""}) == [
        "FILE: postgres.url: expected the environment variable PG, which is not set",
        "FILE: redis.url: found ${REDIS:-redis://x}; expected ${VARIABLE} and nothing more",
        "FILE: models.endpoints.m.api_key: expected the environment variable KEY, which is empty",
    ]


def test_no_message_shows_a_secret_or_a_value_from_the_environment(write):
    path = write(
        """
        http: {port: "${KEY}"}
        postgres: {url: "mysql://u:s3cret@db"}
        redis: {url: ["s3cret"], s3: s3cret}
        models: {endpoints: {m: {url: "ftp://u:s3cret@x", api_key: {a: s3cret}}}}
        """
    )
    lines = problems(path, {"KEY": "s3cret", "AGENTRAY_RAY__DASHBOARD": "x: [s3cret"})
    assert len(lines) == 5
    assert "s3cret" not in "".join(lines)
    assert "FILE: http.port: found the value of ${KEY}; expected a whole number" in "\n".join(lines)
    lines = problems(write("postgres: {url: 'mysql://u:s3cret@db'}"))
    assert lines == [
        (
            "FILE: postgres.url: found an address of another kind; "
            "expected postgresql:// or postgres://…"
        )
    ]


def test_overrides_win_over_the_file_and_flags_win_over_overrides(write):
    path = write(
        """
        http: {port: 1}
        models: {endpoints: {gpt-4o.mini: {url: "http://x", api_key: "${UNSET}"}}}
        """
    )
    env = {
        "AGENTRAY_DATA_DIR": "/d",
        "AGENTRAY_HTTP__PORT": "2",
        "AGENTRAY_HTTP__HOST": "::1",
        "AGENTRAY_RAY__ADDRESS": "",
        "AGENTRAY_RAY__DASHBOARD": "true",
        "AGENTRAY_MODELS__ENDPOINTS__GPT_4O_MINI__API_KEY": "123: #4",
        "AGENTRAY_AGENTS__WRITER": "{tools: [], max_steps: 3}",
        "AGENTRAY_TEST_POSTGRES": "anything",
    }
    flags = {"http": {"port": 3}, "models": {"endpoints": {"tiny": {"url": "http://t"}}}}
    settings = load_settings(path, env, flags=flags)
    assert settings.data_dir == "/d"
    assert (settings.http.host, settings.http.port) == ("::1", 3)
    assert settings.ray.address is None
    assert settings.ray.dashboard
    assert list(settings.models.endpoints) == ["gpt-4o.mini", "tiny"]
    key = settings.models.endpoints["gpt-4o.mini"].api_key
    assert key is not None
    assert key.get_secret_value() == "123: #4"
    assert (settings.agents["writer"].tools, settings.agents["writer"].max_steps) == ((), 3)


def test_a_bad_override_is_an_error_that_names_the_variable():
    env = {
        "AGENTRAY_HTTP_PORT": "1",
        "AGENTRAY_HTTP__PORT__X": "1",
        "AGENTRAY_SESSIONS__HOSTS": "many",
        "AGENTRAY_SESSIONS__IDLE_S": "[1",
        "AGENTRAY_SPEED": "1",
    }
    variable = "environment variable AGENTRAY_"
    assert problems(None, env) == [
        f"{variable}HTTP_PORT: names no setting; did you mean AGENTRAY_HTTP__PORT?",
        f"{variable}HTTP__PORT__X: names no setting; did you mean AGENTRAY_HTTP__PORT?",
        (
            f"{variable}SESSIONS__IDLE_S: sessions.idle_s: found no valid YAML; expected a number "
            "above 0"
        ),
        f"{variable}SPEED: names no setting; see docs/configuration.md for their names",
        (
            f"{variable}SESSIONS__HOSTS: sessions.hosts: found 'many'; expected a whole number "
            "of at least 1, or null"
        ),
    ]


def test_an_override_below_a_mistake_in_the_file_does_not_hide_it(write):
    assert problems(write("http: 5"), {"AGENTRAY_HTTP__PORT": "1"}) == [
        (
            "FILE: http: found 5; expected a section with host, port, max_body_bytes, "
            "stream_write_timeout_s, keepalive_s"
        )
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "sessions: {beat_s: 4}",
            "sessions.term_s: found 6; expected at least twice sessions.beat_s, 8",
        ),
        (
            "agents: {a: {model: gpt}}",
            "agents.a.model: found the unknown model 'gpt'; expected one of simulator",
        ),
        (
            "models: {default: simulator, endpoints: {m: {url: 'http://x'}}}",
            "models.default: found the unknown model 'simulator'; expected one of m",
        ),
        (
            "agents: {a: {tools: [echo, web]}}",
            "agents.a.tools: found the unknown tool 'web'; expected one of echo, python, shell",
        ),
        ("agents: {}", "agents: found none; expected at least one agent, or no such key at all"),
        (
            "models: {simulator: {enabled: false}}",
            "models: found no model; expected models.endpoints, models.serve or the simulator",
        ),
        (
            "models: {simulator: {enabled: true}, endpoints: {simulator: {url: 'http://x'}}}",
            (
                "models.endpoints.simulator: the built-in simulator has this name; "
                "expected another one"
            ),
        ),
        (
            "models: {serve: {m: {source: org/m, min_replicas: 0, affinity: prefix}}}",
            (
                "models.serve.m.affinity: found prefix; "
                "expected session, or min_replicas of at least 1"
            ),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(write, text, problem):
    assert problems(write(text)) == [f"FILE: {problem}"]


def test_the_schema_of_an_agents_answers_is_checked_where_it_can_be(write):
    path = write("agents: {a: {output_schema: {type: thing}}, b: {output_schema: {}}, c: {}}")

    def schema_problem(schema):
        return f"is no schema: {schema}" if schema else None

    assert problems(path, schema_problem=schema_problem) == [
        "FILE: agents.a.output_schema: is no schema: {'type': 'thing'}"
    ]


@pytest.mark.parametrize(
    ("agent", "key"), [("model: vectors", "model"), ("models: [vectors]", "models")]
)
def test_an_agent_cannot_answer_with_an_embedding_model(write, agent, key):
    path = write(
        f"""
        models:
          endpoints:
            chat: {{url: "http://h/v1"}}
            vectors: {{url: "http://h/v1", card: {{kind: embedding}}}}
        agents: {{a: {{{agent}}}}}
        """
    )
    assert problems(path) == [
        f"FILE: agents.a.{key}: found the unknown model 'vectors'; expected one of chat"
    ]
