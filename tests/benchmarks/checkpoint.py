"""Save and load a model with its AdamW state: seconds, what the step waits for, and memory, beside the machine's own limits.

    python tests/benchmarks/checkpoint.py                      # 200 million parameters, 2.4 GB
    python tests/benchmarks/checkpoint.py --parameters 30 --methods limits,ours,torch.save --json FILE

Each method runs in a process of its own, on a fresh folder. What is measured, in units that travel between machines:
    save    until the checkpoint is durable (fsync; checksums where a method has them)          / write + fsync
    stall   how long the training waits in a save that goes on beside it, from the second on    / one warm copy
    load    into a live model and optimizer from the page cache, ours with all checksums and nothing touched before the
            last of them was compared                                                           / read + crc32 on two threads
    memory  the most above what the training itself holds, in MiB and in multiples of the state
The bounds of issue NOTHING-LOST: save <= 1.2, stall <= 1.3, load <= 1.3, memory <= 1 in the background and 64 MiB otherwise.
Ours are measured in turns with the limits, in one process: what else the machine does hits both. The peers' limits are those of
the row "limits". Of all rounds the least time counts. Walls are true on a quiet machine only; the load is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

WIDTH = 2048
CHUNK = 4 * 2**20


# -- what is measured -----------------------------------------------------------------------------------------------------
def make(millions: float) -> tuple[nn.Module, torch.optim.AdamW]:
    """Return a model of about so many million parameters, and AdamW with its state."""
    layers = max(1, round(millions * 1e6 / (WIDTH * WIDTH + WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    return model, optimizer


def tensors_of(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The state, flat: the tensors themselves."""
    found = {f"model/{n}": p.detach() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        found |= {f"optimizer/{n}/{k}": v for k, v in optimizer.state[p].items()}
    return found


class Peak:
    """The most memory that this process has had above what it had at first, in MiB."""

    def __enter__(self) -> Peak:
        self._base = self._most = _resident()
        self._on = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self._most = max(self._most, _resident())
            time.sleep(0.003)

    def __exit__(self, *exception: object) -> None:
        self._on = False
        self._thread.join()
        self.mib = max(self._most, _resident()) - self._base


def _resident() -> float:
    """Anonymous memory of this process in MiB: mapped files are the system's to drop."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return 0.0


@contextlib.contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into[name] = time.perf_counter() - start


def fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


# -- the machine's own limits -----------------------------------------------------------------------------------------------
def views_of(state: dict[str, Tensor]) -> list[memoryview]:
    arrays: list[Any] = [t.numpy() for t in state.values() if t.dim()]
    return [memoryview(array).cast("B") for array in arrays]


def write_and_fsync(state: dict[str, Tensor], path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for view in views_of(state):
            file.write(view)
        os.fsync(file.fileno())


def copy_to(copies: list[Tensor], state: dict[str, Tensor]) -> None:
    for copy, t in zip(copies, state.values(), strict=True):
        copy.copy_(t)


def read(state: dict[str, Tensor], path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        for view in views_of(state):
            file.readinto(view)


def read_and_check(state: dict[str, Tensor], path: Path) -> None:
    """Read straight to its place, and take crc32, on two threads."""

    def check(view: memoryview, descriptor: int, offset: int) -> int:
        os.preadv(descriptor, [view], offset)
        return zlib.crc32(view)

    with open(path, "rb") as file, ThreadPoolExecutor(2) as pool:
        jobs, at = [], 0
        for view in views_of(state):
            for start in range(0, len(view), CHUNK):
                jobs.append(pool.submit(check, view[start : start + CHUNK], file.fileno(), at + start))
            at += len(view)
        for job in jobs:
            job.result()


def least(told: dict[str, Any], name: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """Call `action`; keep its time if it is the least so far, and so the processor time, of all threads."""
    found: dict[str, float] = {}
    cpu = time.process_time()
    with timed(found, name):
        result = action(*arguments)
    found[f"cpu_{name}"] = time.process_time() - cpu
    for key, value in found.items():
        told[key] = min(value, told.get(key, value))
    return result


# -- methods: each fills in what it can measure -----------------------------------------------------------------------------
def limits(state: dict[str, Tensor], folder: Path, told: dict[str, Any], _: Any, rounds: int) -> None:
    """What the machine itself takes for a warm copy, write + fsync, read, read + crc32 on two threads."""
    path = folder / "plain"
    copies = [t.clone() for t in state.values()]
    for _round in range(rounds):
        path.unlink(missing_ok=True)
        least(told, "write_s", write_and_fsync, state, path)
        least(told, "copy_s", copy_to, copies, state)
        least(told, "read_s", read, state, path)
        least(told, "verified_read_s", read_and_check, state, path)


def _ours(folder: Path, objects: Any) -> Any:
    from drivetrain import Accelerator

    accelerator = Accelerator(device="cpu", project_dir=folder)
    accelerator.prepare(*objects)
    return accelerator


def ours(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    """Accelerator.save_state and load_state."""
    accelerator = _ours(folder, objects)
    plain = path = folder / "plain"
    for n in range(rounds):
        least(told, "own_write_s", write_and_fsync, state, plain)
        plain.unlink()
        with Peak() as peak:
            path = least(told, "save_s", accelerator.save_state)
        told["memory_mib"] = max(peak.mib, told.get("memory_mib", 0))
        if n < rounds - 1:
            shutil.rmtree(path)
    write_and_fsync(state, plain)
    told["bytes"] = sum(file.stat().st_size for file in path.iterdir())
    time.sleep(2.1)  # no run goes on within 2 s of its last save; such young files would be read twice
    for _round in range(rounds):
        least(told, "own_verified_read_s", read_and_check, state, plain)
        _forget_what_is_whole()
        least(told, "load_s", accelerator.load_state)
    _forget_what_is_whole()
    with Peak() as peak:  # in a round of its own: the two threads of a load have no core to spare for one that watches
        accelerator.load_state()
    told["load_memory_mib"] = peak.mib


def _forget_what_is_whole() -> None:
    """As in a new process: nothing was checked yet."""
    from drivetrain.strategies.checkpoint.verified import _whole

    _whole.clear()


def ours_beside(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    """Accelerator.save_state(wait=False)."""
    accelerator = _ours(folder, objects)

    def save() -> Any:
        return accelerator.save_state(wait=False)

    with Peak() as peak:
        kept = least(told, "first_stall_s", save).wait().path
        with timed(told, "save_s"):
            path = least(told, "stall_s", save).wait().path
    told["memory_mib"] = peak.mib
    told["bytes"] = sum(file.stat().st_size for file in path.iterdir())
    shutil.rmtree(kept)
    copies = [t.clone() for t in state.values()]
    for n in range(rounds + 2):
        least(told, "own_copy_s" if n else "cold_s", copy_to, copies, state)
        kept, path = path, least(told, "stall_s", save).wait().path
        shutil.rmtree(kept)


def torch_save(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    model, optimizer = objects
    with Peak() as peak, timed(told, "save_s"):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "c.pt")
        fsync_tree(folder)
    told["memory_mib"] = peak.mib
    with Peak() as peak, timed(told, "load_s"):
        loaded = torch.load(folder / "c.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    told["load_memory_mib"] = peak.mib


def dcp(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    import torch.distributed.checkpoint as torch_dcp

    with _group():
        with Peak() as peak, timed(told, "save_s"):
            torch_dcp.save(state, checkpoint_id=folder)
            fsync_tree(folder)
        told["memory_mib"] = peak.mib
        with Peak() as peak, timed(told, "load_s"):
            torch_dcp.load(state, checkpoint_id=folder)
        told["load_memory_mib"] = peak.mib


def dcp_async(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    import torch.distributed.checkpoint as torch_dcp

    with _group(), Peak() as peak:
        for n in (1, 2):
            start = time.perf_counter()
            future: Any = torch_dcp.async_save(state, checkpoint_id=folder / str(n))
            told["stall_s" if n == 2 else "first_stall_s"] = time.perf_counter() - start
            getattr(future, "upload_completion", future).result()
            told["save_s"] = time.perf_counter() - start
    told["memory_mib"] = peak.mib


def accelerate(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*objects)
    with Peak() as peak, timed(told, "save_s"):
        accelerator.save_state(str(folder))
        fsync_tree(folder)
    told["memory_mib"] = peak.mib
    with Peak() as peak, timed(told, "load_s"):
        accelerator.load_state(str(folder))
    told["load_memory_mib"] = peak.mib


def lightning(state: dict[str, Tensor], folder: Path, told: dict[str, Any], objects: Any, rounds: int) -> None:
    """Trainer.save_checkpoint, and a fit that loads the checkpoint and trains no further step."""
    import pytorch_lightning as pl  # pyright: ignore[reportMissingImports]

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer = objects

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    def trainer() -> Any:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        return pl.Trainer(accelerator="cpu", devices=1, max_steps=1, default_root_dir=folder, **quiet)

    module, data = Module(), torch.utils.data.DataLoader(cast(Any, torch.zeros(1, WIDTH)), batch_size=1)
    first = trainer()
    first.fit(module, data)

    def save() -> None:
        first.save_checkpoint(folder / "c.ckpt")
        fsync_tree(folder)

    with Peak() as peak:
        least(told, "save_s", save)
    told["memory_mib"] = peak.mib
    second = trainer()
    with Peak() as peak:
        least(told, "load_s", lambda: second.fit(module, data, ckpt_path=folder / "c.ckpt"))
    told["load_memory_mib"] = peak.mib


@contextlib.contextmanager
def _group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


METHODS: dict[str, tuple[Callable[..., None], str | None]] = {
    "limits": (limits, None),
    "ours": (ours, None),
    "ours-async": (ours_beside, None),
    "torch.save": (torch_save, None),
    "dcp": (dcp, None),
    "dcp-async": (dcp_async, None),
    "accelerate": (accelerate, "accelerate"),
    "lightning": (lightning, "pytorch_lightning"),
}
"""Name -> what runs, and the package that it needs."""


# -- running and telling --------------------------------------------------------------------------------------------------
def run_one(name: str, millions: float, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Run one method in this process."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    model, optimizer = make(millions)
    state = tensors_of(model, optimizer)
    told: dict[str, Any] = {"state_mib": sum(t.numel() * t.element_size() for t in state.values()) / 2**20}
    METHODS[name][0](state, folder, told, (model, optimizer), rounds)
    told.setdefault("bytes", sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    return told


def run_all(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run every method in a process of its own."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
        command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--rounds", str(options.rounds)]
        command += ["--parameters", str(options.parameters), "--threads", str(options.threads)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if run.returncode:
            raise SystemExit(f"{name} failed:\n{run.stderr}")
        found[name] = json.loads(run.stdout.splitlines()[-1])
    return found


def with_ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add what is independent of the machine: times over the limits, memory over the state."""
    limit = found.get("limits")
    for name, told in found.items():
        if limit is not None and name != "limits":
            whole = {"save": "write_s", "stall": "copy_s", "load": "verified_read_s"}
            told |= {f"{k}_ratio": told[f"{k}_s"] / told.get(f"own_{v}", limit[v]) for k, v in whole.items() if f"{k}_s" in told}
        if "cpu_own_verified_read_s" in told:
            told["load_cpu_ratio"] = told["cpu_load_s"] / told["cpu_own_verified_read_s"]
        told |= {k.replace("_mib", "_ratio"): told[k] / told["state_mib"] for k in ("memory_mib", "load_memory_mib") if k in told}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Lay it out for a screen."""
    lines: list[str] = []
    limit = found.get("limits")
    if limit is not None:
        lines.append(
            f"state {limit['state_mib']:.0f} MiB; limits: warm copy {limit['copy_s']:.3f} s, "
            f"write + fsync {limit['write_s']:.3f} s, read {limit['read_s']:.3f} s, read + crc32 {limit['verified_read_s']:.3f} s"
        )
    columns = ("save", "stall", "load")
    lines.append(
        f"{'method':<14}"
        + "".join(f"{c + ' s':>9}{'x limit':>9}" for c in columns)
        + f"{'MB':>8}{'memory MiB':>12}{'in load':>9}"
    )
    for name, told in found.items():
        if name == "limits":
            continue
        cells = [f"{told[f'{c}_s']:>9.3f}{told.get(f'{c}_ratio', float('nan')):>9.2f}" if f"{c}_s" in told else f"{'-':>9}{'':>9}"
                 for c in columns]  # fmt: skip
        memory = [f"{told[k]:>{w}.0f}" if k in told else f"{'-':>{w}}" for k, w in (("memory_mib", 12), ("load_memory_mib", 9))]
        lines.append(f"{name:<14}" + "".join(cells) + f"{told['bytes'] / 1e6:>8.0f}" + "".join(memory))
        if "load_cpu_ratio" in told:
            lines.append(
                f"{'':14}processor time of the load: {told['load_cpu_ratio']:.2f} x that of read + crc32, in any weather"
            )
    return "\n".join(lines)


def machine() -> str:
    """The date, the processor, and how busy it is."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpus:
        model = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), model)
    today = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"{today}; {model}, {os.cpu_count()} cores; torch {torch.__version__}; load average {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", type=float, default=200, help="millions; the state is three times that in fp32")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, separated by commas")
    parser.add_argument("--folder", default=None, help="where to write: the disk that is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of ours and of the limits, in turns")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.parameters, Path(options.folder), options.threads, options.rounds)))
        return
    names = [name.strip() for name in options.methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise SystemExit(f"--methods: there is no {unknown[0]!r}. Known: {', '.join(METHODS)}")
    missing = [n for n in names if METHODS[n][1] and importlib.util.find_spec(METHODS[n][1] or "") is None]
    print(machine())
    found = with_ratios(run_all([n for n in names if n not in missing], options))
    print(table(found))
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))
    if missing:
        print(f"not installed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
