"""Which addresses of the network are public: what a server that opens its users' URLs must stay within."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import TypeAlias

Address: TypeAlias = "IPv4Address | IPv6Address"
Allow: TypeAlias = "Callable[[Address], bool]"

# Written out, because what Python calls global changed between its versions: IANA's special-purpose registries.
_SPECIAL_4 = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this machine
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by a provider's customers
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, where clouds keep their machines' credentials
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Only this part of IPv6 is given out to the public.
_GLOBAL_6 = ip_network("2000::/3")
_SPECIAL_6 = tuple(
    ip_network(text)
    for text in (
        "2001::/23",  # protocols, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4, which holds any address of IPv4
        "3fff::/20",
    )
)
# Translators put an address of IPv4 into the last 32 bits.
_TRANSLATED = ip_network("64:ff9b::/96")
# Azure's own services, which machines there reach under a public address.
_PLATFORM = (IPv4Address("168.63.129.16"),)


def no_address(_: Address) -> bool:
    """Return False: nothing is fetched, and no name is looked up."""
    return False


def public_address(address: Address) -> bool:
    """Return whether ``address`` is on the public internet, and no private, local, reserved or multicast one.

    An address of IPv4 within one of IPv6 counts as what it is.
    """
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _TRANSLATED:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None:
            return address in _GLOBAL_6 and not any(address in network for network in _SPECIAL_6)
        address = inner
    return address not in _PLATFORM and not any(address in network for network in _SPECIAL_4)
