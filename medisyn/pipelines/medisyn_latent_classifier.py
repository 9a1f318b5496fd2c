"""MediSynLatentClassifier: log p(class | noised latent) at every noise level, and its gradient as guidance.

- The encoder half of a UNet from stock diffusers blocks, then attention pooling (the `EncoderUNetModel` of Dhariwal &
  Nichol 2021). It may have the shape of the guided UNet and start from its weights.
- It sees latents as the UNet does, and a noise level on the schedule that it was trained with. Levels of any other
  schedule or sampler are translated by their ratio of noise to signal. So every diffusers scheduler of images can be
  guided whose levels are known: those with `alphas_cumprod`, with `use_flow_sigmas`, of EDM, IPNDM, and of consistency
  models. Not so ScoreSdeVe, KarrasVe, CosineDPMSolver (audio), FlowMatch* and those of discrete tokens.
- Guidance moves the clean latent that the UNet predicts, by Tweedie's formula; from there follow the noise, the
  velocity and the sample. So one rule serves all prediction types.
- Gradients are float32 whatever the model's precision, and an image's does not depend on its batch.
- A saved model carries this very file in `classifier/`, so it needs torch and diffusers only.

    classifier = MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, ["melanoma", "naevus"])
    classifier.log_probabilities(noised_latents, timestep=400)  # (B, 2)
"""

import math
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import get_down_block, get_mid_block
from torch import Tensor, nn

_SOURCE = Path(__file__).read_text(encoding="utf-8")

if __name__.startswith("diffusers_modules."):  # a name of its own for each version of this file, see the pipeline's
    _module = sys.modules.pop(__name__)
    __name__ = f"{__name__}_{sha256(_SOURCE.encode()).hexdigest()[:12]}"
    sys.modules[__name__] = _module

LATENT_TOLERANCE = 0.1  # relative difference of the latents of a test image; half precision makes about 0.01
SMALLEST = 1e-4  # of a signal or noise coefficient that is divided by
SHAPE = (  # what the encoder half shares with a UNet
    "in_channels sample_size down_block_types mid_block_type block_out_channels layers_per_block norm_num_groups "
    "norm_eps act_fn cross_attention_dim attention_head_dim num_attention_heads transformer_layers_per_block "
    "use_linear_projection only_cross_attention upcast_attention resnet_time_scale_shift downsample_padding "
    "flip_sin_to_cos freq_shift"
).split()
GUIDED = (  # some of the schedulers that can be guided, for a message
    "DDIMScheduler DDPMScheduler DPMSolverMultistepScheduler EulerDiscreteScheduler HeunDiscreteScheduler "
    "UniPCMultistepScheduler EDMEulerScheduler"
).split()
SCHEDULE = "num_train_timesteps beta_schedule beta_start beta_end trained_betas rescale_betas_zero_snr".split()


# ---- guidance as functions ----


def noise_coefficients(scheduler: Any, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
    """Signal and noise in what the UNet sees at a timestep, x = signal * clean + noise * normal; float32, () or (B,).

    Of flow-matching schedules 1 - t / T and t / T, of all others sqrt(alpha_bar) and sqrt(1 - alpha_bar) (Ho et al.
    2020, eq. 4), between whole timesteps by the logarithm of their ratio. Samplers whose latents have another scale
    (Euler and its kin) bring them to this one by `scale_model_input`, which must have been called. Those of Karras et
    al. 2022 (EDM, consistency models) scale by c_in = 1 / sqrt(sigma**2 + sigma_data**2), so that it is c_in and
    c_in * sigma. IPNDM counts time from 0 to 1: cos(pi / 2 * t) and sin(pi / 2 * t).

    Args:
        scheduler: any diffusers scheduler for epsilon, v, sample or flow prediction.
        timestep: in [0, num_train_timesteps); fractions are valid; () or (B,).

    Raises:
        ValueError: a scheduler without such a schedule.
    """
    config = scheduler.config
    timestep = torch.as_tensor(timestep).float()
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        noise = timestep / config.num_train_timesteps
        return 1 - noise, noise
    if type(scheduler).__name__ == "IPNDMScheduler":
        return torch.cos(0.5 * math.pi * timestep), torch.sin(0.5 * math.pi * timestep)
    if _is_preconditioned(scheduler):  # timesteps are log(sigma) / 4, of consistency models a thousand times that
        sigma = torch.exp(timestep * (0.004 if _is_consistency(scheduler) else 4.0))
        signal = (sigma.square() + config.sigma_data**2).rsqrt()
        return signal, signal * sigma
    if timestep.ndim == 0 and getattr(scheduler, "step_index", None) is not None:
        # samplers that scale know the level exactly, where their timesteps may be rounded
        scaled = torch.as_tensor(scheduler.scale_model_input(torch.ones(()), timestep)).float().to(timestep.device)
        if scaled < 1:
            return scaled, (1 - scaled.square()).sqrt()
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"classifier guidance needs a scheduler with alphas_cumprod, not {type(scheduler).__name__}; among those "
            f"that work: {', '.join(GUIDED)}"
        )
    ratios = _log_ratios(scheduler.alphas_cumprod.to(timestep.device))
    place = timestep.clamp(0, len(ratios) - 1)
    low = place.floor().long().clamp(max=len(ratios) - 2)
    log_ratio = torch.lerp(ratios[low], ratios[low + 1], place - low)
    return torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()


def log_probability_gradient(
    log_probabilities: Callable[[Tensor], Tensor], sample: Tensor, class_indices: Tensor
) -> Tensor:
    """The gradient of log p(y | x) in x for each item, float32 like `sample`; zero where the index is negative.

    Args:
        log_probabilities: (B, C, h, w) to (B, K), item by item.
        sample: (B, C, h, w).
        class_indices: y of each item, (B,) int64 in [0, K); -1 for an item without a class.
    """
    if (class_indices < 0).all():
        return torch.zeros_like(sample, dtype=torch.float32)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(sample.device.type, enabled=False):
        variable = sample.detach().float().clone().requires_grad_(True)
        chosen = log_probabilities(variable).float().gather(1, class_indices.clamp(min=0)[:, None])[:, 0]
        return torch.autograd.grad(chosen[class_indices >= 0].sum(), variable)[0]


def clean_shift(gradient: Tensor, signal: Tensor, noise: Tensor, scale: float, clip: float | None) -> Tensor:
    """How far guidance moves the predicted clean latent: scale * noise**2 / signal * gradient, (B, C, h, w).

    This is what scale * grad log p(y | x), added to the score, means by Tweedie's formula, E[clean | x] =
    (x + noise**2 * score) / signal.

    Args:
        gradient: of log p(y | x) in x, (B, C, h, w).
        signal: () or (B,), see `noise_coefficients`.
        noise: like `signal`.
        scale: weight of the gradient; the target is p(x) p(y | x)**scale.
        clip: root mean square that a shift is brought down to, item by item; clean latents have about 1. None: any.
    """
    signal, noise = _columns(signal, gradient), _columns(noise, gradient)
    shift = scale * noise.square() / signal.clamp(min=SMALLEST) * gradient
    if clip is not None:
        size = shift.square().flatten(1).mean(dim=1).sqrt()
        shift = shift * _columns(clip / size.clamp(min=clip), shift)
    return shift


def shift_prediction(prediction: Tensor, shift: Tensor, signal: Tensor, noise: Tensor, prediction_type: str) -> Tensor:
    """A UNet's prediction for a clean latent that is `shift` further, at the same noised latent; its own dtype.

    From x = signal * clean + noise * eps: the noise moves by -signal / noise * shift (with the shift of `clean_shift`
    this is -noise * scale * gradient: Dhariwal & Nichol 2021, algorithm 2), the velocities signal * eps - noise *
    clean (signal**2 + noise**2 = 1) and eps - clean (signal + noise = 1) by -shift / noise, the sample by the shift.

    Raises:
        ValueError: an unknown prediction type.
    """
    signal, noise = _columns(signal, shift), _columns(noise, shift).clamp(min=SMALLEST)
    if prediction_type == "epsilon":
        moved = prediction.float() - signal / noise * shift
    elif prediction_type in ("v_prediction", "flow_prediction"):
        moved = prediction.float() - shift / noise
    elif prediction_type == "sample":
        moved = prediction.float() + shift
    else:
        valid = "epsilon, v_prediction, sample, flow_prediction"
        raise ValueError(f"classifier guidance does not know the prediction type {prediction_type!r}; valid: {valid}")
    return moved.to(prediction.dtype)


def prediction_rule(scheduler: Any, signal: Tensor, noise: Tensor) -> tuple[str, Tensor | float]:
    """The type of prediction that `shift_prediction` knows, and the factor of the shift: 1, or like `noise`.

    Where a network's output means clean = skip * x + out * output (see `output_scalings`), it moves by shift / out,
    as a velocity does by -shift / noise.
    """
    if _is_preconditioned(scheduler):
        _, out = output_scalings(scheduler, signal, noise)
        return "v_prediction", -noise / out
    if type(scheduler).__name__ == "IPNDMScheduler":
        return "v_prediction", 1.0
    return scheduler.config.prediction_type, 1.0


def output_scalings(scheduler: Any, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """How Karras et al. 2022 read an output: clean = skip * x + out * output, x being what the network sees.

    Both are like `noise`. Table 1: c_skip = sigma_data**2 / (sigma**2 + sigma_data**2), here divided by c_in, and
    c_out = sigma * sigma_data * c_in, negative for "v_prediction". Consistency models subtract sigma_min from sigma
    (Song et al. 2023, appendix C), so that the network leaves a clean image as it is; `out` is kept from 0 there.
    """
    data, sigma = scheduler.config.sigma_data, noise / signal
    if _is_consistency(scheduler):
        sigma = sigma - scheduler.config.sigma_min
        out = (sigma * data * signal).clamp(min=SMALLEST)
    else:
        out = sigma * data * signal * (-1.0 if scheduler.config.prediction_type == "v_prediction" else 1.0)
    return data**2 / (sigma.square() + data**2) / signal, out


def class_indices(classes: Sequence[str], names: str | Sequence[str | None]) -> Tensor:
    """Positions (B,) of names among the classes, in any case; -1 for None. Raises ValueError listing the classes."""
    given = [names] if isinstance(names, str) else list(names)
    place = {str(name).strip().lower(): index for index, name in enumerate(classes)}
    for name in given:
        if name is not None and str(name).strip().lower() not in place:
            raise ValueError(f"class_label {name!r} is not a class of the classifier; valid: {', '.join(classes)}")
    return torch.tensor([-1 if name is None else place[str(name).strip().lower()] for name in given])


@torch.no_grad()
def latent_fingerprint(pipe: Any) -> list[float]:
    """Mean and deviation of each channel of a test image's scaled latents, (2 C,): it tells autoencoders apart."""
    side = 8 * pipe.vae_scale_factor
    row, column = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    image = torch.stack([torch.sin(6 * (k + 1) * row + 5 * (3 - k) * column + k) for k in range(3)])[None]
    latents = pipe.scale_latents(pipe.encode_latents(image)["mean"].float()).flatten(2)
    values = torch.cat([latents.mean(dim=2), latents.std(dim=2)], dim=1)[0]
    return [round(value, 5) for value in values.tolist()]


def _is_preconditioned(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("EDM") or _is_consistency(scheduler)


def _is_consistency(scheduler: Any) -> bool:
    return type(scheduler).__name__ == "CMStochasticIterativeScheduler"


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """() or (B,) as a factor of (B, C, h, w)."""
    values = torch.as_tensor(values, dtype=torch.float32, device=like.device)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _log_ratios(alphas_cumprod: Tensor) -> Tensor:
    """log(noise / signal) of every timestep; finite at a terminal signal of zero."""
    alphas = alphas_cumprod.double().clamp(1e-12, 1 - 1e-7)
    return (0.5 * torch.log((1 - alphas) / alphas)).float()


# ---- the model ----


class AttentionPool(nn.Module):
    """Tokens to one vector: their mean asks, all of them answer (CLIP's attention pooling).

    Without position embeddings, which would bind it to one size; the padding of convolutions tells positions already.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C)."""
        tokens = features.flatten(2).transpose(1, 2)
        mean = tokens.mean(dim=1, keepdim=True)
        tokens = torch.cat([mean, tokens], dim=1)
        return mean[:, 0] + self.attention(mean, tokens, tokens, need_weights=False)[0][:, 0]


class MediSynLatentClassifier(ModelMixin, ConfigMixin):
    """A classifier of noised latents, (B, C, h, w) and a noise level to (B, K).

    Args:
        classes: names, in the order of the outputs; at least two different ones.
        in_channels: C.
        sample_size: of the latents that it is trained on; others are valid.
        latent_fingerprint: see the function; empty: not known, and then not checked.
        temperature_levels: noise levels, as fractions of the schedule, at which `temperatures` are known; increasing.
        temperatures: divisors of the logits at those levels, linear between them (Guo et al. 2017, section 4.2).
        dropout: in the residual blocks and before the last layer.

    The other arguments are those of `UNet2DConditionModel` and of `DDPMScheduler`: the encoder's shape, and the noise
    schedule that it is trained with.

    Raises:
        ValueError: fewer than two classes, or a class named twice.
    """

    @register_to_config
    def __init__(
        self,
        classes: Sequence[str] = ("no", "yes"),
        in_channels: int = 4,
        sample_size: int | Sequence[int] | None = None,
        down_block_types: Sequence[str] = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        block_out_channels: Sequence[int] = (64, 128, 128),
        layers_per_block: int | Sequence[int] = 1,
        norm_num_groups: int = 16,
        norm_eps: float = 1e-5,
        act_fn: str = "silu",
        cross_attention_dim: int | Sequence[int] = 64,
        attention_head_dim: int | Sequence[int] = 4,
        num_attention_heads: int | Sequence[int] | None = None,
        transformer_layers_per_block: int | Sequence[int] = 1,
        use_linear_projection: bool = False,
        only_cross_attention: bool | Sequence[bool] = False,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "scale_shift",
        downsample_padding: int = 1,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        dropout: float = 0.0,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        latent_fingerprint: Sequence[float] = (),
        temperature_levels: Sequence[float] = (0.0,),
        temperatures: Sequence[float] = (1.0,),
    ) -> None:
        """Build the layers; see the class."""
        super().__init__()
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(f"a classifier needs at least two classes, each named once, not {', '.join(classes)!r}")
        widths, levels = list(block_out_channels), len(block_out_channels)
        time_width = 4 * widths[0]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], time_width, act_fn=act_fn)
        shared: dict[str, Any] = {"temb_channels": time_width, "resnet_eps": norm_eps, "resnet_act_fn": act_fn}
        shared |= {"resnet_groups": norm_num_groups, "resnet_time_scale_shift": resnet_time_scale_shift}
        shared |= {"use_linear_projection": use_linear_projection, "upcast_attention": upcast_attention}
        shared |= {"dropout": dropout}
        heads = _each(num_attention_heads or attention_head_dim, levels)  # UNet2DConditionModel's own reading
        each: dict[str, list] = {"num_attention_heads": heads, "attention_head_dim": _each(attention_head_dim, levels)}
        each |= {"cross_attention_dim": _each(cross_attention_dim, levels)}
        each |= {"transformer_layers_per_block": _each(transformer_layers_per_block, levels)}
        only, layers = _each(only_cross_attention, levels), _each(layers_per_block, levels)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind,
                num_layers=layers[i],
                in_channels=widths[max(i - 1, 0)],
                out_channels=widths[i],
                add_downsample=i + 1 < levels,
                downsample_padding=downsample_padding,
                only_cross_attention=only[i],
                **{name: values[i] for name, values in each.items()},
                **shared,
            )
            for i, kind in enumerate(down_block_types)
        )
        last = {name: values[-1] for name, values in each.items()}
        self.mid_block = get_mid_block(mid_block_type, in_channels=widths[-1], **last, **shared)
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=norm_eps)
        self.pool = AttentionPool(widths[-1], math.gcd(widths[-1], 4))
        last_layer = nn.Linear(widths[-1], len(classes))
        nn.init.zeros_(last_layer.weight)  # before training every class is as probable as another
        nn.init.zeros_(last_layer.bias)
        self.head = nn.Sequential(nn.Dropout(dropout), last_layer)

    @classmethod
    def from_unet(
        cls, unet: Any, scheduler: Any, classes: Sequence[str], copy_weights: bool = True, **changes: Any
    ) -> "MediSynLatentClassifier":
        """A classifier for the latents of a UNet, on the noise schedule of its scheduler.

        Args:
            unet: `UNet2DConditionModel`.
            scheduler: of the same model.
            classes: see the class.
            copy_weights: take the shape and the weights of the UNet's encoder half; else only its channels and size.
            changes: further arguments of the class.

        Raises:
            ValueError: `copy_weights` for a UNet with other blocks than this class knows.
        """
        names = SHAPE if copy_weights else ("in_channels", "sample_size")
        shape = {name: unet.config[name] for name in names if name in unet.config}
        schedule = {name: scheduler.config[name] for name in SCHEDULE if name in scheduler.config}
        if schedule.get("trained_betas") is not None:
            schedule["trained_betas"] = [float(beta) for beta in schedule["trained_betas"]]
        classifier = cls(classes=list(classes), **{**shape, **schedule, **changes})
        if copy_weights:
            state = {name: value for name, value in unet.state_dict().items() if ".lora_" not in name}
            state = {name.replace(".base_layer.", "."): value for name, value in state.items()}
            own = classifier.state_dict()
            taken = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
            new = [name for name in own if name not in taken and not name.startswith(("norm_out", "pool", "head"))]
            if new:
                raise ValueError(f"this UNet's encoder half has other layers than a classifier of its shape: {new[0]}")
            classifier.load_state_dict(taken, strict=False)
        return classifier

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of the outputs."""
        return tuple(self.config.classes)

    def class_indices(self, names: str | Sequence[str | None]) -> Tensor:
        """See the function of the same name."""
        return class_indices(self.classes, names)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Uncalibrated logits (B, K) of noised latents (B, C, h, w) at timesteps () or (B,) of its own schedule."""
        dtype = self.conv_in.weight.dtype
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(timestep).to(dtype))
        features = self.conv_in(sample.to(dtype))
        width = self.config.cross_attention_dim
        tokens = features.new_zeros(len(sample), 1, width if isinstance(width, int) else width[0])
        for block in self.down_blocks:
            context = {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
            features, _ = block(features, embedding, **context)
        if self.mid_block is not None:
            crosses = getattr(self.mid_block, "has_cross_attention", False)
            features = self.mid_block(features, embedding, **({"encoder_hidden_states": tokens} if crosses else {}))
        features = nn.functional.silu(self.norm_out(features))
        return self.head(self.pool(features))

    def log_probabilities(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Calibrated log-probabilities (B, K) in float32, also where the weights are of half precision."""
        if self.conv_in.weight.dtype == torch.float32:
            logits = self(sample.float(), timestep)
        else:
            weights = {name: value.float() for name, value in self.state_dict().items()}
            logits = torch.func.functional_call(self, weights, (sample.float(), timestep))
        return torch.log_softmax(logits.float() / self.temperature(timestep).to(logits.device), dim=1)

    def temperature(self, timestep: Tensor | float) -> Tensor:
        """What divides the logits at timesteps () or (B,) of its own schedule; () or (B, 1)."""
        level = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1) / self.config.num_train_timesteps
        known = torch.tensor(self.config.temperature_levels, device=level.device)
        values = torch.tensor(self.config.temperatures, device=level.device)
        if len(known) == 1:
            return values[0].expand_as(level)
        high = torch.searchsorted(known, level.contiguous()).clamp(1, len(known) - 1)
        share = ((level - known[high - 1]) / (known[high] - known[high - 1])).clamp(0, 1)
        return torch.lerp(values[high - 1], values[high], share)

    def timestep_of(self, signal: Tensor, noise: Tensor) -> Tensor:
        """The timestep of its own schedule, with fractions, at which noise and signal have the same ratio."""
        options = {name: self.config[name] for name in SCHEDULE}
        ratios = _log_ratios(DDPMScheduler(**options).alphas_cumprod.to(signal.device))
        ratio = torch.log(noise.clamp(min=1e-6) / signal.clamp(min=1e-6)).clamp(ratios[0], ratios[-1])
        high = torch.searchsorted(ratios, ratio.contiguous()).clamp(1, len(ratios) - 1)
        return high - 1 + (ratio - ratios[high - 1]) / (ratios[high] - ratios[high - 1])

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
        """The UNet's prediction for score + scale * grad log p(y | sample).

        Args:
            predict: what the UNet says about `sample`, classifier-free guidance included: that comes first.
            sample: what the UNet sees, (B, C, h, w).
            timestep: () or (B,).
            scheduler: whose schedule and prediction type hold.
            class_indices: y, (B,), see `log_probability_gradient`.
            scale: see `clean_shift`.
            clip: see `clean_shift`.
        """
        signal, noise = (value.to(sample.device) for value in noise_coefficients(scheduler, timestep))
        size, own_timestep = (signal.square() + noise.square()).sqrt(), self.timestep_of(signal, noise)

        def log_probabilities(variable: Tensor) -> Tensor:  # of variance-preserving latents
            return self.log_probabilities(variable / _columns(size, variable), own_timestep)

        gradient = log_probability_gradient(log_probabilities, sample, class_indices.to(sample.device))
        shift = clean_shift(gradient, signal, noise, scale, clip)
        prediction_type, factor = prediction_rule(scheduler, signal, noise)
        return shift_prediction(
            predict(sample), _columns(torch.as_tensor(factor), shift) * shift, signal, noise, prediction_type
        )

    def check_latents(self, pipe: Any) -> None:
        """Raise a ValueError in one line if the pipeline's latents are not those that this classifier knows."""
        channels = pipe.unet.config.in_channels
        if channels != self.config.in_channels:
            raise ValueError(
                f"the classifier is for other latents: it takes {self.config.in_channels} channels, this model has "
                f"{channels}; train one for this model (task latent_classifier)"
            )
        if not self.config.latent_fingerprint or pipe.vae is None:
            return
        known, here = torch.tensor(self.config.latent_fingerprint), torch.tensor(latent_fingerprint(pipe))
        difference = ((known - here).norm() / known.norm()).item()
        if not difference <= LATENT_TOLERANCE:
            raise ValueError(
                "the classifier is for other latents: it was trained with another autoencoder (the latents of a test "
                f"image differ by {difference:.0%}, at most {LATENT_TOLERANCE:.0%} is valid); train one for this model"
            )

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and, beside it, this file; `save_pretrained` calls it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        (Path(save_directory) / "medisyn_latent_classifier.py").write_text(_SOURCE, encoding="utf-8")


def _each(value: Any, levels: int) -> list:
    """One value for each level of resolution."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels
