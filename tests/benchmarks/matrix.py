"""Every strategy against one plain PyTorch loop: a table of strategies x precisions x cases, each cell pass, or refused and why.

    python tests/benchmarks/matrix.py                    all rows, 10 steps each
    python tests/benchmarks/matrix.py --steps 50 --only fsdp:2,pp:2 --json FILE     rows whose names start with one of these

A row is a strategy on some processes, which are forked here and talk over gloo, and a model of contract_models.py; a cell is
a case of contract.py: the losses of all steps and all weights against the plain loop, and a run that goes on from what was saved
half-way against the straight one, bit for bit. The plain loops are run once, for all rows.
What a strategy refuses stands below the table with its sentence. A blank is a case
that the model has not (a window of BatchNorm is not one big batch). The exit code is 1 if any cell fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import run_ranks  # pyright: ignore[reportAttributeAccessIssue]  of tests/, found by the line above
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract import CASES, MIXED, Case, Trained, cases_of, check_strategy, plain_loop
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.tensor_parallel import TensorPlan
from drivetrain.strategies.world import World

SYNCED = {"sync_batchnorm": True}
PIPELINES = ("gpipe", "1f1b", "looped-bfs", "interleaved", "zero-bubble", "zbv", "dualpipev")


@dataclass(frozen=True)
class Row:
    """A strategy on some processes, training a model.

    Attributes:
        options: of the strategy, beside its name.
        note: what they are, in the table.
    """

    strategy: str
    ranks: int
    model: str = "llama"
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.strategy}{self.note and ' ' + self.note} x{self.ranks} {self.model}"


def _rows() -> Iterator[Row]:
    for strategy, ranks in (("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)):
        for model in ("mlp", "llama", "conv"):
            yield Row(strategy, ranks, model)
    yield Row("single", 1, "conv-bn")
    for strategy, ranks in (("ddp", 2), ("fsdp", 2), ("hsdp", 4)):
        yield Row(strategy, ranks, "conv-bn", SYNCED, "sync BN")
    yield Row("single", 2)
    yield Row("hsdp", 2)
    yield Row("tp:2", 2, "mlp", {"tensor_parallel": {"first": "colwise_gather", "second": "rowwise_split"}}, "own plan")
    yield Row("tp:2", 2, "mlp")
    for model in ("llama", "gpt"):
        yield Row("tp:2", 2, model)
        yield Row("tp:2+sp", 2, model)
    yield Row(
        "tp:2", 2, "llama", {"tensor_parallel": TensorPlan(sequence_parallel=True, loss_parallel=True)}, "sp, loss parallel"
    )
    yield Row("tp:4", 4, "llama")
    for method in ("all-gather", "ring", "ulysses"):
        yield Row("cp:2", 2, "llama", {"context_parallel": method}, method)
    for schedule in PIPELINES:
        yield Row("pp:2", 2, "llama", {"pipeline": schedule}, schedule)
    yield Row("fsdp:2+ep:2", 2, "moe")
    yield Row("fsdp:4+ep:2", 4, "moe")
    yield Row("fsdp:2+tp:2+ep:2", 4, "moe")
    for strategy in ("fsdp:2+tp:2", "fsdp:2+tp:2+sp", "fsdp:2+pp:2", "fsdp:2+cp:2", "tp:2+pp:2", "cp:2+tp:2"):
        yield Row(strategy, 4)
    if importlib.util.find_spec("deepspeed") is not None:
        for stage in (1, 2, 3):
            yield Row(f"deepspeed:{stage}", 2)
    yield Row("hsdp:2+tp:2", 8)
    yield Row("fsdp:2+tp:2+pp:2", 8)


# A Llama of two blocks takes half of the time of one of four, which pipelines need.
ROWS: list[Row] = [replace(r, model="llama-2") if r.model == "llama" and "pp" not in r.strategy else r for r in _rows()]
PRECISIONS = ("float64", "fp32", "bf16-mixed")


def truths_of(models: Sequence[str], cases: Sequence[Case]) -> dict[Case, Trained]:
    """What one plain PyTorch loop gives for every case of some models: computed once, for all rows."""
    return {bare: plain_loop(bare) for model in models for bare in dict.fromkeys(map(bare_of, cases_of(model, cases)))}


def bare_of(case: Case) -> Case:
    """The case as the plain loop sees it, which knows of no lower precision."""
    return replace(case, name="", precision=None)


def run_row(row: Row, cases: Sequence[Case], truths: Mapping[Case, Trained]) -> list[tuple[str, str, str, float, float]]:
    """Run all cases on this rank; return (case, outcome, detail, loss error, weight error)."""
    world = World.start("cpu", need_group=True)
    found: list[tuple[str, str, str, float, float]] = []

    def truth(case: Case) -> Trained:
        return truths[bare_of(case)]

    try:
        for case in cases:
            try:
                (result,) = check_strategy(lambda: make_strategy(row.strategy, **row.options), world, cases=[case], truth=truth)
                found.append((case.name, result.outcome, result.detail, result.loss_error, result.weight_error))
            except ConfigError as refusal:  # the string itself
                found.append((case.name, "refused", str(refusal), 0.0, 0.0))
            except AssertionError as failure:
                found.append((case.name, "fail", str(failure).strip(), 0.0, 0.0))
            except Exception as error:  # the other ranks may wait for this one: the row ends here
                found.append((case.name, "fail", f"{type(error).__name__}: {error}"[:300], 0.0, 0.0))
                raise
    finally:
        world.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="beginnings of rows' names, with commas between them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [replace(case, steps=args.steps) for case in (*CASES, *MIXED) if case.models == 1]
    kinds = list(dict.fromkeys(kind_of(case) for case in cases))
    letters = {kind: chr(ord("a") + i) for i, kind in enumerate(kinds)}
    for kind, letter in letters.items():
        print(f"  {letter}  {kind}")
    print(f"\n{'':34}" + "".join(f"{p:<{len(kinds) + 2}}" for p in PRECISIONS) + "largest error of losses, of weights")
    print(f"{'':34}" + "".join(f"{''.join(letters.values()):<{len(kinds) + 2}}" for _ in PRECISIONS))
    records: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    rows = [row for row in ROWS if row.label.startswith(tuple(args.only.split(",")))]
    (truths,) = run_ranks(1, truths_of, list(dict.fromkeys(row.model for row in rows)), cases, timeout=600)
    for row in rows:
        began = time.perf_counter()
        chosen = cases_of(row.model, cases)
        worst = cells_of(row, chosen, truths)
        name = row.label
        records += [dict(zip(("case", "outcome", "detail", "losses", "weights"), c, strict=True)) | {"row": name} for c in worst]
        print(line(name, chosen, worst, kinds, time.perf_counter() - began), flush=True)
        for cell in worst:
            if cell[1] != "pass":
                notes.setdefault(f"{name}: {cell[1]}: {cell[2]}", []).append(cell[0])
    print("\n. pass   - refused   X fail   (blank: the model has no such case)")
    for text, names in notes.items():
        print(f"{text}   ({len(names)} cells)" if names[6:] else f"{text}   ({', '.join(names)})")
    outcomes = [record["outcome"] for record in records]
    print(
        f"{len(outcomes)} cells: " + ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("pass", "refused", "fail"))
    )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
    raise SystemExit(any(r["outcome"] == "fail" for r in records))


def cells_of(row: Row, cases: Sequence[Case], truths: Mapping[Case, Trained]) -> list[tuple[str, str, str, float, float]]:
    """Run a row; of each cell return what the rank says that fared worst. A row that breaks off is one of failed cells."""
    try:
        found = run_ranks(row.ranks, run_row, row, cases, truths, timeout=1200)
    except Exception as error:
        return [(case.name, "fail", f"{type(error).__name__}: {error}"[:300], 0.0, 0.0) for case in cases]
    return [max(cells, key=lambda cell: ("pass", "refused", "fail").index(cell[1])) for cells in zip(*found, strict=True)]


def kind_of(case: Case) -> str:
    """A case without its precision and model."""
    return case.name.split(" ", 1)[1].removesuffix(f" {case.model}")


def line(
    name: str, cases: Sequence[Case], cells: Sequence[tuple[str, str, str, float, float]], kinds: list[str], seconds: float
) -> str:
    marks = {"pass": ".", "refused": "-", "fail": "X"}
    by_precision = {
        p: {kind_of(c): cell for c, cell in zip(cases, cells, strict=True) if c.name.startswith(p)} for p in PRECISIONS
    }
    text = f"{name:<34}"
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
