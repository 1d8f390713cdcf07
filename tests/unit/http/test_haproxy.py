"""What the HAProxy wrapper makes of a configuration, without HAProxy."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from zlib import crc32

import pytest

from agentray import ids
from agentray.http import haproxy

CONFIG = """\
global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/a.sock mode 666 level admin
defaults
    errorfile 502 /tmp/500.http
    balance leastconn
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
    acl is_http-models path_beg /models/
    acl is_http-models path /models
    acl is_http-hosts path_beg /
    acl is_http-hosts path /
    use_backend http-models if is_http-models
    use_backend http-hosts if is_http-hosts
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path not found."
backend http-models
    server m-1 127.0.0.1:1 check
    server proxy 127.0.0.1:9 check backup
backend http-hosts
    server h-1 127.0.0.1:2 check
    server h-2 127.0.0.1:3 check
listen stats
  bind *:8404
"""


def rewritten(config: str = CONFIG, *, bind: str = "127.0.0.1") -> str:
    return haproxy.rewrite(config, bind=bind, error_dir="/tmp/e")


def section(config: str, head: str) -> str:
    return re.split(r"\n(?=\S)", config[config.index(f"\n{head}") + 1 :])[0]


def server_ids(config: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"server (\S+) .* id (\d+)", config)}


def test_rewriting_twice_is_rewriting_once() -> None:
    assert rewritten(rewritten()) == rewritten()


def test_a_server_keeps_its_id_whatever_stands_before_it() -> None:
    before = server_ids(rewritten())
    after = server_ids(rewritten(CONFIG.replace("    server h-1 127.0.0.1:2 check\n", "")))
    assert after["h-2"] == before["h-2"]


def test_ids_are_unique_within_a_backend_in_the_bits_that_haproxy_uses() -> None:
    # Two of these 3,000 names have the same hash, as one would expect of 20 bits.
    names = [f"h-{number}" for number in range(3_000)]
    assert len({crc32(name.encode()) % (2**20 - 1) for name in names}) < len(names)
    servers = "".join(f"    server {name} 127.0.0.1:2 check\n" for name in names)
    found = server_ids(rewritten(CONFIG.replace("    server h-1 127.0.0.1:2 check\n", servers)))
    numbers = [found[name] % 2**20 for name in names]
    assert len(set(numbers)) == len(names)
    assert 0 not in numbers


def test_only_the_backend_of_the_session_hosts_hashes() -> None:
    config = rewritten()
    assert "balance hash" in section(config, "backend http-hosts")
    assert "balance hash" not in section(config, "backend http-models")
    assert config.count("balance hash") == 1


def test_rays_own_proxy_is_no_fallback() -> None:
    assert "backup" not in rewritten()


@pytest.mark.parametrize(("bind", "shown"), [("10.1.2.3", "10.1.2.3"), ("::1", "[::1]")])
def test_the_door_is_on_the_address_that_was_asked_for_and_the_rest_on_loopback(
    bind: str, shown: str
) -> None:
    binds = re.findall(r"^\s*bind (\S+)$", rewritten(bind=bind), re.MULTILINE)
    assert binds == ["127.0.0.1:9101", f"{shown}:8000", "127.0.0.1:8404"]


def test_every_error_is_json_in_openais_shape_with_its_length() -> None:
    responses = haproxy.error_responses()
    files = re.findall(r"errorfile (\d+) /tmp/e/(\d+)\.http", rewritten())
    assert {(str(status), str(status)) for status in responses} >= set(files) != set()
    for response in responses.values():
        head, body = response.split("\r\n\r\n")
        assert f"Content-Length: {len(body)}" in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_response_ids_are_cut_where_their_session_begins() -> None:
    assert haproxy.RESPONSE_SESSION_OFFSET == ids.RESPONSE_SESSION_OFFSET


def test_a_drawn_session_id_is_a_session_id() -> None:
    for prefix in ("sess_", "conv_"):
        assert ids.check_session_id(prefix + "0123456789abcdef" * 2)
        assert prefix + "%[uuid,regsub(-,,g)]" in rewritten()


def test_the_wrapper_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(haproxy.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names
