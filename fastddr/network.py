"""The network over which gloo connects the machines of a job."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastddr.errors import UserError

#: An address that no machine has (RFC 5737).
_ANYWHERE = "192.0.2.1"
#: What gloo's errors say, which have no class of their own: two that never met, no such network here, no way from it.
_NO_WAY = ("connectFullMesh failed", "Unable to find address for", "Network is unreachable", "No route to host")


@contextmanager
def meeting(*, several: bool) -> Iterator[None]:
    """Around what lets the ranks of one or `several` machines meet: on the right network, and a sentence where they do
    not reach each other.

    Raises:
        UserError: gloo has no way between this machine and another one.
    """
    if several:
        _name()
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "gloo" not in said.lower() or not any(words in said for words in _NO_WAY):
            raise
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        raise UserError(
            f"this machine and another one of the job do not reach each other over gloo ({_last_line(said)}"
            + (f"; GLOO_SOCKET_IFNAME is {name}" if name else "")
            + "); set GLOO_SOCKET_IFNAME on each to the network that they share, which `ip -brief address` lists."
        ) from error


def _last_line(said: str) -> str:
    return said.strip().splitlines()[-1].strip().rstrip(".")


def _name() -> None:
    """Let gloo take the network on which the first machine is reached, unless the user named one.

    By itself it takes the address of the machine's name, which on many systems is 127.0.1.1. Where the first machine
    has no address of IPv4, that stays so.
    """
    first = os.environ.get("MASTER_ADDR", "")
    # Where the first machine calls itself so, nobody else is there.
    if "GLOO_SOCKET_IFNAME" in os.environ or first.startswith(("127.", "localhost")):
        return
    import psutil

    networks = {
        one.address: name
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    }
    here = _address_towards(first)
    # The first machine's own name may be 127.0.1.1 to it: then the network of its way to everywhere, or its only one.
    if here is not None and here.startswith("127."):
        here = _address_towards(_ANYWHERE) or (next(iter(networks)) if len(networks) == 1 else None)
    if here in networks:
        os.environ["GLOO_SOCKET_IFNAME"] = networks[here]


def _address_towards(place: str) -> str | None:
    """This machine's IPv4 address on the way to a place; None where there is no such way."""
    # Nothing is sent; the system says from which address it would be.
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place, 9))
        here: str = probe.getsockname()[0]
        return here
    return None
