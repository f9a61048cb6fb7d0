#!/usr/bin/env python3
"""Check a unit file before it lands: `systemd-analyze verify` wants a proper file name, Ansible's copy has none.

    verify_unit.py FILE NAME.service

Exits non-zero with systemd's words when it has anything to say about the unit, warnings included.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    source, name = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / name
        shutil.copyfile(source, unit)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    # It also reports other units of the host that ours depends on: only ours is judged.
    complaints = [line for line in done.stdout.splitlines() if name in line]
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
