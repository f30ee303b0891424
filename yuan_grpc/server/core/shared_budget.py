"""Counts of the sequences and tokens of requests, for processes that serve the same engine."""

from collections.abc import MutableSequence
from zlib import crc32

from yuan_grpc.server.core.admission import Cost, refusal_of

CALLERS = 256
"""Number of classes that callers are counted in. Two callers of the same class share the limit of one."""

_QUEUED, _STARTED, _BY_CALLER = 0, 2, 4
"""Positions of the counts of a process: sequences and tokens of each kind."""
_SIZE = _BY_CALLER + 2 * CALLERS


class SharedBudget:
    """Counts in shared memory; see `Budget`. Each process changes only its own counts, so no lock is needed.

    Two processes that reserve the last part at the same moment both get it, so the limits can be exceeded by one
    request of each process.

    Args:
        memory: numbers in shared memory, `size` of the number of processes, at first 0.
        index: the number of this process.
    """

    poll_seconds: float | None = 0.01

    def __init__(self, memory: MutableSequence[int], index: int) -> None:
        self._memory = memory
        self._first = index * _SIZE

    @staticmethod
    def size(processes: int) -> int:
        """Return the number of shared numbers for this many processes."""
        return processes * _SIZE

    def reserve_queue(self, caller: str, cost: Cost, limit: Cost) -> str:
        """Reserve a part of the queue; see `Budget.reserve_queue`."""
        position = _position(caller)
        if refusal := refusal_of(cost, limit, self._sum(_QUEUED), self._sum(position)):
            return refusal
        self._add(_QUEUED, cost)
        self._add(position, cost)
        return ""

    def release_queue(self, caller: str, cost: Cost) -> None:
        """Release a part of the queue."""
        self._add(_QUEUED, Cost(-cost.sequences, -cost.tokens))
        self._add(_position(caller), Cost(-cost.sequences, -cost.tokens))

    def reserve_engine(self, cost: Cost, limit: Cost) -> bool:
        """Reserve a part of the engine; see `Budget.reserve_engine`."""
        started = self._sum(_STARTED)
        if started.sequences >= limit.sequences or started.tokens >= limit.tokens:
            return False
        self._add(_STARTED, cost)
        return True

    def release_engine(self, cost: Cost) -> None:
        """Release a part of the engine."""
        self._add(_STARTED, Cost(-cost.sequences, -cost.tokens))

    def clear(self) -> None:
        """Release everything that this process had reserved, after its end."""
        self._memory[self._first : self._first + _SIZE] = [0] * _SIZE

    def _sum(self, position: int) -> Cost:
        return Cost(sum(self._memory[position::_SIZE]), sum(self._memory[position + 1 :: _SIZE]))

    def _add(self, position: int, cost: Cost) -> None:
        self._memory[self._first + position] += cost.sequences
        self._memory[self._first + position + 1] += cost.tokens


def _position(caller: str) -> int:
    return _BY_CALLER + 2 * (crc32(caller.encode()) % CALLERS)
