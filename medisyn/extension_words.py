"""Words that a pipeline's tokenizer never had: one token each, in a block of rows beside the text encoder's embedding.

- A part of `medisyn.extension`, which describes extensions and takes them off again.

    extend_words(pipe, new_words(captions, pipe.tokenizer), "knee")
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .extension_layers import ExtendedEmbedding, ExtensionBlock, check_name, distinct_words, word_wrapper
from .pipelines.medisyn_pipeline import MediSynPipeline
from .words import extended_tokenizer, ignores_case, is_unknown, pieces

logger = logging.getLogger(__name__)


def extend_words(pipe: MediSynPipeline, words: Sequence[str], name: str = "default") -> list[str]:
    """Make each word one token of a pipeline, if it is not yet.

    Args:
        pipe: Its text encoder is changed in place; it gets a changed copy of its tokenizer.
        words: In any case where the tokenizer ignores case.
        name: Of the extension.

    Returns:
        The words that were added, as the tokenizer sees them.

    Raises:
        ValueError: A pipeline without a text encoder, or a word that the tokenizer cannot take.
    """
    check_name(pipe, name, 1)
    if pipe.text_encoder is None:
        raise ValueError("this pipeline has no text encoder that could learn words")
    wrapper = word_wrapper(pipe)
    tokenizer = wrapper.tokenizer if wrapper else pipe.tokenizer
    table = (wrapper.original if wrapper else pipe.text_encoder.get_input_embeddings()).weight.detach()
    lower = ignores_case(tokenizer)
    vectors = {}
    for word in dict.fromkeys(word.strip().lower() if lower else word.strip() for word in words):
        now, parts = pieces(pipe.tokenizer, word), pieces(tokenizer, word)
        if not parts:
            raise ValueError(f"{word!r} is not a word: the tokenizer finds nothing in it")
        if len(now) > 1 or is_unknown(pipe.tokenizer, now):
            vectors[word] = table[torch.tensor(parts, device=table.device)].float().mean(dim=0)
    if vectors:
        attach_words(pipe, vectors, name)
    return list(vectors)


def attach_words(pipe: MediSynPipeline, vectors: Mapping[str, Tensor], name: str) -> None:
    """Put a block at the token embedding; nothing is changed if that is not possible."""
    wrapper = word_wrapper(pipe)
    if wrapper is None:
        base = pipe.text_encoder.get_input_embeddings()
        if not isinstance(base, nn.Embedding):
            raise ValueError(f"words can be added to a plain embedding, not to a {type(base).__name__}")
        wrapper = ExtendedEmbedding(base, pipe.tokenizer)
    base = wrapper.original
    expected = {(base.embedding_dim,)}
    if {tuple(vector.shape) for vector in vectors.values()} != expected:
        wrong = next(word for word, vector in vectors.items() if tuple(vector.shape) not in expected)
        raise ValueError(f"the vector of {wrong!r} is {tuple(vectors[wrong].shape)}, not ({base.embedding_dim},)")
    block = ExtensionBlock(torch.stack(list(vectors.values())).to(base.weight), tuple(vectors))
    blocks = [*wrapper.blocks().values(), block]
    tokenizer = extended_tokenizer(wrapper.tokenizer, distinct_words(blocks), wrapper.first_id)
    wrapper.extensions[name] = block
    wrapper.freeze()
    pipe.text_encoder.set_input_embeddings(wrapper)
    pipe.register_modules(tokenizer=tokenizer)
    wrapper.update_rows()
    for other, held in wrapper.blocks().items():
        shared = set(held.content) & set(block.content) if held is not block else ()
        if shared:
            logger.warning("extensions %r and %r both have: %s", other, name, ", ".join(sorted(shared)))
