"""`drivetrain estimate`: the memory that a local model takes in each number format: to hold, to run from the disk, to train."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...strategies.errors import CheckpointError, ConfigError, MissingDependency, suggest
from .parser import Parser

if TYPE_CHECKING:
    from torch import nn

_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
_SPELLED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}


def parser() -> Parser:
    """Return the options of `drivetrain estimate`."""
    result = Parser(
        "estimate",
        "Estimate the memory that a local model takes. Nothing is downloaded and no weights are read: a config.json of "
        "transformers builds the model without values, safetensors files are counted by their headers.",
    )
    result.add_argument("model", help="a config.json, a safetensors file, or a folder with one of them")
    result.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8", "int4"], help="of the weights")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    return result


def main(argv: list[str]) -> int:
    """Print the table."""
    chosen = parser().parse_args(argv)
    found = estimate(Path(chosen.model), chosen.dtypes)
    if chosen.json:
        print(json.dumps(found, indent=2))
        return 0
    largest = f", largest block {found['largest']}" if found["largest"] else ""
    print(f"{found['model']}: {found['parameters']:,} parameters{largest}")
    print(f"{'dtype':<10}{'largest block':>15}{'weights':>12}{'from disk':>12}{'training (Adam)':>18}")
    for row in found["rows"]:
        cells = [row[k] for k in ("block", "weights", "from_disk", "training")]
        print(f"{row['dtype']:<10}" + "".join(f"{_size(c):>{w}}" for c, w in zip(cells, (15, 12, 12, 18), strict=True)))
    print("from disk: two buffers of the largest block, and what is outside of the blocks. training: weights, gradients and")
    print("two moments; in 16 bits with fp32 weights beside them (mixed precision). Activations come on top of all.")
    return 0


def estimate(path: Path, dtypes: list[str]) -> dict[str, Any]:
    """Return the estimate: bytes in each row; None where a format is not one to train in.

    Raises:
        ConfigError: an unknown type, or a path with nothing to estimate.
    """
    names = [_SPELLED.get(d, d) for d in dtypes]
    for name in names:
        if name not in _BITS:
            raise ConfigError(f"--dtypes {name}: expected some of {', '.join(_BITS)}.{suggest(name, _BITS)}")
    total, block, outside, label = _count(path)
    rows = []
    for name in names:
        bits = _BITS[name]
        training = {32: 16, 16: 18}.get(bits)  # bytes a parameter: 4+4+8, and 2+4+4+8 (gradients in fp32)
        rows.append(
            {
                "dtype": name,
                "block": None if block is None else block * bits // 8,
                "weights": total * bits // 8,
                "from_disk": None if block is None or outside is None else (2 * block + outside) * bits // 8,
                "training": None if training is None else total * training,
            }
        )
    return {"model": str(path), "parameters": total, "largest": label, "rows": rows}


def _count(path: Path) -> tuple[int, int | None, int | None, str | None]:
    """Return parameters: of all, of the largest block, outside of the blocks; and that block's class."""
    config = path / "config.json" if path.is_dir() else path
    if config.name.endswith(".json") and not config.name.endswith(".index.json") and config.is_file():
        return _of_model(build(config))
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    if not files or not files[0].is_file():
        raise ConfigError(f"{path} is no config.json, no safetensors file, and no folder with one. Nothing is downloaded.")
    return sum(_in_header(file) for file in files), None, None, None


def _in_header(path: Path) -> int:
    """Count the elements in a safetensors file by its header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100 * 2**20:
            raise CheckpointError(f"{path} is no safetensors file: its header is said to have {length:,} bytes.")
        header = json.loads(file.read(length))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for n in entry["shape"]:
                count *= n
            total += count
    return total


def build(config: Path) -> nn.Module:
    """Build the model of a transformers config without values.

    Raises:
        MissingDependency: transformers is not there. ConfigError: the config names no model that it knows.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    kind = content.get("model_type")
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            f"{config} is a config of transformers, which is not installed: pip install transformers. Safetensors files "
            "are counted without it."
        ) from None
    from ...strategies.offload.empty import init_empty_weights

    known = transformers.CONFIG_MAPPING
    if kind not in known:
        raise ConfigError(f"{config}: model_type {kind!r} is unknown to transformers {transformers.__version__}.")
    made = known[kind].from_dict(content)
    named = (content.get("architectures") or [None])[0]
    with init_empty_weights(include_buffers=True):
        cls = getattr(transformers, named, None) if named else None
        return cls(made) if cls is not None else transformers.AutoModel.from_config(made)


def _of_model(model: nn.Module) -> tuple[int, int, int, str | None]:
    from ...strategies.offload.blocks import choose_blocks

    total = sum(p.numel() for p in model.parameters())
    blocks = [(sum(p.numel() for p in m.parameters()), type(m).__name__) for m in choose_blocks(model).values()]
    sizes = sorted(n for n, _ in blocks)
    usual = sizes[len(sizes) // 2] if sizes else 0
    passing = [b for b in blocks if b[0] <= 2 * usual]  # as placement does it: what is much larger stays
    largest, label = max(passing, default=(0, None))
    return total, largest, total - sum(n for n, _ in passing), label


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / 1e3:.2f} kB"
