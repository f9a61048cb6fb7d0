#!/usr/bin/python
"""List a bundle's files with their SHA-256, or say everything in which they are others."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bundle_seal import differences, seal
from ansible.module_utils.image_signature import Refused

DOCUMENTATION = """
module: site_bundle_seal
short_description: Seal a bundle, or verify it
options:
  folder: {type: path, required: true, description: The bundle.}
  state: {type: str, choices: [sealed, verified], required: true, description: What to do.}
  key: {type: str, default: "", description: "PEM file: the private key that signs, or the public one that must have."}
"""

EXAMPLES = """
- site_bundle_seal: {folder: /srv/bundle, state: verified}
"""

RETURN = """
files: {type: list, elements: dict, returned: verified, description: C(name) and C(size) of every listed file.}
problems: {type: list, elements: str, returned: verified, description: "Every file that is another, and how."}
"""


def main() -> None:
    module = AnsibleModule(
        {
            "folder": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["sealed", "verified"], "required": True},
            # A file's name, not a secret.
            "key": {"type": "str", "default": "", "no_log": False},
        }
    )
    folder, path = Path(module.params["folder"]), module.params["key"]
    try:
        key = Path(path).read_bytes() if path else b""
        if module.params["state"] == "sealed":
            module.exit_json(changed=seal(folder, key))
        listed, problems = differences(folder, key)
    except (Refused, OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    files = [{"name": name, "size": entry.size} for name, entry in listed.items()]
    module.exit_json(changed=False, files=files, problems=problems)


if __name__ == "__main__":
    main()
