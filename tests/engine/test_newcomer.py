"""Mistakes of newcomers that only vLLM's processes find: the cause is still the last line."""

from typing import get_args

import pytest
from newcomer.__main__ import ends_as_expected
from newcomer.cases import CASES, Case
from newcomer.play import play

from yuan_grpc.preflight import flags

pytestmark = pytest.mark.engine

PLAYED = ("cache for no request", "out of memory")
"""One fault of the engine's process and one of a worker's; `python tests/newcomer` plays all cases."""


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in PLAYED])
def test_a_failed_start_ends_with_its_cause(case: Case) -> None:
    result = play(case)
    assert ends_as_expected(case, result), result
    assert result.lines < 13


@pytest.mark.filterwarnings("ignore")  # vLLM's warnings while it is imported
def test_every_flag_and_data_type_of_vllm_is_known() -> None:
    from vllm.config.model import ModelDType
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    assert flags.unknown_flags(list(parser._option_string_actions)) == []
    assert set(flags.DTYPES) == set(get_args(ModelDType))
