#!/usr/bin/python
"""Find out which digest an image's name stands for, and whether a key has signed it.  Runs on the controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.findings import Finding, as_data
from ansible.module_utils.image_registry import Registry, RegistryError, parse, sha256
from ansible.module_utils.image_signature import Refused, Signature, downloaded, ids, load_key, of_image, vouch

DOCUMENTATION = """
module: vllm_image_signature
short_description: Whether a key has signed an image
description:
  - Asks the registry, or a folder for a site without one, for the image's manifest and its signatures in cosign's form.
  - Changes nothing. What is wrong comes back as a finding.
options:
  image: {type: str, required: true, description: The image's name.}
  digest: {type: str, default: "", description: The digest it must have; empty takes that of the name now.}
  key: {type: path, required: true, description: The public key, in PEM form.}
  registry_url: {type: str, default: "", description: Where the registry answers; empty is https and the name's host.}
  registry_ca: {type: str, default: "", description: Certificate of who signed the registry's.}
  folder: {type: str, default: "", description: Folder with signature.json and manifest.json instead.}
"""

EXAMPLES = """
- vllm_image_signature:
    image: quay.io/ascend/vllm-ascend:v0.18.0rc1
    key: /etc/glm-ocr/cosign.pub
  delegate_to: localhost
"""

RETURN = """
digest: {type: str, returned: success, description: Digest of the signed manifest; empty with a finding.}
ids: {type: list, elements: str, returned: success, description: The ids that the image may have on a host.}
findings: {type: list, elements: dict, returned: success, description: What is wrong, one at most.}
"""


def from_registry(registry: Registry, reference: str) -> Tuple[bytes, List[Signature], List[bytes]]:
    """Manifest and signatures; the manifests of an index are not needed where the image can be pulled."""
    manifest = registry.manifest(reference)
    return manifest, of_image(registry, sha256(manifest)), []


def from_folder(folder: Path) -> Tuple[bytes, List[Signature], List[bytes]]:
    """The same, and the other manifests that are there."""
    others = [path.read_bytes() for path in sorted(folder.glob("*.json")) if path.name != "signature.json"]
    return (folder / "manifest.json").read_bytes(), downloaded((folder / "signature.json").read_text()), others


def trusted(parameters: Dict[str, Any]) -> Tuple[str, List[str]]:
    """Digest and ids of the signed image."""
    key = load_key(Path(parameters["key"]).read_bytes())
    reference = parse(parameters["image"])
    wanted = parameters["digest"] or reference.digest
    if parameters["folder"]:
        manifest, signatures, others = from_folder(Path(parameters["folder"]))
    else:
        url = parameters["registry_url"] or f"https://{reference.host}"
        registry = Registry(url, reference.repository, parameters["registry_ca"])
        manifest, signatures, others = from_registry(registry, wanted or reference.tag)
    digest = sha256(manifest)
    if wanted and wanted != digest:
        raise Refused(f"the manifest of another image, {digest} instead of {wanted}")
    vouch(key, signatures, digest)
    return digest, ids(manifest, others)


def finding(parameters: Dict[str, Any], found: str) -> Finding:
    key, image = parameters["key"], parameters["image"]
    return Finding(
        "IMAGE_SIGNATURE",
        f"a signature of {image} by {key}",
        found,
        "sign the image that is meant (roles/vllm_image/README.md has the command), name the key that signed it in"
        " vllm_image_signature_key, or let the controller reach the registry: vllm_image_registry_url,"
        " vllm_image_registry_ca; without one, vllm_image_signature_dir",
        "为所需镜像签名（命令见 roles/vllm_image/README.md），在 vllm_image_signature_key 中填写签名所用的公钥，"
        "或让控制机能访问镜像仓库：vllm_image_registry_url、vllm_image_registry_ca；"
        "无仓库时使用 vllm_image_signature_dir",
    )


def main() -> None:
    options = {name: {"type": "str", "default": ""} for name in ("digest", "registry_url", "registry_ca", "folder")}
    module = AnsibleModule(
        {**options, "image": {"type": "str", "required": True}, "key": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    digest = ""
    known: List[str] = []
    problems: List[Finding] = []
    try:
        digest, known = trusted(module.params)
    except (Refused, RegistryError, OSError, ValueError) as error:
        problems.append(finding(module.params, str(error)))
    module.exit_json(changed=False, digest=digest, ids=known, findings=as_data(problems))


if __name__ == "__main__":
    main()
