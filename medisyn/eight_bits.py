"""Which weights of a UNet are stored in 8 bits (float8 e4m3): large matrices and kernels, but none at its ends.

What is left, in half precision, is a few per cent of the bytes. diffusers reads such files into any precision.
"""

import torch
from torch import Tensor, nn

EIGHT_BITS = torch.float8_e4m3fn
ENDS = ("conv_in.", "conv_out.", "time_embedding.", "class_embedding.", "add_embedding.", "encoder_hid_proj.")
SMALLEST = 8192  # numbers


def is_eight_bit(name: str, weight: Tensor) -> bool:
    """Whether the UNet's weight of this name is stored in 8 bits."""
    return weight.ndim > 1 and weight.numel() >= SMALLEST and not name.startswith(ENDS)


def rounded(weight: Tensor) -> Tensor:
    """The weight as 8 bits hold it, in its own precision."""
    return weight.to(EIGHT_BITS).to(weight.dtype)


@torch.no_grad()
def to_eight_bits(unet: nn.Module) -> nn.Module:
    """Store the large matrices of a UNet in 8 bits and the rest in half precision, in place."""
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data.to(EIGHT_BITS if is_eight_bit(name, parameter) else torch.float16)
    return unet
