"""How the samples of a data set with indices become batches: in this process, in workers, or by indexing tensors directly.

    Reading.plain     dataset[i] for each i (or __getitems__, the torch way), then collate_fn
    Reading.__call__  the same with random numbers that depend on the sample alone, this process' generators left as they were
    Reading[request]  what a worker process does: the data set of the torch DataLoader that runs the workers
    TensorReading     TensorDataset and Subsets of it: one index_select a tensor in place of B samples and a collate
All give the same samples in the same order as a plain DataLoader with that sampler.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset, TensorDataset, default_collate, get_worker_info

from ...strategies.errors import DataError
from .collate import in_this_process
from .randomness import Generator, generators, restore, seed_of
from .sharding import Request

__all__ = ["Failure", "Reading", "TensorReading", "WorkerLoader", "WorkerStart", "signals_held_back", "stop_workers"]

_PROBES = 4  # batches that are read with every generator seeded, to learn which the data set uses
_SHOWN = 8  # indices in an error


class Reading:
    """Reads batches from a data set with indices.

    Args:
        mode: "batch": samples of the indices go to `collate_fn` as a list. Without automatic batching (batch_size=None)
            "single": the request's only index, or "whole": its list of indices, is what the data set is asked for.
        seeded: whether random numbers depend on the sample alone; `repeats`: on the position too, when an index may come twice.
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[Any], Any], *, mode: str = "batch", seeded: bool, repeats: bool
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self._collate = in_this_process(collate_fn)
        self.mode = mode
        self.batched = mode == "batch"
        self.seeded = seeded and not draws_nothing(dataset)
        self.repeats = repeats
        # Where __getitems__ would only loop as we do, a loop of ours can seed each sample.
        many = None if _loops(dataset) else getattr(dataset, "__getitems__", None)
        self.many = many if callable(many) and self.batched else None
        self._watch([])  # all of them in a worker and while probing
        self._used: list[Generator] = []
        self._probes = _PROBES

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are spawned: generators belong to a process."""
        return {**self.__dict__, "_watched": [], "_glances": [], "_used": [], "_probes": _PROBES}

    # -- reading ------------------------------------------------------------------------------------------------------
    def plain(self, request: Request) -> Any:
        """Read a batch and leave random numbers alone."""
        indices = request[2]
        data: Any = None
        try:
            if self.many is not None:
                data = self.many(indices)
            elif self.batched:
                data = [self.dataset[sample_index] for sample_index in indices]
            else:
                return self._collate(self.dataset[indices if self.mode == "whole" else indices[0]])
            return self._collate(data)
        except Exception as error:
            raise self._explain(error, indices, data) from error

    def with_seeds(self, request: Request, used: Sequence[Seeded]) -> Any:
        """Read a batch with the generators in `used` seeded before each sample; collate_fn goes on where the last one ended."""
        key, before, indices = request
        data: Any = None
        try:
            if self.many is not None:  # vectorised: one seed, that of the first sample
                _seed(used, seed_of(key, indices[0], before if self.repeats else None))
                data = self.many(indices)
            elif self.mode == "whole":
                _seed(used, seed_of(key, indices[0], before if self.repeats else None))
                return self._collate(self.dataset[indices])
            else:
                data = []
                for offset, sample_index in enumerate(indices):
                    _seed(used, seed_of(key, sample_index, before + offset if self.repeats else None))
                    data.append(self.dataset[sample_index])
            return self._collate(data if self.batched else data[0])
        except Exception as error:
            raise self._explain(error, indices, data) from error

    def __call__(self, request: Request) -> Any:
        """Read a batch in the process that trains, whose random numbers must not notice."""
        if self._probes > 0:
            every = self._watched = self._watched or generators()
            saved = [generator.save() for generator in every]
            try:
                return self._probe(request, every)
            finally:
                restore(every, saved)
        used, glances = self._used, self._glances
        before = [glance() for glance in glances]
        if before != self._seen:  # somebody else has drawn since the last batch
            for i, glance in enumerate(before):
                if glance != self._seen[i]:
                    self._marks[i] = self._watched[i].mark()
            self._seen = before
        if used:
            saved = [generator.save() for generator in used]
            try:
                batch = self.with_seeds(request, used)
            finally:
                restore(used, saved)
        else:
            batch = self.plain(request)
        return batch if [glance() for glance in glances] == before else self._again(request)

    def _again(self, request: Request) -> Any:
        """The data set draws after all: undo, and read with the generators that it moved seeded as well."""
        for generator, mark, seen in zip(self._watched, self._marks, self._seen, strict=True):
            if generator.glance() != seen:
                generator.put_back(mark)
                self._used.append(generator)
        self._watch([generator for generator in self._watched if generator not in self._used])
        return self(request)

    def _watch(self, watched: list[Generator]) -> None:
        self._watched, self._glances = watched, [generator.glance for generator in watched]
        self._seen: list[Any] = [None] * len(watched)
        self._marks: list[Any] = [None] * len(watched)

    def _probe(self, request: Request, every: Sequence[Generator]) -> Any:
        """Read a batch with all generators seeded, and note which ones it moves."""
        self._probes -= 1
        seen: list[Any] = []
        moved: list[Generator] = []

        def note() -> None:
            moved.extend(generator for generator, glance in zip(every, seen, strict=False) if generator.glance() != glance)

        def seed(value: int) -> None:
            note()
            _seed(every, value)
            seen[:] = [generator.glance() for generator in every]

        batch = self.with_seeds(request, [_Seeder(seed)])
        note()
        for generator in every:
            if generator in moved and generator not in self._used:
                self._used.append(generator)
        if self._probes == 0:
            self._watch([generator for generator in every if generator not in self._used])
        return batch

    def __getitem__(self, request: Request) -> Any:
        """Read a batch in a worker. What goes wrong is handed over as a value: torch would wrap it in three tracebacks."""
        self._collate = self.collate_fn
        try:
            if not self.seeded:
                return self.plain(request)
            self._watched = self._watched or generators()
            return self.with_seeds(request, self._watched)
        except DataError as error:
            return Failure(str(error), traceback.format_exc())

    # -- errors -------------------------------------------------------------------------------------------------------
    def _explain(self, error: Exception, indices: list[Any], data: Any) -> DataError:
        name = type(self.dataset).__name__
        info = get_worker_info()
        where = f" (worker {info.id})" if info is not None else ""
        said = f"{type(error).__name__}: {error}"
        shown = ", ".join(map(str, indices[:_SHOWN])) + (", ..." if len(indices) > _SHOWN else "")
        if isinstance(data, list) and len(data) == len(indices):
            missing = next((index for index, item in zip(indices, data, strict=True) if item is None), None)
            if missing is not None:
                return DataError(
                    f"Sample {missing} of {name}{where} is None. Expected data: a __getitem__ without a return gives None."
                )
            return DataError(
                f"The samples {shown} of {name}{where} do not make a batch: {said} Expected samples of the same structure and "
                "shapes. "
                "Pad them in the data set, or give the DataLoader a collate_fn that does."
            )
        sample = _sample_being_read(error.__traceback__)
        what = f"Sample {sample}" if sample is not None else f"One of the samples {shown}"
        return DataError(
            f"{what} of {name}{where} could not be read: {said} Repair the sample, or leave its index out "
            "(torch.utils.data.Subset)."
        )


class Seeded(Protocol):
    """What can be seeded."""

    @property
    def seed(self) -> Callable[[int], Any]: ...


class _Seeder:
    """Stands for all generators during the probe."""

    def __init__(self, seed: Callable[[int], None]) -> None:
        self.seed = seed


def _seed(used: Sequence[Seeded], value: int) -> None:
    for generator in used:
        generator.seed(value)


def _sample_being_read(trace: TracebackType | None) -> Any:
    """Find the index in the frames of an error: a loop that kept it would cost every sample something."""
    while trace is not None:
        code, variables = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code.co_filename == __file__ and "sample_index" in variables:
            return variables["sample_index"]
        trace = trace.tb_next
    return None


class Failure:
    """What a worker hands over in place of a batch that it could not read."""

    def __init__(self, message: str, trace: str) -> None:
        self.message = message
        self.trace = trace

    def error(self) -> DataError:
        """The error for the process that trains; the worker's traceback is a note on it."""
        error = DataError(self.message)
        error.add_note("In the worker:\n" + self.trace)
        return error


def draws_nothing(dataset: Any) -> bool:
    """Whether reading `dataset` can draw no random numbers: containers of torch, and python's own."""
    kind = type(dataset)
    if kind is Subset:
        return draws_nothing(dataset.dataset)
    if kind is ConcatDataset:
        return all(map(draws_nothing, dataset.datasets))
    if kind is StackDataset:
        inner = dataset.datasets
        return all(map(draws_nothing, inner.values() if isinstance(inner, dict) else inner))
    return kind in (TensorDataset, list, tuple, range, Tensor) or kind.__module__ == "numpy"


def _loops(dataset: Any) -> bool:
    """Whether `dataset` reads its samples one by one, `__getitems__` or not."""
    kind = type(dataset)
    if kind is Subset:
        return _loops(dataset.dataset)
    if kind is StackDataset:
        inner = dataset.datasets
        return all(map(_loops, inner.values() if isinstance(inner, dict) else inner))
    return not callable(getattr(dataset, "__getitems__", None))


# -- tensors ----------------------------------------------------------------------------------------------------------
class TensorReading:
    """The batches of a TensorDataset: what default_collate would stack, taken from each tensor at once."""

    def __init__(self, tensors: tuple[Tensor, ...], selection: Tensor | None) -> None:
        self.tensors = tensors
        self.selection = selection
        """The indices of the Subset, if it is one."""

    @classmethod
    def of(cls, dataset: Any, collate_fn: Any) -> TensorReading | None:
        """Return how to read `dataset` this way, or None: another class, other tensors than plain ones, or its own collate_fn."""
        selection: Tensor | None = None
        if collate_fn is not default_collate:
            return None
        while type(dataset) is Subset:
            try:
                inner = torch.as_tensor(dataset.indices, dtype=torch.int64)
                size = len(dataset.dataset)  # pyright: ignore[reportArgumentType]
            except (TypeError, ValueError, RuntimeError):
                return None
            inner = torch.where(inner < 0, inner + size, inner)
            selection = inner if selection is None else inner[selection]
            dataset = dataset.dataset
        if type(dataset) is not TensorDataset or not all(map(_is_plain, dataset.tensors)):
            return None
        return cls(dataset.tensors, selection)

    def resolve(self, indices: Tensor | list[Any]) -> Tensor:
        """Return an epoch's indices into the tensors."""
        found = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(indices, list):
            size = len(self.tensors[0]) if self.selection is None else len(self.selection)
            found = torch.where(found < 0, found + size, found)
        return found if self.selection is None else self.selection[found]

    def batches(self, index_tensors: Iterator[Tensor]) -> Iterator[list[Tensor]]:
        """Yield a batch for each tensor of indices: new memory, as stacking would give."""
        tensors = self.tensors
        for index in index_tensors:
            yield [tensor.index_select(0, index) for tensor in tensors]


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.requires_grad
        and not tensor.is_quantized
    )


# -- workers ----------------------------------------------------------------------------------------------------------
class WorkerLoader(DataLoader[Any]):
    """The torch DataLoader that runs workers (and pins memory): its data set is a `Reading`, its sampler gives requests."""

    def __init__(self, reading: Reading, requests: Any, loader: DataLoader[Any]) -> None:
        """`requests` is iterated once a pass; everything else is as the user's `loader` has it."""
        super().__init__(
            reading if loader.num_workers else _Here(reading),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=requests,
            num_workers=loader.num_workers,
            collate_fn=_as_it_is,
            # torch warns at every pass when there is nothing to pin for; the user's own loader has said so.
            pin_memory=loader.pin_memory and torch.accelerator.is_available(),
            timeout=loader.timeout,
            worker_init_fn=WorkerStart(loader.worker_init_fn) if loader.num_workers else None,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),
            prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
            persistent_workers=loader.persistent_workers,
        )

    def check_worker_number_rationality(self) -> None:
        """Nothing: the user's own loader has said what there is to say."""


class _Here:
    """Reads in the process that trains (no workers, memory pinned all the same)."""

    def __init__(self, reading: Reading) -> None:
        self.read = reading if reading.seeded else reading.plain

    def __getitem__(self, request: Request) -> Any:
        return self.read(request)


def stop_workers(batches: Any) -> None:
    """Let the workers of a DataLoader's iterator end now. Left to the garbage collector after an error they take 5 s."""
    shutdown = getattr(batches, "_shutdown_workers", None)  # torch's own, of 2.x: without it only the 5 s are lost
    if shutdown is not None:
        shutdown()


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_trainer() -> None:
    """Ctrl-C, and what a job system sends to the whole process group, are for the trainer, who still needs its workers."""
    ignored = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        # SIGTERM cannot just be ignored: at its exit Python sends it to the workers that are left, and waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_the_parent_only, name="sigterm", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)


def _obey_the_parent_only() -> None:
    # A trainer that was killed says nothing. torch's workers look for that too, every 5 s and only between two batches; and never
    # notice if it was before their first look, so who the trainer is must be known from before the fork.
    parent, process = os.getppid(), multiprocessing.parent_process()
    trainer = parent if process is None or process.pid is None else process.pid  # another one with a fork server between them
    while os.getppid() == parent and (parent == trainer or _exists(trainer)):
        told = signal.sigtimedwait([signal.SIGTERM], 0.5)  # pyright: ignore[reportAttributeAccessIssue]
        if told is not None and told.si_pid in (parent, trainer):
            break
    os._exit(0)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Start workers inside: signals wait until they know what to ignore, and the trainer gets its own a moment later."""
    if not hasattr(signal, "sigtimedwait"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerStart:
    """Runs first in each worker, before the user's worker_init_fn."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        _leave_signals_to_the_trainer()
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, Reading):
            # Users open files on get_worker_info().dataset here; they mean their own data set.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.then is not None:
            self.then(worker_id)
