"""Memory of lanes that outlives their episodes: a new episode's arrays lie where those of the one before were."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK_BYTES_PER_LANE = 1 << 19
_LINE = 8  # items of 8 bytes in a cache line


class Arena:
    """Hands out memory from large blocks.

    NumPy asks for huge pages where an array has 4 MiB or more. Hundreds of lanes lie on tens of thousands of ordinary
    pages, and a processor knows the addresses of two thousand.
    """

    def __init__(self, lanes: int) -> None:
        """Takes no memory yet."""
        self._block_items = lanes * BLOCK_BYTES_PER_LANE // 8
        self._free = np.empty(0, np.int64)

    def take(self, items: int) -> Array:
        """(items,) int64, not initialised."""
        whole = -(-items // _LINE) * _LINE
        if len(self._free) < whole:
            self._free = np.empty(max(self._block_items, whole), np.int64)
        taken, self._free = self._free[:items], self._free[whole:]
        return taken

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory: a copy takes its own."""
        return {"_block_items": self._block_items, "_free": np.empty(0, np.int64)}


class LaneMemory:
    """One lane's arrays by name, each as long as any episode has needed it."""

    def __init__(self, arena: Arena) -> None:
        """Without arrays."""
        self._arena = arena
        self._arrays: dict[str, Array] = {}

    def room(self, name: str, items: int, dtype: type = np.float64) -> Array:
        """(items,) of a type of 8 bytes: zero where nobody has written yet, else what was there."""
        array = self._arrays.get(name)
        if array is None or len(array) < items:
            array = self._arrays[name] = self._arena.take(items + items // 4)
            array.fill(0)
        return array[:items].view(dtype)

    def keep(self, name: str, array: Array) -> None:
        """Takes an array of this name that has been replaced by a longer one."""
        self._arrays[name] = array.reshape(-1).view(np.int64)
