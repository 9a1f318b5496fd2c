"""Networks that are trained along with an autoencoder and judge its reconstructions: a discriminator, a classifier.

- One optimizer and one backward for both players: a judge's own loss sees detached images, and the autoencoder's sees
  detached weights of the judge.
- Class consistency is the tuning step of HistoDiffusion (Ye et al. 2023, arXiv 2308.04020; not in their code): the
  decoder is tuned on the small labelled set with an image classifier's loss beside the reconstruction losses.

    medisyn train scripts/unconditional_to_conditional/decoder.yaml
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medisyn.losses import discriminator_hinge_loss


def adversarial_losses(discriminator: nn.Module, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """The hinge losses of both players: "generator" and "discriminator", scalars."""
    judged = _with_frozen_weights(discriminator, reconstruction)
    return {
        "generator": -judged.float().mean(),
        "discriminator": discriminator_hinge_loss(
            discriminator(images).float(), discriminator(reconstruction.detach()).float()
        ),
    }


class ClassConsistency(nn.Module):
    """An image classifier, trained on real images, whose loss on reconstructions tunes the decoder.

    Args:
        classes: how many there are.
        channels: of its first layer.
    """

    def __init__(self, classes: int, channels: int = 32) -> None:
        """Build the classifier, from scratch."""
        super().__init__()
        self.classifier = nn.Sequential(
            *patch_trunk(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * channels, classes)
        )

    def forward(self, images: Tensor, reconstruction: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the reconstructions ("consistency") and of the real images ("classifier"), scalars.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: of the same shape; the gradient of "consistency" goes here alone.
            classes: (B,) integers.
        """
        logits, judged = self.classifier(images), _with_frozen_weights(self.classifier, reconstruction)
        return {
            "consistency": cross_entropy(judged.float(), classes),
            "classifier": cross_entropy(logits.float(), classes),
            "classifier_accuracy": (logits.argmax(dim=1) == classes).float().mean(),
        }


def patch_discriminator(channels: int) -> nn.Sequential:
    """A PatchGAN (Isola et al. 2017, section 3.2.2): (B, 3, H, W) -> logits (B, 1, H/8, W/8), normalised by groups."""
    return nn.Sequential(*patch_trunk(channels), nn.Conv2d(4 * channels, 1, 3, padding=1))


def patch_trunk(channels: int) -> list[nn.Module]:
    """Its layers before the logits: (B, 3, H, W) -> (B, 4 channels, H/8, W/8)."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for width in (channels, 2 * channels):
        layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False)]
        layers += [nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
    return layers


def _with_frozen_weights(judge: nn.Module, images: Tensor) -> Tensor:
    frozen = {name: tensor.detach() for name, tensor in judge.state_dict(keep_vars=True).items()}
    return torch.func.functional_call(judge, frozen, (images,))
