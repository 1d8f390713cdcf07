"""Say what a turn is as OpenAI's response object: all of it but its items."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from agentray.events import TurnError, TurnOptions, TurnStatus, Usage
from agentray.http.objects import (
    ConversationMessage,
    ConversationRef,
    IncompleteDetails,
    JsonObjectFormat,
    JsonSchemaFormat,
    OutputText,
    Response,
    ResponseError,
    ResponseUsage,
    TextConfig,
)
from agentray.ids import response_id
from agentray.sessions.base import TurnInfo

__all__ = ["begin", "ended", "message_id", "one_message"]

_RATE_LIMITS = frozenset({"model_rate_limited", "overloaded"})


def begin(
    session_id: str,
    turn: TurnInfo,
    *,
    agent: str,
    previous: str | None = None,
    conversation: bool = False,
) -> Response:
    """Return the response of a turn, before anything happened in it.

    ``agent`` is the session's, as far as that is known: a turn that waits may not tell.
    """
    options = turn.options
    return Response(
        id=response_id(session_id, turn.id),
        created_at=int(turn.accepted_at),
        status="queued" if turn.state == "accepted" else "in_progress",
        background=options.background,
        instructions=options.instructions,
        max_output_tokens=options.max_output_tokens,
        metadata=options.metadata,
        model=options.model or turn.agent or agent,
        previous_response_id=previous,
        conversation=ConversationRef(session_id) if conversation else None,
        temperature=options.temperature,
        text=_text(options),
        top_p=options.top_p,
    )


def _text(options: TurnOptions) -> TextConfig:
    schema = options.output_schema
    if schema is None:
        return TextConfig()
    form = options.output_form
    if not form and schema == {"type": "object"}:
        return TextConfig(JsonObjectFormat())
    facts: dict[str, Any] = {"name": "answer", **form, "schema": schema}
    return TextConfig(JsonSchemaFormat(**facts))


def one_message(response: Response, turn: TurnInfo) -> Response | None:
    """Return the response of a turn that was one plain answer, without its events; else None.

    Such a turn is ``turn.accepted``, ``model.called``, ``model.finished``, ``turn.finished``.
    """
    if turn.status != "completed" or turn.first_seq is None or turn.last_seq is None:
        return None
    if turn.last_seq - turn.first_seq != 3 or turn.text is None:
        return None
    message = ConversationMessage(message_id(turn.id, 1), "completed", [OutputText(turn.text)])
    response = replace(response, output=[message])
    return ended(response, turn.status, turn.error, turn.usage or Usage(), turn.finished_at)


def message_id(turn_id: str, relative_seq: int) -> str:
    """Return the id of the message of a step, by how far behind the turn's first event it began."""
    return f"msg_{turn_id}_{relative_seq}"


def ended(
    response: Response,
    status: TurnStatus,
    error: TurnError | None,
    usage: Usage,
    finished_at: float | None,
) -> Response:
    """Return a response as its turn ended."""
    failure = incomplete = None
    if status == "failed":
        code, message = (error.code, error.message) if error else ("unknown", "the turn failed")
        kind = "rate_limit_exceeded" if code in _RATE_LIMITS else "server_error"
        failure = ResponseError(kind, message, code)
    elif status == "incomplete":
        reason = error.code if error else None
        if reason == "max_output_tokens" or reason == "content_filter":
            incomplete = IncompleteDetails(reason)
        else:
            incomplete = IncompleteDetails("max_messages" if reason == "max_steps" else None)
    return replace(
        response,
        status=status,
        error=failure,
        incomplete_details=incomplete,
        usage=ResponseUsage.of(usage.input_tokens, usage.output_tokens, usage.cached_tokens),
        completed_at=int(finished_at) if status == "completed" and finished_at else None,
    )
