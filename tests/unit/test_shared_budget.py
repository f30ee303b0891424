"""The counts of what requests take, shared by several processes."""

from yuan_grpc.server.core.admission import Cost
from yuan_grpc.server.core.shared_budget import SharedBudget

LIMIT = Cost(10, 1000)


def budgets() -> tuple[SharedBudget, SharedBudget]:
    memory = [0] * SharedBudget.size(2)
    return SharedBudget(memory, 0), SharedBudget(memory, 1)


def test_the_limits_of_the_queue_hold_for_all_processes_together() -> None:
    first, second = budgets()
    assert first.reserve_queue("a", Cost(6, 10), LIMIT) == ""
    assert second.reserve_queue("b", Cost(5, 10), LIMIT) == "the request queue is full (limit 10)"
    assert second.reserve_queue("b", Cost(4, 990), LIMIT) == ""
    assert first.reserve_queue("c", Cost(0, 1), LIMIT) == "the queue of tokens is full (limit 1000)"
    second.release_queue("b", Cost(4, 990))
    assert first.reserve_queue("c", Cost(4, 990), LIMIT) == ""


def test_the_share_of_a_caller_counts_its_requests_in_all_processes() -> None:
    first, second = budgets()
    for budget in (first, second) * 4:
        assert budget.reserve_queue("a", Cost(1, 1), LIMIT) == ""
    assert second.reserve_queue("a", Cost(1, 1), LIMIT) == ""
    assert (
        first.reserve_queue("a", Cost(1, 1), LIMIT)
        == "the request queue has no more for this caller, which has 9 of 10"
    )
    assert first.reserve_queue("b", Cost(1, 1), LIMIT) == ""


def test_the_engine_is_shared_and_a_large_request_may_be_the_last() -> None:
    first, second = budgets()
    assert first.reserve_engine(Cost(9, 10), LIMIT)
    assert second.reserve_engine(Cost(5, 10), LIMIT)
    assert not first.reserve_engine(Cost(1, 1), LIMIT)
    second.release_engine(Cost(5, 10))
    assert first.reserve_engine(Cost(1, 1), LIMIT)


def test_what_a_dead_process_had_taken_is_free_again() -> None:
    first, second = budgets()
    first.reserve_queue("a", Cost(8, 900), LIMIT)
    first.reserve_engine(Cost(8, 900), LIMIT)
    second.reserve_queue("b", Cost(1, 1), LIMIT)
    first.clear()
    assert second.reserve_queue("b", Cost(7, 900), LIMIT) == ""
    assert second.reserve_engine(Cost(1, 1), LIMIT)
    assert second.reserve_queue("c", Cost(9, 1), LIMIT) == "the request queue is full (limit 10)"
