"""Hosts and ports of both kinds: read, resolve, listened at, bracketed."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from shoal import addresses
from shoal.addresses import Address, bracketed, is_loopback, join_host_port, parse_host, refuse_loopback_name, resolve
from shoal.errors import ConfigError
from shoal.server.http.listening import Listening

Resolve = Callable[..., None]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Gives names of the test's own their addresses."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def find(host: str | None, port: int, **options: Any) -> list[Any]:
        return [found for each in known.get(host or "", [host]) for found in real(each, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", find)

    def add(**more: list[str]) -> None:
        known.update(more)

    return add


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("a:1", "a", 1), ("10.0.0.1:29550", "10.0.0.1", 29550), ("[fd02::1]:80", "fd02::1", 80)]
    + [("[fe80::1%eth0]:80", "fe80::1%eth0", 80)],
)
def test_what_is_read_is_shown_as_it_was(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)
    assert str(Address(host, port)) == join_host_port(host, port) == text


@pytest.mark.parametrize(
    "text", ["host", "host:", ":1", "host:0", "host:65536", "host:x", "fd02::1:80", "[]:80", "[x:y]:80"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "host"), [("fd02::1", "fd02::1"), ("[fd02::1]", "fd02::1"), (" a ", "a"), ("10.0.0.1", "10.0.0.1")]
)
def test_a_host_alone(text: str, host: str) -> None:
    assert parse_host(text, "--x") == host


@pytest.mark.parametrize("text", ["", "[]", "a:1", "10.0.0.1:80", "[::1]:80", "http://a"])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ConfigError, match="--x must be the name or the address of a host, without a port"):
        parse_host(text, "--x")


def test_an_address_in_a_url() -> None:
    assert [bracketed(host) for host in ("a", "10.0.0.1", "::1", "a:1")] == ["a", "10.0.0.1", "[::1]", "a:1"]


def test_addresses_of_ipv4_come_first_on_every_host(names: Resolve) -> None:
    names(both=["::1", "127.0.0.1"])
    assert [there[0] for _, there in resolve("both", 7)] == ["127.0.0.1", "::1"]


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "both"])
def test_listening_and_connecting(names: Resolve, host: str) -> None:
    names(both=["::1", "127.0.0.1"])
    listeners = addresses.listen(host, 0)
    try:
        (port,) = {listener.getsockname()[1] for listener in listeners}
        assert len(listeners) == (2 if host == "both" else 1)
        for each in ["::1", "127.0.0.1"] if host == "both" else [host]:
            addresses.connect(Address(each, port), 5).close()
    finally:
        for listener in listeners:
            listener.close()
    with pytest.raises(ConnectionRefusedError):
        addresses.connect(Address(host, port), 5)


@pytest.mark.parametrize("host", ["::", ""])
def test_all_addresses_are_those_of_both_kinds(host: str) -> None:
    listeners = addresses.listen(host, 0)
    try:
        for each in ("::1", "127.0.0.1"):
            addresses.connect(Address(each, listeners[0].getsockname()[1]), 5).close()
    finally:
        for listener in listeners:
            listener.close()


def test_a_server_listens_at_all_addresses_of_a_name(names: Resolve) -> None:
    names(both=["::1", "127.0.0.1"])
    for host, url in (
        ("both", "http://127.0.0.1"),
        ("[::1]", "http://[::1]"),
        ("::", "http://[::1]"),
        ("", "http://127.0.0.1"),
    ):
        listening = Listening(host, 0)
        sockets = listening.bind()
        try:
            port = sockets[0].getsockname()[1]
            assert listening.url(sockets) == f"{url}:{port}"
            for each in ["::1"] if host == "[::1]" else ["::1", "127.0.0.1"]:
                addresses.connect(Address(each, port), 5).close()
        finally:
            for sock in sockets:
                sock.close()


def test_a_name_with_one_address_of_another_host_is_listened_at_by_the_other(names: Resolve) -> None:
    names(moved=["192.0.2.1", "::1"])
    (listener,) = addresses.listen("moved", 0)
    with listener:
        assert listener.getsockname()[0] == "::1"


def test_loopback(names: Resolve) -> None:
    names(mine=["127.0.1.1"], both=["127.0.1.1", "192.0.2.1"])
    found = {
        host: is_loopback(host)
        for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "mine", "both", "::", "192.0.2.1")
    }
    assert found == {
        "127.0.0.1": True,
        "127.9.9.9": True,
        "::1": True,
        "localhost": True,
        "mine": True,
        "both": False,
        "::": False,
        "192.0.2.1": False,
    }


def test_a_name_that_hides_the_loopback_is_named_with_the_way_out(names: Resolve) -> None:
    names(mine=["127.0.1.1"], both=["127.0.1.1", "192.0.2.1"])
    for host in ("127.0.0.1", "::1", "localhost", "both", "192.0.2.1", "nobody.invalid"):
        refuse_loopback_name(host, "--x")
    with pytest.raises(
        ConfigError, match=r"--x mine is 127.0.1.1 on this host .*give an address that the others can reach"
    ):
        refuse_loopback_name("mine", "--x")
