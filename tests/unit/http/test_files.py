"""Files and batches at the door; their store is in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import msgspec
import openai
import pytest
from starlette.types import ASGIApp

from tests.unit.http.conftest import Client
from tests.unit.http.memory_batches import MemoryBatches

TEXT = b'{"custom_id": "a"}\n'
UNKNOWN = "0" * 26
FILE_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'


def connect(app: Any) -> openai.AsyncOpenAI:
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://door/v1", http_client=client, max_retries=0
    )


async def upload(http: httpx.AsyncClient, text: bytes = TEXT, **fields: str) -> httpx.Response:
    form = {"purpose": "batch", **fields}
    return await http.post("/v1/files", data=form, files={"file": ("in.jsonl", text)})


async def order(http: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    file_id = (await upload(http)).json()["id"]
    body = {
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        **changes,
    }
    return await http.post("/v1/batches", json=body)


async def test_the_openai_package_uploads_reads_lists_and_deletes(app: ASGIApp) -> None:
    text = TEXT * 40_000  # more than is kept in memory, and than one piece
    async with connect(app) as client:
        made = await client.files.create(file=("in.jsonl", text), purpose="batch")
        assert (made.bytes, made.filename, made.purpose) == (len(text), "in.jsonl", "batch")
        assert made.expires_at == made.created_at + 30 * 86_400
        assert (await client.files.content(made.id)).content == text
        assert [file.id async for file in client.files.list(purpose="batch", limit=1)] == [made.id]
        assert (await client.files.retrieve(made.id)).id == made.id
        assert (await client.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made.id)


async def test_files_are_listed_page_by_page_in_both_orders(http: httpx.AsyncClient) -> None:
    made = sorted([(await upload(http)).json()["id"] for _ in range(3)])
    first = (await http.get("/v1/files", params={"limit": 2})).json()
    assert [file["id"] for file in first["data"]] == [made[2], made[1]]
    assert first["has_more"]
    params = {"limit": 2, "after": first["last_id"]}
    rest = (await http.get("/v1/files", params=params)).json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([made[0]], False)
    up = (await http.get("/v1/files", params={"order": "asc"})).json()
    assert [file["id"] for file in up["data"]] == made
    assert (await http.get("/v1/files", params={"purpose": "batch_output"})).json()["data"] == []


async def test_a_file_says_how_long_it_is_kept(http: httpx.AsyncClient) -> None:
    times: dict[str, Any] = {
        "expires_after[anchor]": "created_at",
        "expires_after[seconds]": "3600",
    }
    made = (await upload(http, **times)).json()
    assert made["expires_at"] - made["created_at"] == 3_600
    times["expires_after[seconds]"] = "1"
    refused = await upload(http, **times)
    assert (refused.status_code, refused.json()["error"]["param"]) == (
        400,
        "expires_after[seconds]",
    )


@pytest.mark.parametrize(
    ("body", "content_type", "param"),
    [
        (b"?", None, None),
        (b"{}", "application/json", None),
        (b"", "multipart/form-data", None),
        (b"nothing", "multipart/form-data; boundary=b", None),
        (b"--b--\r\n", "multipart/form-data; boundary=b", "file"),
        (
            FILE_PART + b"cut off",
            "multipart/form-data; boundary=b",
            "file",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            "file",
        ),
        (
            FILE_PART + b"\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
            "purpose",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; filename="f"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            None,
        ),
    ],
)
async def test_what_is_no_upload_is_refused(
    http: httpx.AsyncClient, body: bytes, content_type: str | None, param: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = await http.post("/v1/files", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_purposes_that_mean_nothing_here_are_refused(http: httpx.AsyncClient) -> None:
    error = (await upload(http, purpose="fine-tune")).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "purpose")


async def test_a_file_that_is_too_large_is_refused(
    http: httpx.AsyncClient, batches: MemoryBatches
) -> None:
    assert (await upload(http, b"x" * 1_000_000)).status_code == 200
    assert (await upload(http, b"x" * 1_000_001)).status_code == 413
    assert (await upload(http, b"x" * 2_000_000)).status_code == 413
    assert len(batches.made) == 1


async def test_a_name_that_no_database_takes_is_mended(http: httpx.AsyncClient) -> None:
    files = {"file": ("a\0b" + "x" * 300, TEXT)}
    answer = await http.post("/v1/files", data={"purpose": "batch"}, files=files)
    name = answer.json()["filename"]
    assert len(name) == 255
    assert "\0" not in name


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-7", "none-such"])
async def test_a_form_in_whatever_charset_is_taken_or_refused(
    http: httpx.AsyncClient, charset: str
) -> None:
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    name = FILE_PART.replace(b'"f"', b'"a+2AA-b\xff"')
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    answer = await http.post(
        "/v1/files", content=purpose + name + b"x\r\n--b--\r\n", headers=headers
    )
    assert answer.status_code in (200, 400)
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "invalid_request"


async def test_half_a_character_is_no_part_of_a_name(http: httpx.AsyncClient) -> None:
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    name = FILE_PART.replace(b'"f"', b'"a+2AA-b"')
    headers = {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}
    answer = await http.post(
        "/v1/files", content=purpose + name + b"x\r\n--b--\r\n", headers=headers
    )
    assert (answer.status_code, answer.json()["filename"]) == (200, "a?b")


async def test_uploads_past_those_that_may_be_at_once_are_refused(
    app: ASGIApp, http: httpx.AsyncClient
) -> None:
    begun, go = asyncio.Semaphore(0), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        begun.release()
        await go.wait()
        yield FILE_PART + b"x\r\n--b--\r\n"

    async def send() -> int:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        return (await http.post("/v1/files", content=slow(), headers=headers)).status_code

    async with asyncio.timeout(10):
        sending = [asyncio.create_task(send()) for _ in range(4)]
        for _ in sending:
            await begun.acquire()
        refused = await upload(http)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        go.set()
        assert await asyncio.gather(*sending) == [200] * 4
        assert (await upload(http)).status_code == 200


async def test_a_download_whose_end_is_missing_is_broken_off(
    http: httpx.AsyncClient, client: Client, batches: MemoryBatches
) -> None:
    file_id = (await upload(http, b"x" * 300_000)).json()["id"]
    batches.pieces[file_id].pop()
    await client.open("GET", f"/v1/files/{file_id}/content")
    assert client.status == 200
    assert not client.whole


@pytest.mark.parametrize("name", ["file-x", f"file-{UNKNOWN}", "%00", "x" * 1_000])
@pytest.mark.parametrize("what", ["", "/content"])
async def test_an_unknown_file_is_not_found(http: httpx.AsyncClient, name: str, what: str) -> None:
    answer = await http.get(f"/v1/files/{name}{what}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")


async def test_the_openai_package_orders_lists_and_cancels(app: ASGIApp) -> None:
    async with connect(app) as client:
        file = await client.files.create(file=("in.jsonl", TEXT), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"a": "b"},
        )
        assert (made.status, made.metadata, made.input_file_id) == (
            "validating",
            {"a": "b"},
            file.id,
        )
        assert made.expires_at == made.created_at + 86_400
        other = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        listed = [batch.id async for batch in client.batches.list(limit=1)]
        assert listed == sorted([made.id, other.id], reverse=True)
        assert (await client.batches.retrieve(made.id)).id == made.id
        assert (await client.batches.cancel(made.id)).status == "cancelling"
        assert (await client.batches.cancel(made.id)).status == "cancelling"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"input_file_id": f"file-{UNKNOWN}"}, 404, "input_file_id"),
        ({"input_file_id": "\0"}, 404, "input_file_id"),
        ({"endpoint": "/v1/responses"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, None),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
    ],
)
async def test_a_batch_that_cannot_be_is_refused(
    http: httpx.AsyncClient, changes: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await order(http, **changes)
    assert answer.status_code == status
    assert param is None or answer.json()["error"]["param"] == param


async def test_the_output_of_a_batch_is_no_input(
    http: httpx.AsyncClient, batches: MemoryBatches
) -> None:
    file_id = (await upload(http)).json()["id"]
    row = msgspec.structs.replace(batches.made[file_id], purpose="batch_output")
    batches.made[file_id] = row
    answer = await order(http, input_file_id=file_id)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")


@pytest.mark.parametrize("status", ["finalizing", "completed", "failed", "expired"])
async def test_what_has_ended_cannot_be_cancelled(
    http: httpx.AsyncClient, batches: MemoryBatches, status: Any
) -> None:
    batch_id = (await order(http)).json()["id"]
    batches.ordered[batch_id] = msgspec.structs.replace(batches.ordered[batch_id], status=status)
    answer = await http.post(f"/v1/batches/{batch_id}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "batch_ended")


@pytest.mark.parametrize("name", ["batch_x", f"batch_{UNKNOWN}", "%00"])
async def test_an_unknown_batch_is_not_found(http: httpx.AsyncClient, name: str) -> None:
    assert (await http.get(f"/v1/batches/{name}")).status_code == 404
    assert (await http.post(f"/v1/batches/{name}/cancel")).status_code == 404
