"""Who a peer is: one RSA key, from which the peer id and every signature follow, and one TLS certificate.

The key file is libp2p's (`PrivateKey{key_type: RSA, data: PKCS#1 DER}`), so that p2pd runs under the same id. The peer
id is the hash of the public key alone: whoever holds a record with its public key can check both without a registry.
TLS uses its own P-256 certificate (gRPC refuses Ed25519), which is trusted because a signed record carries it.

    <folder>/peer.key   libp2p private key, mode 0600
    <folder>/tls.pem    P-256 private key and self-signed certificate, mode 0600; made anew when it is unusable
    <folder>/lock       held while a process uses the identity

Source of the peer id's format: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import NameOID

from protocol.errors import BadRecord, ConfigError

log = logging.getLogger(__name__)

KEY_BITS = 2048
MAX_KEY_BITS = 4096
"""A longer key would make each verification a burden on whoever reads records."""
PUBLIC_EXPONENT = 65537
CERTIFICATE_DAYS = 5 * 365
"""The record that carries a certificate decides whether it is trusted, so its own lifetime is only a formality."""
RENEW_BEFORE_DAYS = 365
CLOCK_SKEW_DAYS = 1
MAX_IDENTITIES_PER_HOST = 256
CERTIFICATE_NAME_LENGTH = 60
"""A DNS label holds at most 63 characters."""

_SIGNATURE_DOMAIN = b"potluck-signature-1"
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256.digest_size)
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_RSA_HEADER = b"\x08\x00\x12"
"""Protobuf: field 1 (key_type) = 0 (RSA), then field 2 (data), length-delimited."""
_SHA256_MULTIHASH = b"\x12\x20"


@dataclass(frozen=True)
class Identity:
    """A peer's keys. `repr` shows the peer id alone.

    `folder` is None for an identity that lives in memory only.
    """

    peer_id: str
    public_key_der: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    tls_key_pem: bytes = field(repr=False)
    private_key: rsa.RSAPrivateKey = field(repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False)

    @classmethod
    def ephemeral(cls) -> Identity:
        """A new identity in memory, for clients and tests. Takes about 0.1 s: generating a key is slow."""
        return _identity(rsa.generate_private_key(PUBLIC_EXPONENT, KEY_BITS), None)

    @classmethod
    def load_or_create(cls, folder: Path) -> Identity:
        """The identity kept in `folder`, made there if there is none. Blocks on the disk: call it from a thread.

        Raises:
            ConfigError: the key file cannot be read, is no RSA key, or the folder cannot be written.
        """
        key_path = folder / "peer.key"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if key_path.exists():
                key = _parse_private_key(key_path.read_bytes(), key_path)
            else:
                key = rsa.generate_private_key(PUBLIC_EXPONENT, KEY_BITS)
                write_private(key_path, _libp2p_private_key(key))
            return _identity(key, folder)
        except OSError as error:
            raise ConfigError(f"the identity in {folder} cannot be used: {error.strerror or error}") from error

    @property
    def certificate_der(self) -> bytes:
        """The TLS certificate as it goes into the peer's record."""
        return x509.load_pem_x509_certificate(self.certificate_pem).public_bytes(serialization.Encoding.DER)

    def sign(self, context: bytes, body: bytes) -> bytes:
        """An RSA-PSS signature of `body`, valid in `context` only (a record's signature says nothing elsewhere)."""
        return self.private_key.sign(_signed_bytes(context, body), _PSS, hashes.SHA256())

    @contextlib.contextmanager
    def key_file(self) -> Iterator[Path]:
        """The path of the libp2p key file; for an ephemeral identity a temporary one, removed afterwards."""
        if self.folder is not None:
            yield self.folder / "peer.key"
            return
        with tempfile.TemporaryDirectory(prefix="potluck-") as folder:
            path = Path(folder) / "peer.key"
            write_private(path, _libp2p_private_key(self.private_key))
            yield path


def verify(peer_id: str, public_key_der: bytes, context: bytes, body: bytes, signature: bytes) -> None:
    """Does `signature` show that `peer_id` said `body` in `context`? About 0.1 ms.

    Raises:
        BadRecord: the key is not an acceptable RSA key, is not the key of `peer_id`, or did not make the signature.
    """
    key = _public_key(public_key_der)
    if peer_id_of(public_key_der) != peer_id:
        raise BadRecord("the public key is not the signer's")
    try:
        key.verify(signature, _signed_bytes(context, body), _PSS, hashes.SHA256())
    except InvalidSignature:
        raise BadRecord("the signature is wrong") from None


def peer_id_of(public_key_der: bytes) -> str:
    """The libp2p peer id (base58 of a SHA-256 multihash, `Qm...`) of an RSA public key in SubjectPublicKeyInfo DER."""
    digest = hashlib.sha256(_libp2p_key(public_key_der)).digest()
    return base58(_SHA256_MULTIHASH + digest)


def certificate_name(peer_id: str) -> str:
    """The name in a peer's certificate: unique per peer, since two self-signed ones of a name break verification."""
    return peer_id.lower()[:CERTIFICATE_NAME_LENGTH]


def load_certificate(der: bytes) -> x509.Certificate:
    """A certificate out of a record.

    Raises:
        BadRecord: the bytes are no certificate, or one without exactly one common name.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm):
        raise BadRecord("the certificate does not parse") from None
    if len(names) != 1:
        raise BadRecord("the certificate has no single common name")
    return certificate


def common_name(certificate: x509.Certificate) -> str:
    """The common name of a certificate that passed `load_certificate`."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


@contextlib.contextmanager
def claim_identity(root: Path) -> Iterator[Identity]:
    """The first identity under `root` (`identity-0`, `identity-1`, ...) that no other process uses; held until exit.

    Two processes of one identity would overwrite each other's records and steal each other's connections. The lock is
    the kernel's (`flock`), so that it ends with the process, however that ends. Blocks on the disk.

    Raises:
        ConfigError: the identity is unusable (see `Identity.load_or_create`), or all slots are taken.
    """
    for slot in range(MAX_IDENTITIES_PER_HOST):
        folder = root / f"identity-{slot}"
        with contextlib.ExitStack() as held:
            if held.enter_context(_lock(folder)):
                yield Identity.load_or_create(folder)
                return
    raise ConfigError(f"all {MAX_IDENTITIES_PER_HOST} identities in {root} are in use; name another --home")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold `folder`'s lock; False: another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the identity in {folder} cannot be used: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def write_private(path: Path, data: bytes, *, anew: bool = False) -> None:
    """Write a file that only its owner can read, whole or not at all.

    Args:
        anew: leave alone what another process has written there meanwhile.

    Raises:
        FileExistsError: with `anew`, there is such a file.
        OSError: the folder cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp makes it with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            if anew:
                os.link(temporary, path)
                return
        except FileExistsError:
            raise
        except OSError:
            log.debug("no links at %s", path.parent)
        Path(temporary).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()


def base58(data: bytes) -> str:
    """Bitcoin's base58, as libp2p writes peer ids."""
    zeros = len(data) - len(data.lstrip(b"\0"))
    number, digits = int.from_bytes(data), ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return _BASE58[0] * zeros + digits


def _identity(key: rsa.RSAPrivateKey, folder: Path | None) -> Identity:
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    peer_id = peer_id_of(public)
    tls_key, certificate = _new_certificate(peer_id) if folder is None else _kept_certificate(peer_id, folder)
    return Identity(peer_id, public, certificate, tls_key, key, folder)


def _kept_certificate(peer_id: str, folder: Path) -> tuple[bytes, bytes]:
    path = folder / "tls.pem"
    if path.exists():
        kept = _parse_tls_file(path.read_bytes(), peer_id)
        if kept is not None:
            return kept
        log.warning("the TLS certificate in %s is expired or damaged; making a new one", path)
    tls_key, certificate = _new_certificate(peer_id)
    write_private(path, tls_key + certificate)
    return tls_key, certificate


def _parse_tls_file(data: bytes, peer_id: str) -> tuple[bytes, bytes] | None:
    """Key and certificate in PEM; None if they are not a pair, not of this peer, or soon to expire."""
    try:
        key = serialization.load_pem_private_key(data, None)
        certificate = x509.load_pem_x509_certificate(data)
        names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm):
        return None
    renew_at = certificate.not_valid_after_utc - datetime.timedelta(days=RENEW_BEFORE_DAYS)
    usable = (
        key.public_key() == certificate.public_key()
        and names == [certificate_name(peer_id)]
        and certificate.not_valid_before_utc <= _now() < renew_at
    )
    return (_private_pem(key), certificate.public_bytes(serialization.Encoding.PEM)) if usable else None


def _new_certificate(peer_id: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = certificate_name(peer_id)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(days=CLOCK_SKEW_DAYS))
        .not_valid_after(_now() + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _private_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _private_pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@lru_cache(maxsize=4096)
def _public_key(der: bytes) -> rsa.RSAPublicKey:
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadRecord("the public key does not parse") from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise BadRecord("the public key is not RSA")
    if not KEY_BITS <= key.key_size <= MAX_KEY_BITS or key.public_numbers().e != PUBLIC_EXPONENT:
        raise BadRecord("the public key has an unusual size or exponent")
    return key


def _signed_bytes(context: bytes, body: bytes) -> bytes:
    return b"".join((_SIGNATURE_DOMAIN, len(context).to_bytes(2), context, body))


def _libp2p_private_key(key: rsa.RSAPrivateKey) -> bytes:
    return _libp2p_key(
        key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def _libp2p_key(data: bytes) -> bytes:
    """The protobuf message in which libp2p wraps public and private RSA keys alike."""
    return _RSA_HEADER + _varint(len(data)) + data


def _parse_private_key(data: bytes, path: Path) -> rsa.RSAPrivateKey:
    size, start = _read_varint(data, len(_RSA_HEADER))
    try:
        if not data.startswith(_RSA_HEADER) or len(data) - start != size:
            raise ValueError("not a libp2p RSA key file")
        key = serialization.load_der_private_key(data[start:], None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("not an RSA key")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"the key file {path} is damaged ({error}); restore it, or delete it to get a new peer id"
        ) from None
    return key


def _varint(number: int) -> bytes:
    """Protobuf's variable-length integer."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The integer at `start` and the position after it; a truncated one gives what is there."""
    number = shift = 0
    for position in range(start, min(start + 5, len(data))):
        number |= (data[position] & 0x7F) << shift
        shift += 7
        if data[position] < 0x80:
            return number, position + 1
    return number, len(data)
