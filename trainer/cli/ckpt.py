"""`drivetrain ckpt`: look at checkpoints, check, compare, export and delete them, without the model's code.

    drivetrain ckpt ls PATH                      the checkpoints of a run
    drivetrain ckpt show PATH                    counters, files and tensors of one (of several: the newest)
    drivetrain ckpt verify PATH                  read everything and compare checksums; exit code 3 if anything is wrong
    drivetrain ckpt diff PATH OTHER              what differs; exit code 1 if anything does
    drivetrain ckpt export PATH --to FOLDER      the weights of one model as Hugging Face safetensors
    drivetrain ckpt prune PATH --last 3          delete what no rule keeps; --dry-run only says what would go
The first three start without torch, in a fraction of a second.
PATH is a checkpoint (.../step-00000042), the folder that holds them, or a run's folder; or the URL of one (s3://...). Nothing in
a file is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...strategies.checkpoint.contents import Contents
from ...strategies.checkpoint.layout import human, info_of, parse_folder, read_manifest
from ...strategies.checkpoint.urls import path_of
from ...strategies.errors import CheckpointError, ConfigError
from .parser import Parser

if TYPE_CHECKING:
    import argparse

    from ...strategies.checkpoint import Checkpoint, CheckpointInfo

__all__ = ["main", "parser"]

_ACTIONS = ("ls", "show", "verify", "diff", "export", "prune")
_ONLY = {
    "to": ("export",),
    "model": ("export",),
    "max_shard_size": ("export",),
    "quick": ("verify",),
    "last": ("prune",),
    "every": ("prune",),
    "best": ("prune",),
    "metric": ("prune",),
    "mode": ("prune",),
    "dry_run": ("prune",),
    "other": ("diff",),
}
"""Option -> the actions that know it; another one refuses it."""


def parser() -> Parser:
    """Return the options of `drivetrain ckpt`."""
    result = Parser("ckpt", (__doc__ or "").partition("\n\n")[2])
    result.add_argument("action", choices=_ACTIONS, metavar="ACTION", help=" | ".join(_ACTIONS))
    result.add_argument("path", metavar="PATH", help="a checkpoint, a folder of checkpoints, or a run's folder")
    result.add_argument("other", metavar="OTHER", nargs="?", help="diff: what to compare with")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    result.add_argument("--quick", action="store_true", help="verify: crc32 only, not the sha256 of small files")
    result.add_argument("--to", metavar="FOLDER", help="export: where to")
    result.add_argument("--model", metavar="NAME", help="export: which model, where there are several")
    result.add_argument("--max-shard-size", metavar="SIZE", help="export: of one file, such as 2GB (default 5GB)")
    result.add_argument("--last", type=int, metavar="N", help="prune: keep the newest N")
    result.add_argument("--every", type=int, metavar="N", help="prune: keep steps that N divides")
    result.add_argument("--best", type=int, metavar="N", help="prune: keep the best N by --metric")
    result.add_argument("--metric", metavar="NAME", help="prune: a metric of the run, such as val_loss")
    result.add_argument("--mode", choices=("min", "max"), help="prune: which values are good (default min)")
    result.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    return result


def main(argv: list[str]) -> int:
    """Run one action; return the exit code."""
    chosen = parser().parse_args(argv)
    for name, actions in _ONLY.items():
        if getattr(chosen, name) and chosen.action not in actions:
            option = "OTHER" if name == "other" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"drivetrain ckpt {chosen.action} has no {option}; that is for {', '.join(actions)}.")
    code, found, lines = _RUN[chosen.action](chosen)
    if chosen.json:
        print(json.dumps(found, indent=2, default=repr))
    else:
        print("\n".join(lines))
    return code


Outcome = tuple[int, dict[str, Any], Sequence[str]]
"""Exit code, what --json prints, and lines for people."""


def _ls(chosen: argparse.Namespace) -> Outcome:
    infos, broken = _find(chosen.path)
    rows = [_summary(info) for info in infos]
    lines = [f"{'checkpoint':<20}{'saved (UTC)':<21}{'size':>10}{'ranks':>7}  metrics"]
    for info, row in zip(infos, rows, strict=True):
        metrics = "  ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items() if isinstance(v, int | float))
        saved = info.saved_at[:19].replace("T", " ")
        lines.append(f"{info.path.name:<20}{saved:<21}{human(info.num_bytes):>10}{info.world_size:>7}  {metrics}")
    lines += [f"{name}: not readable: {why}" for name, why in broken.items()]
    return (3 if broken else 0), {"checkpoints": rows, "broken": broken}, lines


def _show(chosen: argparse.Namespace) -> Outcome:
    with Contents(_newest(chosen.path)) as checkpoint:
        tensors = {n: {"dtype": checkpoint.dtype_name(n), "shape": list(checkpoint.shape(n))} for n in checkpoint.names()}
        manifest = checkpoint.manifest
        found = {
            **_summary(checkpoint.info),
            "meta": checkpoint.meta,
            "torch": manifest["torch"],
            "drivetrain": manifest["drivetrain"],
            "files": {n: e["bytes"] for n, e in manifest["files"].items()},
            "config": checkpoint.value("config") if "config" in checkpoint.value_names() else {},
            "values": checkpoint.value_names(),
            "tensors": tensors,
            "aliases": dict(checkpoint.aliases),
        }
    lines = [f"{name:<12}{found[name]}" for name in ("path", "step", "saved_at", "world_size", "torch", "drivetrain")]
    lines += [f"{key:<12}{value}" for key, value in checkpoint.meta.items()]
    lines += ["config"] + [f"  {key:<30}{value}" for key, value in found["config"].items()] if found["config"] else []
    lines += ["files"] + [f"  {name:<44}{human(size):>12}" for name, size in found["files"].items()]
    lines += [f"values      {', '.join(found['values'])}", "tensors"]
    lines += [f"  {n:<60}{t['dtype']:<10}{'x'.join(map(str, t['shape'])) or 'scalar'}" for n, t in tensors.items()]
    return 0, found, lines


def _verify(chosen: argparse.Namespace) -> Outcome:
    infos, broken = _find(chosen.path)
    faults = {name: [why] for name, why in broken.items()}
    for info in infos:
        with Contents(info.path) as checkpoint:
            faults[info.path.name] = checkpoint.faults(full=not chosen.quick)
    lines = [f"{name}: {'whole' if not found else '; '.join(found)}" for name, found in faults.items()]
    return (3 if any(faults.values()) else 0), {"faults": faults}, lines


def _diff(chosen: argparse.Namespace) -> Outcome:
    if not chosen.other:
        raise ConfigError("drivetrain ckpt diff compares two checkpoints: drivetrain ckpt diff PATH OTHER.")
    import torch

    found: dict[str, Any] = {"only_first": [], "only_second": [], "kind": {}, "values": {}, "equal": 0}
    with _open(chosen.path) as a, _open(chosen.other) as b:
        names = (set(a.names()), set(b.names()))
        found["only_first"], found["only_second"] = sorted(names[0] - names[1]), sorted(names[1] - names[0])
        for name in sorted(names[0] & names[1]):
            kinds = [f"{c.dtype_name(name)} {list(c.shape(name))}" for c in (a, b)]
            if kinds[0] != kinds[1]:
                found["kind"][name] = kinds
                continue
            x, y = a.tensor(name), b.tensor(name)
            # Bit by bit: a NaN is equal to itself here.
            if torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)):
                found["equal"] += 1
            else:
                found["values"][name] = float((x.to(torch.float64) - y.to(torch.float64)).abs().max())
        own = [{n: c.value(n) for n in c.value_names()} for c in (a, b)]
        same = {n for n in own[0].keys() & own[1].keys() if repr(own[0][n]) == repr(own[1][n])}
        found["other_values"] = sorted((own[0].keys() | own[1].keys()) - same)
    lines = [f"only in the first    {n}" for n in found["only_first"]] + [
        f"only in the second   {n}" for n in found["only_second"]
    ]
    lines += [f"other type or shape  {n}: {x}, {y}" for n, (x, y) in found["kind"].items()]
    lines += [f"differs by {value:<9.3g} {n}" for n, value in found["values"].items()]
    lines += [f"other value          {n}" for n in found["other_values"]]
    differs = bool(lines)
    lines.append(f"{found['equal']} tensor(s) are equal, bit for bit")
    return int(differs), found, lines


def _export(chosen: argparse.Namespace) -> Outcome:
    from ...strategies.checkpoint.weights import save_weights

    if not chosen.to:
        raise ConfigError("drivetrain ckpt export needs a place: --to FOLDER.")
    folder = path_of(chosen.to).expanduser()
    with _open(chosen.path) as checkpoint:
        models = sorted({n.split("/")[1] for n in checkpoint.names() if n.startswith("model/")})
        if chosen.model is None and len(models) != 1:
            raise ConfigError(f"{checkpoint.path} holds {len(models)} models: choose one with --model: {', '.join(models)}.")
        if chosen.model is not None and chosen.model not in models:
            raise ConfigError(f"{checkpoint.path} holds no model {chosen.model!r}; it holds {', '.join(models) or 'none'}.")
        prefix = f"model/{chosen.model or models[0]}/"
        tied = {n.removeprefix(prefix): t.removeprefix(prefix) for n, t in checkpoint.aliases.items() if n.startswith(prefix)}
        names = [n for n in checkpoint.names() if n.startswith(prefix) and n.removeprefix(prefix) not in tied]
        sizes = {n.removeprefix(prefix): _bytes_of(checkpoint, n) for n in names}
        files = save_weights(
            folder,
            sizes,
            lambda wanted: {n: checkpoint.tensor(prefix + n) for n in wanted},
            max_shard_size=chosen.max_shard_size or "5GB",
            metadata=tied,
        )
    found = {"files": [str(file) for file in files], "tensors": len(sizes), "bytes": sum(sizes.values())}
    return 0, found, [*found["files"], f"{len(sizes)} tensors, {human(found['bytes'])}"]


def _prune(chosen: argparse.Namespace) -> Outcome:
    from ...strategies.checkpoint import CheckpointStore, Keep

    keep = Keep(chosen.last or 0, chosen.best or 0, chosen.metric, chosen.mode or "min", chosen.every or 0)
    if not (keep.last or keep.best or keep.every):
        raise ConfigError("drivetrain ckpt prune needs a rule for what stays: --last N, --every N, or --best N --metric NAME.")
    store = CheckpointStore(_folder(path_of(chosen.path)))
    infos = store.list()
    if chosen.dry_run:
        gone = sorted({info.step for info in infos} - keep.chosen(infos))
    else:
        store.claim()  # a run that is saving there is not disturbed
        gone = store.prune(keep)
    left = sorted({info.step for info in infos} - set(gone))
    word = "would go" if chosen.dry_run else "deleted"
    lines = [f"{word}: {', '.join(map(str, gone)) or 'nothing'}", f"stays: {', '.join(map(str, left)) or 'nothing'}"]
    return 0, {"deleted": gone, "kept": left, "dry_run": chosen.dry_run}, lines


_RUN: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "diff": _diff,
    "export": _export,
    "prune": _prune,
}


def _folder(path: Path) -> Path:
    """Return the folder that holds the checkpoints: `path` itself, or `checkpoints` in a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    path = path.expanduser()
    for folder in (path, path / "checkpoints"):
        if any(folder.glob("step-*")):
            return folder
    what = "There is no such folder." if not path.is_dir() else "Give a run's folder, such as runs/<name>/<run>, or a checkpoint."
    raise CheckpointError(f"There are no checkpoints in {path.absolute()}. {what}")


def _find(path: str) -> tuple[list[CheckpointInfo], dict[str, str]]:
    """Return the checkpoints at `path`, oldest first, and why others cannot be read."""
    one = path_of(path).expanduser()
    is_one = (one / "manifest.json").exists() or parse_folder(one.name)
    folders = [one] if is_one else [p for p in sorted(_folder(one).iterdir()) if parse_folder(p.name) and not p.is_symlink()]
    infos: list[CheckpointInfo] = []
    broken: dict[str, str] = {}
    for folder in folders:
        try:
            infos.append(info_of(folder, read_manifest(folder)))
        except CheckpointError as error:
            broken[folder.name] = str(error)
    return sorted(infos, key=lambda info: (info.sequence, info.step)), broken


def _open(path: str) -> Checkpoint:
    """Open the checkpoint at `path`, or the newest of several."""
    from ...strategies.checkpoint import Checkpoint

    return Checkpoint(_newest(path))


def _newest(path: str) -> Path:
    infos, broken = _find(path)
    if not infos:
        raise CheckpointError(next(iter(broken.values()), f"There is no checkpoint at {path}."))
    return infos[-1].path


def _summary(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "step": info.step,
        "saved_at": info.saved_at,
        "num_bytes": info.num_bytes,
        "world_size": info.world_size,
        "metrics": dict(info.meta.get("metrics", {})),
        "progress": dict(info.meta.get("progress", {})),
    }


def _bytes_of(checkpoint: Checkpoint, name: str) -> int:
    size = checkpoint.dtype(name).itemsize
    for n in checkpoint.shape(name):
        size *= n
    return size
