#!/usr/bin/env python3
"""Who may connect to the engine's Unix socket: the front's group once it generates, and nobody before a stop.

    engine_socket.py /run/glm-ocr/engine.sock    closes it

Exit 0 closed, 3 not.  Standard library only: it runs on the host.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys


def permit(path: str, mode: int, group: str = "") -> int:
    """Give the socket a mode, and a group if any: exit status 0, or 3 when that failed.

    The engine may write to the folder: what is there is held, and looked at, before it is changed. No link is followed.
    """
    try:
        held = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            if not stat.S_ISSOCK(os.fstat(held).st_mode):
                raise OSError("no socket")
            itself = f"/proc/self/fd/{held}"
            if group:
                shutil.chown(itself, group=group)
            os.chmod(itself, mode)
        finally:
            os.close(held)
    except (OSError, LookupError) as error:
        wanted = f"mode {mode:04o}" + (f" to the group {group}" if group else "")
        print(f"expected to give the socket {path} {wanted}; found: {error}", file=sys.stderr)
        return 3
    return 0


def open_to(path: str, group: str) -> int:
    """Lets the processes of ``group`` connect."""
    return permit(path, 0o660, group)


def close(path: str) -> int:
    """Lets nobody connect but the engine's own user, and root."""
    return permit(path, 0o600)


if __name__ == "__main__":
    sys.exit(close(sys.argv[1]))
