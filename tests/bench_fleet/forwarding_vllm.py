#!/usr/bin/python3
"""A fixture, `vllm` in the image of the fleet's benchmark: `serve` hands its port's connections to the lab's engine.

As many engines as nodes do not fit the lab's machine. Everything but `serve` is the image's own `vllm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

ORIGINAL = "/usr/local/bin/vllm.engine"


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # the other side has gone: so does this one
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def serve(host: str, port: int, engine: str) -> None:
    """Until SIGTERM."""
    engine_host, _, engine_port = engine.rpartition(":")

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            engine_reader, engine_writer = await asyncio.open_connection(engine_host, int(engine_port))
            with contextlib.closing(engine_writer):
                await asyncio.gather(pump(reader, engine_writer), pump(engine_reader, writer))

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    server = await asyncio.start_server(forward, host, port)
    print(f"port {server.sockets[0].getsockname()[1]} is {engine}'s", flush=True)
    await ended.wait()
    server.close()


def main() -> None:
    if sys.argv[1:2] != ["serve"]:
        os.execv(ORIGINAL, [ORIGINAL, *sys.argv[1:]])
    flags = dict(zip(sys.argv, sys.argv[1:]))  # noqa: B905 the image's Python may be older than strict
    asyncio.run(serve(flags["--host"], int(flags["--port"]), os.environ["FORWARD_TO"]))


if __name__ == "__main__":
    main()
