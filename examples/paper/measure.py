"""What a fusion costs: seconds, and memory beyond what was held before."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from types import TracebackType

import psutil

PERIOD = 0.005  # seconds between two looks at the memory that is held


class Measured:
    """Measures what runs inside a ``with`` statement.

    Attributes
    ----------
    seconds : float
    mebibytes : float
        The largest resident memory, less what was resident before.
    """

    def __enter__(self) -> Measured:
        self.seconds = self.mebibytes = 0.0
        _give_back()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while True:
            held = self._process.memory_info().rss - self._before
            self.mebibytes = max(self.mebibytes, held / 2**20)
            if self._done.wait(PERIOD):
                return


def _give_back() -> None:
    """Return to the system what is held but free, which would hide what is taken next."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
