"""What this process is told about the others: its rank, how many there are, and where they meet.

Only this file reads rank variables. Five launchers are understood, tried in this order:
    RANK, WORLD_SIZE, ...               torchrun, `drivetrain run`, Kubernetes operators, a hand-written launcher
    SLURM_PROCID, SLURM_STEP_ID, ...    srun (a batch script or an `salloc` shell is no rank: it has no step of several tasks)
    OMPI_COMM_WORLD_RANK, ...           mpirun of Open MPI
    PMI_RANK, PMI_SIZE, ...             mpiexec of MPICH, Intel MPI and their kin
    nothing                             one process, alone
Read `read_environment` first. Junk in a variable is never guessed around: it is a ConfigError that names variable and value.
"""

from __future__ import annotations

import ipaddress
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

# Every variable of ours, with what it does. `drivetrain env` prints this table; the agent sets the last four itself.
VARIABLES = {
    "DRIVETRAIN_TRACEBACK": "1: show the whole traceback of errors that are normally one paragraph",
    "DRIVETRAIN_NODE_TIMEOUT": "several nodes: seconds after which a machine that does not answer is lost (60; 0: never)",
    "DRIVETRAIN_LISTEN_FD": "set by the agent for rank 0: the listening loopback socket of the store",
    "DRIVETRAIN_ERROR_FILE": "set by the agent for each rank: where a failing rank writes its error",
    "DRIVETRAIN_AGENT_PID": "set by the agent for each rank: the process that started it",
    "DRIVETRAIN_LOG_FILE": "set by the agent for ranks above 0: where their output goes",
}

LOOPBACK = "127.0.0.1"

# The names of rank, size, rank on the node, size on the node.
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class RankEnvironment:
    """What a launcher told this process. `launcher` is "none", "torchrun", "drivetrain", "variables", "slurm" or "mpi"."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    address: str = LOOPBACK
    port: int = 0  # 0: nobody named one
    launcher: str = "none"
    agent_store: bool = False  # the launcher's agent hosts the store at address:port; no rank does
    restart: int = 0  # how often an elastic agent has started this group before
    listen_fd: int | None = None  # rank 0 of our own agent: the listening socket that the agent made

    @property
    def is_launched(self) -> bool:
        """Did a launcher start this process as one of its ranks (also when it is the only one)?"""
        return self.launcher != "none"

    @property
    def one_node(self) -> bool:
        """Are all ranks on this machine, so that nothing needs to listen beyond loopback?"""
        return self.local_size == self.size

    @property
    def num_nodes(self) -> int:
        """Number of machines, when each has as many ranks as this one."""
        return -(-self.size // self.local_size)


def read_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment:
    """Say which rank this process is, from what its launcher put into the environment.

    Args:
        environ: read this instead of `os.environ`.
    Raises:
        ConfigError: a variable holds junk, two contradict each other, or one is missing. It names variable and value.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        found = _check(_from_rank_variables(env))
        if found.launcher == "variables":
            _check_against_others(found, env)
        return found
    if "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_STEP_NUM_TASKS" in env):
        return _check(_from_slurm(env))
    if "OMPI_COMM_WORLD_RANK" in env:
        return _check(_from_mpi(env, *_OPEN_MPI))
    if "PMI_RANK" in env and env.get("PMI_SIZE", "1").strip() != "1":
        return _check(_from_mpi(env, *_MPICH))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in env:
            raise ConfigError(
                f"{name}={env[name]!r} is set, but RANK and WORLD_SIZE are not: a rank needs all of them. "
                f"Start the ranks with `drivetrain run` or torchrun, or unset {name}."
            )
    return RankEnvironment()


@dataclass(frozen=True)
class JobEnvironment:
    """What a batch system says of the job that this process is part of. Times are in seconds since 1970."""

    scheduler: str = ""  # "slurm", or "" when there is none
    id: str = ""
    started_at: float | None = None
    ends_at: float | None = None  # when it will be killed
    restarts: int = 0  # how often it was started before: requeued, or restarted by an elastic agent
    agent_pid: int | None = None  # of our own launcher, which started before this process did


def read_job(environ: Mapping[str, str] | None = None) -> JobEnvironment:
    """Say which job this is, and how long it may run.

    Raises:
        ConfigError: a variable holds junk. It names variable and value.
    """
    env = os.environ if environ is None else environ
    agent = _integer(env, "DRIVETRAIN_AGENT_PID", low=1) if "DRIVETRAIN_AGENT_PID" in env else None
    restarts = _integer(env, "TORCHELASTIC_RESTART_COUNT", default=0, low=0)
    if "SLURM_JOB_ID" not in env:
        return JobEnvironment(restarts=restarts, agent_pid=agent)
    times = [
        float(_integer(env, name, low=0)) if name in env else None for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME")
    ]
    restarts = max(restarts, _integer(env, "SLURM_RESTART_COUNT", default=0, low=0))
    return JobEnvironment("slurm", env["SLURM_JOB_ID"], times[0], times[1], restarts, agent)


def debug_tracebacks(environ: Mapping[str, str] | None = None) -> bool:
    """Did the user ask for whole tracebacks (DRIVETRAIN_TRACEBACK=1)?"""
    env = os.environ if environ is None else environ
    return env.get("DRIVETRAIN_TRACEBACK", "0") not in ("", "0")


def node_timeout_s(environ: Mapping[str, str] | None = None) -> float:
    """Return after how many seconds without an answer another machine counts as lost; 0: never (node_watch.py).

    Raises:
        ConfigError: DRIVETRAIN_NODE_TIMEOUT is neither 0 nor a number of seconds from 4 on.
    """
    env = os.environ if environ is None else environ
    seconds = _integer(env, "DRIVETRAIN_NODE_TIMEOUT", default=60, low=0)
    if 0 < seconds < 4:
        raise ConfigError(f"DRIVETRAIN_NODE_TIMEOUT={seconds}: expected 0 (never), or at least 4 seconds.")
    return float(seconds)


def gloo_interface(environ: Mapping[str, str] | None = None) -> str | None:
    """Return the interface that the user named for gloo (GLOO_SOCKET_IFNAME); None when none was."""
    return (os.environ if environ is None else environ).get("GLOO_SOCKET_IFNAME") or None


def is_loopback(address: str) -> bool:
    """Is `address` this machine's loopback, by its form alone (no name is looked up)?"""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: `gpu[003-005,9],cpu1` gives `gpu003`."""
    match = re.match(r"^([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", node_list)
    if not match:
        raise ConfigError(
            f"SLURM_JOB_NODELIST={node_list!r} is not a list of nodes like 'node[01-04]'. Set MASTER_ADDR to the "
            "address of the first node."
        )
    prefix, numbers, suffix = match.groups()
    return f"{prefix}{re.split('[-,]', numbers)[0] if numbers else ''}{suffix if numbers else ''}"


def _from_rank_variables(env: Mapping[str, str]) -> RankEnvironment:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if other not in env:
            raise ConfigError(
                f"{name}={env[name]!r} is set, but {other} is not: a rank needs both. "
                f"Start the ranks with `drivetrain run` or torchrun, or unset {name}."
            )
    size = _integer(env, "WORLD_SIZE", low=1)
    rank = _integer(env, "RANK", low=0, below=size, below_name="WORLD_SIZE")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not env.get(name):
                raise ConfigError(
                    f"WORLD_SIZE={size} but {name} is not set: the ranks need one address and port to meet at. "
                    "Start them with `drivetrain run` or torchrun, or set MASTER_ADDR and MASTER_PORT."
                )
    address = env.get("MASTER_ADDR") or LOOPBACK
    if "LOCAL_WORLD_SIZE" in env:
        local_size = _integer(env, "LOCAL_WORLD_SIZE", low=1, below=size + 1, below_name="WORLD_SIZE + 1")
        # LOCAL_RANK may be left out when every node holds as many ranks as this one.
        local_rank = _integer(env, "LOCAL_RANK", default=rank % local_size, low=0)
    elif is_loopback(address):
        local_size = size  # they meet on loopback, so they are all here
        local_rank = _integer(env, "LOCAL_RANK", default=rank, low=0)
    else:
        local_rank = _integer(env, "LOCAL_RANK", default=0, low=0)
        local_size = local_rank + 1  # one process a node is what operators that set no LOCAL_RANK start
    if local_rank >= local_size:
        named = f"LOCAL_WORLD_SIZE={env['LOCAL_WORLD_SIZE']}" if "LOCAL_WORLD_SIZE" in env else f"{local_size} ranks"
        raise ConfigError(
            f"LOCAL_RANK={env.get('LOCAL_RANK')!r} with {named} on this node: expected 0 to {local_size - 1}. "
            "Start the ranks with `drivetrain run` or torchrun."
        )
    node_name = "GROUP_RANK" if "GROUP_RANK" in env else "NODE_RANK"
    elastic = "TORCHELASTIC_RUN_ID" in env
    agent = "DRIVETRAIN_AGENT_PID" in env
    return RankEnvironment(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=_integer(env, node_name, default=rank // local_size, low=0),
        address=address,
        port=_integer(env, "MASTER_PORT", default=0, low=0 if size == 1 else 1, below=65536),
        launcher="drivetrain" if agent else "torchrun" if elastic else "variables",
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart=_integer(env, "TORCHELASTIC_RESTART_COUNT", default=0, low=0),
        listen_fd=_integer(env, "DRIVETRAIN_LISTEN_FD", low=0) if "DRIVETRAIN_LISTEN_FD" in env else None,
    )


def _from_slurm(env: Mapping[str, str]) -> RankEnvironment:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    size = _integer(env, size_name, default=1, low=1)
    if size == 1:
        return RankEnvironment()  # an allocation to work in (srun --pty bash), no group of ranks
    rank = _integer(env, "SLURM_PROCID", low=0, below=size, below_name=size_name)
    node_rank = _integer(env, "SLURM_NODEID", default=0, low=0)
    nodes_name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in env else "SLURM_NNODES"
    nodes = _integer(env, nodes_name, default=1, low=1)
    tasks_name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in env else "SLURM_TASKS_PER_NODE"
    local_size = _tasks_on_node(env, tasks_name, node_rank) if tasks_name in env else -(-size // nodes)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    address = env.get("MASTER_ADDR") or (LOOPBACK if nodes == 1 or not hosts else first_host(hosts))
    # Every task computes the same port from the job and step, so that two steps on one node do not meet.
    job = f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}"
    return RankEnvironment(
        rank=rank,
        size=size,
        local_rank=_integer(env, "SLURM_LOCALID", low=0, below=local_size, below_name=tasks_name),
        local_size=local_size,
        node_rank=node_rank,
        address=address,
        port=_integer(env, "MASTER_PORT", default=_derived_port(job), low=1, below=65536),
        launcher="slurm",
        restart=_integer(env, "SLURM_RESTART_COUNT", default=0, low=0),
    )


def _from_mpi(
    env: Mapping[str, str], rank_name: str, size_name: str, local_rank_name: str, local_size_name: str
) -> RankEnvironment:
    size = _integer(env, size_name, low=1)
    rank = _integer(env, rank_name, low=0, below=size, below_name=size_name)
    local_size = _integer(env, local_size_name, default=size, low=1)
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or ""
    give = "mpirun -x MASTER_ADDR=<first node> -x MASTER_PORT=29500"
    if rank_name == "PMI_RANK":
        give = "mpiexec -genv MASTER_ADDR <first node> -genv MASTER_PORT 29500"
    if local_size < size and not env.get("MASTER_ADDR"):
        raise ConfigError(
            f"{size_name}={size} with {local_size} ranks on this node, but MASTER_ADDR is not set: the ranks of "
            f"several nodes need an address to meet at. Start with `{give}`."
        )
    if size > 1 and not job and not env.get("MASTER_PORT"):
        raise ConfigError(
            f"{size_name}={size}, but neither MASTER_PORT nor PMIX_NAMESPACE is set: the ranks need one port to "
            f"meet at. Start with `{give}`."
        )
    return RankEnvironment(
        rank=rank,
        size=size,
        local_rank=_integer(env, local_rank_name, default=rank % local_size, low=0, below=local_size, below_name=local_size_name),
        local_size=local_size,
        node_rank=rank // local_size,
        address=env.get("MASTER_ADDR") or LOOPBACK,
        port=_integer(env, "MASTER_PORT", default=_derived_port(job), low=1, below=65536),
        launcher="mpi",
    )


def _check_against_others(found: RankEnvironment, env: Mapping[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE that another launcher contradicts: left over in a shell, they make each of its tasks rank 0.

    Where torchrun or our agent was started in each task, they say what is a rank.
    """
    for rank_name, size_name in (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        *((names[0], names[1]) for names in (_OPEN_MPI, _MPICH)),
    ):
        tasks = _integer(env, size_name, default=1, low=1)
        if rank_name in env and tasks > found.size:
            raise ConfigError(
                f"WORLD_SIZE={found.size} and RANK={found.rank} are set, and so are {size_name}={tasks} and "
                f"{rank_name}={env[rank_name]}: {tasks} tasks cannot be {found.size} rank{'s' * (found.size > 1)}. Unset RANK "
                f"and WORLD_SIZE to train on all of them, or {rank_name} where each is to train alone."
            )


def _check(found: RankEnvironment) -> RankEnvironment:
    if found.local_size > found.size:
        raise ConfigError(
            f"{found.launcher}: {found.local_size} ranks on this node, but only {found.size} in all. "
            "The launcher's variables contradict each other: start the ranks anew."
        )
    return found


def _tasks_on_node(env: Mapping[str, str], name: str, node: int) -> int:
    """Read Slurm's `2(x3),1`: two tasks on each of three nodes, one on the next."""
    counts: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ConfigError(f"{name}={env[name]!r} is not a list of counts like '2(x3),1'. Start the step with srun.")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts) or counts[node] < 1:
        raise ConfigError(f"SLURM_NODEID={node} but {name}={env[name]!r} has no such node. Start the step with srun.")
    return counts[node]


def _derived_port(job: str) -> int:
    return 20000 + zlib.crc32(job.encode()) % 10000


def _integer(
    env: Mapping[str, str], name: str, *, default: int | None = None, low: int, below: int | None = None,
    below_name: str = "",
) -> int:  # fmt: skip
    if name not in env and default is not None:
        return default
    text = env.get(name, "")
    wanted = f"an integer of at least {low}" if below is None else f"an integer from {low} to {below - 1}"
    if below is not None and below_name:
        wanted += f" (below {below_name})"
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        met = f"{name}={text!r}" if name in env else f"{name} is not set"
        raise ConfigError(f"{met}: expected {wanted}. Unset the launcher's variables, or start with `drivetrain run`.")
    value = int(text)
    if value < low or (below is not None and value >= below):
        raise ConfigError(f"{name}={text!r}: expected {wanted}. Unset the launcher's variables, or start with `drivetrain run`.")
    return value
