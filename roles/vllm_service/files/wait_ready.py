#!/usr/bin/env python3
"""Wait until the service generates: neither a bound port nor /health says that it does.

    wait_ready.py --url http://127.0.0.1:8000 --model glm-ocr --timeout 900

As ExecStartPost it also ends as soon as the unit's main process ($MAINPID) is gone.
Exit 0 generated, 1 the main process is gone, 2 not within the timeout.  Standard library only: it runs on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request


def generates(url: str, model: str, timeout: float) -> str:
    """Ask for one token.  Returns "" when it came, else what came instead."""
    body = {"model": model, "messages": [{"role": "user", "content": "OK"}], "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # The service is on this host: a proxy of the environment must not see the request.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as response:
            tokens = json.load(response)["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return "" if tokens >= 1 else "no token was generated"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="base URL of the service")
    parser.add_argument("--model", required=True, help="served model name")
    parser.add_argument("--timeout", type=float, required=True, help="seconds")
    arguments = parser.parse_args()
    main_process = os.environ.get("MAINPID")
    end = time.monotonic() + arguments.timeout
    while True:
        remaining = end - time.monotonic()
        answer = generates(arguments.url, arguments.model, max(remaining, 1.0))
        if not answer:
            return 0
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
