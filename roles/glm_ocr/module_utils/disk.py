"""Free space.  Python 3.8, standard library only: it runs on the host."""

from __future__ import annotations

import os
import shutil


def free_bytes(path: str) -> int:
    """Free space where ``path`` is, or where it would be made; ``path`` is absolute."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free
