"""Text as a condition: any transformers text encoder, any open_clip text tower, or a small one made for the captions.

The condition holds two stock components (`text_encoder`, `tokenizer`) that `MediSynPipeline` owns after construction;
encoding itself happens in the pipeline, in one place for training and sampling.

* `TextCondition.from_pretrained("openai/clip-vit-large-patch14")` takes CLIP, BERT-like and T5 encoders of
  transformers; `"open_clip:<model>[/<pretrained>]"` or `"open_clip:hf-hub:<repository>"` goes through open_clip. A
  native CLIP tower is converted weight by weight to a stock `CLIPTextModel`; a Hugging Face tower (BiomedCLIP's BERT)
  is taken out as it is.
* `TextCondition.from_captions(captions)` trains a byte-level BPE tokenizer and builds a small `CLIPTextModel` around
  it. The tokenizer is a stock `CLIPTokenizer`, so a model trained with it exports to a plain `StableDiffusionPipeline`
  folder.
* Captions longer than the encoder's window are counted and warned about once for a training set (`count_truncated`),
  prompts at each encoding by the pipeline; none is cut in silence.

    >>> from medisyn.conditions.text import TextCondition
    >>> text = TextCondition.from_captions(["brain MRI slice showing a glioma", "colonoscopy image showing a polyp"])
    >>> text.token_width()
    192
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from medisyn import paraphrases, prompts
from medisyn.conditions.base import register_condition
from medisyn.conditions.open_clip_towers import BOS, EOS, clear_pooler, load_open_clip

if TYPE_CHECKING:
    from pathlib import Path

    from medisyn.config import TextConditionConfig
    from medisyn.data.cache import EmbeddingCache
    from medisyn.data.loading import ImageDataset
    from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

logger = logging.getLogger(__name__)


@register_condition
@dataclass(frozen=True)
class TextCondition:
    """A text encoder and its tokenizer as the condition `"text"`; see `medisyn.conditions.base.Condition`.

    Attributes:
        encoder: A transformers text encoder with a `last_hidden_state` (B, T, width).
        tokenizer: Its tokenizer, with `model_max_length` equal to the encoder's window.
    """

    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    kind: ClassVar[str] = "text"
    embeds_name: ClassVar[str | None] = "prompt_embeds"

    @classmethod
    def from_pipeline(cls, pipe: MediSynPipeline) -> TextCondition:
        """The text encoder that the pipeline has."""
        if pipe.text_encoder is None:
            raise ValueError(
                "This pipeline was saved without its text encoder; load it with text_encoder and tokenizer."
            )
        return cls(pipe.text_encoder, pipe.tokenizer)

    @property
    def cacheable(self) -> bool:
        """Whether features may be computed once: true where no weight of the encoder is trained."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    @classmethod
    def from_pretrained(cls, name: str, max_length: int | None = None, trainable: bool = False) -> TextCondition:
        """Loads the text encoder of a folder or Hub name, or, after `open_clip:`, of an open_clip model.

        Args:
            name: See the module's documentation.
            max_length: A window in tokens shorter than the encoder's own; every prompt is padded to the window, so a
                short one saves time. Required where the encoder has no fixed window (T5).
            trainable: Whether the encoder is trained along with the UNet.

        Raises:
            ValueError: For a model without a text encoder, or with a tower that has no stock equivalent.
            OSError: When the folder or repository does not hold a model.
        """
        if name.startswith("open_clip:"):
            encoder, tokenizer = load_open_clip(name.removeprefix("open_clip:"))
        else:
            encoder, tokenizer = load_text_encoder(name)
        set_window(tokenizer, encoder, max_length)
        encoder.requires_grad_(trainable)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler.requires_grad_(False)  # unused, so it would have no gradient
        return cls(encoder, tokenizer)

    @classmethod
    def from_captions(
        cls,
        captions: Iterable[str],
        hidden_size: int = 192,
        num_layers: int = 2,
        num_heads: int = 4,
        max_length: int = 24,
        vocab_size: int = 2048,
    ) -> TextCondition:
        """A small text encoder from scratch, to be trained along with the UNet, and a tokenizer for the captions.

        The weights are drawn from torch's global generator: seed it first where they must be reproducible.

        Raises:
            ValueError: When there is no caption to learn from, or `hidden_size` is not a multiple of `num_heads`.
        """
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of {num_heads} (the heads), got {hidden_size}.")
        tokenizer = train_tokenizer(captions, vocab_size=vocab_size, max_length=max_length)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            projection_dim=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=max_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return cls(CLIPTextModel(config), tokenizer)

    @classmethod
    def from_config(
        cls, config: TextConditionConfig, captions: Sequence[str | None], base: MediSynPipeline | None = None
    ) -> TextCondition:
        """The encoder that the configuration names, else that of `base`, else a small one that knows the captions.

        Warns once about captions that are longer than its window.

        Raises:
            ValueError: For a new encoder that is not to be trained, or a window that the encoder does not have.
            OSError: When there is no encoder of that name.
        """
        if config.encoder is not None:
            condition = cls.from_pretrained(config.encoder, config.max_length, trainable=config.train_encoder)
        elif base is not None and cls.kind in base.kinds:
            condition = cls.from_pipeline(base)
            condition.encoder.requires_grad_(config.train_encoder)
            if config.max_length is not None:
                set_window(condition.tokenizer, condition.encoder, config.max_length)
        elif not config.train_encoder:
            raise ValueError("a new text encoder has to be trained: set train_encoder: true, or name an encoder")
        else:
            known = [*prompts.vocabulary(), *(caption for caption in captions if caption)]
            known += paraphrases.known_phrases() if config.paraphrase else []
            window = {} if config.max_length is None else {"max_length": config.max_length}
            condition = cls.from_captions(known, config.hidden_size, config.num_layers, **window)
        condition.count_truncated(captions)
        return condition

    def build_cache(
        self, pipe: MediSynPipeline, images: ImageDataset, folder: Path, **options
    ) -> EmbeddingCache | None:
        """Token features of each different caption, unless the encoder is trained."""
        from medisyn.data.cache import build_caption_embedding_cache

        if not self.cacheable:
            return None
        options.pop("flips", None)
        return build_caption_embedding_cache(pipe, images.captions, folder, **options)

    def components(self) -> dict:
        """The constructor arguments of `MediSynPipeline` that this condition stands for."""
        return {"text_encoder": self.encoder, "tokenizer": self.tokenizer}

    def token_width(self) -> int:
        """The width of one text token."""
        return text_width(self.encoder)

    def vector_width(self) -> None:
        """Text gives no vector."""
        return None

    def encode(self, pipe: MediSynPipeline, examples: Sequence[Mapping]) -> torch.Tensor:
        """Token features (B, T, width) of the captions; an example without a caption gets the empty prompt."""
        return pipe.encode_prompt([example.get("caption") or "" for example in examples])

    def null(self, pipe: MediSynPipeline, batch_size: int) -> torch.Tensor:
        """The features of the empty prompt, (B, T, width)."""
        return pipe.null_embeds(self.kind, batch_size)

    def count_truncated(self, captions: Iterable[str | None]) -> int:
        """How many of `captions` have more tokens than the encoder's window, special tokens included.

        Repeated captions are tokenized once and counted each time. Logs one warning with an example if there are any.
        """
        captions = [caption for caption in captions if caption]
        distinct = list(dict.fromkeys(captions))
        if not distinct:
            return 0
        window = self.tokenizer.model_max_length
        tokens = self.tokenizer(distinct, truncation=False, verbose=False).input_ids
        too_long = {text: len(ids) for text, ids in zip(distinct, tokens, strict=True) if len(ids) > window}
        count = sum(text in too_long for text in captions)
        if count:
            example = max(too_long, key=too_long.__getitem__)
            logger.warning(
                "%d of %d prompts exceed the text encoder's window of %d tokens and will be cut; one has %d: %.120r",
                *(count, len(captions), window, too_long[example], example),
            )
        return count


def text_width(encoder: PreTrainedModel) -> int:
    """The width of a token of `encoder` (`hidden_size`; T5 calls it `d_model`)."""
    return encoder.config.d_model if hasattr(encoder.config, "d_model") else encoder.config.hidden_size


def train_tokenizer(captions: Iterable[str], vocab_size: int = 2048, max_length: int = 24) -> CLIPTokenizer:
    """A `CLIPTokenizer` whose byte-pair merges are learned from the captions and the vocabulary of `medisyn.prompts`.

    Lower-cased, with start and end tokens, padding by the end token as CLIP does. Every byte is in the vocabulary, at
    the end of a word and elsewhere, so a word never seen is spelled out in smaller pieces and never lost.

    Args:
        captions: What to learn from; repetitions do not count.
        vocab_size: An upper limit; learning stops earlier when every word is one token. At least 514 (512 bytes,
            start, end).
        max_length: The window in tokens, start and end included; becomes `model_max_length`.

    Raises:
        ValueError: When there is no caption, or the limit is too small.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = 2 * len(alphabet) + 2
    distinct = sorted({caption.strip() for caption in captions if caption and caption.strip()})
    if not distinct:
        raise ValueError("A tokenizer cannot be trained without captions: all of them are empty.")
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} (every byte twice, start and end), got {vocab_size}."
        )
    # CLIPTokenizer fixes normalisation and splitting: they are taken from an empty one and not repeated here.
    reference = CLIPTokenizer(unk_token=EOS, bos_token=BOS, eos_token=EOS, pad_token=EOS).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    # The trainer counts only those end-of-word bytes that it saw, so room is left for all of them.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    learner.train_from_iterator([*distinct, *prompts.vocabulary()], trainer=trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=EOS, model_max_length=max_length)


def load_text_encoder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text encoder and tokenizer of a transformers folder or Hub name: CLIP's text half, T5's encoder, BERT.

    Raises:
        ValueError: For a model that has no text encoder, or whose checkpoint lacks weights.
        OSError: When there is no such model.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "clip":  # the whole image-text model
        encoder_class = CLIPTextModel
    elif config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        encoder_class = AutoModelForTextEncoding
    elif hasattr(config, "vocab_size") and not config.is_encoder_decoder:
        encoder_class = AutoModel
    else:
        raise ValueError(
            f"{name!r} holds a {config.model_type!r} model, which has no text encoder that is known here; "
            f"known: clip, {', '.join(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)}."
        )
    encoder, loading = encoder_class.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"The checkpoint {name!r} lacks weights of {type(encoder).__name__}: {', '.join(missing[:5])}."
        )
    if loading["missing_keys"]:
        clear_pooler(encoder)
    return encoder, AutoTokenizer.from_pretrained(name)


def set_window(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, max_length: int | None = None) -> None:
    """Sets `tokenizer.model_max_length` to the encoder's window, or to `max_length` where that is shorter.

    Raises:
        ValueError: When the tokenizer cannot pad, when the window is unknown (relative positions) and no `max_length`
            is given, or when `max_length` is beyond the window.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no padding token, which batches of prompts need.")
    limits = []
    if tokenizer.model_max_length < VERY_LARGE_INTEGER:
        limits.append(tokenizer.model_max_length)
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None:
        table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from the padding index on, so that many rows of its table are never reached.
        offset = table.padding_idx + 1 if getattr(table, "padding_idx", None) is not None else 0
        limits.append(positions - offset)
    if not limits and max_length is None:
        raise ValueError(f"{type(encoder).__name__} has no fixed window; give max_length (tokens per prompt).")
    if limits and max_length is not None and not 2 < max_length <= min(limits):
        raise ValueError(f"max_length must be in 3..{min(limits)} for {type(encoder).__name__}, got {max_length}.")
    tokenizer.model_max_length = max_length or min(limits)
