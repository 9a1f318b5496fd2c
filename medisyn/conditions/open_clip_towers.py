"""Text towers of open_clip as stock transformers components, so that a saved model needs no open_clip.

* A native CLIP tower becomes a `CLIPTextModel`, weight by weight; the tokenizer becomes a `CLIPTokenizer`. Token
  features before the projection stay the same.
* A Hugging Face tower (BiomedCLIP's PubMedBERT) is a stock model already and is taken out as it is.
* What the stock classes cannot express (CoCa, SigLIP, bidirectional towers) is refused.

    encoder, tokenizer = load_open_clip("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medisyn import prompts

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"

# How the activations of open_clip's CLIP towers print, and what transformers calls them.
_ACTIVATIONS = {
    "GELU(approximate='none')": "gelu",
    "GELU(approximate='tanh')": "gelu_pytorch_tanh",
    "QuickGELU()": "quick_gelu",
}


def load_open_clip(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text tower and tokenizer of an open_clip model as stock transformers components.

    Args:
        name: `"ViT-B-32/laion2b_s34b_b79k"` (architecture/weights), `"hf-hub:<repository>"` or `"local-dir:<folder>"`.

    Raises:
        ValueError: For an unknown architecture or weights tag, or a tower that has no stock equivalent.
        OSError: When the folder or repository cannot be read.
    """
    import open_clip

    architecture, weights = name, None
    if not name.startswith(("hf-hub:", "local-dir:")):
        architecture, _, weights = name.partition("/")
        prompts.choose("open_clip model", architecture, open_clip.list_models())
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        prompts.choose(f"weights of open_clip model {architecture}", weights, tags)
    try:
        model = open_clip.create_model(architecture, pretrained=weights, require_pretrained=True)
    except RuntimeError as error:  # open_clip reports absent files and failed downloads this way
        raise OSError(f"open_clip cannot load {name!r}: {str(error).splitlines()[0]}") from error
    return convert_open_clip(model, open_clip.get_tokenizer(architecture))


def convert_open_clip(model: Any, tokenizer: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Takes the text tower out of an open_clip model; the token features before the projection stay the same.

    Args:
        model: An `open_clip.CLIP` or `CustomTextCLIP`.
        tokenizer: What `open_clip.get_tokenizer` gives for it.

    Raises:
        ValueError: For a tower or tokenizer that differs from CLIP's in a way the stock classes cannot express.
    """
    tower = getattr(model, "text", model)  # `CLIP` keeps the tower's parts as its own attributes
    if isinstance(getattr(tower, "transformer", None), PreTrainedModel):
        encoder, stock_tokenizer = tower.transformer, getattr(tokenizer, "tokenizer", None)
        if not hasattr(transformers, type(encoder).__name__):  # the inner stack of a T5 cannot be loaded by itself
            raise ValueError(f"The open_clip text tower {type(encoder).__name__} is not a model of its own.")
        if stock_tokenizer is None or tokenizer.tokenizer_mode or tokenizer.strip_sep_token:
            raise ValueError(f"The open_clip tokenizer of {type(encoder).__name__} has no stock equivalent.")
        if hasattr(encoder, "pooler") and encoder.pooler is None:
            # Saved and loaded again, the stock class would have a pooler with new random weights: give it one to keep.
            complete = type(encoder)(encoder.config)
            complete.load_state_dict(encoder.state_dict() | complete.pooler.state_dict(prefix="pooler."))
            encoder = clear_pooler(complete)
        stock_tokenizer.model_max_length = tokenizer.context_length
        return encoder.eval(), stock_tokenizer
    return _convert_clip_tower(tower), _convert_clip_tokenizer(tokenizer)


def _convert_clip_tower(tower: Any) -> CLIPTextModel:
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", [])
    first = blocks[0] if len(blocks) else None
    activation = _ACTIVATIONS.get(repr(first.mlp.gelu)) if first is not None else None
    stock = (
        type(first).__name__ == "ResidualAttentionBlock"
        and activation is not None
        and isinstance(first.ls_1, torch.nn.Identity)
        and getattr(tower, "cls_emb", None) is None
        and tower.attn_mask is not None
    )
    if not stock:
        raise ValueError(
            f"The open_clip text tower {type(tower).__name__} is not CLIP's (causal, pre-norm, GELU or QuickGELU); "
            "only CLIP text towers and Hugging Face text towers can be used."
        )
    width = tower.ln_final.weight.shape[0]
    config = CLIPTextConfig(
        vocab_size=tower.vocab_size + 1,
        hidden_size=width,
        intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        max_position_embeddings=tower.context_length,
        hidden_act=activation,
        layer_norm_eps=tower.ln_final.eps,
        pad_token_id=tower.vocab_size,
        bos_token_id=tower.vocab_size - 2,
        eos_token_id=tower.vocab_size - 1,
    )
    # open_clip pads with token 0, which is also the byte "!". A token of its own with the same embedding pads alike,
    # and no exclamation mark in a prompt is mistaken for padding.
    embedding = tower.token_embedding.weight
    weights = {
        "embeddings.token_embedding.weight": torch.cat([embedding, embedding[:1]]),
        "embeddings.position_embedding.weight": tower.positional_embedding,
        "final_layer_norm.weight": tower.ln_final.weight,
        "final_layer_norm.bias": tower.ln_final.bias,
    }
    for index, block in enumerate(blocks):
        prefix = f"encoder.layers.{index}."
        for part in ("weight", "bias"):
            query, key, value = getattr(block.attn, f"in_proj_{part}").chunk(3)
            weights |= {
                f"{prefix}self_attn.q_proj.{part}": query,
                f"{prefix}self_attn.k_proj.{part}": key,
                f"{prefix}self_attn.v_proj.{part}": value,
                f"{prefix}self_attn.out_proj.{part}": getattr(block.attn.out_proj, part),
                f"{prefix}layer_norm1.{part}": getattr(block.ln_1, part),
                f"{prefix}layer_norm2.{part}": getattr(block.ln_2, part),
                f"{prefix}mlp.fc1.{part}": getattr(block.mlp.c_fc, part),
                f"{prefix}mlp.fc2.{part}": getattr(block.mlp.c_proj, part),
            }
    encoder = CLIPTextModel(config)
    encoder.load_state_dict({name: weight.detach().float() for name, weight in weights.items()}, strict=True)
    return encoder.eval()


def _convert_clip_tokenizer(tokenizer: Any) -> CLIPTokenizer:
    import open_clip

    plain = isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.reduction_fn is None
    if not plain or tokenizer.clean_fn("A,_b.") != "a,_b." or len(tokenizer.all_special_ids) != 2:
        raise ValueError(
            f"The open_clip tokenizer {type(tokenizer).__name__} with these options has no stock equivalent."
        )
    names = {tokenizer.sot_token_id: BOS, tokenizer.eot_token_id: EOS}
    vocab = {names.get(index, token): index for token, index in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    vocab[PAD] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=PAD, model_max_length=tokenizer.context_length)


def clear_pooler(encoder: Any) -> PreTrainedModel:
    """Zeroes a pooler that no checkpoint gave weights to.

    Nothing reads it, but random weights would give the model another hash, and caches another key, at each load.
    """
    with torch.no_grad():
        for parameter in encoder.pooler.parameters():
            parameter.zero_()
    return encoder
