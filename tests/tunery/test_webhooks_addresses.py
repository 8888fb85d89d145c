"""Where webhooks must not go: private addresses in every known spelling, and names that resolve differently later."""

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest

from tunery.errors import InvalidValue
from tunery.webhooks.addresses import Address, Resolver, check, is_public, locate, resolve
from tunery.webhooks.errors import AddressRefused

PUBLIC = [
    "1.1.1.1",
    "93.184.216.34",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "223.255.255.255",
    "2606:4700::1111",
    "2a00:1450:4001:80e::200e",
    "::ffff:1.1.1.1",
    "64:ff9b::101:101",
    "2002:101:101::",
]
NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::7f00:1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "3fff::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.1",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[0:0:0:0:0:ffff:7f00:1]",
        "169.254.169.254",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "100.64.0.1",
    ],
)
def test_a_private_host_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(AddressRefused, match="not public") as caught:
        check(f"https://{host}/hook", ())
    assert caught.value.param == "url"


def _names(**hosts: Sequence[str]) -> Resolver:
    return lambda host, port: [ip_address(address) for address in hosts[host.partition(".")[0]]]


def test_one_private_address_among_public_ones_is_enough() -> None:
    resolver = _names(mixed=["93.184.216.34", "10.0.0.1"])
    with pytest.raises(AddressRefused, match="not public"):
        locate("https://mixed.example/", (), resolver)


def test_a_name_is_resolved_once_and_its_addresses_are_the_ones_used() -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    def rebinding(host: str, port: int) -> list[Address]:
        return [ip_address(address) for address in answers.pop(0)]

    target = locate("https://rebind.example/hook?a=b", (), rebinding)
    assert (target.host, target.port, target.path) == ("rebind.example", 443, "/hook?a=b")
    assert target.addresses == (ip_address("93.184.216.34"),)
    with pytest.raises(AddressRefused):
        locate("https://rebind.example/hook", (), rebinding)


def test_a_name_without_an_address_may_be_registered_but_is_not_posted_to() -> None:
    def nothing(host: str, port: int) -> list[Address]:
        raise OSError("no such name")

    check("https://later.example/", (), nothing)
    with pytest.raises(OSError, match="no such name"):
        locate("https://later.example/", (), nothing)
    with pytest.raises(AddressRefused, match="TLS"):
        check("http://later.example/", (), nothing)
    with pytest.raises(OSError, match="cannot be a name"):
        resolve("a..b", 443)


def test_public_receivers_need_tls_and_its_port() -> None:
    resolver = _names(hooks=["93.184.216.34"])
    check("https://hooks.example", (), resolver)
    check("https://hooks.example:8443/x", (), resolver)
    with pytest.raises(AddressRefused, match="without TLS"):
        check("http://hooks.example/", (), resolver)
    with pytest.raises(AddressRefused, match="port 0 is not 443 or 8443"):
        check("https://hooks.example:0/x", (), resolver)
    with pytest.raises(AddressRefused, match="port 6379 is not 443 or 8443"):
        check("https://hooks.example:6379/", (), resolver)


def test_what_the_operator_named_is_open_and_nothing_beside_it() -> None:
    allow = (ip_network("127.0.0.1/32"), ip_network("fd00::/8"))
    check("http://127.0.0.1:9/x", allow)
    check("http://[::ffff:127.0.0.1]:9/x", allow)
    check("http://[fd00::1]:9/x", allow)
    for url in ("http://127.0.0.2:9/", "http://[64:ff9b::7f00:1]/", "http://1.1.1.1/"):
        with pytest.raises(AddressRefused):
            check(url, allow)
    mixed = _names(mixed=["127.0.0.1", "10.0.0.1"])
    with pytest.raises(AddressRefused):
        check("http://mixed.example/", allow, mixed)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://user@hooks.example.com/",
        "https://user:word@hooks.example.com/",
        "https://hooks.example.com/#here",
        "https://hooks.example.com:99999/",
        "https://hooks.example.com:port/",
        "https://hooks.example.com\\@127.0.0.1/",
        "https://hooks.example.com/a b",
        "https://hooks.example.com/\r\nX: y",
        "https://hooks.\texample.com/",
        "https://bücher.example/",
        "https://[::1/",
        "https://hooks.example.com/" + "x" * 2048,
    ],
)
def test_a_url_that_two_parsers_could_read_differently_is_refused(url: str) -> None:
    with pytest.raises(InvalidValue, match="A webhook's url") as caught:
        check(url, (ip_network("0.0.0.0/0"), ip_network("::/0")))
    assert caught.value.param == "url"
