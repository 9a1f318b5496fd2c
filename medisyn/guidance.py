"""Classifier guidance: latent classifiers for pipelines, and classifiers that never saw noise.

- The mathematics stands in `pipelines/medisyn_latent_classifier.py`, which published models carry; this module gives
  it a name of its own, loads and attaches classifiers, and adds guidance by the predicted clean latent.
- A classifier of clean latents or of images (any callable) judges what the UNet predicts. Its gradient goes back to
  the noised latent through the UNet ("unet", exact), or as if the prediction were signal * x, divided by signal**2 +
  noise**2 where that is not 1 ("scaled", no backward pass through the UNet; so it is for standard normal latents).
- Classifier-free guidance comes first; the classifier's gradient is added to its result.

    pipe = attach_classifier(load_pipeline("runs/unconditional"), "runs/classifier")
    pipe(class_label="eosinophil", classifier_guidance_scale=3.0)
    judge = CleanClassifier(network, ["adenoma", "normal"], decode=pipe.decode_latents)
    pipe(class_label="adenoma", classifier=judge)
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from medisyn.hub import from_hub, is_hub_name
from medisyn.pipelines.medisyn_latent_classifier import (
    SMALLEST,
    MediSynLatentClassifier,
    class_indices,
    clean_shift,
    latent_fingerprint,
    log_probability_gradient,
    noise_coefficients,
    output_scalings,
    prediction_rule,
    shift_prediction,
)
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

__all__ = [
    "CleanClassifier",
    "attach_classifier",
    "clean_prediction",
    "clean_shift",
    "draw_classes",
    "latent_fingerprint",
    "load_classifier",
    "log_probability_gradient",
    "noise_coefficients",
    "shift_prediction",
]

JACOBIANS = ("unet", "scaled")


def load_classifier(name_or_dir: str | Path) -> MediSynLatentClassifier:
    """The latent classifier of a folder, a run, a pipeline that carries one, or a Hub name, in evaluation mode.

    Raises:
        FileNotFoundError: there is none; the message lists what was tried.
        ValueError: something else is there, or it is damaged.
    """
    name, folder = str(name_or_dir), Path(name_or_dir).expanduser()
    places = [folder / "pipeline" / "classifier", folder / "classifier", folder]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None and not folder.exists() and is_hub_name(name):
        found = from_hub("classifier", name, _classifier_files, ("classifier/config.json",), places) / "classifier"
    if found is None:
        raise FileNotFoundError(f"no latent classifier {name!r}; tried: {', '.join(map(str, places))}")
    held = json.loads((found / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if held != MediSynLatentClassifier.__name__:
        raise ValueError(f"{found} holds a {held}, not a {MediSynLatentClassifier.__name__}")
    try:
        return MediSynLatentClassifier.from_pretrained(str(found), use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{found} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


@torch.no_grad()
def draw_classes(
    classifier: MediSynLatentClassifier,
    scheduler: Any,
    noised: Tensor,
    timesteps: Tensor,
    uniforms: Tensor,
    uniform_share: float,
) -> Tensor:
    """A class for every noised latent, (B,): uniformly for `uniform_share` of them, else by p(y | z_t).

    For teaching a model to sample classes: class y meets z_t of probability p(z_t | y) there, so of the pairs that
    real images offer, those drawn by the posterior are its own; uniform ones teach it to turn round from elsewhere.

    Args:
        classifier: of K classes.
        scheduler: whose schedule holds.
        noised: (B, C, h, w).
        timesteps: (B,).
        uniforms: numbers in [0, 1), (B, 2), that decide: which way, and the class.
        uniform_share: in [0, 1].
    """
    own_timesteps = classifier.timestep_of(*noise_coefficients(scheduler, timesteps))
    with torch.autocast(noised.device.type, enabled=False):
        probabilities = classifier.log_probabilities(noised, own_timesteps).exp()
    uniform = uniforms[:, :1] < uniform_share
    probabilities = torch.where(uniform, torch.full_like(probabilities, 1 / probabilities.shape[1]), probabilities)
    below = probabilities.cumsum(dim=1) <= uniforms[:, 1:]
    return below.sum(dim=1).clamp(max=probabilities.shape[1] - 1)


def attach_classifier(
    pipe: MediSynPipeline, classifier: MediSynLatentClassifier | str | Path | None
) -> MediSynPipeline:
    """Make a latent classifier (or its folder or Hub name) a component of the pipeline, in place; None takes it off.

    Raises:
        FileNotFoundError: as for `load_classifier`.
        ValueError: the classifier is for other latents.
    """
    if isinstance(classifier, (str, Path)):
        classifier = load_classifier(classifier)
    if classifier is not None:
        classifier.check_latents(pipe)
        classifier.to(pipe.device).eval()
        if classifier.dtype != pipe.unet.dtype:  # diffusers warns of every cast, needed or not
            classifier.to(pipe.unet.dtype)
    pipe.register_modules(classifier=classifier)
    return pipe


def clean_prediction(
    prediction: Tensor, sample: Tensor, signal: Tensor, noise: Tensor, prediction_type: str
) -> Tensor:
    """The clean latent that a prediction means, (B, C, h, w) float32; differentiable.

    Args:
        prediction: of the UNet, (B, C, h, w).
        sample: what the UNet saw, signal * clean + noise * eps.
        signal: () or (B,), see `noise_coefficients`.
        noise: like `signal`.
        prediction_type: epsilon, v_prediction, sample or flow_prediction.

    Raises:
        ValueError: an unknown prediction type.
    """
    shape = (-1, *[1] * (sample.ndim - 1))
    signal, noise = (torch.as_tensor(value).to(sample.device).reshape(shape) for value in (signal, noise))
    prediction, sample = prediction.float(), sample.float()
    if prediction_type == "epsilon":
        return (sample - noise * prediction) / signal.clamp(min=SMALLEST)
    if prediction_type == "v_prediction":
        return signal * sample - noise * prediction
    if prediction_type == "sample":
        return prediction
    if prediction_type == "flow_prediction":
        return sample - noise * prediction
    valid = "epsilon, v_prediction, sample, flow_prediction"
    raise ValueError(f"classifier guidance does not know the prediction type {prediction_type!r}; valid: {valid}")


class CleanClassifier:
    """Guidance by a classifier that never saw noise; takes the place of a latent classifier in a pipeline's call.

    log p(y | x) is taken to be log p(y | clean) at the clean latent that the UNet predicts for x (Chung et al. 2023,
    arXiv 2209.14687, eq. 10; Bansal et al. 2023, arXiv 2302.07121, eq. 6).

    Args:
        function: (B, C, h, w) clean latents, or with `decode` images (B, 3, H, W) in [0, 1], to logits or
            log-probabilities (B, K); any callable that PyTorch can differentiate, item by item.
        classes: the names of its K outputs.
        decode: latents to images in [-1, 1], such as `pipe.decode_latents`; None: the classifier takes latents.
        jacobian: "unet" or "scaled", see the module.

    Raises:
        ValueError: an unknown `jacobian`, or fewer than two classes.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        classes: Sequence[str],
        decode: Callable[[Tensor], Tensor] | None = None,
        jacobian: str = "unet",
    ) -> None:
        if jacobian not in JACOBIANS:
            raise ValueError(f"jacobian {jacobian!r} is not one of: {', '.join(JACOBIANS)}")
        if len(classes) < 2:
            raise ValueError(f"a classifier needs at least two classes, not {', '.join(classes)!r}")
        self.function, self.decode, self.jacobian = function, decode, jacobian
        self.classes = tuple(classes)

    def class_indices(self, names: str | Sequence[str | None]) -> Tensor:
        """As `MediSynLatentClassifier.class_indices`."""
        return class_indices(self.classes, names)

    def check_latents(self, pipe: Any) -> None:
        """Nothing can be checked: the function takes what it is given."""

    def log_probabilities(self, clean: Tensor) -> Tensor:
        """(B, C, h, w) clean latents to log-probabilities (B, K) in float32."""
        inputs = clean if self.decode is None else self.decode(clean).float() / 2 + 0.5
        scores = self.function(inputs)
        if scores.ndim != 2 or scores.shape[1] != len(self.classes):
            raise ValueError(f"the classifier gave {tuple(scores.shape)} for {len(self.classes)} classes")
        return torch.log_softmax(scores.float(), dim=1)

    def guided_prediction(
        self,
        predict: Callable[[Tensor], Tensor],
        sample: Tensor,
        timestep: Tensor | float,
        scheduler: Any,
        class_indices: Tensor,
        scale: float = 3.0,
        clip: float | None = 1.0,
    ) -> Tensor:
        """As `MediSynLatentClassifier.guided_prediction`; `predict` must be differentiable for jacobian "unet"."""
        signal, noise = (value.to(sample.device) for value in noise_coefficients(scheduler, timestep))
        prediction_type, factor = prediction_rule(scheduler, signal, noise)
        indices, shape = class_indices.to(sample.device), (-1, *[1] * (sample.ndim - 1))

        def clean(prediction: Tensor, seen: Tensor) -> Tensor:
            if isinstance(factor, float):
                return clean_prediction(prediction, seen, signal, noise, prediction_type)
            skip, out = (value.reshape(shape) for value in output_scalings(scheduler, signal, noise))
            return skip * seen.float() + out * prediction.float()

        prediction: Tensor | None = None
        if self.jacobian == "scaled":
            prediction = predict(sample)
            gradient = log_probability_gradient(self.log_probabilities, clean(prediction, sample), indices)
            gradient = (signal / (signal.square() + noise.square())).reshape(shape) * gradient
        else:

            def through_unet(variable: Tensor) -> Tensor:
                nonlocal prediction
                prediction = predict(variable)
                return self.log_probabilities(clean(prediction, variable))

            gradient = log_probability_gradient(through_unet, sample, indices)
        prediction = predict(sample) if prediction is None else prediction.detach()
        shift = clean_shift(gradient, signal, noise, scale, clip)
        if not isinstance(factor, float):
            shift = factor.reshape(shape) * shift
        return shift_prediction(prediction, shift, signal, noise, prediction_type)


def _classifier_files(files: Sequence[str]) -> list[str]:
    chosen = [file for file in files if file.startswith("classifier/") and file.endswith((".json", ".safetensors"))]
    if not chosen:
        raise ValueError("the repository has no classifier/")
    return chosen
