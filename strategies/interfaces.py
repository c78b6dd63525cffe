"""Which network interface the ranks of several nodes talk over.

gloo takes the address that the host's own name leads to. On a Debian machine that is 127.0.1.1, and the other nodes connect to
themselves then; with two networks it may be the slow one. So with several nodes the interface is named (GLOO_SOCKET_IFNAME):
    set by the user                        kept, if there is such an interface
    a route to MASTER_ADDR                 the interface that it leaves by: where the store is reached, the ranks are too
    MASTER_ADDR is this host's loopback    on the first node its name may lead there: the only other interface, else an error
Read `choose_interface` first.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from .environment import is_loopback
from .errors import ConfigError, suggest

_SIOCGIFADDR = 0x8915
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine and one of its addresses. `name` is empty where it cannot be found out."""

    name: str
    address: str


def choose_interface(address: str, port: int, named: str | None = None) -> Interface:
    """Return the interface over which this node talks to the others.

    Args:
        address, port: where the ranks meet: MASTER_ADDR, MASTER_PORT.
        named: what GLOO_SOCKET_IFNAME says; of several, separated by commas, the first counts here.
    Raises:
        ConfigError: there is no such interface, it is the loopback and `address` is not, or several might be meant.
    """
    if named is not None:
        return _named_by_user(named, address)
    here = _leaves_by(address, port)
    if here is None:
        return Interface("", "")
    if is_loopback(here) and not is_loopback(address):
        return _only_other(address, here)
    return Interface(_name_of(here), here)


def check_named(named: str, address: str) -> None:
    """Refuse a GLOO_SOCKET_IFNAME that this machine does not have: gloo's own word for it names neither variable nor way out.

    Raises:
        ConfigError: with the interfaces that there are.
    """
    names = [name for _, name in socket.if_nameindex()]
    for name in (part.strip() for part in named.split(",")):
        if name not in names:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={named!r}: this machine ({socket.gethostname()}) has no interface {name!r}."
                f"{suggest(name, names)} It has {', '.join(names)}. Name the one that leads to {address}, or unset the variable."
            )


def interfaces() -> list[Interface]:
    """Return every interface that is up, with its first IPv4 address. Empty where this cannot be asked (not Linux)."""
    found = []
    if sys.platform == "linux":
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # no IPv4 address
                    flags = struct.unpack("H", fcntl.ioctl(asking, _SIOCGIFFLAGS, request)[16:18])[0]
                    packed = fcntl.ioctl(asking, _SIOCGIFADDR, request)[20:24]
                    if flags & _IFF_UP:
                        found.append(Interface(name, socket.inet_ntoa(packed)))
    return found


def _named_by_user(named: str, address: str) -> Interface:
    check_named(named, address)
    wanted = [name.strip() for name in named.split(",")]
    addresses = {found.name: found.address for found in interfaces()}
    here = addresses.get(wanted[0], "")
    if here and is_loopback(here) and not is_loopback(address):
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={named!r} is the loopback interface, on which no other node is reached, and there are several. "
            f"Name the one that leads to {address}, or unset the variable."
        )
    return Interface(wanted[0], here)


def _leaves_by(address: str, port: int) -> str | None:
    """Return the address that packets to `address` are sent from: a datagram socket is connected, and nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _only_other(address: str, here: str) -> Interface:
    others = [found for found in interfaces() if not is_loopback(found.address)]
    if len(others) == 1:
        return others[0]
    listed = ", ".join(f"{found.name} ({found.address})" for found in others) or "none"
    raise ConfigError(
        f"MASTER_ADDR={address!r} is {here} on this machine ({socket.gethostname()}), its loopback, on which no other node is "
        f"reached. Its other interfaces: {listed}. Expected one of them: set MASTER_ADDR to its address, or "
        "GLOO_SOCKET_IFNAME to its name."
    )


def _name_of(address: str) -> str:
    """Return the name of the interface with this address; empty when it is not found (a second address, not Linux)."""
    for found in interfaces():
        if found.address == address:
            return found.name
    bare = address.partition("%")[0]
    with contextlib.suppress(OSError, ValueError):
        wanted = ipaddress.ip_address(bare).packed.hex()
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            fields = line.split()
            if fields[0] == wanted:
                return fields[-1]
    return ""
