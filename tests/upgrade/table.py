"""The table of the symbols of vLLM that this package uses."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from upgrade.symbols import Use

PATH = Path("docs/vllm-symbols.md")
"""The page with the table, relative to the repository."""

KINDS = {
    "replace": "replaced or checked",
    "add": "added",
    "override": "overridden",
    "attribute": "attribute",
    "import": "imported",
}

HEAD = """\
# Symbols of vLLM

Everything of vLLM that `yuan_grpc` uses, public or private. `make vllm-symbols` writes this page from the source, and
`tests/unit/test_vllm_symbols.py` compares them. A name is private if a part of it begins with an underscore; vLLM does
not promise to keep the others either. `make vllm-next VERSION=0.33.0` compares them with those of another version, and
runs tests with it: see [releasing](releasing.md#try-another-version-of-vllm).

{counts}

## Replaced at run time

The start ends with an error if one of these is missing or has other parameters: see
[decision 0091](decisions/0091-check-replaced-functions.md).

{replaced}

## Used as they are

{used}
"""


def render(uses: Iterable[Use]) -> str:
    """Return the page."""
    by_symbol: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        by_symbol[use.symbol].append(use)
    replaced = {symbol: found for symbol, found in by_symbol.items() if _kinds(found) & {"replace", "add"}}
    used = {symbol: found for symbol, found in by_symbol.items() if symbol not in replaced}
    private = sum(found[0].is_private for found in by_symbol.values())
    counts = f"{len(by_symbol)} symbols, {private} of them private; {len(replaced)} are replaced, checked or added."
    return HEAD.format(counts=counts, replaced=_table(replaced), used=_table(used))


def _table(by_symbol: dict[str, list[Use]]) -> str:
    rows = ["| symbol | private | use | in |", "| --- | --- | --- | --- |"]
    for symbol, uses in sorted(by_symbol.items()):
        kinds = "; ".join(text for kind, text in KINDS.items() if kind in _kinds(uses))
        files = ", ".join(f"`{file.removeprefix('yuan_grpc/')}`" for file in sorted({use.file for use in uses}))
        rows.append(f"| `{symbol}` | {'yes' if uses[0].is_private else ''} | {kinds} | {files} |")
    return "\n".join(rows)


def _kinds(uses: Iterable[Use]) -> set[str]:
    return {use.kind for use in uses}
