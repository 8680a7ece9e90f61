"""What a stretch of work took: wall seconds and peak memory, measured."""

import contextlib
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Meter:
    """Context manager; ``seconds`` and ``peak_memory_bytes`` are known after it, or after `stop`.

    Memory is the GPU's where torch uses one (allocated by tensors), else this process's resident memory: the highest in
    this stretch where the kernel lets the mark be reset, else the highest since the process began.
    """

    seconds: float
    peak_memory_bytes: int

    def __enter__(self) -> Self:
        self._gpu = _gpu()
        if self._gpu:
            self._gpu.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")  # resets VmHWM to what is resident now
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the readings."""
        self.seconds = round(time.perf_counter() - self._started, 3)
        self.peak_memory_bytes = int(self._gpu.max_memory_allocated()) if self._gpu else _peak_resident_bytes()

    @property
    def cost(self) -> dict[str, float | int]:
        """Both, as a completion record names them."""
        return {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}


def _gpu() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _peak_resident_bytes() -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
