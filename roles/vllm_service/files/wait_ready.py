#!/usr/bin/env python3
"""Wait until the service generates: neither a bound port nor /health says that it does.

    wait_ready.py --url http://127.0.0.1:8000 --model glm-ocr --timeout 900

Behind a front the engine is asked at its Unix socket, which is then opened to the front's group: no client gets through
before.

    wait_ready.py ... --socket /run/glm-ocr/engine.sock --open-to haproxy

As ExecStartPost it also ends as soon as the unit's main process ($MAINPID) is gone.
Exit 0 generated, 1 the main process is gone, 2 not within the timeout, 3 the socket could not be opened to the group.
Standard library only, with engine_socket.py and unix_http.py beside it: it runs on the host.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error

import engine_socket
import unix_http


def generates(url: str, model: str, timeout: float, socket: str = "") -> str:
    """Ask for one token.  Returns "" when it came, else what came instead."""
    body = {"model": model, "messages": [{"role": "user", "content": "OK"}], "max_tokens": 1, "temperature": 0}
    try:
        try:
            with unix_http.ask(url, "/v1/chat/completions", timeout, socket, json.dumps(body).encode()) as response:
                tokens = json.load(response)["usage"]["completion_tokens"]
        except urllib.error.HTTPError as error:
            # What it says of the error may not come either.
            return f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return "" if tokens >= 1 else "no token was generated"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="base URL of the service")
    parser.add_argument("--model", required=True, help="served model name")
    parser.add_argument("--timeout", type=float, required=True, help="seconds")
    parser.add_argument("--socket", default="", help="the engine's Unix socket, asked instead of the URL")
    parser.add_argument("--open-to", default="", help="group that may connect to the socket once it generates")
    arguments = parser.parse_args()
    main_process = os.environ.get("MAINPID")
    end = time.monotonic() + arguments.timeout
    while True:
        remaining = end - time.monotonic()
        answer = generates(arguments.url, arguments.model, max(remaining, 1.0), arguments.socket)
        if not answer:
            return engine_socket.open_to(arguments.socket, arguments.open_to) if arguments.open_to else 0
        if main_process and not os.path.exists(f"/proc/{main_process}"):
            print("the engine ended before it could generate; its own messages are above", file=sys.stderr)
            return 1
        if remaining <= 0:
            print(f"no generation within {arguments.timeout:.0f} s; last answer: {answer}", file=sys.stderr)
            return 2
        # Nothing on a starting server can be subscribed to: ask again shortly.
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
