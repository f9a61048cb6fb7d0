"""Render the project's templates as a play would: inventory, role defaults, role vars, Ansible's own templar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import filter_loader, init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.vars.manager import VariableManager

PROJECT = Path(__file__).resolve().parents[2]
ROLES = PROJECT / "roles"

#: Those whose defaults a template may need.
ROLES_OF_DEPLOYMENT = (
    "glm_ocr",
    "ascend_host",
    "vllm_weights",
    "vllm_image",
    "vllm_probe",
    "vllm_service",
    "vllm_watchdog",
    "ocr_front",
    "gateway",
)


def deploy_task(role: str) -> dict[str, Any]:
    """The task of the deployment that runs a role."""
    *_, play = yaml.safe_load((PROJECT / "playbooks" / "deploy.yml").read_text())
    (block,) = [task["block"] for task in play["tasks"] if "block" in task]
    (task,) = [task for task in block if task.get("ansible.builtin.import_role") == {"name": role}]
    return dict(task)


init_plugin_loader()
for folder in ROLES.glob("*/filter_plugins"):
    filter_loader.add_directory(str(folder))


class HostVariables:
    """The variables of one production host, as the roles of `deploy` see them."""

    def __init__(self, tmp_path: Path, group: str = "ascend910", /, **overrides: Any) -> None:
        """Of npu-01 in ``group``, one of inventory/hosts.yml, or of gw-01 in ``gateway``, before npu-01 and npu-02.

        ``overrides`` win over everything, as `-e` does.
        """
        inventory = tmp_path / "hosts.yml"
        groups = yaml.safe_load((PROJECT / "inventory" / "hosts.yml").read_text())
        listed = groups["ascend910"]
        if group == "gateway":
            groups["gateway"] = {"hosts": {"gw-01": {"ansible_host": "192.0.2.10"}}}
            listed["hosts"] = {f"npu-0{n}": {"ansible_host": f"192.0.2.1{n}"} for n in (1, 2)}
        else:
            (listed if group == "ascend910" else listed["children"][group])["hosts"] = {"npu-01": {}}
        inventory.write_text(yaml.safe_dump(groups))
        (tmp_path / "group_vars").symlink_to(PROJECT / "inventory" / "group_vars")
        self.loader = DataLoader()
        manager = InventoryManager(loader=self.loader, sources=[str(inventory)])
        variables = VariableManager(loader=self.loader, inventory=manager)
        host = manager.get_host("gw-01" if group == "gateway" else "npu-01")
        self.values: dict[str, Any] = {}
        for role in ROLES_OF_DEPLOYMENT:
            self.values |= self.load(ROLES / role / "defaults" / "main.yml")
        self.values |= variables.get_vars(host=host)
        # A variable of a host that is not asked for is of no other's concern.
        self.values["hostvars"] = {name: variables.get_vars(host=manager.get_host(name)) for name in manager.hosts}
        for role in ("glm_ocr", "vllm_image", "vllm_service", "vllm_watchdog", "ocr_front", "gateway"):
            self.values |= self.load(ROLES / role / "vars" / "main.yml")
        self.values |= {
            "vllm_image_id": "sha256:" + "0" * 64,
            "vllm_weights_fingerprint": "f" * 64,
            "vllm_weights_files": "e" * 64,
        } | overrides
        self.values["role_path"] = str(ROLES / "vllm_service")

    def load(self, path: Path) -> dict[str, Any]:
        return self.loader.load_from_file(str(path), trusted_as_template=True) if path.exists() else {}

    def template(self, text: str) -> Any:
        return Templar(loader=self.loader, variables=self.values).template(trust_as_template(text))

    def template_file(self, name: str) -> str:
        # With the options of the template module and of the template lookup.
        folder = PROJECT / "templates"
        # A template may extend another of its folder.
        templar = Templar(loader=self.loader, variables=self.values).copy_with_new_env(searchpath=[str(folder)])
        text = trust_as_template((folder / name).read_text())
        return str(templar.template(text, overrides={"trim_blocks": True}, escape_backslashes=False))
