"""The words of a text in English or Chinese, for the search: in Python for the index, in JavaScript for the query.

English words are split at other signs, Chinese text into pairs of characters, which need no dictionary and find every
word of two characters or more.
"""

import re

_RUN = re.compile("[\u4e00-\u9fff]+|[^\\W\u4e00-\u9fff]+")

JAVASCRIPT = """
function splitQuery(query) {
  const runs = query.match(/[\\u4e00-\\u9fff]+|(?:(?![\\u4e00-\\u9fff])[\\p{Letter}\\p{Number}_])+/gu);
  return (runs || []).flatMap((run) => {
    if (!/^[\\u4e00-\\u9fff]{2}/.test(run)) return [run];
    return [...run].slice(1).map((_, start) => run.slice(start, start + 2));
  });
}
"""
"""The same as `split`, under the name that Sphinx's search calls."""


def split(text: str) -> list[str]:
    """Return the words of a text, and the overlapping pairs of its Chinese characters."""
    return [part for run in _RUN.findall(text) for part in _pairs(run)]


def _pairs(run: str) -> list[str]:
    if not "\u4e00" <= run[0] <= "\u9fff" or len(run) == 1:
        return [run]
    return [run[start : start + 2] for start in range(len(run) - 1)]
