"""OpenAI's objects and stream events, in the shapes that this door emits.

They follow ``openai.types.responses`` and ``openai.types.conversations`` of the openai package
3.54; a unit test reads each of them back with that package.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

__all__ = [
    "ContentPartAdded",
    "ContentPartDone",
    "Conversation",
    "ConversationMessage",
    "ConversationRef",
    "Deleted",
    "ErrorEvent",
    "IncompleteDetails",
    "InputImage",
    "InputText",
    "Item",
    "ItemList",
    "ItemStatus",
    "JsonObjectFormat",
    "JsonSchemaFormat",
    "McpArgumentsDone",
    "McpCall",
    "McpCallCompleted",
    "McpCallFailed",
    "McpCallInProgress",
    "McpToolError",
    "Model",
    "ModelFallback",
    "ModelList",
    "OutputItemAdded",
    "OutputItemDone",
    "OutputText",
    "Response",
    "ResponseCompleted",
    "ResponseCreated",
    "ResponseError",
    "ResponseEvent",
    "ResponseFailed",
    "ResponseInProgress",
    "ResponseIncomplete",
    "ResponseQueued",
    "ResponseStatus",
    "ResponseUsage",
    "TextConfig",
    "TextDelta",
    "TextDone",
    "TextFormat",
]

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]


class _Tagged(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class InputText(_Tagged, frozen=True, tag="input_text"):
    """Text of a caller's message."""

    text: str


class InputImage(_Tagged, frozen=True, tag="input_image"):
    """An image of a caller's message, by its address."""

    image_url: str
    detail: Literal["low", "high", "auto"] = "auto"


class OutputText(_Tagged, frozen=True, tag="output_text"):
    """Text of a model."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ConversationMessage(_Tagged, frozen=True, tag="message"):
    """What a model said in one step, or a message that a caller gave."""

    id: str
    status: ItemStatus
    content: list[InputText | InputImage | OutputText]
    role: str = "assistant"


class McpToolError(msgspec.Struct, frozen=True):
    """Why a tool call failed."""

    content: str
    type: Literal["mcp_tool_execution_error"] = "mcp_tool_execution_error"


class McpCall(_Tagged, frozen=True, tag="mcp_call"):
    """A tool call that agentray ran.

    Not a ``function_call``: clients run those themselves, and this one is done already.
    """

    id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: str | None = None
    error: McpToolError | None = None
    server_label: str = "agentray"
    approval_request_id: None = None


Item = ConversationMessage | McpCall


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """The tokens of all model calls of a response."""

    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, input_tokens: int, output_tokens: int, cached_tokens: int) -> ResponseUsage:
        """Return the usage of these tokens; the cached ones are a part of the input."""
        return cls(
            input_tokens,
            _InputDetails(cached_tokens),
            output_tokens,
            _OutputDetails(),
            input_tokens + output_tokens,
        )


class ResponseError(msgspec.Struct, frozen=True):
    """Why a response failed: OpenAI's code, and in ``type`` the stable code of agentray."""

    code: Literal["server_error", "rate_limit_exceeded"]
    message: str
    type: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response stopped early."""

    reason: Literal["max_output_tokens", "content_filter", "max_messages"] | None


class ConversationRef(msgspec.Struct, frozen=True):
    """The conversation of a response."""

    id: str


class TextFormat(_Tagged, frozen=True, tag="text"):
    """An answer in plain text."""


class JsonObjectFormat(_Tagged, frozen=True, tag="json_object"):
    """An answer that is a JSON object, of whatever form."""


class JsonSchemaFormat(_Tagged, frozen=True, kw_only=True, tag="json_schema"):
    """An answer that follows a JSON schema; ``strict`` asks the model's server to see to it, and
    agentray checks it in any case."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """The form of an answer."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat = TextFormat()


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A turn, as OpenAI shows one."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    conversation: ConversationRef | None = None
    store: bool = True
    temperature: float | None = None
    text: TextConfig = TextConfig()
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any] = []
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class _Numbered(_Tagged, frozen=True, kw_only=True):
    sequence_number: int


class ResponseCreated(_Numbered, frozen=True, tag="response.created"):
    response: Response


class ResponseQueued(_Numbered, frozen=True, tag="response.queued"):
    response: Response


class ResponseInProgress(_Numbered, frozen=True, tag="response.in_progress"):
    response: Response


class ResponseCompleted(_Numbered, frozen=True, tag="response.completed"):
    response: Response


class ResponseFailed(_Numbered, frozen=True, tag="response.failed"):
    response: Response


class ResponseIncomplete(_Numbered, frozen=True, tag="response.incomplete"):
    """The end of a response that stopped early; ``response.status`` tells a cancelled one."""

    response: Response


class OutputItemAdded(_Numbered, frozen=True, tag="response.output_item.added"):
    output_index: int
    item: Item


class OutputItemDone(_Numbered, frozen=True, tag="response.output_item.done"):
    output_index: int
    item: Item


class ContentPartAdded(_Numbered, frozen=True, tag="response.content_part.added"):
    item_id: str
    output_index: int
    part: OutputText
    content_index: int = 0


class ContentPartDone(_Numbered, frozen=True, tag="response.content_part.done"):
    item_id: str
    output_index: int
    part: OutputText
    content_index: int = 0


# Positional, and not by way of _Numbered: made once for every piece of text that is streamed.
class TextDelta(_Tagged, frozen=True, tag="response.output_text.delta"):
    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    content_index: int = 0
    logprobs: list[Any] = []


class TextDone(_Numbered, frozen=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    text: str
    content_index: int = 0
    logprobs: list[Any] = []


class McpCallInProgress(_Numbered, frozen=True, tag="response.mcp_call.in_progress"):
    item_id: str
    output_index: int


class McpArgumentsDone(_Numbered, frozen=True, tag="response.mcp_call_arguments.done"):
    item_id: str
    output_index: int
    arguments: str


class McpCallCompleted(_Numbered, frozen=True, tag="response.mcp_call.completed"):
    item_id: str
    output_index: int


class McpCallFailed(_Numbered, frozen=True, tag="response.mcp_call.failed"):
    item_id: str
    output_index: int


class ModelFallback(_Numbered, frozen=True, tag="agentray.model.fallback"):
    """agentray's own: a text that a client had seen broke off, and ``to_model`` was called.

    With ``continues`` the item goes on where it was; else it was closed as incomplete, and what
    comes is a new one. ``reason`` is the code of the error that ended the attempt.
    """

    item_id: str
    output_index: int
    reason: str
    continues: bool
    from_model: str
    to_model: str


class ErrorEvent(_Numbered, frozen=True, tag="error"):
    """The stream ends early; the response goes on and can be retrieved."""

    code: str
    message: str
    param: str | None = None


ResponseEvent = (
    ResponseCreated
    | ResponseQueued
    | ResponseInProgress
    | OutputItemAdded
    | ContentPartAdded
    | TextDelta
    | TextDone
    | ContentPartDone
    | OutputItemDone
    | McpCallInProgress
    | McpArgumentsDone
    | McpCallCompleted
    | McpCallFailed
    | ResponseCompleted
    | ResponseFailed
    | ResponseIncomplete
    | ModelFallback
    | ErrorEvent
)


class ItemList(msgspec.Struct, frozen=True):
    """A page of items."""

    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"

    @classmethod
    def of(cls, items: list[Item], has_more: bool) -> ItemList:
        """Return a page of these items."""
        ends = (items[0].id, items[-1].id) if items else (None, None)
        return cls(items, *ends, has_more)


class Conversation(msgspec.Struct, frozen=True):
    """A session, as OpenAI shows one."""

    id: str
    created_at: int
    metadata: dict[str, str]
    object: Literal["conversation"] = "conversation"


class Deleted(msgspec.Struct, frozen=True):
    """What is left of a conversation or session that was deleted."""

    id: str
    object: Literal["conversation.deleted", "session.deleted"]
    deleted: bool = True


class Model(msgspec.Struct, frozen=True):
    """An agent or a model: both can be named where OpenAI expects a model."""

    id: str
    owned_by: Literal["agents", "models"]
    created: int = 0
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    """All agents and models."""

    data: list[Model]
    object: Literal["list"] = "list"
