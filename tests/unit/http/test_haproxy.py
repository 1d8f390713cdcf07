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


# The parts that Ray adds for applications whose replicas its own router picks.
ROUTED_CONFIG = """\
frontend http_frontend
    bind *:8000
    acl is_http-tiny path_beg /models/tiny/
    acl is_http-tiny path /models/tiny
    acl is_http-hosts path_beg /
    acl is_http-hosts path /
    http-request set-var(txn.ingress_request_router_app) str(http-tiny) if is_http-tiny
    acl has_ingress_request_router_app var(txn.ingress_request_router_app) -m found
    http-request lua.route_via_ingress_request_router if METH_POST has_ingress_request_router_app
    http-request return status 503 content-type text/plain lf-string "Ingress request router \
failed: %[var(txn.ingress_request_router_failed)]" if { var(txn.ingress_request_router_failed) \
-m found } !{ var(txn.ingress_request_router_recoverable) -m found }
    use_backend http-tiny-via-ingress-request-router if is_http-tiny { \
var(txn.via_ingress_request_router) -m found }
    use_backend http-tiny-via-ingress-request-router if is_http-tiny { \
var(txn.ingress_request_router_failed) -m str "unknown_replica_id" }
    use_backend http-tiny if is_http-tiny
    use_backend http-hosts if is_http-hosts
backend http-tiny
    server t-1 127.0.0.1:1 check
    server t-2 127.0.0.1:2 check
    server proxy 127.0.0.1:9 check backup
backend http-tiny-via-ingress-request-router
    use-server t-1 if { var(txn.ingress_request_router_target) -m str "t-1" }
    use-server t-2 if { var(txn.ingress_request_router_target) -m str "t-2" }
    use-server proxy if { var(txn.ingress_request_router_failed) -m str "unknown_replica_id" }
    server t-1 127.0.0.1:1 track http-tiny/t-1
    server t-2 127.0.0.1:2 track http-tiny/t-2
    server proxy 127.0.0.1:9 track http-tiny/proxy backup
backend http-hosts
    server h-1 127.0.0.1:3 check
    server proxy 127.0.0.1:9 check backup
"""
VIA = "backend http-tiny-via-ingress-request-router"


def rewritten(config: str = CONFIG, *, bind: str = "127.0.0.1", **models: list[str]) -> str:
    routes = {f"/models/{name}": traits for name, traits in models.items()}
    return haproxy.rewrite(config, bind=bind, error_dir="/tmp/e", models=routes)


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
    assert "backup" not in rewritten(ROUTED_CONFIG, tiny=[])
    assert " proxy" not in rewritten(ROUTED_CONFIG, tiny=[])
    assert " proxy" not in rewritten(ROUTED_CONFIG, tiny=[haproxy.ROUTED])


def test_calls_of_a_session_are_hashed_to_a_models_replica_and_others_are_not() -> None:
    config = rewritten(ROUTED_CONFIG, tiny=[])
    by_session = section(config, VIA)
    assert "balance hash req.hdr(x-session-id)" in by_session
    assert "hash-type consistent" in by_session
    assert "use-server" not in by_session
    assert "balance" not in section(config, "backend http-tiny\n")
    uses = re.findall(r"use_backend (http-tiny\S*) if is_http-tiny ?(.*)", config)
    assert uses == [
        (VIA.removeprefix("backend "), "{ req.hdr(x-session-id) -m len gt 0 }"),
        ("http-tiny", ""),
    ]
    assert server_ids(section(config, VIA)) == server_ids(section(config, "backend http-tiny\n"))


def test_nobody_asks_rays_router_for_the_replica_of_a_session() -> None:
    asks = "set-var(txn.ingress_request_router_app)"
    assert asks not in rewritten(ROUTED_CONFIG, tiny=[])
    assert asks in rewritten(ROUTED_CONFIG, tiny=[haproxy.ROUTED])


@pytest.mark.parametrize("model", ["tiny", "other"], ids=["ours", "another's"])
def test_where_rays_router_picks_its_choice_is_kept(model: str) -> None:
    routes = {f"/models/{model}": [haproxy.ROUTED]}
    config = haproxy.rewrite(ROUTED_CONFIG, bind="127.0.0.1", error_dir="/tmp/e", models=routes)
    via = section(config, VIA)
    assert via.count("use-server") == 2
    assert "balance" not in via
    # Its pick that HAProxy does not know yet: to any replica.
    assert config.count("use_backend http-tiny-via") == 2


def test_a_model_that_starts_on_demand_keeps_rays_proxy_which_holds_the_call() -> None:
    config = rewritten(ROUTED_CONFIG, tiny=[haproxy.ON_DEMAND])
    assert "server proxy 127.0.0.1:9 check backup" in section(config, "backend http-tiny\n")
    assert config.count("backup") == 1


def test_a_model_without_a_backend_is_answered_for_before_a_session_host_is() -> None:
    first, *_ = section(rewritten(ROUTED_CONFIG, tiny=[], big=[]), "backend http-hosts").split(
        "\n"
    )[1:]
    assert "return status 503" in first
    assert first.endswith("if { path_beg /models/tiny/ /models/big/ }")


def test_what_rays_router_refuses_is_json_in_openais_shape() -> None:
    config = rewritten(ROUTED_CONFIG, tiny=[haproxy.ROUTED])
    [line] = [line for line in config.splitlines() if "recoverable" in line and "return" in line]
    body = re.search(r"string '(.*?)'", line)
    assert body
    assert set(json.loads(body[1])["error"]) == {"message", "type", "param", "code"}
    assert line.endswith("!{ var(txn.ingress_request_router_recoverable) -m found }")


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
