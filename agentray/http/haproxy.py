"""Give HAProxy stable affinity by session: rewrite the configuration that Ray Serve made.

Ray runs this file in HAProxy's place (``RAY_SERVE_HAPROXY_BINARY_PATH``) at each reload. It
rewrites the configuration and becomes HAProxy. It is a script that imports the standard library
alone, so that this costs 20 ms.

What changes:

- Each server gets an ``id`` that its name alone decides. HAProxy places servers on its hash ring
  by id; without one, by position, and losing the first server would move every session.
- The backend of the session hosts (route ``/``) hashes the session's id, from wherever the
  request names it: the header ``x-session-id``, the path, the body. A request that will make a
  session gets an id for it here, in ``x-agentray-new-session``: the session is born on the host
  where all that comes later will arrive.
- A model that agentray serves keeps the calls of a session (the header ``x-session-id``) on the
  replica that has its prefixes cached: they are hashed as sessions are. Calls without one go to
  the replica with the fewest. Where Ray's own router is to pick by the prompt, it is asked, as in
  Ray's configuration; it costs a request to a process of Python's.
- The front door is bound to the configured address and the rest to loopback; HAProxy's own
  answers are JSON in OpenAI's shape; requests are not logged.
- Ray's Python proxy is no fallback: it would answer in place of a host, and hold calls to a model
  whose replicas are dead. Models that start on demand need it: it holds a call until a replica is
  there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from zlib import crc32

__all__ = [
    "MODELS_VARIABLE",
    "NEW_SESSION_HEADER",
    "ON_DEMAND",
    "ROUTED",
    "error_responses",
    "rewrite",
]

MODELS_VARIABLE = "AGENTRAY_INTERNAL_MODELS"
"""Routes of the models that agentray serves, by spaces; behind each route its traits, by colons."""
ROUTED = "routed"
"""Ray's request router picks the replica of each call."""
ON_DEMAND = "on-demand"
"""There may be no replica, until a call asks for one."""

NEW_SESSION_HEADER = "x-agentray-new-session"
SESSION_HEADER = "x-session-id"

# agentray.ids.RESPONSE_SESSION_OFFSET; a test holds the two together.
RESPONSE_SESSION_OFFSET = 32

# HAProxy multiplies an id by 4096 before it hashes it into 32 bits: only 20 bits count.
_ID_BITS = 20
# Points of a server on the ring are 16 times its weight.
_WEIGHT = 64

_MARK = "# rewritten by agentray\n"
_DOOR = "frontend http_frontend"
_RETURN_503 = "http-request return status 503 content-type application/json hdr Retry-After 1"
_UNAVAILABLE = ("No session host is available; try again.", "server_error", "not_ready")
_AWAY = ("What answers this address is away; try again.", "server_error", "not_ready")
_NO_MODEL = ("The model is not being served now; try again.", "server_error", "model_unavailable")
_DEFAULTS = [
    # Who sends half a request holds a connection no longer than this.
    "    timeout http-request 30s",
    "    errorfile 408 {errors}/408.http",
]

_KEY = "txn.agentray_key"
_NEW = "txn.agentray_new"
_BODY_WAIT = "30s"
_CONSISTENT = "hash-type consistent sdbm avalanche"
# What Ray adds to a backend's name for calls whose replica its request router has picked.
_VIA = "-via-ingress-request-router"
_ASK_ROUTER = "set-var(txn.ingress_request_router_app)"
_ROUTER_FAILED = "var(txn.ingress_request_router_failed)"
_MAKES_SESSION = "/v1/responses /v1/sessions"
_MAKES_CONVERSATION = "/v1/conversations"


def rewrite(
    config: str,
    *,
    bind: str,
    error_dir: str,
    session_route: str = "/",
    models: Mapping[str, Collection[str]] | None = None,
) -> str:
    """Return Ray's configuration of HAProxy with the changes that this module is about.

    Args:
        config: what Ray generated; one that was rewritten already is returned as it is.
        bind: the address of the front door. Metrics and statistics are on loopback.
        error_dir: where :func:`error_responses` are, each in ``STATUS.http``.
        session_route: the route of the session hosts.
        models: the traits of the models that agentray serves, by their routes.
    """
    if config.startswith(_MARK):
        return config
    models = models or {}
    lines = config.splitlines()
    ids = _server_ids(lines)
    traits = {f"backend {_backend_of(config, route)}": models[route] for route in models}
    additions = {
        "defaults": [line.format(errors=error_dir) for line in _DEFAULTS],
        # A line for each request; what servers do is still logged.
        _DOOR: ["    no log"],
        f"backend {_backend_of(config, session_route)}": [*_unserved(models), *_affinity()],
        **{head + _VIA: _by_session() for head, known in traits.items() if ROUTED not in known},
    }
    out: list[str] = []
    head = ""
    for line in lines:
        words = line.split()
        if line[:1].strip() and words:
            head = " ".join(words)
            out += [line, *additions.get(head, [])]
        elif words[:1] == ["bind"]:
            address = _address(bind if head == _DOOR else "127.0.0.1")
            out.append(f"    bind {address}:{words[1].rsplit(':', 1)[1]}")
        elif words[:1] == ["errorfile"]:
            out.append(f"    errorfile {words[1]} {error_dir}/{words[1]}.http")
        elif words[:2] == ["stats", "socket"]:
            out.append(line.replace(" mode 666 ", " mode 600 "))
        elif words[:1] == ["server"]:
            if words[-1] != "backup":
                out.append(f"{line} id {ids[head, words[1]]} weight {_WEIGHT}")
            elif ON_DEMAND in traits.get(head, ()):
                out.append(line)
        elif head == "backend default_backend" and words[:2] == ["http-request", "return"]:
            # Nothing is deployed at "/": the system is starting or stopping.
            out.append(f"    {_RETURN_503} string '{_body(*_UNAVAILABLE)}'")
        else:
            out += _routed(line, words, head, traits)
    return _MARK + "\n".join(out) + "\n"


def _routed(
    line: str, words: list[str], head: str, traits: Mapping[str, Collection[str]]
) -> list[str]:
    """Return what stands for a line that may be about a call whose replica Ray's router picks."""
    if words[:1] == ["use-server"]:
        # Ray's proxy, to which the second kind leads, is not among the servers.
        by_router = ROUTED in traits.get(head.removesuffix(_VIA), (ROUTED,))
        return [line] if by_router and _ROUTER_FAILED not in line else []
    if words[:2] == ["http-request", _ASK_ROUTER]:
        backend = words[2].removeprefix("str(").removesuffix(")")
        return [line] if ROUTED in traits.get(f"backend {backend}", (ROUTED,)) else []
    if words[:1] == ["use_backend"] and words[1].endswith(_VIA):
        if ROUTED in traits.get(f"backend {words[1].removesuffix(_VIA)}", (ROUTED,)):
            return [line]
        # Of Ray's two lines for the backend, the second is for answers of the router alone.
        has_session = f"{{ req.hdr({SESSION_HEADER}) -m len gt 0 }}"
        return [] if _ROUTER_FAILED in line else [f"    {' '.join(words[:4])} {has_session}"]
    if words[:2] == ["http-request", "return"] and _ROUTER_FAILED in line:
        condition = line[line.rindex(" if { ") :]
        return [f"    {_RETURN_503} string '{_body(*_NO_MODEL)}'{condition}"]
    return [line]


def _by_session() -> list[str]:
    """Return the lines that keep each session on a replica of a model."""
    return [f"    balance hash req.hdr({SESSION_HEADER})", f"    {_CONSISTENT}"]


def _unserved(models: Collection[str]) -> list[str]:
    """Return the line for calls to models without a backend, which would go to a session host."""
    routes = " ".join(f"{route}/" for route in models)
    answer = f"{_RETURN_503} string '{_body(*_NO_MODEL)}'"
    return [f"    {answer} if {{ path_beg {routes} }}"] if routes else []


def error_responses() -> dict[int, str]:
    """Return the raw HTTP responses that stand for HAProxy's own, by its status.

    What is no HTTP at all, or has a head that is larger than the buffer, is answered by a part of
    HAProxy that knows its own text alone.
    """
    late = ("The request's body did not arrive in time.", "invalid_request_error", "timeout")
    away = _response("503 Service Unavailable", *_AWAY, "Retry-After: 1")
    return {
        408: _response("408 Request Timeout", *late, "Connection: close"),
        # A host that went away in the middle is as good a reason to try again as none at all.
        **dict.fromkeys((502, 503, 504), away),
    }


def _response(status: str, message: str, kind: str, code: str, header: str) -> str:
    body = _body(message, kind, code)
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\n{header}\r\n\r\n{body}"
    )


def _body(message: str, kind: str, code: str) -> str:
    """Return an error in OpenAI's shape."""
    return f'{{"error":{{"message":"{message}","type":"{kind}","param":null,"code":"{code}"}}}}'


def _affinity() -> list[str]:
    """Return the lines that give the session backend its key."""
    no_key = f"!{{ var({_KEY}) -m found }}"
    response = "{ path /v1/responses }"
    session = "{ path /v1/sessions }"
    segment = "path,field(4,/),url_dec"
    of_response = f"bytes({RESPONSE_SESSION_OFFSET})"
    header = f"req.hdr({SESSION_HEADER})"

    def key(fetch: str, condition: str) -> str:
        return f"http-request set-var({_KEY}) {fetch} if {no_key} {condition}"

    def body(query: str, condition: str, *converters: str) -> str:
        fetch = ",".join(["req.body", f"json_query('{query}')", *converters])
        return key(fetch, f"METH_POST {condition} {{ {fetch} -m len gt 0 }}")

    wait = f"http-request wait-for-body time {_BODY_WAIT}"
    draw = f"http-request set-var-fmt({_NEW})"
    uuid = "%[uuid,regsub(-,,g)]"
    hand_on = f"http-request set-header {NEW_SESSION_HEADER} %[var({_NEW})]"
    rules = [
        f"http-request del-header {NEW_SESSION_HEADER}",
        key(header, f"{{ {header} -m len gt 0 }}"),
        key(segment, "{ path_beg /v1/sessions/ /v1/conversations/ }"),
        key(f"{segment},{of_response}", "{ path_beg /v1/responses/ }"),
        # Only these wait for their body, and for no more of it than fits the buffer.
        f"{wait} if {no_key} METH_POST {{ path /v1/responses /v1/sessions }}",
        body("$.conversation", response),
        body("$.conversation.id", response),
        body("$.previous_response_id", response, of_response),
        body("$.id", session),
        f"{draw} sess_{uuid} if {no_key} METH_POST {{ path {_MAKES_SESSION} }}",
        f"{draw} conv_{uuid} if {no_key} METH_POST {{ path {_MAKES_CONVERSATION} }}",
        f"{hand_on} if {{ var({_NEW}) -m found }}",
        key(f"var({_NEW})", f"{{ var({_NEW}) -m found }}"),
        # Without a key (a list, a stateless completion) the servers take turns.
        f"balance hash var({_KEY})",
        _CONSISTENT,
    ]
    return [f"    {rule}" for rule in rules]


def _backend_of(config: str, route: str) -> str | None:
    """Return the backend that Ray sends a route to: its ACL matches the path exactly."""
    found = re.search(rf"^\s*acl is_(\S+) path {re.escape(route)}$", config, re.MULTILINE)
    return found[1] if found else None


def _server_ids(lines: list[str]) -> dict[tuple[str, str], int]:
    """Return an id for each server of each section: its name's hash, unique in its section."""
    servers: dict[str, set[str]] = {}
    head = ""
    for line in lines:
        words = line.split()
        if line[:1].strip() and words:
            head = " ".join(words)
        elif words[:1] == ["server"]:
            servers.setdefault(head, set()).add(words[1])
    ids: dict[tuple[str, str], int] = {}
    top = (1 << _ID_BITS) - 1
    for section, names in servers.items():
        taken: set[int] = set()
        for name in sorted(names):
            number = crc32(name.encode()) % top + 1
            while number in taken:
                number = number % top + 1
            taken.add(number)
            ids[section, name] = number
    return ids


def _address(bind: str) -> str:
    return f"[{bind}]" if ":" in bind else bind


def _main(arguments: list[str]) -> None:
    config = Path(arguments[arguments.index("-f") + 1])
    for status, response in error_responses().items():
        _replace(config.with_name(f"{status}.http"), response)
    bind = os.environ["AGENTRAY_INTERNAL_BIND"]
    # In place: Ray knows its HAProxy by this path on the command line.
    text = rewrite(
        config.read_text(encoding="utf-8"),
        bind=bind,
        error_dir=str(config.parent),
        models=_models(os.environ.get(MODELS_VARIABLE, "")),
    )
    _replace(config, text)
    program = os.environ["AGENTRAY_INTERNAL_HAPROXY"]
    os.execv(program, [program, *arguments])  # noqa: S606 - the same process must go on


def _models(text: str) -> dict[str, list[str]]:
    """Return the traits of each model by its route."""
    return {words[0]: words[1:] for words in (entry.split(":") for entry in text.split())}


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8", newline="")
    beside.replace(file)


if __name__ == "__main__":
    _main(sys.argv[1:])
