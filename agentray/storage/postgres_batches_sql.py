"""The statements about files and batches that are longer than a line.

Whoever locks a batch and its lines locks the batch first: a claim shares it, a result, a cancel
and the end of a batch have it alone. So no line is claimed behind a cancel that was seen.
"""

from __future__ import annotations

__all__ = [
    "ADD_LINES",
    "BATCH",
    "BEFORE_END",
    "BEGIN",
    "CANCEL",
    "CLAIM_BATCH",
    "CLAIM_LINES",
    "CREATE_BATCH",
    "CREATE_FILE",
    "CREATE_PIECE",
    "DELETE_EXPIRED_FILES",
    "DELETE_FILE",
    "END",
    "FAIL",
    "FAIL_REST",
    "FILE",
    "FINALIZE",
    "GIVE_BACK",
    "LOCK_ENDING",
    "OPEN",
    "PUT_OFF",
    "RECORD",
    "RENEW",
    "STILL_RUNNING",
    "WRITE_FILE",
    "list_files",
]

FILE = """
    SELECT tenant, id, purpose, filename, size_bytes,
           extract(epoch FROM created_at)::float8 AS created_at,
           extract(epoch FROM expires_at)::float8 AS expires_at
    FROM files
    WHERE tenant = %(tenant)s AND (expires_at IS NULL OR expires_at > now())
"""

CREATE_PIECE = "INSERT INTO file_pieces (tenant, file_id, number, body) VALUES (%s, %s, %s, %b)"

CREATE_FILE = """
    INSERT INTO files (tenant, id, purpose, filename, size_bytes, expires_at)
    VALUES (%s, %s, %s, %s, %s, now() + make_interval(secs => %s))
"""

DELETE_FILE = """
    WITH f AS (DELETE FROM files WHERE tenant = %s AND id = %s RETURNING tenant, id),
    p AS (DELETE FROM file_pieces p USING f WHERE p.tenant = f.tenant AND p.file_id = f.id)
    SELECT 1 AS one FROM f
"""

DELETE_EXPIRED_FILES = """
    WITH f AS (
        DELETE FROM files WHERE (tenant, id) IN (
            SELECT tenant, id FROM files WHERE expires_at <= now()
            ORDER BY expires_at LIMIT 100 FOR UPDATE SKIP LOCKED
        ) RETURNING tenant, id
    ),
    p AS (DELETE FROM file_pieces p USING f WHERE p.tenant = f.tenant AND p.file_id = f.id)
    SELECT 1 AS one FROM f
"""


def list_files(*, newest_first: bool) -> str:
    """Return the statement that lists files by their age."""
    # Ids are in the order in which they were made.
    before, order = ("<", "DESC") if newest_first else (">", "ASC")
    return f"""{FILE}
        AND (%(purpose)s::text IS NULL OR purpose = %(purpose)s)
        AND (%(after)s::text IS NULL OR id {before} %(after)s)
        ORDER BY id {order} LIMIT %(limit)s
    """


_TIMES = ", ".join(
    f"extract(epoch FROM b.{name})::float8 AS {name}"
    for name in (
        "created_at",
        "expires_at",
        "in_progress_at",
        "finalizing_at",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
    )
)

# Whether lines run is asked of batches alone whose end waits for that.
BATCH = f"""
    SELECT b.tenant, b.id, b.input_file_id, b.endpoint, b.metadata, b.status, b.errors, {_TIMES},
           b.total, b.completed, b.failed, b.input_tokens, b.cached_tokens, b.output_tokens,
           b.reasoning_tokens, b.output_file_id, b.error_file_id, b.output_ttl_s,
           b.expires_at <= now() AS overdue,
           (b.status = 'cancelling' OR b.expires_at <= now()) AND EXISTS (
               SELECT 1 FROM batch_lines l WHERE l.tenant = b.tenant AND l.batch_id = b.id
               AND l.claimed_by IS NOT NULL AND l.due_at > now()) AS running
    FROM batches b
"""

# What there is to do for batches that have not ended.
_WORK = (
    "o.status = 'validating' AND (o.leased_until IS NULL OR o.leased_until <= now())",
    "o.status = 'finalizing'",
    "o.status = 'cancelling'",
    "o.status IN ('validating', 'in_progress') AND o.expires_at <= now()",
    "o.status = 'in_progress' AND o.completed + o.failed >= o.total",
    """o.status = 'in_progress' AND o.id <> ALL(%(resting)s::text[]) AND EXISTS (
        SELECT 1 FROM batch_lines l WHERE l.tenant = o.tenant AND l.batch_id = o.id
        AND l.result IS NULL AND l.due_at <= now())""",
)
_OF_EACH = " UNION ALL ".join(
    f"(SELECT o.tenant, o.id FROM batches o WHERE {work} ORDER BY o.created_at LIMIT %(limit)s)"
    for work in _WORK
)
OPEN = f"{BATCH} WHERE (b.tenant, b.id) IN ({_OF_EACH}) ORDER BY b.created_at"

CREATE_BATCH = """
    INSERT INTO batches
        (tenant, id, input_file_id, endpoint, metadata, expires_at, output_ttl_s)
    VALUES (%s, %s, %s, %s, %s, now() + make_interval(secs => %s), %s)
"""

CANCEL = """
    UPDATE batches SET status = 'cancelling', cancelling_at = now()
    WHERE tenant = %s AND id = %s AND status IN ('validating', 'in_progress')
"""

CLAIM_BATCH = """
    UPDATE batches SET claimed_by = %s, leased_until = now() + make_interval(secs => %s)
    WHERE tenant = %s AND id = %s AND status = 'validating'
    AND (leased_until IS NULL OR leased_until <= now())
    RETURNING 1 AS one
"""

ADD_LINES = """
    WITH held AS (
        UPDATE batches SET leased_until = now() + make_interval(secs => %(lease_s)s)
        WHERE tenant = %(tenant)s AND id = %(batch)s AND status = 'validating'
        AND claimed_by = %(by)s
        RETURNING tenant, id
    ),
    added AS (
        INSERT INTO batch_lines (tenant, batch_id, number, head, body)
        SELECT held.tenant, held.id, l.number, l.head, l.body
        FROM held, unnest(%(numbers)s::int[], %(heads)b::bytea[], %(bodies)b::bytea[])
            AS l(number, head, body)
        ON CONFLICT DO NOTHING
    )
    SELECT 1 AS one FROM held
"""

BEGIN = """
    UPDATE batches SET status = 'in_progress', in_progress_at = now(), total = %s,
        claimed_by = NULL, leased_until = NULL
    WHERE tenant = %s AND id = %s AND status = 'validating' AND claimed_by = %s
    RETURNING 1 AS one
"""

FAIL = """
    WITH b AS (
        UPDATE batches SET status = 'failed', failed_at = now(), errors = %s,
            claimed_by = NULL, leased_until = NULL
        WHERE tenant = %s AND id = %s AND status = 'validating' AND claimed_by = %s
        RETURNING tenant, id
    ),
    gone AS (DELETE FROM batch_lines l USING b WHERE l.tenant = b.tenant AND l.batch_id = b.id)
    SELECT 1 AS one FROM b
"""

CLAIM_LINES = """
    WITH b AS MATERIALIZED (
        SELECT endpoint FROM batches
        WHERE tenant = %(tenant)s AND id = %(batch)s AND status = 'in_progress'
        AND expires_at > now()
        FOR SHARE
    ),
    w AS MATERIALIZED (
        SELECT l.number, b.endpoint FROM b, batch_lines l
        WHERE l.tenant = %(tenant)s AND l.batch_id = %(batch)s AND l.result IS NULL
        AND l.due_at <= now()
        ORDER BY l.due_at, l.number LIMIT %(limit)s
        FOR UPDATE OF l SKIP LOCKED
    )
    UPDATE batch_lines l SET claimed_by = %(by)s, attempts = l.attempts + 1,
        due_at = now() + make_interval(secs => %(lease_s)s)
    FROM w
    WHERE l.tenant = %(tenant)s AND l.batch_id = %(batch)s AND l.number = w.number
    RETURNING l.tenant, l.batch_id, l.number, w.endpoint, l.body, l.attempts
"""

RENEW = """
    UPDATE batch_lines l SET due_at = now() + make_interval(secs => %(lease_s)s)
    FROM unnest(%(tenants)s::text[], %(batches)s::text[], %(numbers)s::int[])
        AS r(tenant, batch_id, number)
    WHERE l.tenant = r.tenant AND l.batch_id = r.batch_id AND l.number = r.number
    AND l.claimed_by = %(by)s
"""

GIVE_BACK = (
    "UPDATE batch_lines SET claimed_by = NULL, due_at = now() WHERE claimed_by = %s",
    """
    UPDATE batches SET claimed_by = NULL, leased_until = NULL
    WHERE status = 'validating' AND claimed_by = %s
    """,
)

PUT_OFF = """
    UPDATE batch_lines SET claimed_by = NULL, attempts = attempts - %s,
        due_at = now() + make_interval(secs => %s)
    WHERE tenant = %s AND batch_id = %s AND number = %s AND claimed_by = %s
"""

RECORD = """
    WITH b AS MATERIALIZED (
        SELECT tenant, id FROM batches
        WHERE tenant = %(tenant)s AND id = %(batch)s AND status IN ('in_progress', 'cancelling')
        FOR UPDATE
    ),
    l AS (
        UPDATE batch_lines l SET result = %(result)b, succeeded = %(succeeded)s, body = NULL,
            claimed_by = NULL
        FROM b
        WHERE l.tenant = b.tenant AND l.batch_id = b.id AND l.number = %(number)s
        AND l.result IS NULL
        RETURNING l.tenant, l.batch_id
    )
    UPDATE batches SET
        completed = completed + %(succeeded)s::int,
        failed = failed + 1 - %(succeeded)s::int,
        input_tokens = input_tokens + %(input_tokens)s,
        cached_tokens = cached_tokens + %(cached_tokens)s,
        output_tokens = output_tokens + %(output_tokens)s,
        reasoning_tokens = reasoning_tokens + %(reasoning_tokens)s
    FROM l WHERE batches.tenant = l.tenant AND batches.id = l.batch_id
    RETURNING 1 AS one
"""

FINALIZE = """
    UPDATE batches SET status = 'finalizing', finalizing_at = now()
    WHERE tenant = %s AND id = %s AND status = 'in_progress' AND completed + failed >= total
"""

BEFORE_END = {
    "completed": "status = 'finalizing'",
    "cancelled": "status = 'cancelling'",
    "expired": "status IN ('validating', 'in_progress') AND expires_at <= now()",
}
"""What a batch has to be to end so."""

LOCK_ENDING = """
    SELECT in_progress_at IS NOT NULL AS ran FROM batches
    WHERE tenant = %s AND id = %s AND {before}
    FOR UPDATE SKIP LOCKED
"""

STILL_RUNNING = """
    SELECT 1 AS one FROM batch_lines
    WHERE tenant = %s AND batch_id = %s AND claimed_by IS NOT NULL AND due_at > now() LIMIT 1
"""

FAIL_REST = """
    UPDATE batch_lines SET result = %b, succeeded = false
    WHERE tenant = %s AND batch_id = %s AND result IS NULL
"""

# Written by the database itself: all of it at once, and none of it goes through a host.
WRITE_FILE = """
    WITH l AS (
        SELECT number, head || result AS line,
               sum(length(head) + length(result)) OVER (ORDER BY number)
                   / %(piece_bytes)s::int AS part
        FROM batch_lines
        WHERE tenant = %(tenant)s AND batch_id = %(batch)s AND succeeded = %(succeeded)s
    ),
    p AS (
        INSERT INTO file_pieces (tenant, file_id, number, body)
        SELECT %(tenant)s, %(file)s, row_number() OVER (ORDER BY part) - 1,
               string_agg(line, ''::bytea ORDER BY number)
        FROM l GROUP BY part
        RETURNING length(body) AS size_bytes
    )
    INSERT INTO files (tenant, id, purpose, filename, size_bytes, expires_at)
    SELECT %(tenant)s, %(file)s, 'batch_output', %(filename)s, sum(p.size_bytes),
           (SELECT now() + make_interval(secs => output_ttl_s) FROM batches
            WHERE tenant = %(tenant)s AND id = %(batch)s)
    FROM p HAVING count(*) > 0
    RETURNING id
"""

END = """
    UPDATE batches SET status = %s, {status}_at = now(), failed = failed + %s,
        output_file_id = %s, error_file_id = %s, claimed_by = NULL, leased_until = NULL
    WHERE tenant = %s AND id = %s
"""
