"""The bodies and queries of files, batches and embeddings, as types."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agentray.errors import InvalidRequestError
from agentray.http.bodies import Limit, Metadata, Name, Order

__all__ = [
    "BatchCreate",
    "BatchesQuery",
    "EmbeddingCreate",
    "ExpiresAfter",
    "FileForm",
    "FileUpload",
    "FilesQuery",
]

_ULID = "[0-9a-hjkmnp-tv-z]{26}"
FileId = Annotated[str, Meta(pattern=f"^file-{_ULID}$")]
BatchId = Annotated[str, Meta(pattern=f"^batch_{_ULID}$")]
Lifetime = Annotated[int, Meta(ge=3_600, le=2_592_000, description="An hour to 30 days.")]


class FileForm(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``POST /v1/files`` besides the file itself."""

    purpose: Literal["batch"]
    anchor: Literal["created_at"] | None = msgspec.field(name="expires_after[anchor]", default=None)
    seconds: Lifetime | None = msgspec.field(name="expires_after[seconds]", default=None)


class FileUpload(FileForm, frozen=True, kw_only=True):
    """``POST /v1/files``, a form: a JSON Lines file, and what it is for."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]


class FilesQuery(msgspec.Struct, frozen=True):
    """Of ``GET /v1/files``; ``after`` is a file's id."""

    purpose: Annotated[str, Meta(pattern="^[a-z_-]{0,40}$")] | None = None
    after: FileId | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Order = "desc"


class ExpiresAfter(msgspec.Struct, frozen=True):
    """When a file's time is over, counted from its making."""

    anchor: Literal["created_at"]
    seconds: Lifetime


class BatchCreate(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/batches``."""

    input_file_id: Annotated[str, Meta(min_length=1, max_length=200)]
    endpoint: Literal["/v1/chat/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchesQuery(msgspec.Struct, frozen=True):
    """Of ``GET /v1/batches``; ``after`` is a batch's id."""

    after: BatchId | None = None
    limit: Limit = 20


Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1)]


class EmbeddingCreate(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/embeddings``; fields that are not listed go to the model as they are."""

    input: (
        Text
        | Annotated[
            list[Text | Token | Annotated[list[Token], Meta(min_length=1)]],
            Meta(min_length=1, max_length=2048, description="All texts, tokens, or lists of them."),
        ]
    )
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    user: Name | None = None

    def check(self) -> None:
        """Raise ``InvalidRequestError`` if the input is a mixture."""
        given = self.input
        if not isinstance(given, str) and any(type(one) is not type(given[0]) for one in given):
            raise InvalidRequestError(
                "expected texts, tokens, or lists of tokens, and not a mixture", param="input"
            )
