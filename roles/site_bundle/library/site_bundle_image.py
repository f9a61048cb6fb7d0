#!/usr/bin/python
"""Begin or go on with an image as an OCI layout: all but its large blobs, which are told to be fetched one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.image_layout import (
    LayoutError,
    blob_path,
    blobs,
    is_index,
    platform_digest,
    prune,
    small_files,
    write,
)
from ansible.module_utils.image_registry import Registry, RegistryError, parse, sha256
from ansible.module_utils.image_signature import Refused, of_image, printed

DOCUMENTATION = """
module: site_bundle_image
short_description: An image as an OCI layout
description:
  - Without I(blob) it resolves the name, writes everything that is small, and returns the blobs.
  - With I(blob) it fetches that one, going on where an earlier run was cut off.
options:
  image: {type: str, required: true, description: The image's name.}
  digest: {type: str, default: "", description: The digest it must have; empty takes that of the name now.}
  architecture: {type: str, default: "", description: "As Docker names it, for an image of several."}
  registry_url: {type: str, default: "", description: Where the registry answers; empty is https and the name's host.}
  registry_ca: {type: str, default: "", description: Certificate of who signed the registry's.}
  folder: {type: path, required: true, description: The folder of the layout.}
  signed: {type: str, default: "", description: "Folder for the signatures; empty takes none."}
  blob: {type: dict, default: {}, description: C(digest) and C(size) of the blob to fetch.}
"""

EXAMPLES = """
- site_bundle_image:
    image: quay.io/ascend/vllm-ascend:v0.18.0rc1
    architecture: arm64
    folder: /srv/bundle/image
"""

RETURN = """
digest: {type: str, returned: success, description: What the name stands for.}
blobs: {type: list, elements: dict, returned: success, description: C(digest) and C(size) of what is left to fetch.}
"""


def begin(registry: Registry, parameters: Dict[str, Any], reference: str) -> Dict[str, Any]:
    folder = Path(parameters["folder"])
    top = registry.manifest(reference)
    digest = sha256(top)
    manifest = registry.manifest(platform_digest(top, parameters["architecture"])) if is_index(top) else top
    changed = False
    if parameters["signed"]:
        signatures = of_image(registry, digest)
        signed = {"manifest.json": top, "signature.json": printed(signatures).encode()}
        if manifest != top:
            signed["platform.json"] = manifest
        changed = write(Path(parameters["signed"]), signed)
    listed = blobs(manifest)
    changed |= prune(folder, [sha256(manifest), *(blob["digest"] for blob in listed)])
    changed |= write(folder, small_files(parameters["image"], manifest))
    return {"changed": changed, "digest": digest, "blobs": listed}


def main() -> None:
    options: Dict[str, Any] = {
        name: {"type": "str", "default": ""}
        for name in ("digest", "architecture", "registry_url", "registry_ca", "signed")
    }
    options["image"] = {"type": "str", "required": True}
    options["blob"] = {"type": "dict", "default": {}}
    options["folder"] = {"type": "path", "required": True}
    module = AnsibleModule(options)
    parameters = module.params
    try:
        name = parse(parameters["image"])
        url = parameters["registry_url"] or f"https://{name.host}"
        registry = Registry(url, name.repository, parameters["registry_ca"])
        blob = parameters["blob"]
        if blob:
            target = Path(parameters["folder"]) / blob_path(blob["digest"])
            result: Dict[str, Any] = {"changed": registry.download(blob["digest"], int(blob["size"]), target)}
        else:
            result = begin(registry, parameters, parameters["digest"] or name.digest or name.tag)
    except (LayoutError, Refused, RegistryError, OSError, ValueError, KeyError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
