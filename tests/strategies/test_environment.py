"""What launchers tell a process is read exactly, and junk is named with its variable and value."""

from __future__ import annotations

import re

import pytest
from drivetrain.strategies.environment import RankEnvironment, first_host, is_loopback, read_environment
from drivetrain.strategies.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-1",
}
MPIEXEC = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "9",
}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_a_launcher_the_process_is_alone() -> None:
    found = read_environment({"PATH": "/bin", "MASTER_ADDR": "elsewhere"})
    assert found == RankEnvironment()
    assert not found.is_launched
    assert found.one_node


def test_torchrun_is_understood() -> None:
    found = read_environment(TORCHRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.node_rank) == (5, 8, 1, 4, 1)
    assert (found.address, found.port, found.agent_store, found.restart) == ("node1", 29400, True, 2)
    assert (found.launcher, found.one_node, found.num_nodes) == ("torchrun", False, 2)


def test_srun_is_understood_and_all_tasks_compute_one_meeting_point() -> None:
    found = read_environment(SRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.node_rank) == (3, 4, 0, 1, 1)
    assert (found.address, found.launcher) == ("gpu007", "slurm")
    first = read_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert (first.local_size, first.port) == (3, found.port)
    assert 20000 <= found.port < 30000
    assert read_environment({**SRUN, "SLURM_STEP_ID": "1"}).port != found.port


def test_a_slurm_batch_script_is_no_rank() -> None:
    """sbatch sets SLURM_PROCID=0 and SLURM_NTASKS=8 for the script itself; only srun makes ranks."""
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) == RankEnvironment()


def test_torchrun_inside_srun_wins() -> None:
    assert read_environment({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_mpirun_is_understood() -> None:
    found = read_environment(MPIRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.node_rank) == (1, 2, 1, 2, 0)
    assert (found.launcher, found.address) == ("mpi", "127.0.0.1")


def test_mpiexec_of_mpich_and_intel_is_understood() -> None:
    """Unread, each of its processes would train alone."""
    found = read_environment(MPIEXEC)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.node_rank) == (3, 4, 1, 2, 1)
    assert (found.launcher, found.address, found.port) == ("mpi", "a", 9)
    assert read_environment({"PMI_RANK": "0", "PMI_SIZE": "1"}) == RankEnvironment()


@pytest.mark.parametrize(
    ("theirs", "told"), [(SRUN, "SLURM_STEP_NUM_TASKS=4"), (MPIRUN, "OMPI_COMM_WORLD_SIZE=2"), (MPIEXEC, "PMI_SIZE=4")]
)
def test_variables_left_over_in_a_shell_do_not_make_each_task_of_a_launcher_rank_0(theirs: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=f"WORLD_SIZE=1 and RANK=0 are set, and so are {told}"):
        read_environment({**theirs, "RANK": "0", "WORLD_SIZE": "1"})
    # A sweep: each task starts an agent of its own, which says what is a rank.
    inner = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "DRIVETRAIN_AGENT_PID": "7"}
    assert read_environment({**theirs, **inner}).size == 1


def test_four_variables_on_loopback_are_enough_and_mean_one_node() -> None:
    found = read_environment(BY_HAND)
    assert (found.local_rank, found.local_size, found.one_node, found.launcher) == (1, 2, True, "variables")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**BY_HAND, "RANK": "abc"}, "RANK='abc'"),
        ({**BY_HAND, "RANK": "2"}, "RANK='2'"),
        ({**BY_HAND, "RANK": "-1"}, "RANK='-1'"),
        ({**BY_HAND, "RANK": ""}, "RANK=''"),
        ({**BY_HAND, "RANK": "1.0"}, "RANK='1.0'"),
        ({**BY_HAND, "RANK": "1" * 30}, "RANK='111"),
        ({**BY_HAND, "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({**BY_HAND, "WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({**BY_HAND, "MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ({**BY_HAND, "MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        ({**BY_HAND, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({**BY_HAND, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**BY_HAND, "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK='4' with LOCAL_WORLD_SIZE=2"),
        ({**BY_HAND, "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({**BY_HAND, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE='3'"),
        ({**BY_HAND, "NODE_RANK": "first"}, "NODE_RANK='first'"),
        ({"RANK": "0"}, "RANK='0' is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' is set, but RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK='0' is set, but RANK and WORLD_SIZE are not"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID='4'"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(y3)"}, "SLURM_STEP_TASKS_PER_NODE='2(y3)'"),
        ({**SRUN, "SLURM_LOCALID": "1"}, "SLURM_LOCALID='1'"),
        ({**MPIRUN, "OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK='2'"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec -genv MASTER_ADDR"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_junk_is_named_with_its_value(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_environment(variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-005,9],cpu1", "gpu003"), ("n1", "n1"), ("n1,n2", "n1"), ("r[1,3]-ib", "r1-ib"), ("a-b[07]", "a-b07")],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_loopback_is_recognised_by_its_form() -> None:
    assert [is_loopback(a) for a in ("localhost", "127.0.0.5", "::1", "10.0.0.1", "node1")] == [True, True, True, False, False]
