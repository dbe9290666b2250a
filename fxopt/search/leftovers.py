"""What a trial leaves behind: graph modules hold themselves in cycles, so memory waits for gc."""

from __future__ import annotations

import gc
from types import TracebackType


class Leftovers:
    """Frees what trials left, in a time that doesn't grow with all that was imported.

    The first time everything is looked through; what is still there is set aside until the end of
    the block, so that later times look at what is newer. A process that has set objects aside by
    itself keeps its own choice.
    """

    def __init__(self) -> None:
        self._is_aside = False
        self._is_first = True

    def __enter__(self) -> Leftovers:
        return self

    def free(self) -> None:
        """Free what no one holds any more."""
        gc.collect()
        if self._is_first and not gc.get_freeze_count():
            gc.freeze()
            self._is_aside = True
        self._is_first = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_aside:
            gc.unfreeze()
            self._is_aside = False
