"""The connections of a client, and the choice of one for each call."""

from itertools import count

from yuan_grpc.client.connections import CALLS_EACH, Connection, Connections


def create_connections(limit: int) -> Connections:
    numbers = count()
    return Connections(lambda: Connection(next(numbers), None), limit)


def channels_of(connections: Connections, calls: int) -> list[int]:
    return [connections.acquire("Generate", "").channel for _ in range(calls)]


def test_calls_one_after_the_other_use_one_connection() -> None:
    connections = create_connections(8)
    for _ in range(3):
        connection = connections.acquire("Generate", "")
        connections.release(connection, "Generate", "")
    assert [connection.channel for connection in connections.opened] == [0]


def test_another_connection_is_opened_when_many_calls_run() -> None:
    connections = create_connections(3)
    assert channels_of(connections, 2 * CALLS_EACH) == [0] * CALLS_EACH + [1] * CALLS_EACH


def test_calls_are_spread_evenly_over_all_connections_that_may_be_opened() -> None:
    connections = create_connections(2)
    channels_of(connections, 2 * CALLS_EACH)
    assert sorted(channels_of(connections, 10)) == [0] * 5 + [1] * 5


def test_abort_uses_the_connection_of_the_call() -> None:
    connections = create_connections(2)
    channels_of(connections, CALLS_EACH)
    call = connections.acquire("GenerateStream", "mine")
    abort = connections.acquire("Abort", "mine")
    assert call.channel == abort.channel == 1
    connections.release(abort, "Abort", "mine")
    connections.release(call, "GenerateStream", "mine")
    assert connections.acquire("Abort", "mine").channel == 0
    assert connections.acquire("Abort", "generated").channel == 0
