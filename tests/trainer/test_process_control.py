"""Who does what among the processes: decorators, splitting, waiting, triggers."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.errors import ConfigError


def facts() -> dict[str, Any]:
    accelerator = Accelerator()
    names = ("num_processes", "process_index", "local_process_index", "is_main_process", "is_local_main_process",
             "is_last_process", "use_distributed")  # fmt: skip
    found: dict[str, Any] = {name: getattr(accelerator, name) for name in names}

    def who(value: int = 5) -> int:
        """Doc."""
        return value

    found["on_main"] = accelerator.on_main_process(who)(7)
    found["on_local_main"] = accelerator.on_local_main_process(who)()
    found["on_last"] = accelerator.on_last_process(who)(value=8)
    found["on_1"] = accelerator.on_process(process_index=1)(who)()
    found["on_local_1"] = accelerator.on_local_process(who, local_process_index=1)()
    found["name"] = accelerator.on_main_process(who).__name__
    found["triggers"] = [accelerator.check_trigger()]
    if accelerator.is_last_process:
        accelerator.set_trigger()
    found["triggers"] += [accelerator.check_trigger(), accelerator.check_trigger()]
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return found


def test_each_rank_knows_who_it_is_and_runs_what_is_its(ranks: Any) -> None:
    first, last = ranks(2, facts)
    assert first["num_processes"] == last["num_processes"] == 2
    assert (first["process_index"], last["process_index"]) == (0, 1)
    assert (first["is_main_process"], last["is_main_process"]) == (True, False)
    assert (first["is_local_main_process"], last["is_local_main_process"]) == (True, False)
    assert (first["is_last_process"], last["is_last_process"]) == (False, True)
    assert first["use_distributed"]
    for name, on_first, on_last in (("on_main", 7, None), ("on_local_main", 5, None), ("on_last", None, 8),
                                    ("on_1", None, 5), ("on_local_1", None, 5)):  # fmt: skip
        assert (first[name], last[name]) == (on_first, on_last), name
    assert first["name"] == "who"
    # Raised by the last rank only, seen by all, once.
    assert first["triggers"] == last["triggers"] == [False, True, False]


def first_writes(path: Path) -> tuple[str, str]:
    """The main process writes a file that the others only read."""
    accelerator = Accelerator()
    found = []
    for i, first in enumerate((accelerator.main_process_first, accelerator.local_main_process_first)):
        file = path / str(i)
        with first():
            if accelerator.is_main_process:
                time.sleep(0.2)
                file.write_text("written")
            found.append(file.read_text())
    with contextlib.suppress(RuntimeError), accelerator.main_process_first():
        if accelerator.is_main_process:
            raise RuntimeError("the download failed")
    accelerator.end_training()
    return found[0], found[1]


def test_the_main_process_goes_first_and_its_error_leaves_nobody_waiting(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, first_writes, tmp_path, timeout=20) == [("written", "written")] * 2


def split(inputs: Any) -> tuple[Any, Any]:
    accelerator = Accelerator()
    with accelerator.split_between_processes(inputs) as mine:
        plain = mine
    with accelerator.split_between_processes(inputs, apply_padding=True) as mine:
        padded = mine
    accelerator.end_training()
    return plain, padded


@pytest.mark.parametrize(
    ("inputs", "parts", "padded"),
    [
        (["a", "b", "c"], [["a", "b"], ["c"]], [["a", "b"], ["c", "c"]]),
        ([1, 2, 3, 4], [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ((1, 2, 3), [(1, 2), (3,)], [(1, 2), (3, 3)]),
        ([1], [[1], []], [[1], [1]]),
        ([], [[], []], [[], []]),
        ({"x": [1, 2, 3], "y": ("a", "b", "c")}, [{"x": [1, 2], "y": ("a", "b")}, {"x": [3], "y": ("c",)}],
         [{"x": [1, 2], "y": ("a", "b")}, {"x": [3, 3], "y": ("c", "c")}]),
    ],
)  # fmt: skip
def test_inputs_are_split_into_contiguous_parts(inputs: Any, parts: Any, padded: Any, ranks: Any) -> None:
    """Accelerate 1.15 changes the caller's dict, and cannot pad a tuple."""
    assert ranks(2, split, inputs) == list(zip(parts, padded, strict=True))


def split_tensor() -> tuple[list[int], list[int], list[str]]:
    accelerator = Accelerator()
    given = {"x": torch.arange(5)}
    with accelerator.split_between_processes(given, apply_padding=True) as mine:
        padded = mine["x"].tolist()
    with accelerator.split_between_processes(given["x"]) as mine:
        plain = mine.tolist()
    accelerator.end_training()
    return plain, padded, [f"{len(v)}" for v in given.values()]


def test_tensors_are_split_too_and_the_callers_object_stays(ranks: Any) -> None:
    assert ranks(2, split_tensor) == [([0, 1, 2], [0, 1, 2], ["5"]), ([3, 4], [3, 4, 4], ["5"])]


def test_what_cannot_be_split_is_refused() -> None:
    accelerator = Accelerator()
    with (
        pytest.raises(ConfigError, match=r"values of one length, got lengths \[1, 2\]"),
        accelerator.split_between_processes({"a": [1], "b": [1, 2]}),
    ):
        pass
    with pytest.raises(ConfigError, match="got str"), accelerator.split_between_processes("abc"):
        pass
    with pytest.raises(ConfigError, match="needs the index of the process"):
        accelerator.on_process(lambda: 0)


def test_print_comes_from_the_main_process_only(ranks: Any, tmp_path: Path) -> None:
    def say() -> None:
        accelerator = Accelerator()
        with open(tmp_path / str(accelerator.process_index), "w") as file:
            accelerator.print("hello", file=file)
        accelerator.end_training()

    ranks(2, say)
    assert [(tmp_path / name).read_text() for name in "01"] == ["hello\n", ""]


def test_what_accelerates_state_is_asked_for(tmp_path: Path) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    assert accelerator.state.num_processes == 1
    assert (accelerator.distributed_type, accelerator.mixed_precision, Accelerator().mixed_precision) == ("NO", "bf16", "no")
    accelerator.save({"a": torch.ones(2)}, tmp_path / "a.safetensors", safe_serialization=True)
    accelerator.save([1, 2], tmp_path / "b.pt")
    assert (tmp_path / "a.safetensors").exists()
    assert torch.load(tmp_path / "b.pt", weights_only=True) == [1, 2]


def test_two_ranks_are_distributed(ranks: Any) -> None:
    assert ranks(2, lambda: Accelerator().distributed_type) == ["MULTI_CPU"] * 2
