"""Which hosts and addresses may be asked."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from workers.policy import Policy
from workers.services.addresses import Origin, check_allowed, forbidden, parse_origin, resolve, system_resolver

FIELD = "objectives.0.options.url"
OPEN = Policy(hosts=("scores.example",))


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Scores.Example/v1", Origin("https", "scores.example", 443)),
        ("http://scores.example.:8080/?q=1", Origin("http", "scores.example", 8080)),
        ("https://[2001:DB8::1]:8443/x", Origin("https", "2001:db8::1", 8443)),
        ("https://bücher.example/", Origin("https", "xn--bcher-kva.example", 443)),
    ],
)
def test_origins(url: str, origin: Origin) -> None:
    assert parse_origin(url, FIELD) == origin
    assert parse_origin(str(origin), FIELD) == origin


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://scores.example/", "gopher://scores.example", "scores.example/v1", "/v1", ""),
        *("https://", "https:///path", "http://user:pass@scores.example/", "http://user@scores.example/"),
        *("http://scores.example:99999/", "http://scores.example:port/", "http://[::1/", "data:,1", "javascript:1"),
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_origin(url, FIELD)
    assert caught.value.field == FIELD
    assert "pass" not in caught.value.message.replace("password", "")


def test_only_hosts_of_the_list() -> None:
    policy = Policy(hosts=("scores.example", "other.example:8080", "[2001:db8::1]:8443"))
    for url in (
        "https://scores.example/",
        "http://SCORES.example/",
        "http://other.example:8080",
        "https://[2001:db8::1]:8443",
    ):
        check_allowed(parse_origin(url, FIELD), policy, FIELD)
    for url in (
        *("https://scores.example:8443/", "https://other.example/", "https://evil.example/", "http://[2001:db8::1]/"),
        *("https://scores.example.evil.example/", "https://evilscores.example/", "http://127.0.0.1/"),
    ):
        with pytest.raises(InvalidInput, match="does not let jobs ask") as caught:
            check_allowed(parse_origin(url, FIELD), policy, FIELD)
        assert caught.value.field == FIELD
    with pytest.raises(InvalidInput):
        check_allowed(parse_origin("https://scores.example/", FIELD), Policy(), FIELD)


PRIVATE = [
    *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.5.4", "192.168.1.1", "100.64.0.1", "169.254.1.1", "192.0.2.1"),
    *("::1", "fe80::1", "fc00::1", "fd12:3456::1", "2001:db8::1", "240.0.0.1", "198.18.0.1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "2002:7f00:1::", "2002:a00:1::1", "::127.0.0.1"),
    "2001:0:7f00:1::1",
]
NEVER = [
    *("0.0.0.0", "224.0.0.1", "ff02::1", "::", "169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254"),
    *("2002:a9fe:a9fe::", "100.100.100.200", "64:ff9b::169.254.169.254"),
]


@pytest.mark.parametrize("address", PRIVATE + NEVER)
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(InvalidInput, match=r"scores\.example has the address") as caught:
        resolve(Origin("https", "scores.example", 443), OPEN, FIELD, lambda *_: ["93.184.215.14", address])
    assert caught.value.field == FIELD


@pytest.mark.parametrize("address", PRIVATE)
def test_private_hosts_may_be_allowed(address: str) -> None:
    policy = OPEN.model_copy(update={"private_hosts": True})
    assert resolve(Origin("http", "scores.example", 80), policy, FIELD, lambda *_: [address])


@pytest.mark.parametrize("address", NEVER)
def test_metadata_is_never_asked(address: str) -> None:
    policy = OPEN.model_copy(update={"private_hosts": True})
    with pytest.raises(InvalidInput):
        resolve(Origin("http", "scores.example", 80), policy, FIELD, lambda *_: [address])


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:93.184.215.14"])
def test_public_addresses(address: str) -> None:
    found = resolve(Origin("https", "scores.example", 443), OPEN, FIELD, lambda *_: [address])
    assert [ipaddress.ip_address(one) for one in found] == [ipaddress.ip_address(address)]


@given(st.ip_addresses(v=4))
def test_an_address_is_judged_alike_however_it_is_written(address: ipaddress.IPv4Address) -> None:
    plain = forbidden(address, private_hosts=False)
    for form in (f"::ffff:{address}", f"64:ff9b::{address}"):
        assert forbidden(ipaddress.ip_address(form), private_hosts=False) == plain
    if plain is not None:
        carried = ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80))
        assert forbidden(carried, private_hosts=False) is not None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "127.1"])
def test_other_ways_to_write_loopback(host: str) -> None:
    """The system's own resolver understands them, and what it finds is checked."""
    with pytest.raises(InvalidInput, match="loopback"):
        resolve(Origin("http", host, 80), Policy(hosts=(host,)), FIELD, system_resolver)


def test_a_name_without_addresses() -> None:
    with pytest.raises(OSError, match="no address"):
        resolve(Origin("http", "scores.example", 80), OPEN, FIELD, lambda *_: [])
