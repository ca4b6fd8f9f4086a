"""Global memory and LDS of the emulator: every byte knows whether it exists, whether it was written, and by whom."""

from __future__ import annotations

import numpy as np

from .arithmetic import Array

# Where the first tensor lies. Nothing is below, so that a null pointer and small offsets from it are faults.
BASE = 1 << 40
# Bytes between tensors, which no access may touch.
GUARD = 4096
ABSENT, UNWRITTEN, WRITTEN = 0, 1, 2


class FaultError(Exception):
    """What no GPU is asked to do: an access out of bounds, a race, a load of what nothing wrote, a missing wait."""


class Memory:
    """Global memory: tensors with guards between them."""

    def __init__(self) -> None:
        self.data = np.zeros(GUARD, np.uint8)
        self.state = np.full(GUARD, ABSENT, np.uint8)

    def place(self, size: int, content: Array | None = None) -> int:
        """Room for ``size`` bytes, at a multiple of 256 as allocators give it; its address. Without content it is not
        written yet."""
        at = len(self.data)
        room = -(-(size + GUARD) // 256) * 256
        self.data = np.concatenate([self.data, np.zeros(room, np.uint8)])
        self.state = np.concatenate([self.state, np.full(room, ABSENT, np.uint8)])
        self.state[at : at + size] = UNWRITTEN if content is None else WRITTEN
        if content is not None:
            self.data[at : at + size] = content
        return BASE + at

    def read(self, address: int, size: int) -> tuple[Array, Array]:
        """(bytes, whether each was written) of a tensor."""
        at = address - BASE
        return self.data[at : at + size].copy(), self.state[at : at + size] == WRITTEN

    def _places(self, addresses: Array, size: int, what: str) -> tuple[Array, int]:
        """(indices ``[n, size / unit]`` in units, the unit's bytes) of accesses of ``size`` bytes each."""
        unit = min(size, 4)
        at = addresses.astype(np.int64) - BASE
        if (outside := (at < 0) | (at + size > len(self.data))).any():
            raise FaultError(f"{what} of {size} bytes at {addresses[outside][0]:#x}, which is out of bounds")
        if (at % unit).any():
            raise FaultError(
                f"{what} of {size} bytes at {addresses[(at % unit) != 0][0]:#x}, which is not aligned to {unit}"
            )
        places = (at // unit)[:, None] + np.arange(size // unit)
        state = self.state.view(f"u{unit}")[places]
        lowest = np.minimum.reduce([state >> (8 * i) & 0xFF for i in range(unit)])
        if (outside := lowest == ABSENT).any():
            raise FaultError(f"{what} of {size} bytes at {addresses[outside.any(1)][0]:#x}, which is out of bounds")
        if what == "load" and (unwritten := lowest == UNWRITTEN).any():
            raise FaultError(f"load of {size} bytes at {addresses[unwritten.any(1)][0]:#x}, which nothing has written")
        return places, unit

    def load(self, addresses: Array, size: int) -> Array:
        """``[n, units]`` of 1, 2 or 4 bytes."""
        places, unit = self._places(addresses, size, "load")
        return self.data.view(f"u{unit}")[places]

    def store(self, addresses: Array, values: Array, size: int) -> None:
        places, unit = self._places(addresses, size, "store")
        self.data.view(f"u{unit}")[places] = values
        self.state.view(f"u{unit}")[places] = WRITTEN * (0x01010101 & ((1 << 8 * unit) - 1))


class Lds:
    """The LDS of several workgroups, and who touched which byte since which barrier.

    A race is an access to a byte that another wave has written, or a write to one that another wave has read or
    written, with no barrier between the two. A write of the content that a byte has is none.
    """

    def __init__(self, groups: int, size: int) -> None:
        self.size = size
        self.data = np.zeros(groups * size, np.uint8)
        self.writer = np.full(groups * size, -1, np.int32)  # wave; -1: nobody yet
        self.written = np.full(groups * size, -1, np.int32)  # barriers that the writer had passed
        self.reader = np.full(groups * size, -1, np.int32)  # wave; -2: several since the same barrier
        self.read = np.full(groups * size, -1, np.int32)

    def _places(self, groups: Array, addresses: Array, size: int, what: str) -> Array:
        if (outside := addresses + size > self.size).any():
            raise FaultError(f"{what} of {size} bytes at {addresses[outside][0]:#x} of {self.size} bytes of LDS")
        unit = min(size, 4) if size < 8 else 8 if size == 8 else 16
        if (odd := addresses % unit != 0).any():
            raise FaultError(f"{what} of {size} bytes at {addresses[odd][0]:#x} of LDS, which is not aligned to {unit}")
        return (groups * self.size + addresses)[:, None] + np.arange(size)

    def load(self, groups: Array, waves: Array, barriers: Array, addresses: Array, size: int) -> Array:
        """Bytes ``[n, size]`` for n lanes of these workgroups and waves, which have passed so many barriers."""
        at = self._places(groups, addresses, size, "load")
        waves, barriers = waves[:, None], barriers[:, None]
        if (self.writer[at] == -1).any():
            raise FaultError(f"load of {size} bytes of LDS that no wave has written")
        if (race := (self.written[at] == barriers) & (self.writer[at] != waves)).any():
            lane = race.any(1).argmax()
            raise FaultError(
                f"race: wave {waves[lane, 0]} loads LDS {addresses[lane]:#x} with no barrier since its writing"
            )
        others = (self.read[at] == barriers) & (self.reader[at] != waves)
        self.reader[at] = np.where(others, -2, waves)
        self.reader[at] = np.where(self.reader[at] == waves, waves, -2)  # two waves at once
        self.read[at] = barriers
        return self.data[at]

    def store(self, groups: Array, waves: Array, barriers: Array, addresses: Array, values: Array) -> None:
        at = self._places(groups, addresses, values.shape[1], "store")
        waves, barriers = waves[:, None], barriers[:, None]
        changes = (self.data[at] != values) | (self.writer[at] == -1)
        race = (self.written[at] == barriers) & (self.writer[at] != waves)
        race |= (self.read[at] == barriers) & (self.reader[at] != waves)
        if (race & changes).any():
            lane = (race & changes).any(1).argmax()
            raise FaultError(
                f"race: wave {waves[lane, 0]} stores to LDS {addresses[lane]:#x}, no barrier since its use"
            )
        self.data[at], self.writer[at], self.written[at] = values, waves, barriers
        if (lost := self.data[at] != values).any():
            raise FaultError(f"race: two lanes store different bytes to LDS {addresses[lost.any(1)][0]:#x} at once")
