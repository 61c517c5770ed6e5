"""What this host shows to the other hosts of its cluster: the shared key, and the files for TLS."""

import functools
import os
from datetime import UTC, datetime
from pathlib import Path

from shoal import env
from shoal.addresses import is_loopback
from shoal.config.engine_options import ClusterTlsOptions
from shoal.errors import ConfigError
from shoal.log import get_logger
from shoal.transport.tls import check_files
from shoal.wire.credentials import Credentials, TlsFiles

log = get_logger("cluster")

CA_FILE, CERTIFICATE_FILE, KEY_FILE, CA_KEY_FILE = "ca.pem", "cert.pem", "key.pem", "ca-key.pem"
_SOON_DAYS = 30  # the log warns of a certificate that expires earlier


def credentials_of_host(options: ClusterTlsOptions, key: str | None = None) -> Credentials:
    """Return the credentials with which this host meets others.

    Args:
        key: the shared key; None: that of the environment.

    Raises:
        ConfigError: the key cannot be read; or the files for TLS are incomplete or cannot be used.
    """
    credentials = Credentials(env.cluster_key() if key is None else key, tls_files(options))
    if credentials.tls is not None:
        check_files(credentials.tls)
    return credentials


def tls_files(options: ClusterTlsOptions) -> TlsFiles | None:
    """Return the files that the options name; None if they name none.

    Raises:
        ConfigError: only some of the three files are named; or a folder and a file.
    """
    files = {
        "--cluster-tls-ca": options.cluster_tls_ca,
        "--cluster-tls-cert": options.cluster_tls_cert,
        "--cluster-tls-key": options.cluster_tls_key,
    }
    given = [flag for flag, path in files.items() if path is not None]
    if options.cluster_tls is not None:
        if given:
            raise ConfigError(f"--cluster-tls names a folder with all files: leave out {given[0]}, or the folder")
        folder = Path(options.cluster_tls)
        return TlsFiles(*(os.path.abspath(folder / name) for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE)))
    if not given:
        return None
    paths = [path for path in files.values() if path is not None]
    if len(paths) < len(files):
        missing = [flag for flag, path in files.items() if path is None]
        raise ConfigError(f"{given[0]} needs {' and '.join(missing)} too; or give a folder: --cluster-tls")
    return TlsFiles(*map(os.path.abspath, paths))


@functools.cache
def log_protection(credentials: Credentials, address: str) -> None:
    """Log, once in this process, how the connections to other hosts at an address are protected."""
    if is_loopback(address):
        return
    files = credentials.tls
    if files is None:
        log.warning(
            "connections between hosts are authenticated but not encrypted: whoever can read the network can read "
            "prompts and outputs; use a private network, or make certificates with `shoal cluster-keys DIR` and give "
            "--cluster-tls DIR on all hosts"
        )
        return
    checked = check_files(files)
    until = datetime.fromtimestamp(checked.expires, UTC)
    log.info(
        "connections between hosts use TLS (%s, until %s); what ranks exchange over gloo and NCCL is not encrypted: "
        "use a private network, WireGuard or IPsec for it",
        *(files.certificate, f"{until:%Y-%m-%d}"),
    )
    if checked.days_left < _SOON_DAYS:
        log.warning(
            "%s expires in %.0f days: make new certificates with `shoal cluster-keys`, and replace the files on all "
            "hosts; running processes read them when they connect again",
            *(files.certificate, checked.days_left),
        )
    if Path(files.ca).with_name(CA_KEY_FILE).exists():
        log.warning(
            "%s is on this host, and whoever has it can make certificates for this cluster: keep it elsewhere",
            Path(files.ca).with_name(CA_KEY_FILE),
        )
