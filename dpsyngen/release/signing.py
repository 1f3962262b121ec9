"""Signatures of bundles: Ed25519 (RFC 8032) by the ``cryptography`` library."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dpsyngen.errors import ConfigError, ReleaseError, require

PASSPHRASE = "DPSYNGEN_KEY_PASSPHRASE"
"""Environment variable with the passphrase of an encrypted key."""

# In front of what is signed, so that the signature of a manifest is never one of anything else under the same key.
_DOMAIN = b"dpsyngen bundle manifest, version 1\n"
_OTHER_KIND = "{} is a key of another kind; bundles are signed with Ed25519."


def make_key(path: Path) -> tuple[Path, str]:
    """Make a key pair: the private key at `path` (mode 0600), the public one beside it with the ending ``.pub``.

    If the environment variable ``DPSYNGEN_KEY_PASSPHRASE`` is set, the private key is encrypted with it.  Returns the
    path of the public key and its fingerprint; ConfigError if one of the files exists, or the folder does not.
    """
    require(path.name, "the private key", str(path), "the name of a file to make, such as board.pem")
    public_path = path.with_name(path.name + ".pub")
    key = Ed25519PrivateKey.generate()
    passphrase = os.environ.get(PASSPHRASE)
    encryption: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file in (path, public_path):
        if file.exists():
            raise ConfigError(f"{file} exists already; a key is never overwritten.  Choose another name.")
    try:
        for file, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
                f.write(content)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be written: {error.strerror}.") from None
    return public_path, fingerprint(key.public_key())


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """A private key from a PEM file (PKCS #8), as :func:`make_key` or OpenSSL write it; ConfigError if it is none."""
    passphrase, data = os.environ.get(PASSPHRASE), _read(path)
    try:
        key = serialization.load_pem_private_key(data, passphrase.encode() if passphrase else None)
    except TypeError:
        state, change = ("not encrypted", "unset") if passphrase else ("encrypted", "set")
        raise ConfigError(f"the key {path} is {state}: {change} the environment variable {PASSPHRASE}.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path} is no private key in PEM form, or its passphrase ({PASSPHRASE}) is wrong.  Make one with "
            "`dpsyngen key`."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(_OTHER_KIND.format(path))
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """A public key from a PEM file.  Raises ConfigError if it is missing or not an Ed25519 key."""
    data = _read(path)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is no public key in PEM form.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(_OTHER_KIND.format(path))
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror}.") from None


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in groups of four hexadecimal digits: to be compared by eye."""
    digest = hashlib.sha256(_raw(key)).hexdigest()
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def sign(manifest: bytes, key: Ed25519PrivateKey) -> str:
    """The signature file of a manifest, as JSON."""
    signature, public = key.sign(_DOMAIN + manifest).hex(), _raw(key.public_key()).hex()
    return json.dumps({"algorithm": "Ed25519", "public_key": public, "signature": signature}, indent=1)


def check_signature(manifest: bytes, signature: bytes) -> Ed25519PublicKey:
    """Check the signature file of a manifest; returns the key that it names.  ReleaseError if it does not fit."""
    try:
        stored = json.loads(signature)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(stored["public_key"]))
        key.verify(bytes.fromhex(stored["signature"]), _DOMAIN + manifest)
        if stored["algorithm"] != "Ed25519":
            raise ValueError(stored["algorithm"])
    except InvalidSignature:
        raise ReleaseError("the signature does not fit this manifest: files were changed after signing.") from None
    except (ValueError, KeyError, TypeError, RecursionError, UnsupportedAlgorithm):
        raise ReleaseError("the signature file is damaged.") from None
    return key
