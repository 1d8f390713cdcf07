"""Read the lines of a batch's input, and write those of its output, as OpenAI has them."""

from __future__ import annotations

from typing import Any

import msgspec

from agentray.models.usage import reasoning_in, usage_in, usage_said
from agentray.storage.batches import BatchFault, LineUsage, NewLine

__all__ = [
    "ENDPOINTS",
    "MAX_LINE_BYTES",
    "InputReader",
    "answer",
    "asks_for_stream",
    "failure",
    "usage_of",
]

ENDPOINTS = ("/v1/chat/completions", "/v1/embeddings")
"""What the lines of a batch may ask for."""

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_FAULTS = 100
MAX_ID_CHARS = 512

_BOM = b"\xef\xbb\xbf"
_encode = msgspec.json.encode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)


class _TextError(ValueError):
    """A value is no text."""


class InputReader:
    """Reads a batch's input, fed piece by piece, into lines.

    ``faults`` says what is wrong with it, at most ``MAX_FAULTS`` things; ``total`` counts its
    lines. Blank ones are passed over, and count in the numbers alone.
    """

    def __init__(self, batch_id: str, endpoint: str, *, max_requests: int) -> None:
        self.faults: list[BatchFault] = []
        self.total = 0
        self._batch_id = batch_id
        self._endpoint = endpoint
        self._max_requests = max_requests
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0
        self._ids: set[str] = set()

    @property
    def given_up(self) -> bool:
        """Whether there is no use in reading on."""
        return len(self.faults) >= MAX_FAULTS

    def feed(self, piece: bytes) -> list[NewLine]:
        """Take in the next piece of the file; return the lines that are whole with it."""
        found: list[NewLine] = []
        *whole, rest = piece.split(b"\n")
        for part in whole:
            self._keep(part)
            self._end_line(found)
        self._keep(rest)
        return found

    def close(self) -> list[NewLine]:
        """Return the line that the end of the file ends, if there is one."""
        found: list[NewLine] = []
        self._end_line(found)
        if not self.total and not self.faults:
            self._fault("empty_file", "The batch file is empty.", None)
        return found

    def _keep(self, part: bytes) -> None:
        if self._size + len(part) <= MAX_LINE_BYTES:
            self._parts.append(part)
        self._size += len(part)

    def _end_line(self, found: list[NewLine]) -> None:
        raw, size = b"".join(self._parts), self._size
        self._parts, self._size = [], 0
        self._number += 1
        if self._number == 1:
            raw = raw.removeprefix(_BOM)
        too_long = size > MAX_LINE_BYTES
        if self.given_up or not (raw.strip() or too_long):
            return
        self.total += 1
        if self.total == self._max_requests + 1:
            most = f"The batch has more than {self._max_requests} requests."
            self._fault("too_many_tasks", most, None)
        elif too_long:
            self._fault("line_too_long", f"This line is longer than {MAX_LINE_BYTES} bytes.")
        elif self.total <= self._max_requests and (line := self._line(raw)) is not None:
            found.append(line)

    def _line(self, raw: bytes) -> NewLine | None:
        try:
            fields = _object.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._fault("invalid_json_line", "This line is not parseable as valid JSON.")
            return None
        for name in ("custom_id", "method", "url", "body"):
            if name not in fields:
                said = f"Missing required parameter: '{name}'."
                self._fault("missing_required_parameter", said, param=name)
                return None
        try:
            custom_id, method, url = (_as_text(fields, n) for n in ("custom_id", "method", "url"))
        except _TextError as error:
            said = f"Invalid type for '{error}': expected a string."
            self._fault("invalid_type", said, param=str(error))
            return None
        if method != "POST":
            self._fault("invalid_method", "The method has to be 'POST'.", param="method")
        elif url != self._endpoint:
            said = f"The url does not match the batch's endpoint, {self._endpoint}."
            self._fault("url_mismatch", said, param="url")
        elif not bytes(fields["body"]).startswith(b"{"):
            self._fault(
                "invalid_type", "Invalid type for 'body': expected an object.", param="body"
            )
        elif not 1 <= len(custom_id) <= MAX_ID_CHARS:
            said = f"A custom_id has 1 to {MAX_ID_CHARS} characters."
            self._fault("invalid_custom_id", said, param="custom_id")
        elif custom_id in self._ids:
            said = "The custom_id of this line is that of an earlier one, too."
            self._fault("duplicate_custom_id", said, param="custom_id")
        else:
            self._ids.add(custom_id)
            return NewLine(self._number, self._head(custom_id), bytes(fields["body"]))
        return None

    def _head(self, custom_id: str) -> bytes:
        name = line_id(self._batch_id, self._number).encode()
        return b'{"id":"batch_req_' + name + b'","custom_id":' + _encode(custom_id)

    def _fault(
        self, code: str, message: str, line: int | None = -1, *, param: str | None = None
    ) -> None:
        if not self.given_up:
            at = self._number if line == -1 else line
            self.faults.append(BatchFault(code=code, message=message, line=at, param=param))


def _as_text(fields: dict[str, msgspec.Raw], name: str) -> str:
    try:
        return _text.decode(fields[name])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _TextError(name) from error


def line_id(batch_id: str, number: int) -> str:
    """Return what is unique to a line, and the same whenever its file is read."""
    return f"{batch_id.removeprefix('batch_')}{number:05x}"


def answer(batch_id: str, number: int, attempts: int, status: int, body: bytes) -> bytes:
    """Return the rest of a line of an output or error file: what was answered."""
    try:
        # A line is a line, however the model's server lays its answer out.
        body = msgspec.json.format(body, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = _encode(body.decode("utf-8", "replace"))
    request_id = f"req_{line_id(batch_id, number)}{attempts:02x}".encode()
    return (b',"response":{"status_code":%d,"request_id":"%b","body":%b},"error":null}\n') % (
        status,
        request_id,
        body,
    )


def failure(code: str, message: str) -> bytes:
    """Return the rest of a line of an error file: why nobody was asked."""
    return b',"response":null,"error":%b}\n' % _encode({"code": code, "message": message})


def asks_for_stream(body: bytes) -> bool:
    """Return whether a request asks for its answer as a stream."""
    try:
        stream: Any = _object.decode(body).get("stream")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # Whoever answers says what is wrong.
    return stream is not None and bytes(stream) not in (b"false", b"null")


def usage_of(body: bytes) -> LineUsage:
    """Return the tokens that an answer says it took; none if it does not say, or no number that
    can be."""
    said = usage_said(body)
    usage = usage_in(said)
    return LineUsage(
        usage.input_tokens, usage.cached_tokens, usage.output_tokens, reasoning_in(said)
    )
