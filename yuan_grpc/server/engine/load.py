"""The load of an engine, for balancers and autoscalers."""

from collections.abc import MutableSequence, Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class EngineLoad:
    """The load of one data-parallel rank at its last step.

    Attributes:
        rank: the data-parallel rank.
        num_running: number of choices that are computed.
        num_waiting: number of choices that wait.
        max_num_seqs: maximum number of choices that are computed at a time.
        kv_cache_usage: fraction of the KV cache in use.
        kv_cache_tokens: capacity of the KV cache, in tokens; 0 if unknown.
        tokens_per_second: tokens generated per second, over the last seconds.
    """

    rank: int = 0
    num_running: int = 0
    num_waiting: int = 0
    max_num_seqs: int = 1
    kv_cache_usage: float = 0.0
    kv_cache_tokens: int = 0
    tokens_per_second: float = 0.0


class LoadBoard:
    """The last load of each rank, in one process."""

    def __init__(self) -> None:
        self._loads: dict[int, EngineLoad] = {}

    def post(self, load: EngineLoad) -> None:
        """Replace the load of a rank."""
        self._loads[load.rank] = load

    def read(self) -> Sequence[EngineLoad]:
        """Return the loads, in order of the ranks."""
        return [self._loads[rank] for rank in sorted(self._loads)]


class SharedLoadBoard(LoadBoard):
    """The last load of each rank, for processes that share an engine: it reports each step to one of them only.

    Args:
        memory: numbers in shared memory, `size` of the number of ranks.
    """

    def __init__(self, memory: MutableSequence[float]) -> None:
        self._memory = memory

    @staticmethod
    def size(ranks: int) -> int:
        """Return how many numbers the loads of some ranks take."""
        return ranks * len(_TYPES)

    def post(self, load: EngineLoad) -> None:
        """Replace the load of a rank."""
        first = load.rank * len(_TYPES)
        for index, value in enumerate(astuple(load)):
            self._memory[first + index] = value

    def read(self) -> Sequence[EngineLoad]:
        """Return the loads of the ranks that have been posted, in their order."""
        rows = (self._memory[first : first + len(_TYPES)] for first in range(0, len(self._memory), len(_TYPES)))
        loads = [EngineLoad(*(kind(value) for kind, value in zip(_TYPES, row, strict=True))) for row in rows]
        return [load for load in loads if load.max_num_seqs]


_TYPES = tuple(type(value) for value in astuple(EngineLoad()))


def utilization(loads: Sequence[EngineLoad]) -> float:
    """Return running and waiting choices, divided by the number that is computed at a time."""
    capacity = sum(load.max_num_seqs for load in loads)
    return sum(load.num_running + load.num_waiting for load in loads) / capacity if capacity else 0.0


def kv_cache_usage(loads: Sequence[EngineLoad]) -> float:
    """Return the fraction of the KV cache in use, the mean of all ranks."""
    return sum(load.kv_cache_usage for load in loads) / len(loads) if loads else 0.0
