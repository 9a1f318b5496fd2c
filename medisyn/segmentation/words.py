"""Where a word of the prompt acts: cross-attention by word (DAAM, Tang et al. 2022, arXiv 2210.04885).

- A word is the tokens that its letters became, however many; a sequence of words ("right lung") is a word as well.
- Maps of a real image: its latents with the noise of one timestep, one run of the UNet, see `probing`.
- Models that are conditioned on one token alone have no such maps: the softmax over a single key is 1 everywhere.
- A map is no finer than the finest grid of the layers; the embedded default has cross-attention at 4 x 4 alone.

    heat = word_maps(pipe, latents, Probe(300, "frontal chest X-ray of a child with clear lungs"), "lungs", (128, 128))
"""

import re

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedTokenizerBase

from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

from .attention import finest_grid, record_attention
from .probing import Probe, run_unet

SHARE_OF_MAXIMUM = 0.4  # above it a place belongs to the word (the paper's threshold, section 3.2)


def word_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str, window: int) -> list[int]:
    """Positions of a word's tokens in an encoded prompt, special tokens counted, every place where the word stands.

    Args:
        tokenizer: A fast one (which knows the letters of its tokens).
        prompt: The text that conditions.
        word: A word or words of it, in any case.
        window: Tokens that the encoder sees.

    Raises:
        ValueError: The word is not in the prompt (whole words count) or lies past the window.
    """
    spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)]
    if not word.strip() or not spans:
        raise ValueError(f"the word {word!r} is not in the prompt {prompt!r}")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell the letters of its tokens; use a fast one")
    letters = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=window)["offset_mapping"]
    # some tokenizers count the space before a word as its letter, so a token counts by its last letter
    found = [
        position
        for position, (start, end) in enumerate(letters)
        if end > start and any(first < end <= last for first, last in spans)
    ]
    if not found:
        raise ValueError(f"the word {word!r} lies past the text encoder's window of {window} tokens")
    return found


def word_maps(pipe: MediSynPipeline, latents: Tensor, probe: Probe, word: str, size: tuple[int, int]) -> Tensor:
    """How strongly each pixel attends to a word: (B, height, width) in [0, 1], the largest value of an image is 1.

    The sum over layers and draws of the attention to the word's tokens (their mean), each resized bicubically
    (equation 4 of the paper).

    Args:
        pipe: With a text condition.
        latents: (B, C, h, w), see `probing.encode_images`.
        probe: With a prompt that has the word in it.
        word: See `word_tokens`.
        size: (height, width) of the maps in pixels.

    Raises:
        ValueError: No prompt, no text condition, or a word that is not in the prompt.
    """
    return word_attention(pipe, latents, probe, word, size)[0]


@torch.no_grad()
def word_attention(
    pipe: MediSynPipeline, latents: Tensor, probe: Probe, word: str, size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """`word_maps`, and (height, width) of the finest grid that they were read from."""
    if probe.prompt is None:
        raise ValueError(f"the word {word!r} needs a prompt that contains it")
    if "text" not in pipe.kinds or pipe.tokenizer is None:
        raise ValueError(f"word {word!r}: this model has no text condition; it has: {', '.join(pipe.kinds) or 'none'}")
    positions = word_tokens(pipe.tokenizer, probe.prompt, word, pipe.text_window)
    total = torch.zeros(len(latents), *size)
    grids: set[tuple[int, int]] = set()
    with record_attention(pipe.unet, (latents.shape[-2], latents.shape[-1]), kinds=("cross",)) as maps:
        for images, _ in run_unet(pipe, latents, probe):
            if not maps:
                raise ValueError("this UNet has no cross-attention layers")
            for one in maps:
                grids.add(one.size)
                weights = one.weights[..., positions].mean(dim=-1).unflatten(1, one.size).float().cpu()
                resized = interpolate(weights[:, None], size=size, mode="bicubic", align_corners=False)
                total[images] += resized[:, 0].clamp(min=0)
            maps.clear()
    return total / total.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12), finest_grid(grids)
