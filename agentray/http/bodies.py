"""The bodies and queries that callers send, as types: what does not fit them is refused.

OpenAI's bodies may have fields that are not listed here: what they could mean changes nothing.
agentray's own may not: an unknown field is a mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from agentray.errors import InvalidRequestError
from agentray.events import Message, TurnOptions
from agentray.http.errors import UnsupportedParameterError
from agentray.http.objects import (
    ConversationRef,
    InputText,
    JsonObjectFormat,
    JsonSchemaFormat,
    OutputText,
    TextFormat,
)
from agentray.models.checks import check_schema

__all__ = [
    "Cancel",
    "ChatCreate",
    "ConversationCreate",
    "ConversationUpdate",
    "EventsQuery",
    "ItemsQuery",
    "Metadata",
    "ResponseCreate",
    "RetrieveQuery",
    "SessionCreate",
    "SessionsQuery",
    "TurnCreate",
    "native_messages",
    "response_messages",
    "turn_options",
]

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16, description="Up to 16 pairs of text."),
]
SessionId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}$")]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Limit = Annotated[int, Meta(ge=1, le=100)]
Order = Literal["asc", "desc"]
Nothing = Annotated[list[Any], Meta(max_length=0)]


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="input_image"):
    """An image by its address (``https:`` or ``data:``)."""

    image_url: Annotated[str, Meta(min_length=1)]
    detail: Literal["low", "high", "auto"] | None = None


class MessageItem(msgspec.Struct, frozen=True):
    """A message, in the shape of OpenAI's responses."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText | ImagePart | OutputText], Meta(min_length=1)]
    type: Literal["message"] = "message"


class AskedText(msgspec.Struct, frozen=True):
    """The form that an answer is to have."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(msgspec.Struct, frozen=True):
    effort: None = None
    summary: None = None
    generate_summary: None = None


class BackgroundOptions(msgspec.Struct, frozen=True):
    completion_window: Literal["soonest"] | None = None


Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponseCreate(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/responses``. ``model`` is an agent's name or a model's."""

    input: Annotated[str, Meta(min_length=1)] | Annotated[list[MessageItem], Meta(min_length=1)]
    model: Name | None = None
    stream: bool | None = None
    background: bool | None = None
    conversation: SessionId | ConversationRef | None = None
    previous_response_id: Annotated[str, Meta(max_length=200)] | None = None
    instructions: str | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_output_tokens: Tokens | None = None
    metadata: Metadata | None = None
    user: Name | None = None
    # From here on, only what changes nothing; see errors.py.
    store: bool | None = None
    parallel_tool_calls: bool | None = None
    background_options: BackgroundOptions | None = None
    context_management: Nothing | None = None
    image: Annotated[dict[str, Any], Meta(max_length=0)] | None = None
    include: list[Includable] | None = None
    max_tool_calls: None = None
    moderation: None = None
    prompt: None = None
    reasoning: Reasoning | None = None
    service_tier: Literal["auto", "default"] | None = None
    text: AskedText | None = None
    tool_choice: Literal["auto"] | None = None
    tools: Nothing | None = None
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None

    def check(self) -> None:
        """Refuse what the types cannot tell.

        Raises:
            InvalidRequestError: two parameters contradict each other.
            UnsupportedParameterError: one has a meaning that is not honoured.
        """
        if self.conversation is not None and self.previous_response_id is not None:
            raise InvalidRequestError(
                "conversation and previous_response_id exclude each other",
                param="previous_response_id",
            )
        if self.store is False:
            raise UnsupportedParameterError(
                "store: false is not supported: a response is a turn of a session, which is kept "
                "until the session is deleted",
                param="store",
            )
        if self.parallel_tool_calls is False:
            raise UnsupportedParameterError(
                "parallel_tool_calls: false is not supported", param="parallel_tool_calls"
            )


class RetrieveQuery(msgspec.Struct, frozen=True):
    """Of ``GET /v1/responses/{response_id}``."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0, lt=2**53)] | None = None


class ItemsQuery(msgspec.Struct, frozen=True):
    """Of a list of items; ``after`` is an item's id."""

    after: Annotated[str, Meta(max_length=64)] | None = None
    limit: Limit = 20
    order: Order = "desc"


class ConversationCreate(msgspec.Struct, frozen=True):
    """``POST /v1/conversations``; ``agent`` is agentray's own and names who answers in it."""

    items: Nothing | None = None
    metadata: Metadata | None = None
    agent: Name | None = None


class ConversationUpdate(msgspec.Struct, frozen=True):
    """``POST /v1/conversations/{conversation_id}``."""

    metadata: Metadata | None


class SessionCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/sessions``."""

    id: SessionId | None = None
    agent: Name | None = None
    user: Name | None = None
    placement: Literal["shared", "dedicated"] = "shared"
    ttl_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    metadata: Metadata | None = None


class SessionsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``GET /v1/sessions``; ``after`` is ``next`` of the page before."""

    user: Name | None = None
    agent: Name | None = None
    status: Literal["idle", "running", "closed", "parked"] | None = None
    after: Annotated[str, Meta(max_length=512)] | None = None
    limit: Limit = 20


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ImageUrl(msgspec.Struct, frozen=True, omit_defaults=True):
    url: Annotated[str, Meta(min_length=1)]
    detail: Literal["low", "high", "auto"] | None = None


class ImageUrlPart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    image_url: ImageUrl


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message, in the shape of OpenAI's chat."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[TextPart | ImageUrlPart], Meta(min_length=1)]


class TurnCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/sessions/{session_id}/turns``."""

    input: Annotated[str, Meta(min_length=1)] | Annotated[list[ChatMessage], Meta(min_length=1)]
    stream: bool = False
    background: bool = False
    if_busy: Literal["enqueue", "reject", "interrupt"] = "enqueue"
    idempotency_key: Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,255}$")] | None = None
    model: Name | None = None
    instructions: str | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_output_tokens: Tokens | None = None
    output_schema: dict[str, Any] | None = None
    metadata: Metadata | None = None


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /v1/sessions/{session_id}/cancel``: one turn, or all that run or wait."""

    turn_id: str | None = None


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``GET /v1/sessions/{session_id}/events``: ``after`` is ``SEQ`` or ``SEQ.OFFSET``.

    With ``turn_id`` only that turn's events come, and a stream ends with them.
    """

    after: Annotated[str, Meta(pattern=r"^[0-9]{1,15}(\.[0-9]{1,15})?$")] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    turn_id: str | None = None


class ChatRequestMessage(msgspec.Struct, frozen=True):
    """A message of a stateless completion; what else it has goes to the model as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class ChatCreate(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``; fields that are not listed go to the model as they are."""

    model: Name
    messages: Annotated[list[ChatRequestMessage], Meta(min_length=1)]
    stream: bool | None = None
    store: bool | None = None
    temperature: Temperature | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None


def turn_options(body: ResponseCreate | TurnCreate, model: str | None) -> TurnOptions:
    """Return the options of a turn; ``model`` is a model, not an agent.

    Raises:
        InvalidRequestError: the JSON schema that the answer is to follow is none.
    """
    schema, form = _output(body)
    return TurnOptions(
        model=model,
        output_schema=schema,
        output_form=form,
        instructions=body.instructions,
        temperature=body.temperature,
        top_p=body.top_p,
        max_output_tokens=body.max_output_tokens,
        background=bool(body.background),
        metadata=body.metadata or {},
    )


def _output(body: ResponseCreate | TurnCreate) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the JSON schema of the answer, if it is to follow one, and what else is said of it."""
    if isinstance(body, TurnCreate):
        if body.output_schema is not None:
            check_schema(body.output_schema, param="output_schema")
        return body.output_schema, {}
    form = body.text.format if body.text is not None else None
    if isinstance(form, JsonObjectFormat):
        return {"type": "object"}, {}
    if not isinstance(form, JsonSchemaFormat):
        return None, {}
    check_schema(form.schema, param="text.format.schema")
    facts = {"name": form.name, "description": form.description, "strict": form.strict}
    return form.schema, {name: fact for name, fact in facts.items() if fact is not None}


def response_messages(given: str | Sequence[MessageItem]) -> list[Message]:
    """Return the input of a response as messages of the chat protocol."""
    if isinstance(given, str):
        return [Message("user", given)]
    return [
        Message(
            "system" if item.role == "developer" else item.role,
            item.content
            if isinstance(item.content, str)
            else [_chat_part(part) for part in item.content],
        )
        for item in given
    ]


def _chat_part(part: InputText | ImagePart | OutputText) -> dict[str, Any]:
    if not isinstance(part, ImagePart):
        return {"type": "text", "text": part.text}
    image = {"url": part.image_url}
    return {"type": "image_url", "image_url": image | ({"detail": d} if (d := part.detail) else {})}


def native_messages(given: str | Sequence[ChatMessage]) -> list[Message]:
    """Return the input of a turn as messages."""
    if isinstance(given, str):
        return [Message("user", given)]
    return [
        Message(
            "system" if message.role == "developer" else message.role,
            message.content
            if isinstance(message.content, str)
            else [msgspec.to_builtins(part) for part in message.content],
        )
        for message in given
    ]
