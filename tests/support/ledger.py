"""A client that sends requests throughout and accounts for every one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import requests

from lab import chat, until

COMPLETE = ("stop", "length")


@dataclass
class Ledger:
    """``complete`` and ``refused`` count requests; ``lost`` tells those that ended as 200 without being complete.

    ``key`` is the one to send, if any; ``retry_after`` has what each 503 said of it; ``longest_gap`` are the seconds of
    the longest time without a complete reply, from the start or from one such reply to the next.
    """

    key: str = ""
    complete: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    retry_after: list[str | None] = field(default_factory=list)
    longest_gap: float = 0.0
    _last: float = field(default_factory=time.monotonic)

    def account(self, number: int, url: str) -> bool:
        """Sends one request; whether it was complete.  One that was refused is the sender's to repeat."""
        try:
            reply = chat(url, f"request {number}", max_tokens=8, key=self.key)
        except requests.RequestException:
            self.refused += 1
            return False
        if reply.status_code != 200:
            self.refused += 1
            if reply.status_code == 503:
                self.retry_after.append(reply.headers.get("Retry-After"))
            return False
        choice = reply.json()["choices"][0]
        if choice["finish_reason"] not in COMPLETE:
            self.lost.append(f"request {number}: finish_reason {choice['finish_reason']}")
            return True
        self.complete += 1
        now = time.monotonic()
        self.longest_gap, self._last = max(self.longest_gap, now - self._last), now
        return True


@contextmanager
def ledger(url: str, key: str = "") -> Iterator[Ledger]:
    """Sends one request after the other, each until it is complete, as long as the block runs."""
    book, end = Ledger(key), threading.Event()

    def send() -> None:
        number = 0
        while not end.is_set():
            number += book.account(number, url)
            # A steady load, not all that the lab's two cores give.
            end.wait(0.2)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield book
    finally:
        end.set()
        sender.join()


@dataclass(frozen=True)
class Load:
    """What the ledgers of several clients say together."""

    books: list[Ledger]

    @property
    def complete(self) -> int:
        return sum(book.complete for book in self.books)

    @property
    def refused(self) -> int:
        return sum(book.refused for book in self.books)

    @property
    def lost(self) -> list[str]:
        return [one for book in self.books for one in book.lost]

    @property
    def longest_gap(self) -> float:
        """Seconds that the client who waited longest was without a complete reply."""
        return max(book.longest_gap for book in self.books)

    def all_served(self, seconds: float) -> None:
        """Waits until every client had a reply to a request that it sent after this was called."""
        # The next one of each may have been on its way before.
        wanted = [book.complete + 2 for book in self.books]
        until(lambda: all(book.complete >= count for book, count in zip(self.books, wanted, strict=True)), seconds)


@contextmanager
def clients(count: int, url: str, key: str = "", seconds: float = 60) -> Iterator[Load]:
    """So many that send one request after the other, all of which have been served within ``seconds``."""
    with ExitStack() as stack:
        load = Load([stack.enter_context(ledger(url, key)) for _ in range(count)])
        load.all_served(seconds)
        yield load
