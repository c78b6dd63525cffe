"""Where the ranks meet: one key-value store, in which each says that it is there.

    rank 0 (or its launcher's agent) listens at MASTER_ADDR:MASTER_PORT, the others come to it
    each writes where it runs, and waits for all the others
Who does not come in time is named, and so is what can only be a mistake of the start: two processes with one rank, ranks that
were told different numbers of ranks. Read `meet` first.   Source: torch.distributed.TCPStore.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .environment import LOOPBACK, RankEnvironment, is_loopback
from .errors import DistributedError
from .node_watch import Place

# While ranks wait for others they look this often whether somebody has found that they cannot meet.
_LOOK_S = 2.0

# One store per meeting point and process: the port stays taken while other ranks may still look things up, and a second
# World in the same process (a second Trainer) meets there again under the next number. Keyed by process: forks start anew.
_stores: dict[tuple[int, str, int], tuple[Store, int]] = {}


def meet(env: RankEnvironment, timeout_s: float) -> tuple[Store, list[Place]]:
    """Return a store in which all ranks have arrived, under a prefix of its own, and where each of them is.

    Raises:
        DistributedError: naming the ranks that did not come in time, that came twice, or that were told another size.
    """
    here = Place(env.node_rank, socket.gethostname())
    if env.size == 1:
        return HashStore(), [here]
    key = (os.getpid(), env.address, env.port)
    store, generation = _stores.get(key) or (_open_store(env, timeout_s), 0)
    _stores[key] = (store, generation + 1)
    prefixed = PrefixStore(f"drivetrain/{env.restart}/{generation}", store)
    names = [f"arrived/{rank}" for rank in range(env.size)]
    deadline = time.monotonic() + timeout_s
    try:
        _check_in(env, here, prefixed)
        while True:
            left = deadline - time.monotonic()
            try:
                prefixed.wait(names, timedelta(seconds=max(0.001, min(left, _LOOK_S))))
                break
            except RuntimeError:
                if prefixed.check(["contradiction"]):
                    raise DistributedError(f"[rank {env.rank}/{env.size}] {prefixed.get('contradiction').decode()}") from None
                if left <= _LOOK_S:
                    raise
    except DistributedError:
        raise
    except RuntimeError as error:  # DistStoreError is one
        raise DistributedError(
            f"[rank {env.rank}/{env.size}] met {_missing(prefixed, names)} at {env.address}:{env.port} within "
            f"{timeout_s:.0f} s. Expected all {env.size}. See why they did not start, or died before."
        ) from error
    return prefixed, [Place(**json.loads(told)) for told in prefixed.multi_get(names)]


def _check_in(env: RankEnvironment, here: Place, store: Store) -> None:
    """Say that this rank is there. What contradicts the other ranks is left in the store too, so that none waits in vain."""
    problem = ""
    size = store.compare_set("size", "", str(env.size)).decode()
    if size != str(env.size):
        problem = (
            f"ranks were told different numbers of ranks: {size}, and rank {env.rank} on {here.host} (node {here.node}) "
            f"{env.size}. Expected one: start each node with the same number of nodes and of processes."
        )
    elif store.add(f"came/{env.rank}", 1) > 1:
        other = Place(**json.loads(store.get(f"arrived/{env.rank}"))).host
        problem = (
            f"two processes say that they are rank {env.rank}: one on {other}, one on {here.host}, both as node {here.node}. "
            "Expected each node under a number of its own (--node-rank)."
        )
    if problem:
        store.set("contradiction", problem)
        raise DistributedError(f"[rank {env.rank}/{env.size}] {problem}")
    store.set(f"arrived/{env.rank}", json.dumps(asdict(here)))


def _missing(store: Store, names: list[str]) -> str:
    try:
        missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
    except RuntimeError:
        return "the other ranks no more: the store of rank 0 is gone"
    return f"no rank {', '.join(missing)}"


def _open_store(env: RankEnvironment, timeout_s: float) -> Store:
    timeout = timedelta(seconds=timeout_s)
    hosts_here = env.rank == 0 and not env.agent_store
    # On one node the ranks' own store listens on loopback, whatever name the machine goes by.
    address = LOOPBACK if env.one_node and not env.agent_store else env.address
    try:
        if hosts_here:
            listener = _listener(env) if env.one_node else _listener_towards(env)
            if listener is not None:
                return TCPStore(
                    address, env.port, env.size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
                )
        return TCPStore(address, env.port, env.size, hosts_here, timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        doing = "listen on" if hosts_here else "reach"
        if not _has_name(address):
            what = f"No address is known for the name {address!r} on {socket.gethostname()}: MASTER_ADDR may be wrong"
        elif not env.one_node and is_loopback(env.address):
            what = f"MASTER_ADDR is this machine's own loopback, and there are {env.num_nodes} nodes: set it to the first one's"
        elif hosts_here:
            what = "MASTER_PORT may be taken: choose another"
        else:
            what = "MASTER_ADDR or MASTER_PORT may be wrong, or rank 0 did not start"
        raise DistributedError(
            f"[rank {env.rank}/{env.size}] could not {doing} {address}:{env.port}, where the ranks meet: "
            f"{str(error).splitlines()[0].rstrip('.')}. {what}."
        ) from error


def _has_name(address: str) -> bool:
    try:
        return bool(socket.getaddrinfo(address, None))
    except OSError:
        return False


def _listener(env: RankEnvironment) -> socket.socket:
    """Return the listening loopback socket of the store: the one that our agent passed down, or a new one."""
    fd = env.listen_fd
    if fd is not None:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                # A duplicate, so that a second store of this process could use it again.
                passed = socket.socket(fileno=os.dup(fd))
                if is_loopback(passed.getsockname()[0]) and passed.getsockname()[1] == env.port:
                    return passed
                passed.close()
    return _bound(socket.AF_INET, LOOPBACK, env)


def _listener_towards(env: RankEnvironment) -> socket.socket | None:
    """Return a socket that listens at MASTER_ADDR only; None (torch listens everywhere) where that is no address of ours.

    The others may know this machine by an address that only a router knows, or its name leads to the loopback here alone.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(env.address, env.port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return None  # a name server may know it in a moment: torch tries again
    if is_loopback(str(target[0])) and not is_loopback(env.address):
        return None
    try:
        return _bound(family, str(target[0]), env)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise


def _bound(family: int, host: str, env: RankEnvironment) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, env.port))
        listener.listen(max(64, env.size))
    except OSError:
        listener.close()
        raise
    return listener
