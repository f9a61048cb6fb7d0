"""A stand-in for the admin socket of a gateway, whose instances are up unless a play took them out."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

#: srv_admin_state that HAProxy 2.6 has after each command.
FORCED = {"ready": 0, "maint": 1, "drain": 8}


def configuration(path: Path, instances: Sequence[str]) -> Path:
    """HAProxy's, as far as the module reads it."""
    path.write_text("\n".join(["backend engine", *(f"    server {name} 192.0.2.1:8000" for name in instances), ""]))
    return path


@contextmanager
def admin(
    path: Path, log: Path, instances: Sequence[str], down: Sequence[str] = (), deaf: bool = False
) -> Iterator[dict[str, int]]:
    """Answers at ``path`` as far as the module asks; orders become lines of ``log``.  Yields their admin states.

    ``deaf``: it obeys no order, and says so.
    """
    states = dict.fromkeys(instances, 0)

    def states_shown() -> str:
        rows = [f"3 engine {name} {0 if name in down else 2} {state}" for name, state in states.items()]
        return "\n".join(["1", "# be_id be_name srv_name srv_op_state srv_admin_state", *rows, ""])

    def statistics() -> str:
        rows = [f"engine,{name},0,{'DOWN' if name in down else 'UP'},L7OK,200," for name in states]
        return "\n".join(["# pxname,svname,scur,status,check_status,check_code,", *rows, ""])

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            command = self.rfile.readline().decode().strip()
            answer = {"show servers state": states_shown, "show stat": statistics}.get(command, lambda: "")()
            if command.startswith("set server engine/") and deaf:
                answer = "Permission denied"
            elif command.startswith("set server engine/"):
                _, _, target, _, order = command.split()
                states[target.partition("/")[2]] = FORCED[order]
                with log.open("a") as file:
                    file.write(f"gateway {order} {target.partition('/')[2]}\n")
            self.wfile.write((answer + "\n").encode())

    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield states
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
