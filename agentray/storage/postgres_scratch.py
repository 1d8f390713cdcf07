"""The files that tools left in sessions, on PostgreSQL."""

from __future__ import annotations

from agentray.config.settings import PostgresSettings
from agentray.storage.postgres_pool import Pool, run

__all__ = ["PostgresScratch"]

_READ = """
SELECT body FROM scratch
WHERE tenant = %(tenant)s AND session_id = %(session)s
  AND (%(before)s::bigint IS NULL OR seq < %(before)s)
ORDER BY seq DESC LIMIT 1
"""

# The session's row is locked as an append locks it: it cannot be taken over or deleted meanwhile.
# What the last call but one left goes: a call that is run again begins from the one before it.
_WRITE = """
WITH mine AS (
  SELECT 1 FROM sessions
  WHERE tenant = %(tenant)s AND id = %(session)s AND epoch = %(epoch)s FOR UPDATE
), old AS (
  DELETE FROM scratch
  WHERE tenant = %(tenant)s AND session_id = %(session)s AND EXISTS (SELECT 1 FROM mine)
    AND seq < (SELECT max(seq) FROM scratch WHERE tenant = %(tenant)s
               AND session_id = %(session)s AND seq < %(seq)s)
)
INSERT INTO scratch (tenant, session_id, seq, body)
SELECT %(tenant)s, %(session)s, %(seq)s, %(body)s FROM mine
ON CONFLICT (tenant, session_id, seq) DO UPDATE SET body = excluded.body
RETURNING 1
"""


class PostgresScratch:
    """``ScratchStore`` over a pool that is somebody else's."""

    def __init__(self, pool: Pool, settings: PostgresSettings) -> None:
        self._pool = pool
        self._timeout_s = settings.statement_timeout_s

    async def read_scratch(
        self, tenant: str, session_id: str, *, before_seq: int | None = None
    ) -> bytes | None:
        names = {"tenant": tenant, "session": session_id, "before": before_seq}
        rows = await run(self._pool, _READ, names, timeout_s=self._timeout_s)
        return bytes(rows[0]["body"]) if rows else None

    async def write_scratch(
        self, tenant: str, session_id: str, *, epoch: int, seq: int, body: bytes
    ) -> bool:
        names = {"tenant": tenant, "session": session_id, "epoch": epoch, "seq": seq, "body": body}
        return bool(await run(self._pool, _WRITE, names, timeout_s=self._timeout_s))
