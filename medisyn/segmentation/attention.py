"""Attention maps of any UNet of diffusers, recorded while it runs as it always does.

- Each attention layer gets a processor that first hands everything to the layer's own processor, so the UNet's output
  stays the same bit for bit whatever that is (plain, sdpa, sliced, fused, LoRA, IP-Adapter), and then computes the
  weights once more from the layer's own projections. LoRA layers are inside those projections.
- On leaving the context, also by an exception, every layer has the processor object that it had before.
- Weights are averaged over heads at once: of a 64 x 64 layer they are 64 MB an image.

    with record_attention(pipe.unet, size=(16, 16)) as maps:
        pipe.unet(latents, t, **conditions)
    maps[0].weights     # (B, queries, keys), each row sums to 1
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

Kind = Literal["self", "cross"]
FINE = 16  # places along a side from which on attention draws the outline of an organ


@dataclass(frozen=True)
class AttentionMap:
    """The weights of one attention layer in one run of the UNet.

    Attributes:
        layer: Its name in the UNet.
        kind: "self": keys are the same places as the queries; "cross": keys are tokens of a condition.
        size: (height, width) of the grid of queries, row by row.
        weights: (B, height x width, keys) float32, the mean over heads; each row sums to 1.
    """

    layer: str
    kind: Kind
    size: tuple[int, int]
    weights: Tensor


def finest_grid(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The one of (height, width) with the most places; at least one is needed."""
    return max(sizes, key=lambda size: size[0] * size[1])


@contextmanager
def record_attention(
    unet: nn.Module, size: tuple[int, int], kinds: tuple[Kind, ...] = ("self", "cross")
) -> Iterator[list[AttentionMap]]:
    """Collect the attention maps of every run of `unet` inside the context.

    Args:
        unet: Any UNet whose attention layers are diffusers' `Attention`; wrapped (compiled) ones as well.
        size: (height, width) of the latents, from which a layer's grid follows.
        kinds: What to record.

    Yields:
        A list that grows with each run, in the order in which the layers run.

    Raises:
        ValueError: An unknown kind, or a UNet without such layers.
    """
    if not kinds or not set(kinds) <= {"self", "cross"}:
        raise ValueError(f"attention kinds {kinds!r} are not some of: self, cross")
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no attention layers; use a method that reads features")
    maps: list[AttentionMap] = []
    # `set_processor` would take a processor with weights out of the module's own and put it back at another place
    before: dict[str, Any] = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            # an entry of the instance's dictionary comes before a registered submodule of the same name
            layer.__dict__["processor"] = _RecordingProcessor(name, before[name], size, kinds, maps)
        yield maps
    finally:
        for name, layer in layers.items():
            if "processor" in layer._modules:
                layer.__dict__.pop("processor", None)
            else:
                layer.__dict__["processor"] = before[name]


class _RecordingProcessor:
    """Runs the layer's own processor and adds the layer's weights to a list."""

    def __init__(
        self, layer: str, original: Any, size: tuple[int, int], kinds: tuple[Kind, ...], maps: list[AttentionMap]
    ):
        self.layer, self.original, self.size, self.kinds, self.maps = layer, original, size, kinds, maps
        # the layer asks `processor.__call__` which keywords it takes; calls themselves go by the class
        self.__dict__["__call__"] = original.__call__

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        inputs = hidden_states.clone() if attn.group_norm is not None else hidden_states  # some work in place
        result = self.original(
            attn,
            hidden_states,
            *args,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )
        temb = kwargs.get("temb")
        with torch.no_grad():
            for kind, weights in _weights(attn, inputs, encoder_hidden_states, attention_mask, temb).items():
                if kind in self.kinds:
                    own = (inputs.shape[-2], inputs.shape[-1]) if inputs.ndim == 4 else None
                    grid = own or _grid(weights.shape[1], self.size)
                    self.maps.append(AttentionMap(self.layer, kind, grid, weights))
        return result


def _weights(
    attn: Attention, hidden: Tensor, encoder: Any, mask: Tensor | None, temb: Tensor | None
) -> dict[Kind, Tensor]:
    """Softmax(q k^T / sqrt(d) + mask) of a layer, its mean over heads, split into self and cross where it has both."""
    encoder = encoder[0] if isinstance(encoder, tuple) else encoder  # IP-Adapter: text first, then images
    if attn.spatial_norm is not None:
        hidden = attn.spatial_norm(hidden, temb)
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    added = attn.added_kv_proj_dim is not None
    encoder = hidden if added and encoder is None else encoder
    if attn.group_norm is not None:
        hidden = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
    if encoder is not None and attn.norm_cross:
        encoder = attn.norm_encoder_hidden_states(encoder)
    if added:  # keys are those of the condition and, unless it is left out, those of the places
        query, keys = attn.to_q(hidden), [attn.add_k_proj(encoder)]
        keys += [] if attn.only_cross_attention else [attn.to_k(hidden)]
        key = torch.cat(keys, dim=1)
    elif attn.fused_projections and encoder is None:
        query, key, _ = attn.to_qkv(hidden).chunk(3, dim=-1)
    elif attn.fused_projections:
        query, key = attn.to_q(hidden), attn.to_kv(encoder).chunk(2, dim=-1)[0]
    else:
        query, key = attn.to_q(hidden), attn.to_k(hidden if encoder is None else encoder)
    query, key = (values.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for values in (query, key))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    scores = (query.float() @ key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, key.shape[2], len(query))
        scores = scores + mask.view(len(query), attn.heads, -1, mask.shape[-1]).float()
    weights = scores.softmax(dim=-1).mean(dim=1)
    if not added:
        return {"self" if encoder is None else "cross": weights}
    tokens = encoder.shape[1]
    parts: dict[Kind, Tensor] = {"cross": weights[..., :tokens]}
    if not attn.only_cross_attention:
        parts["self"] = weights[..., tokens:]
    return {kind: part / part.sum(dim=-1, keepdim=True) for kind, part in parts.items()}


def _grid(places: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer's grid: the latents' size, halved (rounded up) until it has that many places."""
    height, width = size
    while height * width > max(places, 1):
        height, width = -(-height // 2), -(-width // 2)
    if height * width != places:
        raise ValueError(f"a layer of {places} places does not fit latents of {size[0]} x {size[1]}")
    return height, width
