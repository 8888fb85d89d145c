"""Checks where webhooks may go: URLs come from users, and the server's network reaches hosts that users must not.

A name is resolved once, all its addresses are checked, and the connection uses those addresses. If the connection
resolved the name again, it could get a public address first and 127.0.0.1 afterwards.
"""

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

from tunery.errors import InvalidValue
from tunery.webhooks.errors import AddressRefused

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Sequence[Address]]

MAX_URL = 2048
PORTS = (443, 8443)
"""Ports of public receivers. Other ports belong to other services."""

# Spelled out, as `ipaddress` cannot be asked: in Python 3.11 `is_private` is False for 100.64.0.0/10, NAT64, 6to4 and
# multicast, `is_global` is True for most of them, and both change with the patch version.
_DENIED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, and some clouds' metadata
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, the clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# IPv6 the other way round: all public addresses lie in 2000::/3, so what is not in there needs no name.
_GLOBAL_V6 = IPv6Network("2000::/3")
_DENIED_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo with them
        "2001:db8::/32",
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")
_6TO4 = IPv6Network("2002::/16")


def is_public(address: Address) -> bool:
    """Whether an address is public, also after unwrapping an embedded IPv4 address."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _DENIED_V4)
    if (inner := _unwrapped(address)) is not None:
        return is_public(inner)
    # IPv4-compatible (::a.b.c.d), local NAT64 (64:ff9b:1::/48), link-local, unique local, multicast: not in 2000::/3.
    return address in _GLOBAL_V6 and not any(address in network for network in _DENIED_V6)


def _unwrapped(address: IPv6Address) -> IPv4Address | None:
    """Returns the IPv4 address embedded in a mapped, NAT64 or 6to4 address."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _6TO4:
        return IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
    return None


def is_allowed(address: Address, allow: Sequence[Network]) -> bool:
    """Whether the operator has allowed the address's network."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return any((mapped or address) in network for network in allow)


def resolve(host: str, port: int) -> Sequence[Address]:
    """Returns all addresses of a name from the system, which also expands `127.1` and `0x7f.1`. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or longer than 63 characters
        raise OSError(f"'{host}' cannot be a name") from None
    return list(dict.fromkeys(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


@dataclass(frozen=True)
class Target:
    """A checked destination: connect to one of `addresses`, with `host` as the name."""

    secure: bool
    host: str
    port: int
    path: str
    addresses: tuple[Address, ...]


def locate(url: str, allow: Sequence[Network], resolver: Resolver = resolve) -> Target:
    """Resolves and checks a URL. Raises InvalidValue, AddressRefused, and OSError if its name cannot be resolved."""
    parts, port = _parsed(url)
    host = parts.hostname or ""
    addresses = tuple(resolver(host, port))
    if not addresses:
        raise OSError(f"'{host}' has no address")
    if not all(is_allowed(address, allow) for address in addresses):
        _check_public(parts, port, [address for address in addresses if not is_allowed(address, allow)])
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme == "https", host, port, path, addresses)


def check(url: str, allow: Sequence[Network], resolver: Resolver = resolve) -> None:
    """Checks a URL. Raises InvalidValue, AddressRefused.

    A name that does not resolve passes: its record may be added later, and every delivery checks again.
    """
    try:
        locate(url, allow, resolver)
    except OSError:
        parts, port = _parsed(url)
        _check_public(parts, port, [])


def _parsed(url: str) -> tuple[SplitResult, int]:
    # Only visible ASCII without backslashes: `urlsplit` silently drops tabs and line ends, some parsers read
    # backslashes as slashes, and differences between parsers can be exploited. `user@` hides the host from people.
    if len(url) > MAX_URL or not re.fullmatch(r"[\x21-\x5b\x5d-\x7e]+", url):
        raise _invalid(f"must have at most {MAX_URL} printable ASCII characters; percent-encode others")
    try:
        parts = urlsplit(url)
        port = parts.port if parts.port is not None else {"https": 443}.get(parts.scheme, 80)
    except ValueError as error:
        raise _invalid(f"cannot be read ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _invalid("must look like https://hooks.example.com/path")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _invalid("must have no user name, password or fragment")
    return parts, port


def _invalid(reason: str) -> InvalidValue:
    return InvalidValue(param="url", reason=f"A webhook's url {reason}.", fault=reason)


def _check_public(parts: SplitResult, port: int, addresses: Sequence[Address]) -> None:
    # The reason does not include the addresses: the resolver may know internal names.
    if not all(is_public(address) for address in addresses):
        raise AddressRefused(
            param="url", address=parts.netloc, reason="it is, or resolves to, an address that is not public."
        )
    if parts.scheme != "https":
        raise AddressRefused(
            param="url", address=parts.netloc, reason="without TLS anyone on the network path can read the messages."
        )
    if port not in PORTS:
        raise AddressRefused(param="url", address=parts.netloc, reason=f"port {port} is not 443 or 8443.")
