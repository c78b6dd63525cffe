"""Several machines on one: `nodes(n)` makes n hosts with a network of their own, joined by a bridge, for launchers to run in.

    node0 (10.77.0.1) --+-- bridge --+-- node1 (10.77.0.2)        each: its own interfaces, loopback, host name and /etc/hosts
Each node is a process that sleeps, in new network, UTS and mount namespaces; a command enters them (`nsenter`). They have no name
and no file: the kernel takes them away with their last process, and every process here dies with the one that started it, so
nothing is left when a test is killed. The files of the machine are shared, but for what `hide` covers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")


@dataclass
class Node:
    """One host. `interface` is its only one beside `lo`, until a test adds others."""

    index: int
    pid: int
    interface: str = "eth0"
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.index + 1}"

    def start(self, command: Sequence[str], *, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """Start a command here; its variables are those of the test, with `variables` on top."""
        # The test's own setting is about the test's own machine.
        environ = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        process = subprocess.Popen(
            [*_DIES_WITH_US, *_entering(self.pid), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**environ, **variables},
        )
        self.started.append(process)
        return process

    def run(self, *command: str) -> str:
        """Run a short command here and return what it printed."""
        done = subprocess.run([*_entering(self.pid), *command], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)} on {self.name}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def processes(self) -> list[int]:
        """Return the processes that live here, without the one that holds the node."""
        return [pid for pid in _in_namespace(os.readlink(f"/proc/{self.pid}/ns/net")) if pid != self.pid]

    def cut(self) -> None:
        """Take this node's own interface down: nothing goes in or out, and it can see that."""
        self.run("ip", "link", "set", self.interface, "down")

    def join(self) -> None:
        """Undo `cut`."""
        self.run("ip", "link", "set", self.interface, "up")

    def drop_to(self, other: Node) -> None:
        """Lose what this node sends to `other`, without a word to anybody; what comes from there still arrives."""
        # A rule before the routing table: `lookup local` comes first only for what is for this node itself.
        self.run("ip", "route", "add", "blackhole", f"{other.address}/32")

    def slow_down(self, rate: str) -> None:
        """Let what this node sends wait in a queue for a line of `rate`, such as "1mbit", for up to a second."""
        self.run("tc", "qdisc", "add", "dev", self.interface, "root", "tbf", "rate", rate, "burst", "8kb", "latency", "1s")

    def lose_power(self) -> None:
        """End every process here, and the line first: no word of it reaches the others."""
        self.cut()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def hide(self, folder: Path) -> None:
        """Cover `folder` with an empty one that only this node sees."""
        self.run("mount", "-t", "tmpfs", "none", str(folder))


@dataclass
class Nodes:
    """All hosts and the switch between them."""

    hosts: list[Node]
    switch: int  # the process that holds the namespace of the bridge

    def __getitem__(self, index: int) -> Node:
        return self.hosts[index]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.hosts)

    def unplug(self, index: int) -> None:
        """Take the switch's end of a node's line down: the node sees no carrier, the others see nothing."""
        _quiet([*_entering(self.switch), "ip", "link", "set", f"port{index}", "down"])

    def plug(self, index: int) -> None:
        """Undo `unplug`."""
        _quiet([*_entering(self.switch), "ip", "link", "set", f"port{index}", "up"])

    def join_again(self, interface: str, network: str) -> None:
        """Give each node a second network, such as "10.88.0", with an interface of that name."""
        _quiet([*_entering(self.switch), "ip", "link", "add", interface, "type", "bridge"])
        _quiet([*_entering(self.switch), "ip", "link", "set", interface, "up"])
        for node in self:
            port = f"{interface}{node.index}"
            line = [*_entering(self.switch), "ip", "link", "add", port, "type", "veth"]
            _quiet([*line, "peer", "name", interface, "netns", str(node.pid)])
            _quiet([*_entering(self.switch), "ip", "link", "set", port, "master", interface, "up"])
            node.run("ip", "addr", "add", f"{network}.{node.index + 1}/24", "dev", interface)
            node.run("ip", "link", "set", interface, "up")

    def finish(self, started: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[subprocess.CompletedProcess[str]]:
        """Wait for commands; kill those that are not done in time and say what they had printed."""
        deadline = time.monotonic() + timeout
        done = []
        late = False
        for process in started:
            try:
                out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()) if not late else 1.0)
            except subprocess.TimeoutExpired:
                late = True
                for node in self:
                    node_processes = node.processes()
                    for pid in node_processes:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                out, err = process.communicate(timeout=10)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        if late:
            told = "\n".join(f"[{index}] {d.returncode}\n{d.stdout}\n{d.stderr}" for index, d in enumerate(done))
            raise TimeoutError(f"not all were done after {timeout:g} s; killed.\n{told}")
        return done


@contextlib.contextmanager
def make_nodes(n: int) -> Iterator[Nodes]:
    """Make n nodes; end all that runs in them when the context is left.

    Raises:
        OSError: this user or this machine cannot make them.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        raise OSError(f"no {', '.join(missing) or 'Linux'}")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(n + 1):
            holders.append(_hold())
        switch, *hosts = [holder.pid for holder in holders]
        _quiet([*_entering(switch), "ip", "link", "add", "bridge", "type", "bridge"])
        _quiet([*_entering(switch), "ip", "link", "set", "bridge", "up"])
        found = [Node(index, pid) for index, pid in enumerate(hosts)]
        names = "".join(f"{node.address} {node.name}\n" for node in found)
        for node in found:
            line = [*_entering(switch), "ip", "link", "add", f"port{node.index}", "type", "veth"]
            _quiet([*line, "peer", "name", node.interface, "netns", str(node.pid)])
            _quiet([*_entering(switch), "ip", "link", "set", f"port{node.index}", "master", "bridge", "up"])
            node.run("hostname", node.name)
            node.run("ip", "addr", "add", f"{node.address}/24", "dev", node.interface)
            node.run("ip", "link", "set", "lo", "up")
            node.run("ip", "link", "set", node.interface, "up")
            # As Debian's installer does it: at home, the name of a host leads to its loopback.
            _write(node, "/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {node.name}\n{names}")
        yield Nodes(found, switch)
    finally:
        for holder in holders:
            namespace = _namespace(holder.pid)
            for pid in _in_namespace(namespace) if namespace else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            holder.kill()
            holder.wait()


@pytest.fixture
def nodes() -> Iterator[Callable[[int], Nodes]]:
    """`nodes(n)`: n hosts with their own network, until the test ends; skips where they cannot be made."""
    with contextlib.ExitStack() as stack:

        def make(n: int) -> Nodes:
            try:
                return stack.enter_context(make_nodes(n))
            except OSError as error:
                pytest.skip(f"waits for the right to make network namespaces: {error}")

        yield make


def _hold() -> subprocess.Popen[bytes]:
    """Start a process that only holds a node's namespaces; ready when it has written a line."""
    command = [*_DIES_WITH_US, "unshare", "--net", "--uts", "--mount", "sh", "-c", "echo ready; exec sleep infinity"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        if process.stdout.readline() != b"ready\n":
            raise OSError(process.stderr.read().decode().strip() or "unshare failed")
    return process


def _entering(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net", "--uts", "--mount", f"--wdns={os.getcwd()}", "--"]


def _quiet(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command} ended with {done.returncode}")


def _write(node: Node, path: str, text: str) -> None:
    """Give this node a file of its own in the place of `path`."""
    script = 'f=$(mktemp) && printf "%s" "$1" > "$f" && mount --bind "$f" "$2" && rm -f "$f"'
    node.run("sh", "-c", script, "sh", text, path)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _in_namespace(namespace: str) -> list[int]:
    return [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _namespace(int(entry.name)) == namespace
    ]
