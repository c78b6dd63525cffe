"""Several nodes: the numbers of one process, and what becomes of a job whose network is cut or whose node is gone.

Each test runs whole trainings on hosts of their own (tests/nodes.py), started as users start them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

JOBS = Path(__file__).parents[1] / "node_jobs.py"
QUICK = {"DRIVETRAIN_NODE_TIMEOUT": "4", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
pytestmark = pytest.mark.slow


def of_ours(net: Any, arguments: Sequence[str], *, ranks: int = 2, **variables: str) -> list[Any]:
    """`drivetrain run --nnodes 2 ...` on each node."""
    return [
        node.start(
            [
                *(sys.executable, "-m", "drivetrain", "run", "-n", str(ranks), "--nnodes", str(len(net.hosts))),
                *("--node-rank", str(node.index), "--master-addr", net[0].address, "--master-port", "29511", *arguments),
            ],
            **{**QUICK, **variables},
        )
        for node in net
    ]


def of_torch(net: Any, arguments: Sequence[str], **variables: str) -> list[Any]:
    return [
        node.start(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(net.hosts)), "--nproc-per-node", "2"),
                *("--node-rank", str(node.index), "--master-addr", net[0].address, "--master-port", "29512", *arguments),
            ],
            **{**QUICK, **variables},
        )
        for node in net
    ]


def of_slurm(net: Any, arguments: Sequence[str], **variables: str) -> list[Any]:
    """What srun would set, for each task; the first host is named, and that name leads to its loopback at home."""
    started = []
    for node in net:
        for local in range(2):
            told = {
                "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_NODEID": str(node.index),
                "SLURM_PROCID": str(2 * node.index + local), "SLURM_LOCALID": str(local),
            }  # fmt: skip
            started.append(node.start([sys.executable, *arguments], **{**QUICK, **told, **variables}))
    return started


MEET = """
import os, sys, time, torch
from drivetrain.strategies.world import World
world = World.start("cpu", timeout_s=float(sys.argv[1]))
began = time.monotonic()
total = world.all_reduce(torch.ones(int(sys.argv[2])))
world.barrier()
print(os.environ.get("GLOO_SOCKET_IFNAME"), float(total.mean()), round(time.monotonic() - began, 1), flush=True)
"""


def meeting(net: Any, folder: Path, *options: str, numbers: int = 10, timeout_s: int = 60, **variables: str) -> list[Any]:
    """Let one rank of each node meet; `options` follow those of `drivetrain run` and win."""
    (folder / "meet.py").write_text(MEET)
    arguments = [*options, str(folder / "meet.py"), str(timeout_s), str(numbers)]
    return net.finish(of_ours(net, arguments, ranks=1, **variables))


def wait_for(paths: Sequence[Path], started: Sequence[Any], seconds: float = 120) -> None:
    """Wait until all files are there; fail with what was printed when the job ends before."""
    deadline = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        if any(process.poll() is not None for process in started) or time.monotonic() > deadline:
            for process in started:
                process.kill()
            told = [process.communicate(timeout=30) for process in started]
            pytest.fail("the job did not come so far:\n" + "\n".join(out + err for out, err in told))
        time.sleep(0.05)


def training(net: Any, folder: Path, *options: str, launcher: Callable[..., Any] = of_ours) -> list[Any]:
    """Start an endless training on two nodes of two ranks, and wait until every rank trains."""
    started = launcher(net, [str(JOBS), "train", str(folder / "out.json"), f"root={folder / 'runs'}", *options])
    wait_for([folder / f"pid{rank}" for rank in range(4)], started)
    return started


def one_process(folder: Path, job: str, *options: str) -> dict[str, Any]:
    out = folder / "one.json"
    command = [sys.executable, str(JOBS), job, str(out), f"root={folder / 'one'}", *options]
    subprocess.run(command, env={**os.environ, **QUICK}, check=True, capture_output=True, timeout=120)
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("launcher", "strategies"),
    [(of_ours, "ddp,fsdp,hsdp,pp:4"), (of_torch, "hsdp"), (of_slurm, "ddp")],
    ids=["drivetrain run", "torchrun", "srun"],
)
def test_two_nodes_train_like_one_process(launcher: Callable[..., Any], strategies: str, nodes: Any, tmp_path: Path) -> None:
    """Whoever starts them; with one run folder, hsdp's replicas a node each, and a pipeline of inference over both."""
    one = one_process(tmp_path, "numbers", "strategies=single")["single"]
    net = nodes(2)
    out = tmp_path / "out.json"
    started = launcher(net, [str(JOBS), "numbers", str(out), f"strategies={strategies}", f"root={tmp_path / 'runs'}"])
    for ended in net.finish(started, timeout=200):
        assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    for strategy in strategies.split(","):
        assert found[strategy]["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert found[strategy]["weight"] == pytest.approx(one["weight"], rel=1e-10)
        assert (found[strategy]["runs"], found[strategy]["checkpoints"]) == (1, one["checkpoints"])
    if "hsdp" in found:
        assert found["hsdp"]["axes"] == {"dp_replicate": 2, "dp_shard": 2, "pp": 1}
        assert found["hsdp"]["shards_with"] == [0, 1], "a shard is gathered within a node"
    assert found["pipeline"]["output"] == pytest.approx(found["pipeline"]["expected"], rel=1e-12)
    assert sum(found["pipeline"]["held"]) == 513
    assert max(found["pipeline"]["held"]) < 513 / 2


def own_interface_down(net: Any) -> None:
    net[1].cut()


def unplugged(net: Any) -> None:
    net.unplug(1)


def one_way(net: Any) -> None:
    net[1].drop_to(net[0])


def power_lost(net: Any) -> None:
    net[1].lose_power()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the training that nobody broke, on four ranks of one machine."""
    folder = tmp_path_factory.mktemp("unbroken")
    command = [sys.executable, "-m", "drivetrain", "run", "-n", "4", str(JOBS), "train", str(folder / "out.json")]
    options = [f"root={folder / 'runs'}", "steps=30", "step_s=0"]
    subprocess.run([*command, *options], env={**os.environ, **QUICK}, check=True, capture_output=True, timeout=120)
    return json.loads((folder / "out.json").read_text())["losses"]


@pytest.mark.parametrize(
    ("fault", "launcher"),
    [(own_interface_down, of_slurm), (one_way, of_torch), (power_lost, of_ours)],
    ids=["own interface down, srun", "one way, torchrun", "power lost, drivetrain run"],
)
def test_a_lost_node_ends_every_rank_in_time_and_is_named(
    fault: Callable[[Any], None], launcher: Callable[..., Any], nodes: Any, tmp_path: Path
) -> None:
    """gloo alone waits for half an hour, and cannot say for whom. Whoever started them."""
    net = nodes(2)
    started = training(net, tmp_path, "step_s=0.1", launcher=launcher)
    fault(net)
    began = time.monotonic()
    ended = net.finish(started, timeout=90)
    print(f"{fault.__name__}: {time.monotonic() - began:.1f} s to the end of all")
    here, there = ended[: len(ended) // 2], ended[len(ended) // 2 :]
    for one in here:
        assert one.returncode == 1, one.stderr
        assert "node 1 (node1, ranks 2 to 3) does not answer" in one.stderr
        assert "for up to 4 s (DRIVETRAIN_NODE_TIMEOUT)" in one.stderr
    for one in there if fault is not power_lost else ():
        assert one.returncode == 1, one.stderr
        assert "node 0 (node0, ranks 0 to 1) does not answer" in one.stderr
    assert [node.processes() for node in net] == [[], []]


def test_after_a_cut_the_job_goes_on_bit_for_bit(unbroken: list[float], nodes: Any, tmp_path: Path) -> None:
    net = nodes(2)
    out = tmp_path / "out.json"
    started = training(net, tmp_path, "step_s=0.2", "steps=30")
    net.unplug(1)
    first, second = net.finish(started, timeout=90)
    assert (first.returncode, second.returncode) == (1, 1), first.stderr + second.stderr
    assert "node 1 (node1, ranks 2 to 3) does not answer" in first.stderr
    assert "node 0 (node0, ranks 0 to 1) does not answer" in second.stderr
    assert not out.exists()
    net.plug(1)
    options = ["train", str(out), f"root={tmp_path / 'runs'}", "resume=auto", "steps=30", "step_s=0"]
    for ended in net.finish(of_ours(net, [str(JOBS), *options]), timeout=120):
        assert ended.returncode == 0, ended.stderr
    (metrics,) = tmp_path.glob("runs/job/*/metrics.jsonl")
    written = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["metrics"]["loss"] for line in written if "loss" in line["metrics"]] == unbroken
    assert len(json.loads(out.read_text())["losses"]) < 30, "it began anew"


def test_an_error_on_another_node_ends_all_and_is_last_on_every_screen(nodes: Any, tmp_path: Path) -> None:
    net = nodes(2)
    options = [f"root={tmp_path / 'runs'}", "step_s=0.1", "fail=3"]
    for ended in net.finish(of_ours(net, [str(JOBS), "train", str(tmp_path / "out.json"), *options])):
        assert ended.returncode == 1
        assert "Rank 3 failed first, and all 2 of this node were stopped:" in ended.stderr
        assert ended.stderr.strip().splitlines()[-2].startswith("[rank 3/4] ValueError: boom"), ended.stderr
        assert ended.stderr.count("ValueError: boom") == 1


def test_a_rank_killed_on_another_node_is_named_on_every_screen(nodes: Any, tmp_path: Path) -> None:
    net = nodes(2)
    started = training(net, tmp_path, "step_s=0.1")
    os.kill(int((tmp_path / "pid3").read_text()), signal.SIGKILL)
    first, second = net.finish(started)
    assert (first.returncode, second.returncode) == (1, 137)
    assert "[rank 3/4] on node 1 (node1, ranks 2 to 3) ended without a word" in first.stderr
    assert "[rank 3/4] was killed by SIGKILL" in second.stderr
    assert [node.processes() for node in net] == [[], []]


def test_a_stopped_rank_on_another_node_is_named_by_the_watchdog(nodes: Any, tmp_path: Path) -> None:
    """Its kernel still answers: that it does not run is seen by its heartbeats."""
    net = nodes(2)
    started = training(net, tmp_path, "step_s=0.1", "watchdog=10")
    os.kill(int((tmp_path / "pid3").read_text()), signal.SIGSTOP)
    first, second = net.finish(started, timeout=90)
    assert first.returncode == 1
    assert second.returncode in (1, 137)
    assert "rank 3 (process" in first.stderr
    assert "on node1)" in first.stderr
    assert "its process does not run" in first.stderr
    assert [node.processes() for node in net] == [[], []]


def test_nodes_without_a_common_folder_are_told_so_before_anything_is_lost(nodes: Any, tmp_path: Path) -> None:
    """Each writes to a disk of its own: no checkpoint would ever be whole. Without checkpoints such a job trains."""
    net = nodes(2)
    runs = tmp_path / "runs"
    runs.mkdir()
    net[1].hide(runs)
    options = [f"root={runs}", "step_s=0.1", "steps=20"]
    for ended in net.finish(of_ours(net, [str(JOBS), "train", str(tmp_path / "out.json"), *options])):
        assert ended.returncode == 3
        assert "is not to be seen by rank 2 on node 1 (node1), rank 3 on node 1 (node1)" in ended.stderr, ended.stderr
        assert "put root= on a shared file system" in ended.stderr
    assert not list(tmp_path.glob("pid*")), "it had trained"
    alone = [*options, "checkpoints=no"]
    for ended in net.finish(of_ours(net, [str(JOBS), "train", str(tmp_path / "out.json"), *alone])):
        assert ended.returncode == 0, ended.stderr


def test_with_two_networks_the_one_of_the_address_is_taken(nodes: Any, tmp_path: Path) -> None:
    """The host's own name, which gloo goes by, leads to its loopback here, and would lead to the other network elsewhere."""
    net = nodes(2)
    net.join_again("fast", "10.88.0")
    for ended in meeting(net, tmp_path, "--master-addr", "10.88.0.1"):
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split()[:2] == ["fast", "2.0"]


def test_a_host_whose_name_is_its_loopback_is_told_what_to_set_where_two_networks_are_meant(nodes: Any, tmp_path: Path) -> None:
    net = nodes(2)
    net.join_again("fast", "10.88.0")
    first, second = meeting(net, tmp_path, "--master-addr", "node0", timeout_s=10)
    assert first.returncode == 2
    assert "MASTER_ADDR='node0' is 127.0.0.1 on this machine (node0), its loopback" in first.stderr
    assert "eth0 (10.77.0.1), fast (10.88.0.1)" in first.stderr
    assert "could not reach node0:29511" in second.stderr
    named = meeting(net, tmp_path, "--master-addr", "node0", GLOO_SOCKET_IFNAME="fast")
    assert [ended.returncode for ended in named] == [0, 0], named[0].stderr
    assert named[0].stdout.split()[:2] == ["fast", "2.0"]


def test_nodes_that_were_started_with_other_numbers_are_told_so(nodes: Any, tmp_path: Path) -> None:
    net = nodes(2)
    for ended in meeting(net, tmp_path, "--node-rank", "0", timeout_s=10):
        assert ended.returncode == 1
        assert "two processes say that they are rank 0: one on node" in ended.stderr
        assert "Expected each node under a number of its own (--node-rank)" in ended.stderr
    both = meeting(net, tmp_path, "--master-addr", "127.0.0.1", timeout_s=10)
    assert [ended.returncode for ended in both] == [1, 1]
    assert "MASTER_ADDR is this machine's own loopback, and there are 2 nodes: set it to the first one's" in both[-1].stderr


def test_a_slow_line_is_no_lost_node(nodes: Any, tmp_path: Path) -> None:
    """Half a megabyte over a line of half a megabit takes longer than a node may be silent."""
    net = nodes(2)
    for node in net:
        node.slow_down("512kbit")
    for ended in meeting(net, tmp_path, numbers=130_000):
        assert ended.returncode == 0, ended.stderr
        _, mean, seconds = ended.stdout.split()
        print(f"an all-reduce of 0.5 MB over 512 kbit/s: {seconds} s")
        assert float(mean) == 2.0
