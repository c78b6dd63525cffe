"""The ranks of several nodes notice when a node, or the line to it, is gone, and tell each other what they failed of.

    rank 0   o--- a connection of its own, which carries nothing while all is well ---o   every other rank
A machine that loses its power and a line that is cut send no word: a collective that waits for them waits for the timeout of
its group (half an hour), and then cannot say for whom. Here the kernels ask each other (TCP keep-alive), so that a Python that
computes, compiles or was stopped counts as there, while a machine that does not answer for `timeout_s` is lost: every rank ends.
What is said over the connection, as lines of JSON:
    failed   a rank met an error that ends it: the others, who only see its connections close, can say whose error it was
    gone     rank 0 saw a rank end without a word (killed)
    lost     rank 0 misses a node
    bye      all is well, I am leaving
Read `_hear` first.   Source: tcp(7), TCP_KEEPIDLE and TCP_USER_TIMEOUT.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

# After the error of another rank this one has so long to meet it by itself, in a collective, before it is ended.
_SETTLE_S = 5.0
_LONGEST_LINE = 1 << 16
_LONGEST_TEXT = 1 << 14

_running: weakref.WeakSet[NodeWatch] = weakref.WeakSet()


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: int
    host: str


@dataclass(frozen=True)
class News:
    """What ended another rank: its report, or what rank 0 saw of it."""

    rank: int
    text: str
    exit_code: int


class NodeWatch:
    """One rank's end of the watch. Started by `World.start` when there are several nodes.

    Attributes:
        on_lost: called in a thread when this process has to end: the node of another rank is gone. It must not return.
        news: the first thing heard that ended another rank; None while all is well.
    """

    def __init__(self, rank: int, places: Sequence[Place], timeout_s: float) -> None:
        self.rank, self.places, self.timeout_s = rank, places, timeout_s
        self._process = os.getpid()  # a fork has the sockets too, and must not speak for its parent
        self.on_lost: Callable[[DistributedError], Any] = _print_and_end
        self.news: News | None = None
        self._heard = threading.Event()
        self._end_at = 0.0  # time.monotonic() at which this process is ended, after news; 0: not
        self._stopped = False
        self._failed = False
        self._selector = selectors.DefaultSelector()
        self._wake, wakes = socket.socketpair()
        self._selector.register(wakes, selectors.EVENT_READ, "wake")
        self._listener: socket.socket | None = None
        self._token = ""
        self._peers: dict[int, socket.socket] = {}  # by rank: on rank 0 all others, elsewhere rank 0
        self._buffers: dict[socket.socket, bytes] = {}
        self._lock = threading.Lock()  # of _peers, and of what is sent

    @classmethod
    def start(cls, rank: int, places: Sequence[Place], store: Store, address: str, timeout_s: float, wait_s: float) -> NodeWatch:
        """Connect to the other ranks; all of them call it.

        Args:
            places: of every rank.
            store: a store in which all ranks have met.
            address: of this machine, towards the other nodes. On rank 0: where the others come to.
            timeout_s: how long a machine may be silent.
            wait_s: how long rank 0 is waited for.
        Raises:
            DistributedError: rank 0 cannot be reached, though the store can.
        """
        watch = cls(rank, places, timeout_s)
        if rank == 0:
            watch._listener = socket.create_server((address, 0), family=_family(address), backlog=max(64, len(places)))
            watch._token = secrets.token_hex(16)
            watch._selector.register(watch._listener, selectors.EVENT_READ, "listener")
            told = {"address": address, "port": watch._listener.getsockname()[1], "token": watch._token}
            store.set("node_watch", json.dumps(told))
        else:
            store.wait(["node_watch"], timedelta(seconds=wait_s))
            told = json.loads(store.get("node_watch"))
            watch._connect(told["address"], told["port"], told["token"], wait_s)
        _running.add(watch)
        threading.Thread(target=watch._run, name="drivetrain-node-watch", daemon=True).start()
        return watch

    def tell(self, text: str, exit_code: int) -> None:
        """Tell the other ranks that this one ends of an error. Never raises."""
        if self._stopped or os.getpid() != self._process:
            return
        self._failed = True
        self._send_all({"failed": asdict(News(self.rank, text[-_LONGEST_TEXT:], exit_code))})

    def wait_for_news(self, seconds: float) -> News | None:
        """Return what ended another rank; waits a little, since its connections may have closed before its words came."""
        self._heard.wait(seconds)
        return self.news

    def stop(self) -> None:
        """Leave: from now on nobody misses this rank, and it misses nobody. A second call does nothing."""
        if self._stopped or os.getpid() != self._process:
            return
        self._stopped = True
        _running.discard(self)
        self._send_all({"bye": True})
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    # -- the thread ---------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._stopped:
                for key, _ in self._selector.select(1.0 if self._end_at else None):
                    if key.data == "listener":
                        self._accept()
                    elif key.data != "wake" and not self._stopped:
                        self._read(key.fileobj, key.data)  # pyright: ignore[reportArgumentType]
                if self._end_at and time.monotonic() > self._end_at and not self._stopped and not self._failed:
                    news = self.news
                    assert news is not None
                    self._lose(f"stopped because {self._named(news.rank)} had failed: {news.text}")
        finally:
            for sock in (*self._buffers, self._wake, *([self._listener] if self._listener else [])):
                sock.close()
            self._selector.close()

    def _connect(self, address: str, port: int, token: str, wait_s: float) -> None:
        try:
            sock = socket.create_connection((address, port), timeout=wait_s)
        except OSError as error:
            raise DistributedError(
                f"[rank {self.rank}/{len(self.places)}] on {self._node_named(self.places[self.rank].node)} reached the store, "
                f"but not rank 0 at {address}:{port}: {error}. The ranks of several nodes need every port between the nodes: "
                "open them in the firewall, or name the network that is open with GLOO_SOCKET_IFNAME on each node."
            ) from error
        sock.settimeout(None)
        keep_alive(sock, self.timeout_s)
        self._add(sock, 0)
        sock.sendall(json.dumps({"hello": token, "rank": self.rank}).encode() + b"\n")

    def _add(self, sock: socket.socket, rank: int) -> None:
        self._buffers[sock] = b""
        self._selector.register(sock, selectors.EVENT_READ, rank)
        with self._lock:
            self._peers[rank] = sock

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            keep_alive(sock, self.timeout_s)
            self._buffers[sock] = b""
            self._selector.register(sock, selectors.EVENT_READ, -1)  # a stranger until it has shown the token

    def _read(self, sock: socket.socket, rank: int) -> None:
        try:
            data = sock.recv(_LONGEST_LINE)
        except OSError as error:
            self._drop(sock, rank)
            if isinstance(error, ConnectionError):
                self._closed(rank)
            elif rank >= 0:
                self._silent(rank)
            return
        if not data:
            self._drop(sock, rank)
            self._closed(rank)
            return
        *lines, rest = (self._buffers[sock] + data).split(b"\n")
        self._buffers[sock] = rest
        for line in lines:
            try:
                message = json.loads(line)
                if rank < 0:
                    rank = self._welcome(sock, message)
                else:
                    self._hear(message, rank)
            except (ValueError, KeyError, TypeError, AttributeError):
                self._drop(sock, rank)  # not one of us
                return
        if len(rest) > 2 * _LONGEST_LINE:
            self._drop(sock, rank)

    def _welcome(self, sock: socket.socket, message: Any) -> int:
        rank = int(message["rank"])
        if not hmac.compare_digest(str(message["hello"]), self._token) or not 0 < rank < len(self.places):
            raise ValueError("a stranger")
        self._selector.modify(sock, selectors.EVENT_READ, rank)
        with self._lock:
            self._peers[rank] = sock
        return rank

    def _hear(self, message: Mapping[str, Any], rank: int) -> None:
        """Act on what `rank` said; rank 0 hands it on."""
        if "bye" in message:
            with self._lock:
                self._peers.pop(rank, None)
        elif "failed" in message:
            self._learn(News(**message["failed"]), ends="gone" not in message)
        elif "lost" in message:
            self._lose(str(message["lost"]))

    def _closed(self, rank: int) -> None:
        """A rank that said no goodbye has ended: it was killed."""
        with self._lock:
            missed = self._peers.pop(rank, None) is not None
        if missed and not self._stopped:
            text = (
                f"[rank {rank}/{len(self.places)}] on {self._node_named(self.places[rank].node)} ended without a word: it was "
                "killed, by hand, by its launcher or for want of memory."
            )
            self._learn(News(rank, text, 1), ends=False)

    def _silent(self, rank: int) -> None:
        """The kernel of a rank's machine does not answer."""
        node = self.places[rank].node
        text = (
            f"{self._node_named(node)} does not answer: that machine is gone, or the network between it and "
            f"{self._node_named(self.places[self.rank].node)}. Its kernel was asked for up to {self.timeout_s:.0f} s "
            "(DRIVETRAIN_NODE_TIMEOUT). When both are back, start the job again: resume='auto' goes on from the last checkpoint."
        )
        if self.rank == 0:
            with self._lock:
                self._peers.pop(rank, None)
            self._send_all({"lost": text}, but_node=node)
        self._lose(text)

    def _learn(self, news: News, *, ends: bool = True) -> None:
        if self.news is None:
            self.news = news
            self._heard.set()
        if ends and not self._end_at:
            self._end_at = time.monotonic() + _SETTLE_S
        if self.rank == 0:
            self._send_all({"failed": asdict(news)} if ends else {"failed": asdict(news), "gone": True})

    def _lose(self, text: str) -> None:
        self._stopped = True
        error = DistributedError(f"[rank {self.rank}/{len(self.places)}] {text}")
        error.met_elsewhere = self.news is not None
        self.on_lost(error)

    def _drop(self, sock: socket.socket, rank: int) -> None:
        self._buffers.pop(sock, None)
        self._selector.unregister(sock)
        sock.close()

    def _send_all(self, message: Mapping[str, Any], *, but_node: int = -1) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for rank, sock in self._peers.items():
                if self.places[rank].node != but_node:
                    with contextlib.suppress(OSError):
                        # A line that is cut takes what fits into the buffer and holds up nobody.
                        sock.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _named(self, rank: int) -> str:
        return f"rank {rank} on {self._node_named(self.places[rank].node)}"

    def _node_named(self, node: int) -> str:
        ranks = [rank for rank, place in enumerate(self.places) if place.node == node]
        host = self.places[ranks[0]].host
        several = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        return f"node {node} ({host}, {several})"


def tell_all(text: str, exit_code: int) -> None:
    """Tell the ranks on other nodes that this process ends of an error; nothing where there is one node."""
    for watch in list(_running):
        watch.tell(text, exit_code)


def news_of_all(seconds: float = 1.0) -> News | None:
    """Return what ended another rank, if that was heard: what a closed connection is the consequence of."""
    for watch in list(_running):
        news = watch.wait_for_news(seconds)
        if news is not None:
            return news
    return None


def keep_alive(sock: socket.socket, timeout_s: float) -> None:
    """Let the kernel ask the other side's kernel whether it is there, and fail the socket after `timeout_s` without an answer."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, int(timeout_s / 4))
    for name, value in (
        ("TCP_KEEPIDLE", every),
        ("TCP_KEEPINTVL", every),
        ("TCP_KEEPCNT", 3),
        # Data that is never acknowledged counts too: while there is some, no probes are sent.
        ("TCP_USER_TIMEOUT", int(timeout_s * 1000)),
    ):
        if hasattr(socket, name):  # not all on macOS
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _print_and_end(error: DistributedError) -> None:
    """End a process that has no launcher of ours to tell. At once: the thread that trains hangs, and cannot be asked."""
    sys.stderr.write(f"DistributedError: {error}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)
