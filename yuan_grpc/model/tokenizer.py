"""Yuan's tokenizer: the checkpoint's sentencepiece model, with the special tokens as they were in training.

transformers' Llama tokenizer rebuilds merges and ignores scores, and so encodes many texts differently while every
round trip still works; this class asks the sentencepiece library itself. See docs/decisions.md.
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
"""Tokens the sentencepiece model lacks: they take the ids behind its last piece, in this order."""

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
"""Split off the text before the rest is encoded. Neither `<n>` nor `</s>`: their texts were plain text in training."""

HIDDEN = (END_OF_DOCUMENT, PADDING, "<s>", "</s>", "<unk>")
"""What `skip_special_tokens` leaves out; `<sep>` and the code markers are part of an answer and stay."""

UNMERGED, UNMERGED_PIECE = "\n", "<0x0A>"
"""A byte that no piece contains, so that what is behind it is encoded as if within a text."""

_NOT_TEXT = frozenset((*SPECIAL, *HIDDEN))


class YuanTokenizer:
    """vLLM's `TokenizerLike` over a sentencepiece model.

    Args:
        model_file: the checkpoint's `tokenizer.model`.
        truncation_side: which end of a text `truncation` cuts off, "left" or "right".

    Raises:
        ValueError: the model lacks a special token, so it is not a Yuan tokenizer.
    """

    is_fast = False
    # vLLM gives the texts of single tokens back the space that `decode` takes off the first; this is where it looks.
    _vllm_space_marker_cache = SPACE

    def __init__(self, model_file: str | Path, truncation_side: str = "left") -> None:
        # By this name xgrammar looks for it, and takes a tokenizer for sentencepiece's if it is there.
        self.sp_model = SentencePieceProcessor(model_file=str(model_file))
        self.name_or_path = str(Path(model_file).parent)
        self.truncation_side = truncation_side
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        self._pieces: list[str] = [*pieces, *APPENDED]
        self._ids = {piece: token_id for token_id, piece in enumerate(self._pieces)}
        if lacking := [token for token in SPECIAL if token not in self._ids]:
            raise ValueError(f"{model_file} is not a Yuan tokenizer: it has no {lacking[0]}")
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
        """Reads the tokenizer of a checkpoint folder, or of a model id on the hub.

        Raises:
            OSError: there is no `tokenizer.model`.
        """
        found = cached_file(str(path_or_repo_id), MODEL_FILE, revision=revision, cache_dir=download_dir)
        assert found is not None
        return cls(found, truncation_side)

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Text to ids. Each stretch between special tokens gets a leading space of its own, as in training.

        Nothing is added before or behind, whatever `add_special_tokens` says: the model was trained without.
        """
        ids: list[int] = []
        for stretch in self._special.split(text):
            if (special := self._special_ids.get(stretch)) is not None:
                ids.append(special)
            elif stretch:
                ids.extend(self.sp_model.encode(stretch))
        if truncation and max_length is not None and len(ids) > max_length:
            return ids[len(ids) - max_length :] if self.truncation_side == "left" else ids[:max_length]
        return ids

    def encode_word(self, word: str) -> list[list[int]]:
        """The ways a word's tokens can be: where a text or a word begins, behind a space; and within a text.

        Chinese words are mostly of the second kind. `encode` knows the first alone, for it adds a space.
        """
        within = self.encode(f"{UNMERGED}{word}")
        return [self.encode(word), within[within.index(self.sp_model.piece_to_id(UNMERGED_PIECE)) + 1 :]]

    def encode_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """The ids of `encode`, each with its piece and the characters of the text it stands for: from, up to.

        The leading space that `encode` adds to each stretch has no width. The bytes of one character all have its span.
        """
        tokens: list[tuple[int, str, int, int]] = []
        start = 0
        for stretch in self._special.split(text):
            if (special := self._special_ids.get(stretch)) is not None:
                tokens.append((special, stretch, start, start + len(stretch)))
            elif stretch:
                tokens.extend(self._place(stretch, start))
            start += len(stretch)
        return tokens

    def _place(self, stretch: str, start: int) -> Iterator[tuple[int, str, int, int]]:
        # The model's normaliser changes nothing but spaces, so pieces are as long as their characters.
        spelled = SPACE + stretch.replace(" ", SPACE)
        done = missing = 0  # characters of `spelled`; bytes of the next one
        for token_id in self.sp_model.encode(stretch):
            piece, first = self._pieces[token_id], done
            if token_id in self._byte_ids:
                missing = (missing or len(spelled[done].encode())) - 1
                end, done = done + 1, done + (not missing)
            else:
                end = done = done + len(piece)
            yield token_id, piece, start + max(first - 1, 0), start + end - 1

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> BatchEncoding:
        """Encodes one text or several.

        Raises:
            ValueError: a text pair, which this model has no use for.
        """
        if text_pair is not None:
            raise ValueError("`text_pair` is not supported")
        if isinstance(text, str):
            ids = self.encode(text, truncation, max_length)
            return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
        rows = [self.encode(one, truncation, max_length) for one in text]
        return BatchEncoding({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """Ids to text, less the leading space that `encode` put there."""
        ids = [ids] if isinstance(ids, int) else ids
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))
        return text.removeprefix(" ")

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Pieces to the very text they stand for, a leading space included, so that texts can be joined.

        Bytes that are no whole character become U+FFFD.
        """
        return b"".join([self._bytes.get(token, b"") for token in tokens]).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, ids: Sequence[int], skip_special_tokens: bool = False) -> list[str]:
        """Ids to pieces; an id that is no token's gives an empty one."""
        skipped = self._hidden_ids if skip_special_tokens else frozenset()
        known = len(self._pieces)
        return [self._pieces[i] if i < known else "" for i in ids if i not in skipped]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Pieces to ids; an unknown piece gives the id of `<unk>`."""
        unknown = self._ids["<unk>"]
        if isinstance(tokens, str):
            return self._ids.get(tokens, unknown)
        return [self._ids.get(token, unknown) for token in tokens]

    def apply_chat_template(
        self, messages: list[Any], tools: list[dict[str, Any]] | None = None, tokenize: bool = False, **kwargs: Any
    ) -> str | list[int]:
        """A conversation in Yuan's own format: turns joined by `<n>`, and `<sep>` before the answer.

        Raises:
            ValueError: tools, which the model was not trained to call.
        """
        if tools:
            raise ValueError("`tools` are not supported")
        turns = kwargs.get("conversation", messages)
        text = TURN_SEPARATOR.join(turn["content"] for turn in turns) + ANSWER_SEPARATOR
        return self.encode(text) if tokenize else text

    def get_vocab(self) -> dict[str, int]:
        """Piece to id, of all that can be written as text.

        From this vLLM's structured outputs take what may stand in a constrained text: no special token is here, lest
        `.*` be matched by `<pad>`, and no padding row of the embedding.
        """
        return {piece: token_id for piece, token_id in self._ids.items() if piece not in _NOT_TEXT}

    def get_added_vocab(self) -> dict[str, int]:
        """Nothing: no token needs spaces around it when text is put together."""
        return {}

    def num_special_tokens_to_add(self) -> int:
        """None are ever added."""
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
