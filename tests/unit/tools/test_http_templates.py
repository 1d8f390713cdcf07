"""How arguments and secrets get into a request, and where they cannot get."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from agentray.config.tool_settings import HttpToolSettings
from agentray.errors import ConfigError, ToolError
from agentray.tools.exchange import (
    HttpRequest,
    header_problem,
    may_repeat,
    redirected,
    retry_after_s,
)
from agentray.tools.hosts import parse_url
from agentray.tools.http_tools import template_of
from agentray.tools.secrets import Secrets

SECRETS = Secrets({"TOKEN": SecretStr("tok:12/34+x"), "PART": SecretStr("tok:12")})


def template(**settings: Any) -> tuple[Any, dict[str, Any]]:
    base = {"description": "d", "url": "https://api.example.com/items/{id}"}
    return template_of(
        HttpToolSettings.model_validate(base | settings), SECRETS, key="tools.http.x"
    )


def request(arguments: dict[str, Any], **settings: Any) -> HttpRequest:
    return template(**settings)[0].request(arguments, SECRETS, "key")


def any_of(*names: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {} for name in names}}


def test_arguments_are_encoded_where_they_stand() -> None:
    found = request(
        {"id": "a/b c?d#e%2f", "q": "x&y=z", "tags": ["a", "b&"]},
        query={"q": "{q}", "tag": "{tags}", "fixed": "1 2", "absent": "{none}"},
        parameters=any_of("id", "q", "tags", "none"),
    )
    path = "https://api.example.com/items/a%2Fb%20c%3Fd%23e%252f"
    assert found.url == f"{path}?q=x%26y%3Dz&tag=a&tag=b%26&fixed=1%202"


@pytest.mark.parametrize("value", ["..", ".", "../x", "a/../b", "..\\x", "x/.."])
def test_an_argument_cannot_lead_to_another_path(value: str) -> None:
    with pytest.raises(ToolError, match="another path"):
        request({"id": value})


def test_dots_within_a_name_stay() -> None:
    assert request({"id": "..a.b.."}).url.endswith("/items/..a.b..")


def test_an_empty_part_of_a_path_is_refused() -> None:
    with pytest.raises(ToolError, match="id may not be empty"):
        request({"id": ""})


def test_secrets_are_put_in_by_name_and_never_by_an_argument() -> None:
    found = request(
        {"id": "${secret:TOKEN}"},
        headers={"Authorization": "Bearer ${secret:TOKEN}", "X-Id": "{id}"},
        query={"key": "${secret:TOKEN}"},
    )
    headers = dict(found.headers)
    assert headers["Authorization"] == "Bearer tok:12/34+x"
    assert headers["X-Id"] == "${secret:TOKEN}"
    assert found.url.endswith("/items/%24%7Bsecret%3ATOKEN%7D?key=tok%3A12%2F34%2Bx")


def test_a_body_has_arguments_with_their_types() -> None:
    found = request(
        {"id": "1", "n": 2, "list": [1, {"a": None}], "name": "Ann"},
        method="POST",
        body={"n": "{n}", "list": "{list}", "text": "Hi {name}, {n}", "absent": "{x}", "k": [1]},
        parameters=any_of("id", "n", "list", "name", "x"),
    )
    assert json.loads(found.body or b"") == {
        "n": 2,
        "list": [1, {"a": None}],
        "text": "Hi Ann, 2",
        "k": [1],
    }
    assert dict(found.headers)["Idempotency-Key"] == "key"


def test_arguments_that_no_template_names_go_where_the_method_has_them() -> None:
    parameters = any_of("id", "n")
    assert request({"id": "1", "n": True}, parameters=parameters).url.endswith("?n=true")
    posted = request({"id": "1", "n": True}, parameters=parameters, method="POST")
    assert posted.body == b'{"n":true}'


def test_the_schema_of_a_template_is_its_places() -> None:
    _, parameters = template(query={"q": "{q}"})
    assert parameters["required"] == ["id", "q"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"url": "https://{host}/x"}, "nothing to fill in the host"),
        ({"url": "https://a.{b}.c/x"}, "nothing to fill in the host"),
        ({"url": "https://${secret:TOKEN}/x"}, "nothing to fill in the host"),
        ({"url": "ftp://a/x"}, "nothing to fill in the host"),
        ({"url": "https://0x7f.1/"}, "a number for a host"),
        ({"url": "https://a/ b"}, "have to be encoded"),
        ({"headers": {"Host": "x"}}, "not for tools to set"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "not for tools to set"),
        ({"headers": {"Proxy-Authorization": "x"}}, "not for tools to set"),
        ({"headers": {"X y": "x"}}, "is no name of a header"),
        ({"headers": {"X": "a\r\nB: c"}}, "cannot be in one"),
        ({"headers": {"X": "${secret:NONE}"}}, "there is no secret 'NONE'"),
        ({"method": "POST", "body": {"a": "${secret:TOKEN}"}}, "the query and headers alone"),
        ({"parameters": any_of("other")}, "is not in the properties"),
        ({"method": "POST", "body": {}, "parameters": any_of("id", "x")}, "are in no template"),
    ],
)
def test_a_template_that_cannot_be_sent_names_its_key(
    settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"tools\.http\.x.*{problem}"):
        template(**settings)


@pytest.mark.parametrize("value", ["a\r\nEvil: 1", "a\nb", "a\0b", "a\x7f", "\ud800"])
def test_an_argument_cannot_split_a_header(value: str) -> None:
    found = request({"id": "1", "h": value}, headers={"X-H": "{h}"}, parameters=any_of("id", "h"))
    assert header_problem(found.headers) is not None


def test_requests_say_who_asks_unless_the_operator_does() -> None:
    found = dict(request({"id": "1"}, parameters=any_of("id")).headers)
    assert found["User-Agent"] == "agentray"
    assert found["Accept"].startswith("application/json")
    own = {"user-agent": "shop/1", "accept": "text/csv"}
    found = dict(request({"id": "1"}, headers=own, parameters=any_of("id")).headers)
    assert found == own


# Secrets that come back


@pytest.mark.parametrize(
    "text",
    [
        "tok:12/34+x",
        "a=tok%3A12%2F34%2Bx&",
        "tok:12%2F34%2Bx",
        r'{"echo": "tok:12\/34+x"}',
        base64.b64encode(b"tok:12/34+x").decode(),
        base64.b64encode(b"u:tok:12/34+x").decode(),
        base64.b64encode(b"us:tok:12/34+x").decode(),
        "a=tok%3a12%2f34%2bx&",
        r"tok:12\u002F34\u002bx",
        r"tok\u003a12\u002f34\u002Bx",
        quote(base64.b64encode(b"tok:12/34+x").decode(), safe=""),
    ],
)
def test_a_secret_is_taken_out_however_it_is_encoded(text: str) -> None:
    found = SECRETS.redact(f"before {text} after")
    assert "[secret TOKEN]" in found
    assert found.startswith("before ")
    assert "12" not in found


@pytest.mark.parametrize("shift", range(3))
def test_a_secret_is_taken_out_of_base64_of_both_alphabets(shift: int) -> None:
    secrets = Secrets({"KEY": SecretStr("~~??>>~~??>>")})
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        found = secrets.redact("before " + encode(b"u" * shift + b"~~??>>~~??>>").decode())
        assert "[secret KEY]" in found


@pytest.mark.parametrize(
    "text", ["na%C3%AFve-ké%", "na%c3%afve-k%c3%a9%25", r"na\u00efve-k\u00E9%"]
)
def test_a_secret_with_more_than_ascii_is_taken_out(text: str) -> None:
    secrets = Secrets({"A": SecretStr("other-one"), "KEY": SecretStr("naïve-ké%")})
    assert secrets.redact(f"<{text}>") == "<[secret KEY]>"
    for size in range(3, len(text)):
        assert secrets.redact(f"<{text[:size]}", cut=True) == "<"


def test_a_secret_that_the_cut_hit_is_taken_out_too() -> None:
    for size in range(1, len("tok:12/34+x")):
        cut = SECRETS.redact("text " + "tok:12/34+x"[:size], cut=True)
        assert cut == "text "


def test_a_secret_too_short_to_be_found_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer than 6"):
        Secrets({"S": SecretStr("abc")}).value("S")


# Repeating and redirecting


@pytest.mark.parametrize(
    ("method", "status", "asked", "expected"),
    [
        ("GET", 503, None, True),
        ("PUT", 502, None, True),
        ("GET", 504, None, True),
        ("GET", 500, None, False),
        ("GET", 404, 1.0, False),
        ("POST", 503, None, False),
        ("POST", 503, 1.0, True),
        ("POST", 429, 0.0, True),
        ("POST", 502, 1.0, False),
    ],
)
def test_only_what_does_no_harm_is_repeated(
    method: str, status: int, asked: float | None, expected: bool
) -> None:
    assert may_repeat(method, status, asked) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("120", 120.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 60.0),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value, 1445412420.0) == expected


@pytest.mark.parametrize(
    ("status", "method", "location", "expected"),
    [
        (302, "POST", "/next", ("GET", {"authorization", "accept"}, None)),
        (303, "PUT", "/next", ("GET", {"authorization", "accept"}, None)),
        (307, "POST", "/next", ("POST", {"authorization", "accept", "content-type"}, b"{}")),
        (302, "GET", "https://b.example/", ("GET", {"accept", "content-type"}, b"{}")),
        (302, "GET", "http://a.example/", ("GET", {"accept", "content-type"}, b"{}")),
        (302, "GET", "https://a.example:8443/", ("GET", {"accept", "content-type"}, b"{}")),
    ],
)
def test_a_redirect_takes_secrets_to_the_same_origin_alone(
    status: int, method: str, location: str, expected: tuple[str, set[str], bytes | None]
) -> None:
    headers = (("Accept", "x"), ("Authorization", "s"), ("Content-Type", "application/json"))
    asked = HttpRequest(method, "https://a.example/", headers, b"{}")
    origin, url = parse_url(asked.url)
    found = redirected(asked, origin, url, status, location, SECRETS)
    assert (found.method, {name.lower() for name, _ in found.headers}, found.body) == expected


@pytest.mark.parametrize("value", ["tok:12/34+x", "agent tok%3a12%2F34%2Bx"])
def test_a_secret_in_a_header_that_others_get_stays_with_its_origin(value: str) -> None:
    asked = HttpRequest("GET", "https://a.example/", (("User-Agent", value), ("Accept", "x")))
    origin, url = parse_url(asked.url)
    near = redirected(asked, origin, url, 302, "/next", SECRETS)
    assert near.headers == asked.headers
    far = redirected(asked, origin, url, 302, "https://b.example/", SECRETS)
    assert far.headers == (("Accept", "x"),)


def test_a_requests_size_is_that_of_all_that_the_tool_put_into_it() -> None:
    asked = HttpRequest("PUT", "https://a.example/", (("X-A", "é"),), b"{}")
    assert asked.size_bytes == len("PUT") + len("https://a.example/") + len("X-A") + 2 + 2
