"""Certificates of clusters, for tests of connections with TLS."""

from datetime import datetime
from pathlib import Path

from shoal.cli import certificates
from shoal.wire.credentials import TlsFiles


class Cluster:
    """A CA, and certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = certificates.make_ca(1)

    def host(self, name: str = "host", days: int = 1, now: datetime | None = None) -> TlsFiles:
        """Return the files of a host, in a folder of their own."""
        return files_in(self.folder(name, days, now))

    def folder(self, name: str = "host", days: int = 1, now: datetime | None = None) -> Path:
        folder = self._folder / name
        folder.mkdir(parents=True)
        certificates.write_host(folder, self._ca, name, days, now)
        return folder


def files_in(folder: Path) -> TlsFiles:
    return TlsFiles(str(folder / "ca.pem"), str(folder / "cert.pem"), str(folder / "key.pem"))
