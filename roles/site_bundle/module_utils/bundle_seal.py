"""The list of a bundle's files, and whether they are still those.

In the form of `sha256sum`, with which it can be checked before anything of the bundle is trusted to run.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ansible.module_utils.image_signature import Refused, load_key, verify
from ansible.module_utils.weights_manifest import Entry, hash_files, list_files, parse, render
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

LIST, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"


def contents(folder: Path) -> Tuple[Dict[str, Entry], Dict[str, str]]:
    """The files with what they are, and those that cannot be read with why."""
    files, problems = list_files(folder)
    files = {name: identity for name, identity in files.items() if name not in (LIST, SIGNATURE)}
    hashes, unread = hash_files(folder, files)
    return {name: Entry(sha256, files[name].size) for name, sha256 in hashes.items()}, {**problems, **unread}


def sign(key: Any, content: bytes) -> str:
    """Base64, as `cosign sign-blob` prints it."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        signed = key.sign(content, ec.ECDSA(SHA256()))
    elif isinstance(key, rsa.RSAPrivateKey):
        signed = key.sign(content, padding.PKCS1v15(), SHA256())
    else:
        signed = key.sign(content)
    return base64.b64encode(signed).decode()


def seal(folder: Path, private: bytes) -> bool:
    """Write the list, and sign it where there is a key; whether anything was not so already."""
    entries, problems = contents(folder)
    cut_off = [name for name in entries if name.endswith(".partial")]
    if problems or cut_off:
        raise Refused("; ".join([f"{name}: {problem}" for name, problem in problems.items()] + cut_off))
    text = render(entries)
    path, signature = folder / LIST, folder / SIGNATURE
    changed = not path.is_file() or path.read_text(encoding="utf-8") != text
    if changed:
        path.write_text(text, encoding="utf-8")
    if not private:
        if signature.exists():
            signature.unlink()
            changed = True
        return changed
    key = load_pem_private_key(private, None)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        verify(load_key(public), text.encode(), signature.read_text(encoding="ascii").strip())
    except (Refused, OSError):
        signature.write_text(sign(key, text.encode()) + "\n", encoding="ascii")
        changed = True
    return changed


def differences(folder: Path, public: bytes) -> Tuple[Dict[str, Entry], List[str]]:
    """What is listed, and everything in which the folder is not that."""
    try:
        text = (folder / LIST).read_text(encoding="utf-8")
    except OSError as error:
        return {}, [f"{LIST}: {error.strerror}; the bundle was not made to its end, or this is none"]
    problems: List[str] = []
    if public:
        try:
            verify(load_key(public), text.encode(), (folder / SIGNATURE).read_text(encoding="ascii").strip())
        except (Refused, OSError, ValueError) as error:
            problems.append(f"{SIGNATURE}: {error}")
    try:
        listed = parse(text)
    except ValueError as error:
        return {}, [*problems, f"{LIST}: {error}"]
    there, unread = contents(folder)
    problems += [f"{name}: {problem}" for name, problem in unread.items()]
    for name, entry in listed.items():
        if name not in there and name not in unread:
            problems.append(f"{name}: missing")
        elif name in there and there[name].sha256 != entry.sha256:
            problems.append(f"{name}: altered, {entry.size} bytes with SHA-256 {entry.sha256} expected")
    problems += [f"{name}: not listed" for name in there if name not in listed]
    return listed, problems
