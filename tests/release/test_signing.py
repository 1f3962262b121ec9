"""Keys and signatures: never overwritten, readable by their owner, checked against the key that was given."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from dpsyngen.errors import ConfigError, ReleaseError
from dpsyngen.release.signing import (
    PASSPHRASE,
    check_signature,
    fingerprint,
    make_key,
    read_private_key,
    read_public_key,
    sign,
)


def test_a_signature_is_of_one_manifest_and_one_key(tmp_path) -> None:
    public, shown = make_key(tmp_path / "k")
    signature = sign(b"manifest", read_private_key(tmp_path / "k")).encode()
    assert fingerprint(check_signature(b"manifest", signature)) == shown == fingerprint(read_public_key(public))
    with pytest.raises(ReleaseError, match="changed after signing"):
        check_signature(b"manifesto", signature)
    make_key(tmp_path / "other")
    other = json.loads(sign(b"manifest", read_private_key(tmp_path / "other")))
    mixed = {**json.loads(signature), "public_key": other["public_key"]}
    with pytest.raises(ReleaseError, match="changed after signing"):
        check_signature(b"manifest", json.dumps(mixed).encode())


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"{", b"\xff", b"[" * 9999, b'{"public_key": "zz"}', b'{"public_key": 1}']
)
def test_damaged_signatures(content) -> None:
    with pytest.raises(ReleaseError, match="damaged"):
        check_signature(b"manifest", content)


def test_keys_are_never_overwritten_and_are_their_owners(tmp_path) -> None:
    public, _ = make_key(tmp_path / "k")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    before = (tmp_path / "k").read_bytes(), public.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        make_key(tmp_path / "k")
    (tmp_path / "k").unlink()
    with pytest.raises(ConfigError, match="exists already"):
        make_key(tmp_path / "k")
    assert not (tmp_path / "k").exists()
    assert public.read_bytes() == before[1]
    with pytest.raises(ConfigError, match="cannot be written"):
        make_key(tmp_path / "none" / "k")
    with pytest.raises(ConfigError, match="the name of a file to make"):
        make_key(Path(""))


def test_passphrase(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    make_key(tmp_path / "k")
    assert b"ENCRYPTED" in (tmp_path / "k").read_bytes()
    read_private_key(tmp_path / "k")
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(ConfigError, match="passphrase"):
        read_private_key(tmp_path / "k")
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(ConfigError, match="is encrypted: set"):
        read_private_key(tmp_path / "k")
    make_key(tmp_path / "open")
    monkeypatch.setenv(PASSPHRASE, "x")
    with pytest.raises(ConfigError, match="not encrypted: unset"):
        read_private_key(tmp_path / "open")


def test_keys_that_are_none(tmp_path) -> None:
    make_key(tmp_path / "k")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_private_key(tmp_path / "none")
    with pytest.raises(ConfigError, match="no private key"):
        read_private_key(tmp_path / "k.pub")
    with pytest.raises(ConfigError, match="no public key"):
        read_public_key(tmp_path / "k")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_public_key(tmp_path / "none")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    curve = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec").write_bytes(
        curve.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        + curve.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(ConfigError, match="another kind"):
        read_private_key(tmp_path / "ec")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl on this machine")
def test_keys_of_openssl_are_taken(tmp_path: Path) -> None:
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k"], check=True)
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "k", "-pubout", "-out", tmp_path / "k.pub"], check=True)
    signature = sign(b"m", read_private_key(tmp_path / "k")).encode()
    assert fingerprint(check_signature(b"m", signature)) == fingerprint(read_public_key(tmp_path / "k.pub"))
