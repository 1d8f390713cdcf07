"""Tell what a model's SQL statement begins with, without trusting it further than that: pure."""

from __future__ import annotations

import re

from agentray.storage.sql_base import refused

__all__ = ["READING", "WRITING", "admitted"]

READING = frozenset({"SELECT", "VALUES", "TABLE", "WITH"})
"""What may begin a statement that only reads."""

WRITING = READING | {"INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE"}
"""What may begin a statement where writing is configured."""

_MOST_CHARACTERS = 100_000
_SKIPPED = re.compile(r"(?:\s+|\(|--[^\n]*(?:\n|$))")
_WORD = re.compile(r"[A-Za-z_]+")


def admitted(statement: str, keywords: frozenset[str]) -> str:
    """Return a statement without the semicolon behind it, if it begins with one of ``keywords``.

    That it is one statement and what it does is for the database to tell: this refuses what a
    keyword can tell, in words that the model can act on.

    Raises:
        StorageError: it is refused.
    """
    if len(statement) > _MOST_CHARACTERS:
        raise refused(f"the statement is longer than {_MOST_CHARACTERS} characters")
    if "\0" in statement:
        raise refused("the statement has a NUL character in it")
    bare = statement.strip().rstrip(";").rstrip()
    keyword = _first_word(bare)
    if keyword not in keywords:
        known = ", ".join(sorted(keywords))
        raise refused(f"found {keyword or 'no keyword'}; one statement may begin with {known}")
    return bare


def _first_word(statement: str) -> str:
    at = 0
    while True:
        if statement.startswith("/*", at):
            at = _behind_comment(statement, at)
        elif skipped := _SKIPPED.match(statement, at):
            at = skipped.end()
        else:
            word = _WORD.match(statement, at)
            return word[0].upper() if word else ""


def _behind_comment(statement: str, at: int) -> int:
    # PostgreSQL's comments nest. Where they do not, a statement is refused that could have run.
    depth = 0
    for mark in re.finditer(r"/\*|\*/", statement[at:]):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return at + mark.end()
    return len(statement)
