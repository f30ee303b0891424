"""The search index for pages in English and Chinese: English words by their stem, Chinese text by pairs of characters.

Sphinx splits one language by spaces, or Chinese with a package that comes as source only. Pairs need no dictionary,
find every word of two characters or more, and are the same in Python and JavaScript.
"""

import re

from sphinx.search import languages
from sphinx.search.en import SearchEnglish

NAME = "en_zh"
_RUN = re.compile("[\u4e00-\u9fff]+|[^\\W\u4e00-\u9fff]+")


def split(text: str) -> list[str]:
    """Return the words of a text, and the overlapping pairs of its Chinese characters."""
    return [part for run in _RUN.findall(text) for part in _pairs(run)]


def _pairs(run: str) -> list[str]:
    if not "\u4e00" <= run[0] <= "\u9fff" or len(run) == 1:
        return [run]
    return [run[start : start + 2] for start in range(len(run) - 1)]


class SearchEnglishAndChinese(SearchEnglish):
    """The search language of Sphinx that uses these words in the index and, in JavaScript, in the query."""

    lang = NAME
    js_splitter_code = """
function splitQuery(query) {
  const runs = query.match(/[\\u4e00-\\u9fff]+|(?:(?![\\u4e00-\\u9fff])[\\p{Letter}\\p{Number}_])+/gu);
  return (runs || []).flatMap((run) => {
    if (!/^[\\u4e00-\\u9fff]{2}/.test(run)) return [run];
    return [...run].slice(1).map((_, start) => run.slice(start, start + 2));
  });
}
"""

    def split(self, input: str) -> list[str]:
        """Return the words of a text of a page."""
        return split(input)


def register() -> str:
    """Make the language known to Sphinx, and return its name."""
    languages[NAME] = SearchEnglishAndChinese
    return NAME
