"""Which hosts may be asked: an allow-list of names, and a check of every address that a name stands for.

A name is looked up once and the connection made to the address that was checked, so a name server that answers
differently the second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from optimizer.errors import InvalidInput
from workers.policy import Policy

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Sequence[str]]
"""From a host's name and port to its addresses; raises OSError where there are none."""

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_METADATA = {
    *map(ipaddress.ip_address, ("169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"))
}
"""Where clouds tell a machine its credentials: nobody scores models there, whatever is allowed."""


def system_resolver(host: str, port: int) -> Sequence[str]:
    """Look a name up as the system does."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Origin:
    """Where a service is: scheme, host (in ASCII, lower case) and port."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """Host and port as a URL and the Host header have them: no port where it is the scheme's usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


def parse_origin(url: str, field: str) -> Origin:
    """Return where a URL leads.

    Raises:
        InvalidInput: it is no absolute http or https URL, or it holds a user name or password.
    """
    try:
        parts = urlsplit(url)
        host, port = _host(parts), parts.port
    except ValueError as error:
        raise InvalidInput(f"this is no URL: {error}", field=field) from None
    if parts.scheme not in _PORTS or not host:
        raise InvalidInput(
            "only http and https URLs with a host can be asked", field=field, remedy="write https://host/path"
        )
    if parts.username is not None or parts.password is not None:
        raise InvalidInput(
            "a URL must hold no user name and no password",
            field=field,
            remedy="put the credentials into a secret and name it in a header",
        )
    return Origin(parts.scheme, host, _PORTS[parts.scheme] if port is None else port)


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".")
    return host if host.isascii() else host.encode("idna").decode("ascii").lower()


def check_allowed(origin: Origin, policy: Policy, field: str) -> None:
    """Raise `InvalidInput` unless the server's operator allows jobs to ask this host at this port."""
    usual = origin.port == _PORTS[origin.scheme]
    named = {f"{origin.host}:{origin.port}", f"[{origin.host}]:{origin.port}"}
    named |= {origin.host, f"[{origin.host}]"} if usual else set()
    if not named & {host.lower() for host in policy.hosts}:
        raise InvalidInput(
            f"this server does not let jobs ask {origin.netloc}",
            field=field,
            remedy="its operator can allow it with MERGEOPT_HOSTS",
        )


def resolve(origin: Origin, policy: Policy, field: str, resolver: Resolver = system_resolver) -> list[str]:
    """Look a host up and return its addresses, all of them checked.

    Raises:
        InvalidInput: one of its addresses may not be asked.
        OSError: the name cannot be looked up now.
    """
    found = [ipaddress.ip_address(address.partition("%")[0]) for address in resolver(origin.host, origin.port)]
    if not found:
        raise OSError("the name has no address")
    for address in found:
        if (reason := forbidden(address, policy.private_hosts)) is not None:
            raise InvalidInput(
                f"{origin.host} has the address {address}, which is {reason}",
                field=field,
                remedy="jobs may ask public addresses only, unless the operator sets MERGEOPT_PRIVATE_HOSTS",
            )
    return [str(address) for address in found]


def forbidden(address: Address, private_hosts: bool) -> str | None:
    """Return why an address may not be asked, or None if it may; looks into IPv6 addresses that stand for IPv4 ones."""
    for inner in _meant(address):
        if inner in _METADATA:
            return "a cloud's metadata service"
        if inner.is_multicast or inner.is_unspecified:
            return "no single machine's"
        if not private_hosts and not inner.is_global:
            return "private, loopback, link-local or reserved"
    return None


def _meant(address: Address) -> Iterator[Address]:
    """The address, and every IPv4 address that it carries: mapped, compatible, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:  # the same as the IPv4 address, whatever IPv6 calls the range
        yield address.ipv4_mapped
        return
    if address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _COMPATIBLE and int(address) > 1:
        yield ipaddress.IPv4Address(int(address))
