"""Yuan's tokenizer: the checkpoint's sentencepiece model, with the special tokens as in training.

The Llama tokenizer of transformers rebuilds the merges and ignores the scores. It encodes many texts differently, which
round trips do not reveal. This class calls the sentencepiece library. See docs/decisions/0001-exact-tokenizer.md.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from sentencepiece import SentencePieceProcessor
from transformers import BatchEncoding
from transformers.utils import cached_file

MODEL_FILE = "tokenizer.model"
END_OF_DOCUMENT = "<eod>"
PADDING = "<pad>"
TURN_SEPARATOR = "<n>"
ANSWER_SEPARATOR = "<sep>"
SPACE = "▁"

APPENDED = ("<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>")
"""Tokens that the sentencepiece model lacks. Their ids follow its last piece, in this order."""

SPECIAL = (
    END_OF_DOCUMENT,
    ANSWER_SEPARATOR,
    PADDING,
    *APPENDED,
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<s>",
    "<unk>",
)
"""Tokens recognized in a text before encoding. `<n>` and `</s>` are not: in training they were encoded as text."""

HIDDEN = (END_OF_DOCUMENT, PADDING, "<s>", "</s>", "<unk>")
"""Tokens that `skip_special_tokens` removes. `<sep>` and the code markers are part of a response and are kept."""

UNMERGED, UNMERGED_PIECE = "\n", "<0x0A>"
"""A byte that appears in no multi-character piece, so text after it is encoded as in the middle of a text."""

CHAT_TEMPLATE = (
    f"{{{{ messages | map(attribute='content') | join('{TURN_SEPARATOR}') }}}}"
    f"{{% if add_generation_prompt is not defined or add_generation_prompt %}}{ANSWER_SEPARATOR}{{% endif %}}"
)
"""`YuanTokenizer.apply_chat_template` in Jinja, for programs that format conversations themselves."""

_NOT_TEXT = frozenset((*SPECIAL, *HIDDEN))


class YuanTokenizer:
    """A sentencepiece model that implements vLLM's `TokenizerLike`.

    Args:
        model_file: The checkpoint's `tokenizer.model`.
        truncation_side: The end of a text that `truncation` removes, "left" or "right".

    Raises:
        ValueError: The model lacks a special token, so it is not a Yuan tokenizer.
    """

    is_fast = False
    # vLLM reads this to restore the leading space of a single token, which `decode` removes.
    _vllm_space_marker_cache = SPACE

    def __init__(self, model_file: str | Path, truncation_side: str = "left") -> None:
        # xgrammar identifies sentencepiece tokenizers by this attribute.
        self.sp_model = SentencePieceProcessor(model_file=str(model_file))
        self.name_or_path = str(Path(model_file).parent)
        self.truncation_side = truncation_side
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        self._pieces: list[str] = [*pieces, *APPENDED]
        self._ids = {piece: token_id for token_id, piece in enumerate(self._pieces)}
        if missing := [token for token in SPECIAL if token not in self._ids]:
            raise ValueError(f"{model_file} is not a Yuan tokenizer: it has no {missing[0]}")
        self._bytes = {piece: piece.replace(SPACE, " ").encode() for piece in self._pieces}
        self._byte_ids = frozenset(i for i in range(len(pieces)) if self.sp_model.is_byte(i))
        self._bytes |= {pieces[i]: bytes([int(pieces[i][3:-1], 16)]) for i in self._byte_ids}
        self._special = re.compile("(" + "|".join(sorted(map(re.escape, SPECIAL), key=len, reverse=True)) + ")")
        self._special_ids = {token: self._ids[token] for token in SPECIAL}
        self._hidden_ids = frozenset(self._ids[token] for token in HIDDEN)
        self.max_chars_per_token = max(map(len, self._pieces))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *args: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        truncation_side: str = "left",
        **kwargs: Any,
    ) -> "YuanTokenizer":
        """Load the tokenizer of a checkpoint folder or of a model id on the hub.

        Raises:
            OSError: `tokenizer.model` does not exist.
        """
        model_file = cached_file(str(path_or_repo_id), MODEL_FILE, revision=revision, cache_dir=download_dir)
        assert model_file is not None
        return cls(model_file, truncation_side)

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Convert text to ids. Each segment between special tokens gets a leading space, as in training.

        No token is added at either end, even with `add_special_tokens`, because the model was trained without any.
        """
        ids: list[int] = []
        for segment in self._special.split(text):
            if (special := self._special_ids.get(segment)) is not None:
                ids.append(special)
            elif segment:
                ids.extend(self.sp_model.encode(segment))
        if truncation and max_length is not None and len(ids) > max_length:
            return ids[len(ids) - max_length :] if self.truncation_side == "left" else ids[:max_length]
        return ids

    def encode_word(self, word: str) -> list[list[int]]:
        """Return the two encodings of a word: after a space or at the beginning of a text, and inside a text.

        Chinese words mostly have the second one. `encode` returns only the first one, because it adds a space.
        """
        within = self.encode(f"{UNMERGED}{word}")
        return [self.encode(word), within[within.index(self.sp_model.piece_to_id(UNMERGED_PIECE)) + 1 :]]

    def encode_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Return the ids of `encode`, each with its piece and the start and end of its characters in the text.

        The leading space that `encode` adds to each segment has no width. The bytes of a character all have its span.
        """
        tokens: list[tuple[int, str, int, int]] = []
        start = 0
        for segment in self._special.split(text):
            if (special := self._special_ids.get(segment)) is not None:
                tokens.append((special, segment, start, start + len(segment)))
            elif segment:
                tokens.extend(self._segment_offsets(segment, start))
            start += len(segment)
        return tokens

    def _segment_offsets(self, segment: str, start: int) -> Iterator[tuple[int, str, int, int]]:
        # The model's normalizer changes spaces only, so a piece has as many characters as its text.
        normalized = SPACE + segment.replace(" ", SPACE)
        position = remaining = 0  # in characters of `normalized`; bytes of the character at `position`
        for token_id in self.sp_model.encode(segment):
            piece, first = self._pieces[token_id], position
            if token_id in self._byte_ids:
                remaining = (remaining or len(normalized[position].encode())) - 1
                end, position = position + 1, position + (not remaining)
            else:
                end = position = position + len(piece)
            yield token_id, piece, start + max(first - 1, 0), start + end - 1

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> BatchEncoding:
        """Encode one text or several.

        Raises:
            ValueError: A text pair was given, which this model does not support.
        """
        if text_pair is not None:
            raise ValueError("`text_pair` is not supported")
        if isinstance(text, str):
            ids = self.encode(text, truncation, max_length)
            return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
        rows = [self.encode(one, truncation, max_length) for one in text]
        return BatchEncoding({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """Convert ids to text, without the leading space that `encode` adds."""
        ids = [ids] if isinstance(ids, int) else ids
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))
        return text.removeprefix(" ")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes that a token adds to a text; none for an unknown id."""
        (piece,) = self.convert_ids_to_tokens([token_id], skip_special_tokens) or [""]
        return self._bytes.get(piece, b"")

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Convert pieces to their exact text, including a leading space, so that texts can be joined.

        Bytes of incomplete characters become U+FFFD.
        """
        return b"".join([self._bytes.get(token, b"") for token in tokens]).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, ids: Sequence[int], skip_special_tokens: bool = False) -> list[str]:
        """Convert ids to pieces; unknown ids become empty pieces."""
        skipped = self._hidden_ids if skip_special_tokens else frozenset()
        known = len(self._pieces)
        return [self._pieces[i] if i < known else "" for i in ids if i not in skipped]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Convert pieces to ids; unknown pieces get the id of `<unk>`."""
        unknown = self._ids["<unk>"]
        if isinstance(tokens, str):
            return self._ids.get(tokens, unknown)
        return [self._ids.get(token, unknown) for token in tokens]

    def apply_chat_template(
        self, messages: list[Any], tools: list[dict[str, Any]] | None = None, tokenize: bool = False, **kwargs: Any
    ) -> str | list[int]:
        """Format a conversation as in training: turns joined by `<n>`, and `<sep>` before the response.

        Raises:
            ValueError: Tools were given, which the model was not trained to call.
        """
        if tools:
            raise ValueError("`tools` are not supported")
        turns = kwargs.get("conversation", messages)
        text = TURN_SEPARATOR.join(turn["content"] for turn in turns) + ANSWER_SEPARATOR
        return self.encode(text) if tokenize else text

    def describe(self) -> dict[str, Any]:
        """Return the special tokens and the chat template, under the names of `tokenizer_config.json`."""
        return {
            "tokenizer_class": type(self).__name__,
            "bos_token": END_OF_DOCUMENT,
            "eos_token": END_OF_DOCUMENT,
            "pad_token": PADDING,
            "unk_token": "<unk>",
            "add_bos_token": False,
            "add_eos_token": False,
            "chat_template": CHAT_TEMPLATE,
        }

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all pieces that represent text.

        vLLM's structured outputs allow these in a constrained text. Special tokens and padding rows of the embedding
        are excluded, so that `.*` does not match `<pad>`.
        """
        return {piece: token_id for piece, token_id in self._ids.items() if piece not in _NOT_TEXT}

    def get_added_vocab(self) -> dict[str, int]:
        """Return no tokens: none needs spaces around it when text is joined."""
        return {}

    def num_special_tokens_to_add(self) -> int:
        """Return 0: no special tokens are added."""
        return 0

    @property
    def all_special_tokens(self) -> list[str]:
        return list(HIDDEN)

    @property
    def all_special_ids(self) -> list[int]:
        return [self._ids[token] for token in HIDDEN]

    @property
    def bos_token_id(self) -> int:
        return self._ids[END_OF_DOCUMENT]

    @property
    def eos_token_id(self) -> int:
        return self._ids[END_OF_DOCUMENT]

    @property
    def pad_token_id(self) -> int:
        return self._ids[PADDING]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def max_token_id(self) -> int:
        return len(self._pieces) - 1

    def __len__(self) -> int:
        return len(self._pieces)
