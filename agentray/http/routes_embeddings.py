"""OpenAI's embeddings: passed through to a model that makes them."""

from __future__ import annotations

import msgspec

from agentray.http.batch_bodies import EmbeddingCreate
from agentray.http.door import Door
from agentray.http.exchange import Exchange, Header

__all__ = ["create_embeddings"]

_create = msgspec.json.Decoder(EmbeddingCreate)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_JSON: Header = (b"content-type", b"application/json")


async def create_embeddings(door: Door, exchange: Exchange) -> None:
    body = await exchange.decode(_create, door.settings.max_body_bytes, openai=True)
    body.check()
    model = door.embedding_model(body.model)
    with door.completions.admit():
        answer = await door.embeddings.embed_raw(model, _fields.decode(exchange.raw))
        await exchange.reply_bytes(answer, _JSON)
