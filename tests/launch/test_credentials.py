"""The credentials of a host: the options that name the files for TLS, and what the log says about the protection."""

import logging
import os
from pathlib import Path

import pytest

from shoal.config.engine_options import ClusterTlsOptions
from shoal.errors import ConfigError
from shoal.launch.credentials import credentials_of_host, log_protection, tls_files
from shoal.wire.base import as_json, encode
from shoal.wire.credentials import Credentials
from shoal.wire.plan import ModelFiles, NodePlan, ReplicaPlace
from support.certificates import Cluster, files_in
from support.plans import bare_plan

ELSEWHERE = "192.0.2.1"  # an address that is never used


def options_of(files: object) -> ClusterTlsOptions:
    return ClusterTlsOptions(cluster_tls=str(files))


def test_a_folder_and_three_files_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Cluster(tmp_path).folder("host")
    monkeypatch.chdir(tmp_path)
    by_folder = tls_files(ClusterTlsOptions("host"))
    by_files = tls_files(ClusterTlsOptions(None, "host/ca.pem", "host/cert.pem", "host/key.pem"))
    assert by_folder == by_files == files_in(folder)
    assert tls_files(ClusterTlsOptions()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ClusterTlsOptions("host", cluster_tls_ca="a"), "--cluster-tls names a folder .* leave out --cluster-tls-ca"),
        (ClusterTlsOptions(cluster_tls_key="a"), "--cluster-tls-key needs --cluster-tls-ca and --cluster-tls-cert too"),
        (ClusterTlsOptions(None, "a", "b"), "--cluster-tls-ca needs --cluster-tls-key too"),
    ],
)
def test_incomplete_files_are_refused(options: ClusterTlsOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tls_files(options)


def test_the_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Cluster(tmp_path).folder("host")
    monkeypatch.setenv("SHOAL_CLUSTER_KEY", "secret")
    assert credentials_of_host(options_of(folder)) == Credentials("secret", files_in(folder))
    os.chmod(folder / "key.pem", 0o604)
    with pytest.raises(ConfigError, match=r"key.pem may be read by users other than its owner \(mode 604\)"):
        credentials_of_host(options_of(folder))


def test_the_log_says_once_how_connections_are_protected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal")
    for _ in range(2):
        log_protection(Credentials("secret"), ELSEWHERE)
        log_protection(Credentials("secret"), "127.0.0.1")
    (open_line,) = (record for record in caplog.records)
    assert open_line.levelno == logging.WARNING
    assert "whoever can read the network can read prompts and outputs" in open_line.getMessage()
    assert "--cluster-tls DIR" in open_line.getMessage()
    caplog.clear()
    folder = Cluster(tmp_path).folder("host", days=9)
    (folder / "ca-key.pem").touch()
    log_protection(Credentials("secret", files_in(folder)), ELSEWHERE)
    first, expires, ca_key = (record.getMessage() for record in caplog.records)
    assert "use TLS" in first
    assert "what ranks exchange over gloo and NCCL is not encrypted" in first
    assert "expires in 9 days" in expires
    assert f"{folder / 'ca-key.pem'} is on this host" in ca_key


def test_a_plan_for_another_host_has_no_credentials(tmp_path: Path) -> None:
    nodes = tuple(NodePlan(number, "host", ELSEWHERE, ModelFiles("/model"), here=number == 0) for number in (0, 1))
    ours = Credentials("secret", Cluster(tmp_path).host())
    plan = bare_plan(place=ReplicaPlace(credentials=ours), nodes=nodes)
    assert plan.on_node(0).place.credentials == ours
    assert b"secret" not in encode(plan.on_node(1))
    assert "secret" not in str(as_json(plan.on_node(1)))
