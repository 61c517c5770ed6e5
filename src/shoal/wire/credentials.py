"""What a process shows to the processes of other hosts, so that they let it in."""

import msgspec

from shoal.wire.base import Wire


class TlsFiles(Wire, frozen=True):
    """The files of this host for encrypted connections, as absolute paths."""

    ca: str  # the certificate of the cluster's CA (certificate authority), which has signed those of all hosts
    certificate: str
    key: str  # the private key of the certificate


class Credentials(Wire, frozen=True):
    """The shared key of a cluster, and the files for encrypted connections to its hosts.

    They stay on their host: no process sends them over a network.
    """

    key: str = ""  # the shared secret; "": none is needed, as only this host can connect
    tls: TlsFiles | None = None  # None: connections are not encrypted


NO_CREDENTIALS = Credentials()

credentials_decoder: msgspec.msgpack.Decoder[Credentials] = msgspec.msgpack.Decoder(Credentials)
