"""The statements of the durable tier, each with what makes it right under concurrency."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ACCEPT",
    "CLAIM",
    "CREATE_SESSION",
    "DELETE_SESSION",
    "FORK_SESSION",
    "INBOX",
    "ORPHANS",
    "RECENT_EVENTS",
    "REQUEST_CANCEL",
    "SESSION",
    "TURN",
    "list_sessions",
]

# An owner without a row is dead. One whose last beat is older than the term (%s) is dead
# too, unless the server itself came up less than a term ago: nobody could beat before that.
_OWNER_ALIVE = """
  EXISTS (SELECT 1 FROM hosts h WHERE h.id = s.owner AND greatest(
    h.beat_at, pg_postmaster_start_time()) > now() - make_interval(secs => %s))
"""

_SESSION_COLUMNS = """
  s.tenant, s.id, s.agent, s.user_id AS user, s.placement, s.origin, s.metadata,
  s.parked_reason,
  extract(epoch FROM s.created_at)::float8 AS created_at,
  extract(epoch FROM s.updated_at)::float8 AS updated_at,
  extract(epoch FROM s.expires_at)::float8 AS expires_at,
  coalesce(s.expires_at <= now(), false) AS expired,
  s.epoch, s.owner, s.last_seq, s.inbox, s.turns, s.cost, s.latest_turn
"""

_OPEN = """
  (SELECT count(*) FROM turns t
   WHERE t.tenant = s.tenant AND t.session_id = s.id AND t.state <> 'done') AS open_turns
"""

SESSION = f"""
SELECT {_SESSION_COLUMNS}, {_OPEN}, {_OWNER_ALIVE} AS owner_alive
FROM sessions s WHERE s.tenant = %s AND s.id = %s
"""

TURN = """
SELECT id, ordinal, state, status, idempotency_key, request_hash, input, options,
  cancel_requested,
  extract(epoch FROM accepted_at)::float8 AS accepted_at,
  extract(epoch FROM finished_at)::float8 AS finished_at,
  first_seq, last_seq
FROM turns WHERE tenant = %s AND session_id = %s
"""

# The events of the last turns that began, from the first of them on.
RECENT_EVENTS = """
SELECT body FROM events WHERE tenant = %s AND session_id = %s AND seq >= coalesce(
  (SELECT first_seq FROM turns WHERE tenant = %s AND session_id = %s AND first_seq IS NOT NULL
   ORDER BY first_seq DESC OFFSET %s LIMIT 1), 0)
ORDER BY seq
"""

CREATE_SESSION = """
INSERT INTO sessions (tenant, id, agent, user_id, placement, origin, metadata, expires_at,
                      epoch, owner)
VALUES (%s, %s, %s, %s, %s, %s, %s, now() + make_interval(secs => %s),
        extract(epoch FROM now()) * 1000, %s)
ON CONFLICT DO NOTHING RETURNING 1 AS one
"""

DELETE_SESSION = (
    "DELETE FROM scratch WHERE tenant = %s AND session_id = %s",
    "DELETE FROM events WHERE tenant = %s AND session_id = %s",
    "DELETE FROM turns WHERE tenant = %s AND session_id = %s",
    "DELETE FROM sessions WHERE tenant = %s AND id = %s",
)

FORK_SESSION = (
    "SELECT 1 FROM sessions WHERE tenant = %(tenant)s AND id = %(old)s FOR SHARE",
    """
    INSERT INTO sessions (tenant, id, agent, user_id, placement, origin, metadata, epoch,
                          last_seq, turns, latest_turn)
    SELECT tenant, %(new)s, agent, user_id, placement, origin, metadata,
      extract(epoch FROM now()) * 1000, %(seq)s,
      (SELECT count(*) FROM turns WHERE tenant = s.tenant AND session_id = s.id
         AND last_seq <= %(seq)s),
      (SELECT id FROM turns WHERE tenant = s.tenant AND session_id = s.id
         AND last_seq = %(seq)s)
    FROM sessions s WHERE tenant = %(tenant)s AND id = %(old)s
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO turns (tenant, session_id, id, state, status, request_hash, options,
                       accepted_at, finished_at, first_seq, last_seq)
    SELECT tenant, %(new)s, id, state, status, request_hash, options,
      accepted_at, finished_at, first_seq, last_seq
    FROM turns WHERE tenant = %(tenant)s AND session_id = %(old)s AND last_seq <= %(seq)s
    ORDER BY ordinal
    """,
    """
    INSERT INTO events (tenant, session_id, seq, epoch, body)
    SELECT tenant, %(new)s, seq, 0, body FROM events
    WHERE tenant = %(tenant)s AND session_id = %(old)s AND seq <= %(seq)s
    """,
    """
    INSERT INTO scratch (tenant, session_id, seq, body)
    SELECT tenant, %(new)s, seq, body FROM scratch
    WHERE tenant = %(tenant)s AND session_id = %(old)s AND seq <= %(seq)s
    """,
)

ACCEPT = """
SELECT * FROM accept_turn(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s::int, %s::float8)
"""

REQUEST_CANCEL = """
WITH marked AS (
  UPDATE turns SET cancel_requested = true
  WHERE tenant = %s AND session_id = %s AND state <> 'done'
    AND (%s::text IS NULL OR id = %s::text)
  RETURNING tenant, session_id, id, ordinal
)
SELECT m.id, s.owner FROM marked m
JOIN sessions s ON s.tenant = m.tenant AND s.id = m.session_id ORDER BY m.ordinal
"""

# Two claimants: the second waits for the first's row lock and then finds that the epoch it saw
# is no longer the row's. Hosts are read from the snapshot; if that errs, the fence decides.
CLAIM = f"""
UPDATE sessions s SET epoch = s.epoch + 1, owner = %s, parked_reason = NULL
FROM (SELECT tenant, id, epoch, owner FROM sessions WHERE tenant = %s AND id = %s) seen
WHERE s.tenant = seen.tenant AND s.id = seen.id AND s.epoch = seen.epoch
  AND s.placement = %s AND (s.owner IS NULL OR s.owner = %s OR NOT {_OWNER_ALIVE})
RETURNING {_SESSION_COLUMNS}, 0 AS open_turns, true AS owner_alive,
  seen.owner AS previous_owner
"""

# Running turns too: a host that claimed a session and lost the answer does not know that it runs.
INBOX = """
SELECT t.tenant, t.session_id, t.id, t.state, t.cancel_requested
FROM turns t JOIN sessions s ON s.tenant = t.tenant AND s.id = t.session_id
WHERE t.state <> 'done' AND s.owner = %s AND s.parked_reason IS NULL
ORDER BY t.ordinal
"""

# Not FOR UPDATE SKIP LOCKED: the claim that follows is a compare-and-set of its own, and two
# sweepers that see the same session have one winner. Dedicated sessions come last: those that wait
# for a process that may be started must not keep the others waiting.
ORPHANS = f"""
SELECT s.tenant, s.id, s.placement
FROM (SELECT DISTINCT tenant, session_id FROM turns WHERE state <> 'done') t
JOIN sessions s ON s.tenant = t.tenant AND s.id = t.session_id
WHERE s.parked_reason IS NULL AND (s.owner IS NULL OR NOT {_OWNER_ALIVE})
ORDER BY s.placement = 'dedicated', random() LIMIT %s
"""

_STATUS_FILTERS = {
    "closed": "s.parked_reason IS NULL AND s.expires_at <= now()"
    " AND NOT EXISTS (SELECT 1 FROM turns t WHERE t.tenant = s.tenant"
    " AND t.session_id = s.id AND t.state <> 'done')",
    "parked": "s.parked_reason IS NOT NULL",
    "running": "s.parked_reason IS NULL AND EXISTS (SELECT 1 FROM turns t WHERE t.tenant = s.tenant"
    " AND t.session_id = s.id AND t.state <> 'done')",
    "idle": "s.parked_reason IS NULL AND coalesce(s.expires_at > now(), true)"
    " AND NOT EXISTS (SELECT 1 FROM turns t WHERE t.tenant = s.tenant"
    " AND t.session_id = s.id AND t.state <> 'done')",
}


def list_sessions(
    term_s: float,
    tenant: str,
    *,
    user: str | None,
    agent: str | None,
    status: str | None,
    before: tuple[float, str] | None,
    limit: int,
) -> tuple[str, list[Any]]:
    """Return the statement and parameters of a page of sessions, newest first."""
    where, params = ["s.tenant = %s"], [term_s, tenant]
    if user is not None:
        where.append("s.user_id = %s")
        params.append(user)
    if agent is not None:
        where.append("s.agent = %s")
        params.append(agent)
    if status is not None:
        where.append(_STATUS_FILTERS[status])
    if before is not None:
        where.append("(s.created_at, s.id) < (to_timestamp(%s), %s)")
        params.extend(before)
    statement = (
        f"SELECT {_SESSION_COLUMNS}, {_OPEN}, {_OWNER_ALIVE} AS owner_alive FROM sessions s"
        f" WHERE {' AND '.join(where)} ORDER BY s.created_at DESC, s.id DESC LIMIT %s"
    )
    return statement, [*params, limit]
