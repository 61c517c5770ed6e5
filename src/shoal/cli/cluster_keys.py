"""`shoal cluster-keys`: the certificates with which the hosts of a cluster encrypt their connections."""

from pathlib import Path
from typing import Any

import click

from shoal.errors import ConfigError
from shoal.launch.credentials import CA_FILE, CA_KEY_FILE, CERTIFICATE_FILE, KEY_FILE
from shoal.lazy import load

_MOST_DAYS = 36500
_FILES = f"{CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE}"


@click.command("cluster-keys")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--hosts",
    type=click.IntRange(1, 10_000),
    help="make a folder with a certificate of its own for each of this number of hosts; else all hosts use one",
)
@click.option(
    "--days",
    type=click.IntRange(1, _MOST_DAYS),
    default=365,
    show_default=True,
    help="time after which the certificates expire",
)
@click.option(
    "--ca",
    "ca_folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help=f"sign with the CA of this folder ({CA_FILE}, {CA_KEY_FILE}) instead of a new one: for new hosts, and before "
    "certificates expire",
)
def cluster_keys(folder: Path, hosts: int | None, days: int, ca_folder: Path | None) -> None:
    """Make the certificates for --cluster-tls.

    The folder DIR must be new or empty. It gets the certificate of a CA (certificate authority), the key of the CA, and
    a certificate with its key for the hosts.
    """
    write_set = _load_writer()
    _make_folder(folder)
    try:
        folders = write_set(folder, hosts, days, ca_folder)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror}") from None
    _tell(folder, folders, days, new_ca=ca_folder is None)


def _load_writer() -> Any:
    try:
        return load("shoal.cli.certificates:write_set")
    except ModuleNotFoundError:
        raise ConfigError(
            "shoal cluster-keys needs the package cryptography: pip install shoal[tls]; other tools such as openssl "
            f"can make {_FILES} too"
        ) from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
        if taken is not None:
            raise ConfigError(f"{folder} has {taken.name} already, and nothing is overwritten: give a new folder")
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{folder} can't be made: {error.strerror}; give another folder") from None


def _tell(folder: Path, folders: list[Path], days: int, *, new_ca: bool) -> None:
    if folders == [folder]:
        click.echo(f"1. Copy {_FILES} of {folder} into a folder on each host, for example:")
        click.echo(f"     scp {folder}/{{{CA_FILE},{CERTIFICATE_FILE},{KEY_FILE}}} HOST:/etc/shoal/tls/")
    else:
        click.echo(f"1. Copy the folder of each host ({folders[0]} and so on) to it, for example:")
        click.echo(f"     scp {folders[0]}/* HOST:/etc/shoal/tls/")
    click.echo(f"   {KEY_FILE} must have the mode 600, and belong to the user that runs Shoal.")
    click.echo("2. Give --cluster-tls /etc/shoal/tls on all hosts, or set SHOAL_CLUSTER_TLS to it.")
    click.echo("   Hosts still need the same SHOAL_CLUSTER_KEY.")
    if new_ca:
        click.echo(f"3. Keep {folder / CA_KEY_FILE} off the hosts: who has it can make certificates for this cluster.")
        click.echo(f"   New certificates in time: shoal cluster-keys NEW_DIR --ca {folder}")
    click.echo(f"The certificates expire in {days} days.")
