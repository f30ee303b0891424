"""The load of an engine in memory that several processes share."""

from yuan_grpc.server.engine.load import EngineLoad, SharedLoadBoard


def test_a_shared_board_has_the_last_load_of_each_rank_for_all_processes() -> None:
    memory = [0.0] * SharedLoadBoard.size(3)
    boards = [SharedLoadBoard(memory) for _ in range(2)]
    assert boards[0].read() == []
    first = EngineLoad(0, 3, 1, 4, 0.25, 4096, 17.5)
    third = EngineLoad(2, 0, 0, 4, 0.0, 4096, 0.0)
    boards[0].post(EngineLoad(max_num_seqs=4))
    boards[1].post(third)
    boards[1].post(first)
    assert boards[0].read() == [first, third]
