"""Make tools of HTTP requests that are written as templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast
from urllib.parse import quote, unquote

import msgspec

from agentray.config.tool_settings import HttpToolSettings
from agentray.errors import ConfigError, ToolError
from agentray.tools.exchange import HttpReply, HttpRequest, header_problem
from agentray.tools.hosts import HostRule, Origin, parse_url
from agentray.tools.secrets import SECRET, Secrets
from agentray.tools.spec import OnCrash, ToolContext, ToolSpec

__all__ = [
    "HttpTemplate",
    "Sender",
    "check_template",
    "host_of",
    "http_tool",
    "spec_of_template",
    "template_of",
]

_PLACE = re.compile(SECRET.pattern + r"|\{([A-Za-z_][A-Za-z0-9_]*)\}")
_BASE = re.compile(r"https?://[^/?#{}$]+(?=[/?#]|\Z)", re.IGNORECASE)
_ACCEPT = "application/json, text/*;q=0.9, */*;q=0.5"
_USER_AGENT = "agentray"
_KEYED = frozenset({"POST", "PATCH"})
_IN_QUERY = frozenset({"GET", "HEAD", "DELETE"})


class Sender(Protocol):
    """The way out; see ``agentray.tools.gateway.Gateway``."""

    async def send(self, request: HttpRequest, *, tenant: str, timeout_s: float) -> HttpReply: ...


class HttpTemplate(msgspec.Struct, frozen=True):
    """A request with ``{name}`` where arguments go and ``${secret:NAME}`` where secrets go.

    ``base`` is the scheme and host, which neither can be in; ``path`` has the query that is part
    of the address. A query's or header's value that is one argument and nothing else is left out
    with it, and a list is repeated in the query, unless its name is in ``joined``: then it has
    commas. ``body`` is JSON: a text of it that is one argument becomes that, of whatever type;
    ``whole_body`` is the argument that is the body.
    """

    method: str
    base: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    body: dict[str, Any] | None = None
    whole_body: str = ""
    joined: frozenset[str] = frozenset()

    @property
    def origin(self) -> Origin:
        return parse_url(self.base + "/")[0]

    def places(self) -> Iterator[str]:
        """Yield the names of the arguments, some more than once."""
        texts = [self.path, *(value for _, value in (*self.query, *self.headers))]
        texts += _texts(self.body)
        for text in texts:
            yield from (match[2] for match in _PLACE.finditer(text) if match[2])
        if self.whole_body:
            yield self.whole_body

    def request(self, arguments: Mapping[str, Any], secrets: Secrets, key: str) -> HttpRequest:
        """Return the request of a call; ``key`` is its idempotency key.

        Raises:
            ToolError: an argument cannot be where it belongs; its reason is ``invalid``.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        url = self.base + self._path(given, secrets)
        pairs = [
            f"{quote(name, safe='')}={quote(value, safe='')}"
            for name, template in self.query
            for value in self._values(template, given, secrets)
        ]
        if pairs:
            url += ("&" if "?" in url else "?") + "&".join(pairs)
        headers = [
            (name, _filled(template, given, secrets))
            for name, template in self.headers
            if not _is_absent(template, given)
        ]
        body = self._body(given)
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        if self.method in _KEYED:
            headers.append(("Idempotency-Key", key))
        headers += [("Accept", _ACCEPT), ("User-Agent", _USER_AGENT)]
        # The operator's own come first, and win.
        unique = {name.lower(): (name, value) for name, value in reversed(headers)}
        return HttpRequest(self.method, url, tuple(reversed(unique.values())), body)

    def _path(self, given: Mapping[str, Any], secrets: Secrets) -> str:
        for name in (match[2] for match in _PLACE.finditer(self.path.partition("?")[0])):
            if name and not _shown(given.get(name, "")):
                raise ToolError(f"{name} may not be empty.", reason="invalid")
        path = _filled(self.path, given, secrets, encoded=True) or "/"
        segments = unquote(path.partition("?")[0]).replace("\\", "/").split("/")
        if "." in segments or ".." in segments:
            # The host may take it for a step up, before or after it decodes the rest.
            raise ToolError("An argument would lead to another path.", reason="invalid")
        return path

    def _values(self, template: str, given: Mapping[str, Any], secrets: Secrets) -> Sequence[str]:
        if _is_absent(template, given):
            return ()
        name = _only_place(template)
        value = given[name] if name else None
        if isinstance(value, list) and name not in self.joined:
            return [_shown(item) for item in cast("list[Any]", value)]
        return [_filled(template, given, secrets)]

    def _body(self, given: Mapping[str, Any]) -> bytes | None:
        if self.whole_body:
            found = given.get(self.whole_body)
            return None if found is None else msgspec.json.encode(found)
        return None if self.body is None else msgspec.json.encode(_filled_json(self.body, given))


def http_tool(
    name: str, settings: HttpToolSettings, secrets: Secrets, sender: Callable[[], Sender]
) -> tuple[ToolSpec, HttpTemplate]:
    """Return the tool of an entry of ``tools.http``, and how it is sent.

    Raises:
        ConfigError: the entry cannot be used; the message names its key.
    """
    template, parameters = template_of(settings, secrets, key=f"tools.http.{name}")
    spec = spec_of_template(
        name,
        settings.description,
        parameters,
        template,
        secrets,
        sender,
        timeout_s=settings.timeout_s,
        on_crash=settings.on_crash,
        cache_s=settings.cache_s,
        version=settings.version,
    )
    return spec, template


def spec_of_template(
    name: str,
    description: str,
    parameters: dict[str, Any],
    template: HttpTemplate,
    secrets: Secrets,
    sender: Callable[[], Sender],
    *,
    timeout_s: float,
    on_crash: OnCrash | None = None,
    cache_s: float = 0.0,
    version: str = "1",
) -> ToolSpec:
    """Return the tool that sends a template."""

    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        request = template.request(arguments, secrets, context.idempotency_key)
        reply = await sender().send(request, tenant=context.tenant, timeout_s=timeout_s)
        return _told(reply)

    return ToolSpec(
        name=name,
        description=description,
        parameters=parameters,
        run=run,
        on_crash=on_crash or ("report" if template.method in _KEYED else "retry"),
        # The gateway ends it first, and says more.
        timeout_s=timeout_s + 1,
        cache_s=cache_s,
        version=version,
        # It waits for another machine.
        cpu=0.05,
    )


def template_of(
    settings: HttpToolSettings, secrets: Secrets, *, key: str
) -> tuple[HttpTemplate, dict[str, Any]]:
    """Return an entry's template and the JSON schema of its arguments.

    Arguments that no template names go to the query, or are the JSON body of a method that has one.

    Raises:
        ConfigError: the entry cannot be used; the message names its key.
    """
    base = _BASE.match(settings.url)
    if base is None:
        raise ConfigError(f"{key}.url: expected http(s)://HOST/…, with nothing to fill in the host")
    template = HttpTemplate(
        settings.method,
        base[0],
        settings.url[base.end() :].partition("#")[0],
        tuple(settings.query.items()),
        tuple(settings.headers.items()),
        settings.body,
    )
    places = dict.fromkeys(template.places())
    parameters = settings.parameters or {
        "type": "object",
        "properties": {name: {"type": "string"} for name in places},
        "required": list(places),
        "additionalProperties": False,
    }
    properties: dict[str, Any] = parameters.get("properties") or {}
    for name in places:
        if name not in properties:
            raise ConfigError(f"{key}: {{{name}}} is not in the properties of its parameters")
    free = [name for name in properties if name not in places]
    if free and settings.method in _IN_QUERY:
        added = tuple((name, f"{{{name}}}") for name in free)
        template = msgspec.structs.replace(template, query=template.query + added)
    elif free and settings.body is None:
        body = {name: f"{{{name}}}" for name in free}
        template = msgspec.structs.replace(template, body=body)
    elif free:
        raise ConfigError(f"{key}: {', '.join(free)} of its parameters are in no template")
    check_template(template, secrets, key=key)
    return template, parameters


def check_template(template: HttpTemplate, secrets: Secrets, *, key: str) -> None:
    """See that a template can be sent.

    Raises:
        ConfigError: it cannot; the message names its key.
    """
    try:
        parse_url(template.base + _PLACE.sub("x", template.path))
    except ToolError as error:
        raise ConfigError(f"{key}.url: {error.message}") from error
    if any(SECRET.search(text) for text in _texts(template.body)):
        raise ConfigError(f"{key}.body: secrets go to the address, the query and headers alone")
    texts = [template.path, *(value for _, value in (*template.query, *template.headers))]
    for text in texts:
        for name in SECRET.findall(text):
            try:
                secrets.value(name)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error.message}") from error
    plain = [(name, _PLACE.sub("x", value)) for name, value in template.headers]
    if (problem := header_problem(plain)) is not None:
        raise ConfigError(f"{key}.headers: {problem}")


def host_of(template: HttpTemplate) -> HostRule:
    """Return the rule that lets a template out."""
    return HostRule(template.origin)


def _told(reply: HttpReply) -> str:
    text = reply.text
    if reply.truncated:
        text += f"\n[cut here: the answer has more than these {len(text)} characters]"
    if not reply.ok:
        raise ToolError(f"HTTP {reply.status} {reply.reason}\n{text}".strip(), reason="upstream")
    return text or f"(HTTP {reply.status}, without a body)"


# Filling in


def _filled(
    template: str, given: Mapping[str, Any], secrets: Secrets, *, encoded: bool = False
) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1]:
            # A colon is a part of some services' tokens, and is left in paths by all.
            text, safe = secrets.value(match[1]), ":"
        else:
            text, safe = _shown(given.get(match[2], "")), ""
        return quote(text, safe=safe) if encoded else text

    # One pass: an argument that looks like a place is none.
    return _PLACE.sub(value, template)


def _filled_json(template: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(template, dict):
        return {
            key: _filled_json(item, given)
            for key, item in cast("dict[str, Any]", template).items()
            if not (isinstance(item, str) and _is_absent(item, given))
        }
    if isinstance(template, list):
        return [_filled_json(item, given) for item in cast("list[Any]", template)]
    if not isinstance(template, str):
        return template
    if (name := _only_place(template)) is not None:
        return given.get(name)
    return _PLACE.sub(lambda match: _shown(given.get(match[2], "")), template)


def _only_place(template: str) -> str | None:
    match = _PLACE.fullmatch(template)
    return match[2] if match else None


def _is_absent(template: str, given: Mapping[str, Any]) -> bool:
    name = _only_place(template)
    return name is not None and name not in given


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ",".join(_shown(item) for item in cast("list[Any]", value))
    return msgspec.json.encode(value).decode()


def _texts(template: Any) -> list[str]:
    if isinstance(template, dict):
        return [text for item in cast("dict[str, Any]", template).values() for text in _texts(item)]
    if isinstance(template, list):
        return [text for item in cast("list[Any]", template) for text in _texts(item)]
    return [template] if isinstance(template, str) else []
