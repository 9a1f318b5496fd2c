"""Words for a tokenizer that breaks them: which of some captions to add, and a copy of the tokenizer that has them.

- Stock tokenizers of transformers: CLIP, BERT, RoBERTa, T5. The copy is one as well and can be saved.
- A word is matched whole, with or without punctuation after it, and in any case if the tokenizer ignores case.

    new_words(["knee, Kellgren-Lawrence grade 3"] * 5, pipe.tokenizer)  # ["kellgren-lawrence"]
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import AddedToken, PreTrainedTokenizerBase

_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def new_words(
    captions: Iterable[str | None],
    tokenizer: PreTrainedTokenizerBase,
    minimum_count: int = 5,
    minimum_pieces: int = 3,
) -> list[str]:
    """The words of captions that a tokenizer breaks into many pieces, the most frequent first.

    A compound counts as one word by its parts without the hyphens, and only if one of them is broken itself: "x-ray"
    is none, nor is "70-year-old". Numbers and single letters are not words. Case is as the tokenizer sees it.

    Args:
        captions: Repetitions count.
        tokenizer: Of the text encoder.
        minimum_count: How often a word must occur, so that there is something to learn it from.
        minimum_pieces: Into how many pieces it must be broken; a word with unknown letters is broken for certain.
    """
    counts: Counter[str] = Counter()
    lower = ignores_case(tokenizer)
    for caption, count in Counter(caption for caption in captions if caption).items():
        for word in _WORD.findall(caption.lower() if lower else caption):
            counts[word] += count
    vocabulary = tokenizer.get_vocab()

    def is_broken(word: str) -> bool:
        parts = [pieces(tokenizer, part) for part in word.split("-") if not part.isdigit()]
        if any(is_unknown(tokenizer, part) for part in parts):
            return True
        return sum(map(len, parts)) >= minimum_pieces and max(map(len, parts)) > 1

    frequent = sorted(
        (word for word, count in counts.items() if count >= minimum_count), key=lambda w: (-counts[w], w)
    )
    # a word that is in the vocabulary as a piece of longer words cannot be a token of its own
    return [
        word
        for word in frequent
        if sum(map(str.isalpha, word)) > 1
        and word not in vocabulary
        and (len(pieces(tokenizer, word)) > 1 or is_unknown(tokenizer, pieces(tokenizer, word)))
        and is_broken(word)
    ]


def pieces(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The token ids of a word inside a sentence."""
    # after a space, as words are: byte-level tokenizers such as RoBERTa's tell the difference
    return tokenizer(f" {word}", add_special_tokens=False, verbose=False).input_ids


def is_unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether the tokenizer has no token for a part of what these ids stand for."""
    return tokenizer.unk_token_id in ids


def ignores_case(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether capital and small letters are the same to a tokenizer."""
    small = pieces(tokenizer, "a")
    return small == pieces(tokenizer, "A") and not is_unknown(tokenizer, small)


def extended_tokenizer(
    original: PreTrainedTokenizerBase, words: Sequence[str], first_id: int
) -> PreTrainedTokenizerBase:
    """A copy that has `words` as tokens from `first_id` on. Raises ValueError for a word that it cannot take."""
    tokenizer = copy.deepcopy(original)
    if hasattr(tokenizer, "_wrap_decode_method_backend_tokenizer"):  # CLIP's readable decoding is lost in the copy
        tokenizer._wrap_decode_method_backend_tokenizer()
    # normalized: matched in the normalised text, hence in any case where the tokenizer ignores case. lstrip: the space
    # before it belongs to the word; byte-level tokenizers would make it a token
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=True) for word in words])
    for token_id, word in enumerate(words, first_id):
        if tokenizer.convert_tokens_to_ids(word) != token_id or pieces(tokenizer, word) != [token_id]:
            reason = "it is a piece of longer words there" if word in original.get_vocab() else "it reads another word"
            raise ValueError(f"the tokenizer cannot take {word!r} as a new word: {reason}")
    return tokenizer
