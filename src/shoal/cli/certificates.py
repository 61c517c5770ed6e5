"""The certificates of a cluster: a CA, and certificates that it has signed. Needs the package `cryptography`."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal.errors import ConfigError
from shoal.launch.credentials import CA_FILE, CA_KEY_FILE, CERTIFICATE_FILE, KEY_FILE

_CA_DAYS = 3650
_EARLIER = timedelta(days=1)  # certificates are valid from the day before, as clocks of hosts differ

Signer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def write_set(folder: Path, hosts: int | None, days: int, ca_folder: Path | None) -> list[Path]:
    """Write the certificates of a cluster into an empty folder, and return the folders that hosts need.

    Args:
        hosts: make a folder with a certificate for each of so many hosts; None: make one certificate for all.
        days: the time after which they expire.
        ca_folder: the folder of the CA that signs; None: make a CA, whose certificate and key are written too.

    Raises:
        ConfigError: the CA cannot be read.
        OSError: the folder cannot be written.
    """
    ca = make_ca(days) if ca_folder is None else read_ca(ca_folder)
    if ca_folder is None:
        write_ca(folder, ca)
    if hosts is None:
        write_host(folder, ca, "shoal host", days)
        return [folder]
    folders = [folder / f"host-{number}" for number in range(hosts)]
    for number, each in enumerate(folders):
        each.mkdir(mode=0o700)
        write_host(each, ca, f"shoal host {number}", days)
    return folders


def make_ca(days: int, now: datetime | None = None) -> Signer:
    """Return the certificate of a new CA and its key. It is valid for ten years, or for `days` if these are more."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Shoal cluster CA")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(name, name, key, max(days, _CA_DAYS), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def read_ca(folder: Path) -> Signer:
    """Read the certificate and the key of a CA that `write_ca` has written.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--ca {folder} has no usable {CA_FILE} and {CA_KEY_FILE}: {why}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"--ca {folder}: {CA_KEY_FILE} is not the key of {CA_FILE}")
    return certificate, key


def write_ca(folder: Path, ca: Signer) -> None:
    """Write the certificate and the key of a CA into a folder."""
    _write(folder / CA_FILE, ca[0].public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / CA_KEY_FILE, _pem(ca[1]), 0o600)


def write_host(folder: Path, ca: Signer, name: str, days: int, now: datetime | None = None) -> None:
    """Write a new certificate with its key, and the certificate of the CA, into a folder. Hosts use it in both roles.

    Args:
        name: for people; Shoal does not compare it.
        now: the beginning of its `days`; None: the present.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    roles = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    signer = ca[0].extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name(name), ca[0].subject, key, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(roles, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False)
        .sign(ca[1], hashes.SHA256())
    )
    if not (folder / CA_FILE).exists():
        _write(folder / CA_FILE, ca[0].public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / KEY_FILE, _pem(key), 0o600)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, now: datetime | None
) -> x509.CertificateBuilder:
    begin = datetime.now(UTC) if now is None else now
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _EARLIER)
        .not_valid_after(begin + timedelta(days=days))
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file, which nobody else can read before its mode is set."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
