"""One HTTP reply of the chat API as it was read from the socket: framing, events, tokens and their times.

``Reply.feed`` takes the bytes of each read with the time of that read and may be called long after it: the client
stamps at the socket and parses when it has nothing better to do. Reads may be cut anywhere, inside a character, an
event or a chunk header. An event gets the time of the read that completed it.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import pairwise
from operator import sub

# A content event of vLLM in its own HTTP chunk, the one shape of which there are thousands; everything else takes
# the general path. It cannot match by accident: a quote inside a JSON string is escaped, so a key is a key.
CONTENT_CHUNK = re.compile(
    rb"(?P<size>[0-9a-fA-F]+)\r\n(?P<event>"
    rb'(?P<begin>data: \{[^{}]*"choices":\[\{"index":0,"delta":\{"content":")(?!")[^"\\]*(?:\\.[^"\\]*)*'
    rb'(?P<end>"\}[^{}]*"finish_reason":null[^{}]*\}\](?P<usage>,"usage":\{)?'
    rb'(?(usage)[^{}]*"completion_tokens":(?P<counted>\d+)[^{}]*\})[^{}]*\}\n\n))\r\n'
)
COUNTED = re.compile(rb'"completion_tokens":(\d+)')
CHUNK_END = b"\n\n\r\n"
TEXT_KEYS = ("content", "reasoning", "reasoning_content", "tool_calls")
BODY_LIMIT = 64 << 20  # of a reply that is no event stream


class ProtocolError(Exception):
    """Bytes that are not the HTTP or the events that were asked for."""


class Reply:
    """What one reply said; times are those given to ``feed``, None while it has not happened.

    ``tokens`` and ``prompt_tokens`` are the server's ``usage``. ``gaps`` holds the seconds between successive
    content events, ``gap_tokens`` the tokens each brought (``usage`` of the chunk when the server sends it, else 1).
    """

    __slots__ = (
        "_begin",
        "_chunked",
        "_end",
        "_head_done",
        "_left",
        "_line_end",
        "_raw",
        "_text",
        "_trailer",
        "body",
        "chunks",
        "complete",
        "error",
        "finish_reason",
        "first",
        "first_tokens",
        "gap_tokens",
        "gaps",
        "last",
        "prompt_tokens",
        "reusable",
        "status",
        "stream",
        "tokens",
        "tokens_at_last",
    )

    def __init__(self) -> None:
        self.status: int | None = None
        self.stream = False
        self.complete = False
        self.reusable = True
        self.body = b""
        self.error: str | None = None
        self.finish_reason: str | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.first_tokens: int | None = None
        self.tokens_at_last: int | None = None
        self.tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.chunks = 0
        self.gaps = array("d")
        self.gap_tokens = array("l")
        self._head_done = False
        self._chunked = False
        self._line_end = False  # a chunk is over, its line end is not
        self._trailer = False  # the chunk of length 0 was there
        self._left: int | None = None  # bytes of the body or chunk still to come; None: until the connection closes
        self._raw = b""  # framing not understood yet
        self._text = b""  # an event not complete yet
        self._begin = b""  # what the content events of this reply have in common, once one was seen
        self._end = b""

    def feed(self, data: bytes, time: float) -> None:
        """Take the bytes of one read.  Raises ``ProtocolError`` when they cannot be a reply."""
        if self.complete:
            raise ProtocolError("bytes after the end of the reply")
        if self._raw:
            data, self._raw = self._raw + data, b""
        if not self._head_done:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > 65536:
                    raise ProtocolError("no end of the HTTP header in 64 KiB")
                self._raw = data
                return
            self._head(data[:end])
            data = data[end + 4 :]
            if self.status == 100:  # an interim reply: the real one follows
                self._head_done = False
                if data:
                    self.feed(data, time)
                return
        if self._chunked:
            self._feed_chunks(data, time)
        elif self._left is None:
            self._payload(data, time)
        else:
            if len(data) > self._left:
                raise ProtocolError("more bytes than Content-Length")
            self._left -= len(data)
            self._payload(data, time)
            self.complete = self._left == 0

    def feed_all(self, reads: list[bytes], times: list[float]) -> None:
        """``feed`` each; quicker for a long stream.  Raises ``ProtocolError``."""
        at = 0
        while at < len(reads):
            if self._begin and not self._raw and not self._text and not self._left and not self._line_end:
                end = at
                while end < len(reads) and reads[end].endswith(CHUNK_END):
                    end += 1
                if end > at:
                    if not self._burst(reads[at:end], times[at:end]):
                        break
                    at = end
                    continue
            self.feed(reads[at], times[at])
            at += 1
        for data, time in zip(reads[at:], times[at:], strict=True):
            self.feed(data, time)

    def close(self) -> None:
        """The server closed the connection: the end of a reply that has no length of its own."""
        self.reusable = False
        if self._head_done and not self._chunked and self._left is None:
            self.complete = True

    def _head(self, head: bytes) -> None:
        status, *lines = head.split(b"\r\n")
        try:
            version, code = status.split(b" ", 2)[:2]
            self.status = int(code)
        except ValueError:
            version = b""
        if not version.startswith(b"HTTP/1."):
            raise ProtocolError(f"not HTTP: {status[:60]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip().lower()
        self._head_done = True
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self.stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        connection = headers.get(b"connection", b"")
        self.reusable = connection != b"close" and (version != b"HTTP/1.0" or connection == b"keep-alive")
        if self._chunked:
            self._left = 0
        elif b"content-length" in headers:
            length = headers[b"content-length"]
            if not length.isdigit():
                raise ProtocolError(f"Content-Length is {length[:40]!r}")
            self._left = int(length)
            self.complete = self._left == 0
        elif self.status in (204, 304):
            self.complete = True

    def _feed_chunks(self, data: bytes, time: float) -> None:
        at, size, alike = 0, len(data), True
        while at < size:
            if self._left:
                piece = data[at : at + self._left]
                self._left -= len(piece)
                at += len(piece)
                self._payload(piece, time)
                self._line_end = self._left == 0
                continue
            if self._line_end:
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ProtocolError("a chunk is longer than its header says")
                at, self._line_end = at + 2, False
                continue
            if not self._text and not self._trailer:
                match = CONTENT_CHUNK.match(data, at)
                if match and int(match["size"], 16) == match.end("event") - match.start("event"):
                    if not self._begin:
                        # Without usage, all that follows the text is the same again.
                        end = match.end("usage") if match["usage"] else match.end()
                        self._begin, self._end = b"\r\n" + match["begin"], data[match.start("end") : end]
                    self._content(time, int(match["counted"]) if match["counted"] else None)
                    at = match.end()
                    last = data.rfind(self._begin, at) if alike else -1
                    end = data.find(CHUNK_END, last) + len(CHUNK_END)
                    if end > last >= 0:
                        alike = self._burst([data[at:end]], [time])
                        at = end if alike else at
                    continue
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            line, at = data[at:end], end + 2
            if self._trailer:
                self.complete = not line
                if self.complete and at < size:
                    raise ProtocolError("bytes after the end of the reply")
                continue
            try:
                self._left = int(line.split(b";")[0], 16)
            except ValueError:
                raise ProtocolError(f"not a chunk header: {line[:40]!r}") from None
            self._trailer = self._left == 0
        self._raw = data[at:]

    def _burst(self, reads: list[bytes], times: list[float]) -> bool:
        """Take whole chunks that are all content events like the first, whatever their texts; else take nothing.

        They are counted together instead of parsed one by one; of their chunk sizes the first is checked.
        """
        data = b"".join(reads)
        numbers = [read.count(CHUNK_END) for read in reads]
        number = sum(numbers)
        if not data.count(self._begin) == data.count(self._end) == number or self._begin + b'"' in data:
            return False
        begin = data.find(self._begin)
        try:
            end = begin + 2 + int(data[:begin], 16)
        except ValueError:
            return False
        if data[end : end + 2] != b"\r\n" or self.last is None:
            return False
        steps, counted = [1] * number, None
        if self._end.endswith(b"{"):
            counts = [int(count) for count in COUNTED.findall(data)]
            if len(counts) != number or self.tokens_at_last is None:
                return False
            steps = [max(after - before, 0) for before, after in pairwise([self.tokens_at_last, *counts])]
            self.tokens = counted = counts[-1]
        if number != len(times):
            times = [time for time, events in zip(times, numbers, strict=True) for _ in range(events)]
        self.chunks += number
        self.gaps.extend(map(sub, times, [self.last, *times]))
        self.gap_tokens.extend(steps)
        self.last, self.tokens_at_last = times[-1], counted
        return True

    def _payload(self, piece: bytes, time: float) -> None:
        if not self.stream:
            if len(self.body) + len(piece) > BODY_LIMIT:
                raise ProtocolError("a reply over 64 MiB")
            self.body += piece
            return
        text = self._text + piece
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *events, self._text = text.split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._event(line[5:].strip(), time)

    def _event(self, data: bytes, time: float) -> None:
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
            usage = event.get("usage") or {}
            choices = event.get("choices") or []
            if error := event.get("error"):
                self.error = str(error.get("message") or error) if isinstance(error, dict) else str(error)
            if (prompt := usage.get("prompt_tokens")) is not None:
                self.prompt_tokens = int(prompt)
            counted = usage.get("completion_tokens")
            if choices:
                delta = choices[0].get("delta") or {}
                self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
                if any(delta.get(key) for key in TEXT_KEYS):
                    self._content(time, counted)
            if counted is not None:
                self.tokens = int(counted)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise ProtocolError(f"not a chunk of a chat completion ({error}): {data[:80]!r}") from error

    def _content(self, time: float, counted: int | None) -> None:
        self.chunks += 1
        if self.last is None:
            self.first, self.first_tokens = time, counted
        else:
            self.gaps.append(time - self.last)
            before = self.tokens_at_last
            self.gap_tokens.append(1 if counted is None or before is None else max(counted - before, 0))
        self.last, self.tokens_at_last = time, counted
        if counted is not None:
            self.tokens = counted
