"""Calibration: the user's own inputs, streamed, from which passes learn the ranges of values.

An iterable that can be iterated again (a list, a DataLoader) is iterated at every pass over it. A
generator can't be, so the first pass writes each batch to a temporary file that has no name, and
later passes read it: memory stays flat in the number of batches either way.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from fxopt.calls import FORMS, check_batches, check_inputs, spread
from fxopt.errors import CalibrationError, InputError, OutsideError
from fxopt.progress import Progress
from fxopt.signature import Signature


class Calibration:
    """Inputs of one captured model, to be streamed as often as passes ask.

    `source` is any iterable of inputs, each a tensor, a tuple of positionals or a dict of keywords,
    and must give the same batches each time it is iterated. `progress` is called with a line now
    and then while batches are streamed. `was_read` tells whether any pass has asked for them.
    Batches for which the model takes another branch than in the captured graph are passed over;
    `instead` stands in where none is left.

    Raises `CalibrationError` when `source` is no iterable of inputs.
    """

    def __init__(
        self,
        source: Iterable[Any],
        signature: Signature,
        progress: Progress | None = None,
        instead: tuple[Tensor, ...] | None = None,
    ) -> None:
        check_batches(source, "calibration=", CalibrationError)
        self.instead = instead
        self._refused = ""
        self.signature = signature
        self.progress = progress
        self.was_read = False
        self.length = _length(source)
        once = iter(source) is source
        self._source: Iterable[Any] = _Spool(source, self._flat) if once else source
        self._is_flat = once

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of each batch in placeholder order, from the first batch on.

        Raises `CalibrationError` for a batch that doesn't fit the model (naming its index), for an
        iterable without any batch, and where there is no room for the temporary file.
        """
        self.was_read = True
        index = -1
        fitting = False
        for index, batch in enumerate(self._source):
            flat = batch if self._is_flat else self._flat(index, batch)
            if flat is not None:
                fitting = True
                yield flat
        if self._refused and not fitting:
            if self.instead is None:
                raise CalibrationError(f"no batch of calibration= can be used: {self._refused}")
            yield self.instead
        elif index < 0:
            raise CalibrationError(
                "calibration= is empty: it gave no batch at all. Give an iterable of inputs, each "
                f"{FORMS}; a generator that was used up before gives nothing."
            )

    def _flat(self, index: int, batch: Any) -> tuple[Tensor, ...] | None:
        check_inputs(batch, f"calibration batch {index}", CalibrationError)
        try:
            return tuple(self.signature.flatten(*spread(batch)))
        except InputError as error:
            if isinstance(error, OutsideError) and error.branch:
                self._refused = str(error)
                return None
            raise CalibrationError(
                f"calibration batch {index} doesn't fit the model: {error}"
            ) from error


class _Spool:
    """The batches of a one-shot iterator, each written as it comes and read back ever after.

    A pass that stops early leaves the rest in the iterator, where the next pass finds it.
    """

    def __init__(
        self, source: Iterable[Any], flat: Callable[[int, Any], tuple[Tensor, ...] | None]
    ) -> None:
        self.source = iter(source)
        self.flat = flat
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        self.ends = [0]
        self.taken = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        index = 0
        while True:
            if index + 1 < len(self.ends):
                yield self._read(index)
            else:
                try:
                    batch = next(self.source)
                except StopIteration:
                    return
                tensors = self.flat(self.taken, batch)
                self.taken += 1
                if tensors is None:
                    continue
                self._write(tensors)
                yield tensors
            index += 1

    def _write(self, tensors: tuple[Tensor, ...]) -> None:
        buffer = io.BytesIO()
        torch.save([tensor.detach().clone() for tensor in tensors], buffer)  # no view of more
        try:
            self.file.seek(self.ends[-1])
            self.file.write(buffer.getbuffer())
            self.file.flush()
        except OSError as error:
            raise CalibrationError(
                f"calibration batch {len(self.ends) - 1} can't be kept for later passes in "
                f"{tempfile.gettempdir()}: {error.strerror}. Give calibration= as a list or "
                "DataLoader, which is iterated again instead."
            ) from error
        self.ends.append(self.ends[-1] + buffer.tell())

    def _read(self, index: int) -> tuple[Tensor, ...]:
        start, end = self.ends[index : index + 2]
        self.file.seek(start)
        return tuple(torch.load(io.BytesIO(self.file.read(end - start)), weights_only=True))


def _length(source: Iterable[Any]) -> int | None:
    """How many batches there are, where the iterable tells; a DataLoader over a stream doesn't."""
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:
        return None
