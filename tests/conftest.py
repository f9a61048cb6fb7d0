"""Makes the project's Python importable: scripts, the roles' modules, plugins and module_utils, the tests' helpers."""

from __future__ import annotations

import sys
from pathlib import Path

import ansible.module_utils

PROJECT = Path(__file__).resolve().parents[1]
for folder in (
    PROJECT / "tests" / "support",
    PROJECT / "tests" / "faults",
    PROJECT / "tests" / "bench_fleet",
    PROJECT / "files" / "scripts",
    PROJECT / "files" / "guard",
    *PROJECT.glob("roles/*/library"),
    *PROJECT.glob("roles/*/filter_plugins"),
    *PROJECT.glob("roles/*/action_plugins"),
    *PROJECT.glob("roles/*/callback_plugins"),
    *PROJECT.glob("roles/*/files"),
    # Some of it is put beside a script too.
    *PROJECT.glob("roles/*/module_utils"),
):
    sys.path.insert(0, str(folder))
# As Ansible does when it ships a module of a role.
ansible.module_utils.__path__.extend(str(folder) for folder in PROJECT.glob("roles/*/module_utils"))
