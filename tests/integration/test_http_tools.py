"""HTTP tools through the gateway against real sockets: what gets out, and what comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from agentray.clock import SystemClock
from agentray.config.settings import BreakerSettings, ToolsSettings
from agentray.errors import ConfigError, ToolError
from agentray.models.breaker import Breaker
from agentray.tools.runner import Ask
from agentray.tools.spec import Toolbox, ToolContext, ToolResult
from agentray.tools.spec_runner import SpecRunner
from agentray.tools.toolbox import open_toolbox

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SECRET = "the-operators-key"


class Api:
    """A server that answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.handler: Handler = _echo
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.connections: list[object] = []
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.connections.append(request.transport)
        self.bodies.append(await request.read())
        return await self.handler(request)


async def _echo(request: web.Request) -> web.StreamResponse:
    return web.json_response({"path": request.raw_path, "headers": dict(request.headers)})


def answers(*statuses: int, **options: Any) -> Handler:
    left = list(statuses)

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=left.pop(0) if len(left) > 1 else left[0], **options)

    return handler


def redirects(to: str, status: int = 302) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/end":
            return await _echo(request)
        return web.Response(status=status, headers={"Location": to})

    return handler


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    api = Api()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    api.port = runner.addresses[0][1]
    yield api
    await runner.cleanup()


class Place:
    """Tools with a name service of their own."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.names: dict[str, Sequence[str]] = {}
        self.looked_up: list[str] = []
        self.boxes: list[Toolbox] = []

    async def lookup(self, host: str, port: int) -> Sequence[str]:
        self.looked_up.append(host)
        if host not in self.names:
            raise OSError("there is no such name")
        return self.names[host]

    async def open(
        self,
        tool: dict[str, Any] | None = None,
        *,
        breaker: Any = None,
        others: dict[str, Any] | None = None,
        **gateway: Any,
    ) -> SpecRunner:
        """Return what runs the tool ``call``, at http://api.test, with the given settings."""
        self.names.setdefault("api.test", ["127.0.0.1"])
        origin = f"http://api.test:{self.api.port}"
        settings = ToolsSettings.model_validate(
            {
                "http": {
                    "call": {"description": "d", "url": f"{origin}/start"} | (tool or {}),
                    **(others or {}),
                },
                "secrets": {"KEY": SecretStr(SECRET)},
                "gateway": {"allow_private": [origin]} | gateway,
            }
        )
        box = await open_toolbox(
            settings,
            breaker=lambda _: breaker or Breaker(BreakerSettings()),
            clock=SystemClock(),
            lookup=self.lookup,
        )
        self.boxes.append(box)
        return SpecRunner(box, _no_slot)


async def _no_slot(tier: Any) -> Any:
    raise ToolError("no sandbox is needed here")


@pytest.fixture
async def place(api: Api) -> AsyncIterator[Place]:
    place = Place(api)
    yield place
    for box in place.boxes:
        await box.close()


async def call(runner: SpecRunner, tenant: str = "acme", **arguments: Any) -> ToolResult:
    body = json.dumps(arguments).encode()
    return await asyncio.wait_for(runner.run(Ask(tenant, "s", 1, "key", "call", body)), 20)


# Requests and answers


async def test_a_call_reaches_its_host_with_its_secret_and_not_the_model(
    api: Api, place: Place
) -> None:
    runner = await place.open(
        {
            "query": {"q": "{q}", "key": "${secret:KEY}"},
            "headers": {"Authorization": "Bearer ${secret:KEY}"},
        }
    )
    found = await call(runner, q="a b&c")
    (request,) = api.requests
    assert request.raw_path == f"/start?q=a%20b%26c&key={SECRET}"
    assert request.headers["Authorization"] == f"Bearer {SECRET}"
    assert request.headers["Host"] == f"api.test:{api.port}"
    assert found.status == "ok"
    assert SECRET not in found.output
    assert found.output.count("[secret KEY]") == 2


async def test_connections_are_kept(api: Api, place: Place) -> None:
    runner = await place.open()
    for _ in range(2):
        await call(runner)
    assert len(set(api.connections)) == 1


async def test_an_error_is_told_with_its_body_and_without_secrets(api: Api, place: Place) -> None:
    api.handler = answers(404, text=f"no {SECRET} here", reason="Gone")
    found = await call(await place.open())
    assert (found.status, found.reason) == ("error", "upstream")
    assert found.output == "HTTP 404 Gone\nno [secret KEY] here"


async def test_a_long_answer_is_cut_and_its_connection_is_not_used_again(
    api: Api, place: Place
) -> None:
    api.handler = answers(200, text="x" * 500_000)
    runner = await place.open(max_response_bytes=1_000)
    for _ in range(2):
        found = await call(runner)
        assert found.output.startswith("x" * 1_000 + "\n[cut here")
    assert len(set(api.connections)) == 2


async def test_a_secret_on_the_edge_of_the_cut_is_not_told(api: Api, place: Place) -> None:
    api.handler = answers(200, text="x" * 990 + SECRET + "y" * 1_000)
    found = await call(await place.open(max_response_bytes=1_000))
    assert SECRET[:4] not in found.output


async def test_a_secret_on_the_edge_of_a_cut_reason_is_not_told(api: Api, place: Place) -> None:
    api.handler = answers(500, text="", reason="x" * 70 + SECRET)
    found = await call(await place.open())
    assert "x" * 70 in found.output
    assert SECRET[:4] not in found.output


async def test_an_answer_in_an_encoding_that_was_not_asked_for_is_refused(
    api: Api, place: Place
) -> None:
    api.handler = answers(200, body=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    found = await call(await place.open())
    assert "encoding that was not asked for" in found.output
    assert api.requests[0].headers["Accept-Encoding"] == "identity"


async def test_bytes_that_are_no_text_are_named(api: Api, place: Place) -> None:
    api.handler = answers(200, body=b"\x89PNG\xff", content_type="image/png")
    assert (await call(await place.open())).output == "(5 bytes of image/png, not shown)"


async def test_a_post_has_the_calls_idempotency_key_each_time(api: Api, place: Place) -> None:
    api.handler = answers(503, 200, headers={"Retry-After": "0"})
    found = await call(await place.open({"method": "POST", "body": {"a": 1}}))
    assert found.output == "(HTTP 200, without a body)"
    keys = [request.headers["Idempotency-Key"] for request in api.requests]
    assert len(keys) == 2
    assert keys[0] == keys[1]
    assert api.bodies == [b'{"a":1}'] * 2


# Retries


async def test_an_idempotent_request_is_repeated_and_others_are_not(api: Api, place: Place) -> None:
    api.handler = answers(502, 504, 200)
    assert (await call(await place.open())).status == "ok"
    assert len(api.requests) == 3
    api.requests.clear()
    api.handler = answers(502, 200)
    found = await call(await place.open({"method": "POST"}))
    assert found.output.startswith("HTTP 502")
    assert len(api.requests) == 1


async def test_attempts_are_bounded_and_the_last_answer_is_told(api: Api, place: Place) -> None:
    api.handler = answers(503)
    assert (await call(await place.open(attempts=2))).output.startswith("HTTP 503")
    assert len(api.requests) == 2


async def test_a_host_that_wants_to_be_left_alone_for_longer_is_not_waited_for(
    api: Api, place: Place
) -> None:
    api.handler = answers(429, headers={"Retry-After": "3600"})
    began = time.monotonic()
    found = await call(await place.open())
    assert found.output.startswith("HTTP 429")
    assert len(api.requests) == 1
    assert time.monotonic() - began < 5


async def test_a_lost_connection_is_tried_again_if_it_does_no_harm(api: Api, place: Place) -> None:
    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    api.handler = hang_up
    found = await call(await place.open({"method": "POST"}))
    assert found.reason == "upstream"
    assert "gave no whole answer" in found.output
    assert len(api.requests) == 1
    await call(await place.open(attempts=2))
    assert len(api.requests) >= 3


async def test_a_host_that_is_not_there_is_told(place: Place) -> None:
    place.names["api.test"] = ["127.0.0.1"]
    place.api.port = 1
    found = await call(await place.open(attempts=2))
    assert found.reason == "upstream"
    assert "could not be reached" in found.output


async def test_a_call_ends_at_its_deadline(api: Api, place: Place) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    api.handler = never
    began = time.monotonic()
    found = await call(await place.open({"timeout_s": 0.3}))
    assert (found.reason, found.output) == ("timeout", "There was no whole answer within 0.3 s.")
    assert time.monotonic() - began < 5


async def test_a_host_that_keeps_failing_is_left_alone(api: Api, place: Place) -> None:
    api.handler = answers(500)
    breaker = Breaker(BreakerSettings(min_calls=2, open_s=60))
    runner = await place.open(breaker=breaker)
    for _ in range(2):
        assert "HTTP 500" in (await call(runner)).output
    found = await call(runner)
    assert "left alone" in found.output
    assert len(api.requests) == 2


async def test_a_host_that_fails_for_one_tenant_is_open_to_others(api: Api, place: Place) -> None:
    api.handler = answers(500)
    runner = await place.open(requests_per_s=1_000, burst=1_000)
    tries = 0
    while "left alone" not in (await call(runner)).output:
        tries += 1
        assert tries < 100, "the breaker does not open"
    assert "HTTP 500" in (await call(runner, tenant="other")).output


async def test_a_host_that_hangs_counts_as_failing(api: Api, place: Place) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    api.handler = never
    breaker = Breaker(BreakerSettings(min_calls=1, open_s=60))
    await call(await place.open({"timeout_s": 0.2}, breaker=breaker))
    assert breaker.opened


# Where requests may go


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["169.254.169.254"],
    ],
)
async def test_a_name_that_leads_to_a_private_address_is_not_connected_to(
    api: Api, place: Place, addresses: list[str]
) -> None:
    place.names["api.test"] = addresses
    found = await call(await place.open(allow_private=[]))
    assert found.reason == "refused"
    assert not api.requests


async def test_metadata_stays_closed_to_hosts_that_may_be_private(api: Api, place: Place) -> None:
    place.names["api.test"] = ["169.254.169.254"]
    found = await call(await place.open())
    assert found.reason == "refused"
    assert "metadata" in found.output


async def test_a_name_is_looked_up_once_and_connected_to_as_it_was_judged(
    api: Api, place: Place
) -> None:
    # A name that changes between the look and the connection: the second answer is never asked for.
    looked = 0

    async def lookup(host: str, port: int) -> Sequence[str]:
        nonlocal looked
        looked += 1
        return ["127.0.0.1"] if looked == 1 else ["169.254.169.254"]

    place.lookup = lookup  # type: ignore[method-assign]
    assert (await call(await place.open())).status == "ok"
    assert looked == 1


async def test_an_address_in_the_place_of_a_name_is_judged_too(api: Api, place: Place) -> None:
    url = f"http://127.0.0.1:{api.port}/"
    found = await call(await place.open({"url": url}))
    assert found.reason == "refused"
    assert not api.requests
    allowed = await place.open({"url": url}, allow_private=[f"http://127.0.0.1:{api.port}"])
    assert (await call(allowed)).status == "ok"


@pytest.mark.parametrize(
    "to",
    [
        "http://other.test/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://2852039166/",
        "http://user@api.test/",
        "file:///etc/passwd",
        "//other.test/",
    ],
)
async def test_a_redirect_to_where_tools_may_not_go_is_refused(
    api: Api, place: Place, to: str
) -> None:
    place.names["other.test"] = ["127.0.0.1"]
    api.handler = redirects(to)
    found = await call(await place.open())
    assert found.reason == "refused"
    assert len(api.requests) == 1
    assert "other.test" not in place.looked_up


async def test_a_redirect_to_an_allowed_name_with_a_private_address_is_refused(
    api: Api, place: Place
) -> None:
    place.names["other.test"] = ["127.0.0.1"]
    other = f"http://other.test:{api.port}"
    api.handler = redirects(f"{other}/end")
    found = await call(await place.open(allow=[other]))
    assert found.reason == "refused"
    assert len(api.requests) == 1


async def test_a_redirect_does_not_lead_from_a_public_api_to_another_tools_private_service(
    api: Api, place: Place
) -> None:
    place.names["own.test"] = ["127.0.0.1"]
    own, other = f"http://own.test:{api.port}", f"http://api.test:{api.port}"
    tools = {"inner": {"description": "d", "url": f"{own}/"}}
    api.handler = redirects(f"{own}/end")
    # Both are at this machine here; that the first redirects to the second is what is refused.
    settings: dict[str, Any] = {"allow_private": [own, other]}
    refused = await call(await place.open(others=tools, **settings))
    assert refused.reason == "refused"
    assert "may be private" in refused.output
    assert [request.host for request in api.requests] == [f"api.test:{api.port}"]
    named = await call(await place.open(others=tools, allow=[own], **settings))
    assert named.status == "ok"
    # To itself any host may redirect.
    api.handler = redirects("/end")
    assert (await call(await place.open(others=tools, **settings))).status == "ok"


async def test_a_redirect_takes_no_secret_to_another_host(api: Api, place: Place) -> None:
    place.names["other.test"] = ["127.0.0.1"]
    place.names["api.test"] = ["127.0.0.1"]
    other = f"http://other.test:{api.port}"
    own = f"http://api.test:{api.port}"
    headers = {"Authorization": "Bearer ${secret:KEY}", "X-Key": "${secret:KEY}"}
    runner = await place.open({"headers": headers}, allow=[other], allow_private=[own, other])
    api.handler = redirects("/end")
    assert (await call(runner)).status == "ok"
    assert api.requests[-1].headers["Authorization"] == f"Bearer {SECRET}"
    api.handler = redirects(f"{other}/end")
    assert (await call(runner)).status == "ok"
    assert api.requests[-1].headers["Host"].startswith("other.test")
    assert SECRET not in str(api.requests[-1].headers)


async def test_redirects_are_bounded(api: Api, place: Place) -> None:
    api.handler = redirects("/again")
    found = await call(await place.open(max_redirects=3))
    assert "redirects more than 3 times" in found.output
    assert len(api.requests) == 4


async def test_variables_for_proxies_and_cookies_change_nothing(
    api: Api, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    api.handler = answers(200, headers={"Set-Cookie": "a=b"})
    runner = await place.open()
    for _ in range(2):
        assert (await call(runner)).status == "ok"
    assert "Cookie" not in api.requests[-1].headers


async def test_an_argument_cannot_split_a_request(api: Api, place: Place) -> None:
    runner = await place.open({"headers": {"X-Name": "{name}"}})
    found = await call(runner, name="a\r\nX-Evil: 1")
    assert found.reason == "refused"
    assert not api.requests


# Rates and caps


async def test_a_tenant_that_asks_too_often_waits_and_then_is_refused(
    api: Api, place: Place
) -> None:
    runner = await place.open(requests_per_s=0.1, burst=2)
    for _ in range(2):
        assert (await call(runner)).status == "ok"
    found = await call(runner)
    assert (found.reason, found.output[:17]) == ("refused", "Too many requests")
    assert len(api.requests) == 2
    # Another tenant has a rate of its own.
    assert (await call(runner, tenant="other")).status == "ok"


async def test_bytes_come_no_faster_than_they_may(api: Api, place: Place) -> None:
    api.handler = answers(200, text="x" * 60_000)
    runner = await place.open(call_bytes_per_s=40_000, max_response_bytes=60_000)
    began = time.monotonic()
    assert (await call(runner)).status == "ok"
    # Half a second's worth comes at once.
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize(
    ("caps", "words"),
    [
        ({"call_bytes": 10_000}, "more bytes than it may"),
        ({"tenant_bytes_per_day": 10_000}, "bytes of this day"),
    ],
)
async def test_bytes_of_calls_and_days_are_bounded(
    api: Api, place: Place, caps: dict[str, Any], words: str
) -> None:
    api.handler = answers(200, text="x" * 50_000)
    found = await call(await place.open(**caps))
    assert found.reason == "refused"
    assert words in found.output


async def test_a_body_that_is_too_large_is_not_sent(api: Api, place: Place) -> None:
    tool = {"method": "POST", "body": {"text": "{text}"}}
    found = await call(await place.open(tool, max_request_bytes=100), text="x" * 200)
    assert found.reason == "refused"
    assert not api.requests


async def test_an_address_and_headers_count_as_bytes_of_a_request(api: Api, place: Place) -> None:
    tools = [
        {"query": {"q": "{text}"}},
        {"headers": {"X-Text": "{text}"}},
    ]
    for tool in tools:
        found = await call(await place.open(tool, max_request_bytes=300), text="x" * 400)
        assert (found.reason, found.output) == ("refused", "The request has more than 300 bytes.")
        found = await call(await place.open(tool, call_bytes=300), text="x" * 400)
        assert "more bytes than it may" in found.output
    assert not api.requests
    # What a redirect makes of it counts as well.
    api.handler = redirects("/" + "x" * 400)
    found = await call(await place.open(max_request_bytes=300))
    assert found.output == "The request has more than 300 bytes."


# OpenAPI


async def test_tools_come_from_a_document_that_is_fetched(api: Api, place: Place) -> None:
    document = {
        "openapi": "3.1.0",
        "info": {"title": "t", "version": "1"},
        "servers": [{"url": "/v1"}],
        "paths": {
            "/items/{id}": {
                "get": {
                    "operationId": "getItem",
                    "parameters": [
                        {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
                    ],
                }
            }
        },
    }

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(document) if request.path == "/doc" else await _echo(request)

    api.handler = handler
    origin = f"http://127.0.0.1:{api.port}"
    settings = ToolsSettings.model_validate(
        {"openapi": {"shop": {"document": f"{origin}/doc"}}, "gateway": {"allow_private": [origin]}}
    )
    box = await open_toolbox(
        settings, breaker=lambda _: Breaker(BreakerSettings()), clock=SystemClock()
    )
    spec = box.get("shop__getItem")
    assert spec is not None
    assert spec.run is not None
    output = await spec.run({"id": "a/b"}, ToolContext("acme", "s", "k"))
    assert json.loads(output)["path"] == "/v1/items/a%2Fb"
    assert box.offered(["shop.*"]) == ("shop__getItem",)
    await box.close()


async def test_a_document_that_cannot_be_fetched_names_its_key(api: Api) -> None:
    api.handler = answers(404)
    settings = ToolsSettings.model_validate(
        {"openapi": {"shop": {"document": f"http://127.0.0.1:{api.port}/doc"}}}
    )
    with pytest.raises(ConfigError, match=r"tools\.openapi\.shop\.document: .* cannot be read"):
        await open_toolbox(settings, breaker=lambda _: pytest.fail("called"), clock=SystemClock())
