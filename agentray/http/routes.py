"""All that is served: each route with what it takes and gives."""

from __future__ import annotations

from agentray.http import bodies, objects
from agentray.http import routes_chat as chat
from agentray.http import routes_conversations as conversations
from agentray.http import routes_responses as responses
from agentray.http import routes_sessions as sessions
from agentray.http import routes_system as system
from agentray.http.door import Door
from agentray.http.routing import Answer, Route
from agentray.sessions.base import SessionInfo, TurnInfo

__all__ = ["REFUSALS", "ROUTES"]

SSE = "text/event-stream"
_NO_RESPONSE = (400, 404, 503)
_NO_SESSION = (400, 404, 503)

ROUTES: tuple[Route[Door], ...] = (
    Route(
        method="POST",
        path="/v1/responses",
        endpoint=responses.create_response,
        summary="Answer an input: in a conversation, behind a response, or in a new session",
        tag="OpenAI",
        body=bodies.ResponseCreate,
        headers=("Idempotency-Key",),
        answers=(
            Answer(200, objects.Response),
            Answer(200, objects.ResponseEvent, SSE, "with `stream`"),
        ),
        errors=(400, 404, 409, 413, 429, 503),
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}",
        endpoint=responses.retrieve_response,
        summary="Show a response, or stream it again behind a sequence number",
        tag="OpenAI",
        query=bodies.RetrieveQuery,
        answers=(
            Answer(200, objects.Response),
            Answer(200, objects.ResponseEvent, SSE, "with `stream`"),
        ),
        errors=_NO_RESPONSE,
    ),
    Route(
        method="POST",
        path="/v1/responses/{response_id}/cancel",
        endpoint=responses.cancel_response,
        summary="Cancel a response that is queued or in progress",
        tag="OpenAI",
        answers=(Answer(200, objects.Response),),
        errors=_NO_RESPONSE,
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}/input_items",
        endpoint=responses.list_input_items,
        summary="List what was put into a response",
        tag="OpenAI",
        query=bodies.ItemsQuery,
        answers=(Answer(200, objects.ItemList),),
        errors=_NO_RESPONSE,
    ),
    Route(
        method="POST",
        path="/v1/conversations",
        endpoint=conversations.create_conversation,
        summary="Make a conversation",
        tag="OpenAI",
        body=bodies.ConversationCreate,
        answers=(Answer(200, objects.Conversation),),
        errors=(400, 413, 503),
    ),
    Route(
        method="GET",
        path="/v1/conversations/{conversation_id}",
        endpoint=conversations.retrieve_conversation,
        summary="Show a conversation",
        tag="OpenAI",
        answers=(Answer(200, objects.Conversation),),
        errors=_NO_SESSION,
    ),
    Route(
        method="POST",
        path="/v1/conversations/{conversation_id}",
        endpoint=conversations.update_conversation,
        summary="Replace a conversation's metadata",
        tag="OpenAI",
        body=bodies.ConversationUpdate,
        answers=(Answer(200, objects.Conversation),),
        errors=(*_NO_SESSION, 413),
    ),
    Route(
        method="DELETE",
        path="/v1/conversations/{conversation_id}",
        endpoint=conversations.delete_conversation,
        summary="Delete a conversation with all that is in it",
        tag="OpenAI",
        answers=(Answer(200, objects.Deleted),),
        errors=_NO_SESSION,
    ),
    Route(
        method="GET",
        path="/v1/conversations/{conversation_id}/items",
        endpoint=conversations.list_items,
        summary="List a conversation's items",
        tag="OpenAI",
        query=bodies.ItemsQuery,
        answers=(Answer(200, objects.ItemList),),
        errors=_NO_SESSION,
    ),
    Route(
        method="GET",
        path="/v1/conversations/{conversation_id}/items/{item_id}",
        endpoint=conversations.retrieve_item,
        summary="Show an item of a conversation",
        tag="OpenAI",
        answers=(Answer(200, objects.Item),),
        errors=_NO_SESSION,
    ),
    Route(
        method="POST",
        path="/v1/chat/completions",
        endpoint=chat.create_chat_completion,
        summary="Answer a whole conversation; nothing is kept",
        tag="OpenAI",
        body=bodies.ChatCreate,
        answers=(
            Answer(200, dict, text="The answer of the model's server, as it came"),
            Answer(200, None, SSE, "with `stream`"),
        ),
        errors=(400, 404, 413, 429, 502),
    ),
    Route(
        method="GET",
        path="/v1/models",
        endpoint=system.list_models,
        summary="List agents and models: each can be named as `model`",
        tag="OpenAI",
        answers=(Answer(200, objects.ModelList),),
    ),
    Route(
        method="GET",
        path="/v1/models/{model}",
        endpoint=system.retrieve_model,
        summary="Show an agent or a model",
        tag="OpenAI",
        answers=(Answer(200, objects.Model),),
        errors=(404,),
    ),
    Route(
        method="POST",
        path="/v1/sessions",
        endpoint=sessions.create_session,
        summary="Make a session, or return the one that has this id",
        tag="Sessions",
        body=bodies.SessionCreate,
        answers=(
            Answer(201, SessionInfo, text="It is new"),
            Answer(200, SessionInfo, text="It was there"),
        ),
        errors=(400, 413, 503),
    ),
    Route(
        method="GET",
        path="/v1/sessions",
        endpoint=sessions.list_sessions,
        summary="List sessions, newest first",
        tag="Sessions",
        query=bodies.SessionsQuery,
        answers=(Answer(200, sessions.SessionPage),),
        errors=(400, 503),
    ),
    Route(
        method="GET",
        path="/v1/sessions/{session_id}",
        endpoint=sessions.retrieve_session,
        summary="Show a session",
        tag="Sessions",
        answers=(Answer(200, SessionInfo),),
        errors=_NO_SESSION,
    ),
    Route(
        method="DELETE",
        path="/v1/sessions/{session_id}",
        endpoint=sessions.delete_session,
        summary="Delete a session with all that is in it",
        tag="Sessions",
        answers=(Answer(200, objects.Deleted),),
        errors=_NO_SESSION,
    ),
    Route(
        method="POST",
        path="/v1/sessions/{session_id}/turns",
        endpoint=sessions.create_turn,
        summary="Send a message; answers when the turn has ended, or streams, or at once",
        tag="Sessions",
        body=bodies.TurnCreate,
        headers=("Idempotency-Key",),
        answers=(
            Answer(200, TurnInfo, text="It has ended"),
            Answer(200, sessions.StreamEvent, SSE, "with `stream`; ids are cursors"),
            Answer(202, TurnInfo, text="It was accepted, with `background`"),
        ),
        errors=(*_NO_SESSION, 409, 413, 429),
    ),
    Route(
        method="GET",
        path="/v1/sessions/{session_id}/turns/{turn_id}",
        endpoint=sessions.retrieve_turn,
        summary="Show a turn",
        tag="Sessions",
        answers=(Answer(200, TurnInfo),),
        errors=_NO_SESSION,
    ),
    Route(
        method="GET",
        path="/v1/sessions/{session_id}/events",
        endpoint=sessions.read_events,
        summary="Read a session's journal, or with `Accept: text/event-stream` follow it",
        tag="Sessions",
        query=bodies.EventsQuery,
        headers=("Last-Event-ID",),
        answers=(
            Answer(200, sessions.EventPage),
            Answer(200, sessions.StreamEvent, SSE, "what was missed, then live"),
        ),
        errors=_NO_SESSION,
    ),
    Route(
        method="POST",
        path="/v1/sessions/{session_id}/cancel",
        endpoint=sessions.cancel_turns,
        summary="Cancel a turn, or all that run or wait",
        tag="Sessions",
        body=bodies.Cancel,
        answers=(Answer(200, sessions.CancelledTurns),),
        errors=(*_NO_SESSION, 413),
    ),
    Route(
        method="GET",
        path="/healthz",
        endpoint=system.health,
        summary="Say that this process answers",
        tag="System",
        answers=(Answer(200, system.Health),),
    ),
    Route(
        method="GET",
        path="/readyz",
        endpoint=system.readiness,
        summary="Say whether this process takes new work (503 if not), and what it holds",
        tag="System",
        answers=(
            Answer(200, system.Readiness),
            Answer(503, system.Readiness, text="It takes no new work"),
        ),
    ),
    Route(
        method="GET",
        path="/metrics",
        endpoint=system.metrics,
        summary="Give the metrics of all hosts, for Prometheus",
        tag="System",
        answers=(Answer(200, None, "text/plain"),),
    ),
    Route(
        method="GET",
        path="/openapi.json",
        endpoint=system.openapi,
        summary="Describe all routes",
        tag="System",
        answers=(Answer(200, dict),),
    ),
)

REFUSALS = {
    ("DELETE", "/v1/responses/{response_id}"): (
        "a response is a turn and goes with its session: DELETE /v1/sessions/{session_id}"
    ),
    ("POST", "/v1/conversations/{conversation_id}/items"): (
        "items come into a conversation by its responses alone"
    ),
    ("DELETE", "/v1/conversations/{conversation_id}/items/{item_id}"): (
        "a journal is never changed: an item goes with its conversation"
    ),
}
"""What to say of methods that OpenAI has and agentray has not."""
