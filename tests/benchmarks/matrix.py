"""Every strategy against one plain PyTorch loop: a table of strategies x precisions x cases, each cell pass, or refused and why.

    python tests/benchmarks/matrix.py                    all rows, 12 steps each
    python tests/benchmarks/matrix.py --steps 50 --only fsdp --json FILE

A row is a strategy on a number of processes, which are forked here and talk over gloo; a cell is a case of contract.py:
the losses of all steps and all weights against the plain loop, and a run that was saved and loaded half-way against the straight
one, bit for bit. What a strategy refuses stands below the table with its sentence. The exit code is 1 if any cell fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import run_ranks
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract import CASES, MIXED, Case, check_strategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.world import World

ROWS: list[tuple[str, int]] = [
    ("single", 1),
    ("single", 2),
    ("ddp", 1),
    ("ddp", 2),
    ("ddp", 4),
    ("fsdp", 1),
    ("fsdp", 2),
    ("fsdp", 4),
    ("fsdp:2", 4),
    ("hsdp", 2),
    ("hsdp", 4),
    ("hsdp:2", 4),
    ("fsdp:2+tp:2", 4),
    ("fsdp:2+pp:2", 4),
    ("fsdp:2+cp:2", 4),
    ("fsdp:2+ep:2", 4),
]
PRECISIONS = ("float64", "fp32", "bf16-mixed")


def run_row(strategy: str, cases: Sequence[Case]) -> list[tuple[str, str, str, float, float]]:
    """Run all cases on this rank; return (case, outcome, detail, loss error, weight error)."""
    world = World.start("cpu", need_group=True)
    found: list[tuple[str, str, str, float, float]] = []
    try:
        for case in cases:
            try:
                (result,) = check_strategy(lambda: make_strategy(strategy), world, cases=[case])
                found.append((case.name, result.outcome, result.detail, result.loss_error, result.weight_error))
            except ConfigError as refusal:  # the string itself
                found.append((case.name, "refused", str(refusal), 0.0, 0.0))
            except AssertionError as failure:
                found.append((case.name, "fail", str(failure).strip(), 0.0, 0.0))
    finally:
        world.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="rows whose strategy starts so")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [replace(case, steps=args.steps) for case in (*CASES, *MIXED)]
    kinds = list(dict.fromkeys(kind_of(case) for case in cases))
    letters = {kind: chr(ord("a") + i) for i, kind in enumerate(kinds)}
    for kind, letter in letters.items():
        print(f"  {letter}  {kind}")
    print(f"\n{'':22}" + "".join(f"{p:<{len(kinds) + 2}}" for p in PRECISIONS) + "largest error of losses, of weights")
    print(f"{'':22}" + "".join(f"{''.join(letters.values()):<{len(kinds) + 2}}" for _ in PRECISIONS))
    records: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    for strategy, ranks in ROWS:
        if strategy.startswith(args.only):
            began = time.perf_counter()
            found = run_ranks(ranks, run_row, strategy, cases, timeout=600)
            worst = [
                max(cells, key=lambda cell: ("pass", "refused", "fail").index(cell[1])) for cells in zip(*found, strict=True)
            ]
            name = f"{strategy} x{ranks}"
            records += [
                dict(zip(("case", "outcome", "detail", "losses", "weights"), c, strict=True)) | {"row": name} for c in worst
            ]
            print(line(name, cases, worst, kinds, time.perf_counter() - began), flush=True)
            for cell in worst:
                if cell[1] != "pass":
                    notes.setdefault(f"{name}: {cell[1]}: {cell[2]}", []).append(cell[0])
    print("\n. pass   - refused   X fail")
    for text, names in notes.items():
        print(f"{text}   ({'all cases' if len(names) == len(cases) else ', '.join(names)})")
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
    raise SystemExit(any(r["outcome"] == "fail" for r in records))


def kind_of(case: Case) -> str:
    """A case without its precision."""
    return case.name.split(" ", 1)[1]


def line(
    name: str, cases: Sequence[Case], cells: Sequence[tuple[str, str, str, float, float]], kinds: list[str], seconds: float
) -> str:
    marks = {"pass": ".", "refused": "-", "fail": "X"}
    by_precision = {
        p: {kind_of(c): cell for c, cell in zip(cases, cells, strict=True) if c.name.startswith(p)} for p in PRECISIONS
    }
    text = f"{name:<22}"
    for precision in PRECISIONS:
        held = by_precision[precision]
        text += f"{''.join(marks[held[k][1]] if k in held else ' ' for k in kinds):<{len(kinds) + 2}}"
    errors = []
    for precision in PRECISIONS:
        passed = [cell for cell in by_precision[precision].values() if cell[1] == "pass"]
        if passed:
            errors.append(f"{precision} {max(c[3] for c in passed):.0e} {max(c[4] for c in passed):.0e}")
    return f"{text}{'   '.join(errors):<70}{seconds:5.0f} s"


if __name__ == "__main__":
    main()
