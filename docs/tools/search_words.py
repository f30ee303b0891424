"""The search language of the site: English words by their stem, and Chinese text.

Sphinx splits one language by spaces, or Chinese with a package that comes as source only.
"""

import words
from sphinx.search import languages
from sphinx.search.en import SearchEnglish

NAME = "en_zh"


class SearchEnglishAndChinese(SearchEnglish):
    """The words in the index and, in JavaScript, in the query."""

    lang = NAME
    js_splitter_code = words.JAVASCRIPT

    def split(self, input: str) -> list[str]:
        """Return the words of a text of a page."""
        return words.split(input)


def register() -> str:
    """Make the language known to Sphinx, and return its name."""
    languages[NAME] = SearchEnglishAndChinese
    return NAME
