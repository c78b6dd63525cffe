"""`drivetrain bench precision mine.py`: every low precision that runs here, on your model, against bf16 and fp32."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...strategies.errors import unknown_name
from .parser import Parser

BENCHMARKS = ("precision",)
_ABOUT = """\
Train a model of yours with every precision that runs on this machine, and compare.

FILE.py has a function make() -> (TrainingModule, training loader); another is named FILE.py:FUNCTION:

    def make(optimizer_bits=None):
        return MyModule(), DataLoader(...)

It is called once for each precision, in a process of its own, with the same seed: the weights and the order of the data are the
same. If it takes optimizer_bits (8, 4 or "fp8"), its optimizer should then be LowBitAdamW(bits=optimizer_bits). A step that
returns {"loss": sum, "num_items": n} is compared per item, and tokens/s are its items.

steps/s   without the first ten steps. On a CPU in CPU time of one thread, so that what else runs does not count; else wall time.
MiB       on a CPU the most that the process held, less what it held before the training; else the most that was allocated.
loss      the mean of the last 20 steps; gap: that less the one of bf16-mixed, and of fp32. furthest: the largest distance of one
          step. Each step's loss is that of other weights: fp32 and bf16 come apart at single steps too. The gap says more.
error     relative error of the output of each converted Linear, on a batch, after the training: the mean and the worst; all of
          them are in the JSON.
What does not run here is listed with what it needs. Losses that agree bit for bit would mean that a precision did nothing; that
is said.
"""


def parser() -> Parser:
    """Return the options of `drivetrain bench`."""
    result = Parser("bench", _ABOUT, usage="drivetrain bench precision FILE.py[:FUNCTION] [options]")
    result.add_argument("benchmark", metavar="precision", help="the one that there is")
    result.add_argument("target", metavar="FILE.py[:FUNCTION]", help="your model and data")
    result.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps of each training (default: 200)")
    result.add_argument("--only", metavar="NAMES", help="precisions, with commas; fp32 and bf16-mixed always run")
    result.add_argument("--table", type=Path, metavar="FILE", help="write the table there too")
    result.add_argument(
        "--json", type=Path, metavar="FILE", help="write all numbers there: losses of every step, errors of every layer"
    )
    result.add_argument("--picture", type=Path, metavar="FILE", help="draw the loss curves (needs matplotlib)")
    result.add_argument("--one", help=argparse.SUPPRESS)  # how it calls itself, in the process of one precision
    return result


def main(argv: list[str]) -> int:
    """Run the comparison; return 0. A precision that cannot run here is no failure."""
    options = parser().parse_args(argv)
    if options.benchmark not in BENCHMARKS:
        raise unknown_name("benchmark", options.benchmark, BENCHMARKS)
    from .. import precision_bench as bench

    if options.one:
        options.json.write_text(json.dumps(bench.run_one(options.one, options.target, options.steps)))
        return 0
    rows = []
    for row in bench.run_all(options.target, options.steps, options.only.split(",") if options.only else ()):
        rows.append(row)
        print(f"{row['name']}: {'done' if 'losses' in row else 'not here'}", file=sys.stderr, flush=True)
    bench.compare(rows)
    about = bench.machine()
    text = f"{', '.join(f'{k} {v}' for k, v in about.items())}; {options.steps} steps\n\n{bench.table(rows)}"
    print(text)
    if options.table:
        options.table.write_text(text + "\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "steps": options.steps, "rows": rows}))
    if options.picture:
        bench.draw(rows, str(options.picture))
    return 0
