"""What the proxy of programs reads in a request: where it leads, and which headers go on."""

from __future__ import annotations

from typing import Any

import pytest

from agentray.clock import SystemClock
from agentray.config.settings import ToolsSettings
from agentray.config.tool_settings import CodeSettings, SandboxSettings
from agentray.errors import ConfigError, ToolError
from agentray.tools.code import code_tools
from agentray.tools.forward import forwarded, tunnel_origin
from agentray.tools.hosts import Origin
from agentray.tools.toolbox import open_toolbox


def test_a_tunnel_leads_to_a_host_and_a_port() -> None:
    assert tunnel_origin("API.example.com:443") == Origin("https", "api.example.com", 443)
    assert tunnel_origin("[::1]:8443") == Origin("https", "::1", 8443)


@pytest.mark.parametrize(
    "target",
    [
        "", "api.example.com", "api.example.com:", ":443", "api.example.com:0", "a.b:65536",
        "user@api.example.com:443", "api.example.com:443/x", "api.example.com:443#x",
        "evil.example\\.api.example.com:443", "https://api.example.com:443", "2130706433:443",
        "0x7f.1:443", "api.example.com\x00.evil.example:443", "a b:443", "[::1:443", "::1:443",
    ],
)  # fmt: skip
def test_what_parsers_read_differently_is_no_target(target: str) -> None:
    with pytest.raises(ToolError) as caught:
        tunnel_origin(target)
    assert caught.value.fields["reason"] == "refused"


def test_headers_of_one_connection_do_not_go_on() -> None:
    headers = [
        (b"Host", b"inner.example"),
        (b"Proxy-Authorization", b"Basic eA=="),
        (b"Proxy-Connection", b"keep-alive"),
        (b"Connection", b"close, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Upgrade", b"websocket"),
        (b"Accept", b"*/*"),
        (b"Content-Length", b"3"),
    ]
    assert forwarded(headers) == [("accept", "*/*"), ("content-length", "3")]


def test_only_one_header_says_where_a_body_ends() -> None:
    headers = [(b"Content-Length", b"3"), (b"Transfer-Encoding", b"chunked"), (b"A", b"b")]
    assert forwarded(headers) == [("a", "b")]
    # Nobody can have that one taken away.
    named = [(b"Connection", b"content-length"), (b"Content-Length", b"3")]
    assert forwarded(named) == [("content-length", "3")]


def test_the_model_is_told_which_network_there_is() -> None:
    python, shell = code_tools(CodeSettings(), SandboxSettings())
    assert "a sandbox without network." in python.description
    assert python.network is None
    assert shell.network is None
    open_to = CodeSettings(hosts=("api.example.com", "*.example.org"))
    for spec in code_tools(open_to, SandboxSettings()):
        assert "without network" not in spec.description
        assert "leads to api.example.com, *.example.org and nowhere else." in spec.description


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"code": {"hosts": ["https://a.example/x"]}}, r"tools\.code\.hosts: found 'https://a"),
        (
            {"code": {"hosts": ["a.example"]}, "sandbox": {"tier": "gvisor"}},
            r"tools\.code\.hosts: .*'gvisor'",
        ),
    ],
)
async def test_hosts_that_cannot_be_are_refused_with_their_key(
    settings: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        await open_toolbox(
            ToolsSettings.model_validate(settings), breaker=_unused, clock=SystemClock()
        )


def _unused(host: str) -> Any:
    raise AssertionError(host)
