"""Classifier guidance: gradients, the distribution that guided samples follow, schedulers, and the pipeline's call."""

import ast
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from scipy.stats import ks_1samp

from medisyn import load_pipeline
from medisyn.guidance import (
    CleanClassifier,
    attach_classifier,
    clean_prediction,
    clean_shift,
    load_classifier,
    log_probability_gradient,
    noise_coefficients,
    shift_prediction,
)
from medisyn.pipelines import medisyn_latent_classifier
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier, latent_fingerprint
from tests.components import tiny_pipeline

CLASSES = ("glioma", "meningioma", "no tumor")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def tiny_classifier(pipe, seed: int = 0, **changes) -> MediSynLatentClassifier:
    """A classifier for a tiny pipeline with random weights, so that it has an opinion."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fingerprint = latent_fingerprint(pipe)
        options = {"latent_fingerprint": fingerprint} | changes
        classifier = MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, CLASSES, **options)
        torch.nn.init.normal_(classifier.head[1].weight, std=0.5)
    return classifier.eval()


@pytest.fixture(scope="module")
def pipe():
    unconditional = tiny_pipeline(())
    return attach_classifier(unconditional, tiny_classifier(unconditional))


def sample(pipe, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "output_type": "np", "classifier_guidance_scale": 20.0} | options
    if "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(0)
    return pipe(**options).images


# ---- the functions ----


@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "flow_prediction"])
def test_every_prediction_type_means_the_same_shift_of_the_clean_latent(prediction_type):
    generator = torch.Generator().manual_seed(0)
    clean, eps, shift = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(3))
    signal = torch.tensor([0.8, 0.3])
    noise = 1 - signal if prediction_type == "flow_prediction" else (1 - signal**2).sqrt()
    a, b = signal[:, None, None, None], noise[:, None, None, None]
    predictions = {
        "epsilon": eps,
        "v_prediction": a * eps - b * clean,
        "sample": clean,
        "flow_prediction": eps - clean,
    }
    noised, prediction = a * clean + b * eps, predictions[prediction_type]
    moved = shift_prediction(prediction, shift, signal, noise, prediction_type)
    for before, expected in ((prediction, clean), (moved, clean + shift)):
        found = clean_prediction(before, noised, signal, noise, prediction_type)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_noise_moves_as_in_the_published_algorithm():
    """eps - sqrt(1 - alpha_bar) * scale * gradient: Dhariwal & Nichol 2021, algorithm 2."""
    gradient, eps = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    signal, noise = noise_coefficients(DDPMScheduler(), 300)
    shift = clean_shift(gradient, signal, noise, scale=2.5, clip=None)
    expected = eps - (1 - DDPMScheduler().alphas_cumprod[300]).sqrt() * 2.5 * gradient
    torch.testing.assert_close(shift_prediction(eps, shift, signal, noise, "epsilon"), expected, atol=1e-5, rtol=1e-4)


def test_a_clip_bounds_each_item_and_leaves_small_ones():
    gradient = torch.stack([torch.full((3, 2, 2), value) for value in (100.0, 0.01)])
    signal, noise = torch.tensor(0.6), torch.tensor(0.8)
    free, clipped = (clean_shift(gradient, signal, noise, 1.0, clip) for clip in (None, 0.5))
    torch.testing.assert_close(clipped[0].square().mean().sqrt(), torch.tensor(0.5))
    torch.testing.assert_close(clipped[0] / free[0], torch.full((3, 2, 2), (clipped[0] / free[0]).mean().item()))
    torch.testing.assert_close(clipped[1], free[1])


def test_noise_coefficients_of_schedules_and_fractions_of_timesteps():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    signal, noise = noise_coefficients(scheduler, torch.tensor([0, 400, 999]))
    torch.testing.assert_close(signal, scheduler.alphas_cumprod[[0, 400, 999]].sqrt(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(3))
    between = noise_coefficients(scheduler, 400.5)[0].item()
    assert noise_coefficients(scheduler, 401)[0].item() < between < noise_coefficients(scheduler, 400)[0].item()
    flow = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert [round(value.item(), 3) for value in noise_coefficients(flow, 250)] == [0.75, 0.25]
    with pytest.raises(ValueError, match="alphas_cumprod, not ScoreSdeVeScheduler; .* that work: DDIMSched"):
        noise_coefficients(diffusers.ScoreSdeVeScheduler(), 1)


def test_a_level_of_another_schedule_is_found_by_its_ratio_of_noise_to_signal(pipe):
    for timestep in (3.0, 250.0, 731.5):
        found = pipe.classifier.timestep_of(*noise_coefficients(pipe.scheduler, timestep))
        assert found.item() == pytest.approx(timestep, abs=0.01)
    other = DDPMScheduler(beta_schedule="linear")
    found = pipe.classifier.timestep_of(*noise_coefficients(other, 300)).item()
    own = noise_coefficients(pipe.scheduler, found)[0].item()
    assert own == pytest.approx(noise_coefficients(other, 300)[0].item(), abs=1e-3)


def test_the_gradient_against_finite_differences(pipe):
    generator = torch.Generator().manual_seed(0)
    latents, direction = (torch.randn(3, 4, 5, 7, generator=generator) for _ in range(2))  # an odd size
    indices = torch.tensor([2, 0, -1])

    def log_probabilities(sample):
        return pipe.classifier.log_probabilities(sample, 300)

    gradient = log_probability_gradient(log_probabilities, latents, indices)
    with torch.no_grad():
        ends = [log_probabilities(latents + step * direction) for step in (0.01, -0.01)]
    differences = (ends[0] - ends[1]).gather(1, indices.clamp(min=0)[:, None])[:, 0] / 0.02
    slopes = (gradient * direction).flatten(1).sum(dim=1)
    torch.testing.assert_close(slopes[:2], differences[:2], atol=2e-3, rtol=1e-2)
    assert slopes[:2].abs().min() > 0.01  # the test would see a gradient of zero
    assert gradient[2].abs().max() == 0  # no class, no guidance


# ---- the distribution of guided samples ----

MEANS, WIDTH = torch.tensor([-2.0, 0.2, 1.8]), 0.35
WEIGHTS, CLASS_OF = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0, 0, 1])
GRID = torch.linspace(-4, 4, 401)


def log_components(x, signal=1.0, noise=0.0):
    """log(weight * density) of the mixture's components at x (N,), diffused; (N, 3)."""
    variance = torch.as_tensor((signal * WIDTH) ** 2 + noise**2)
    return WEIGHTS.log() - 0.5 * (x[:, None] - signal * MEANS) ** 2 / variance - 0.5 * torch.log(6.2832 * variance)


def log_posterior(x, signal=1.0, noise=0.0):
    """log p(y | x) of both classes at a noise level, (N, 2)."""
    log_p = log_components(x, signal, noise)
    of_class = [log_p[:, CLASS_OF == y].logsumexp(dim=1) for y in (0, 1)]
    return torch.stack(of_class, dim=1) - log_p.logsumexp(dim=1, keepdim=True)


class MixtureClassifier(MediSynLatentClassifier):
    """The exact posterior of the mixture; for a power, that of a class whose probability is p(0 | clean) ** power."""

    power = 1.0

    def log_probabilities(self, sample, timestep):
        signal, noise = (value.reshape(()) for value in noise_coefficients(SCHEDULER, timestep))
        x = sample.flatten()
        if self.power == 1.0:
            return log_posterior(x, signal, noise)
        kernel = -0.5 * ((x[:, None] - signal * GRID) / noise) ** 2
        prior = log_components(GRID).logsumexp(dim=1)
        tilted = (kernel + prior + self.power * log_posterior(GRID)[:, 0]).logsumexp(dim=1)
        return (tilted - (kernel + prior).logsumexp(dim=1))[:, None].expand(-1, 2)


SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
SCHEDULER = DDPMScheduler(**SCHEDULE)


def draw(scheduler, prediction_type, power, count=1000):
    """Guided samples of the mixture by a plain loop, the exact prediction in the place of the UNet; (N,)."""
    classifier = MixtureClassifier(classes=["left", "right"], in_channels=1, block_out_channels=(16,) * 3, **SCHEDULE)
    classifier.power = power
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 1, 1, 1, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t)
        signal, noise = noise_coefficients(scheduler, t)

        def predict(x, signal=signal, noise=noise):
            with torch.enable_grad():
                variable = x.detach().flatten().requires_grad_(True)
                log_p = log_components(variable, signal, noise).logsumexp(dim=1)
                score = torch.autograd.grad(log_p.sum(), variable)[0].reshape(x.shape)
            eps = -noise * score
            clean = (x - noise * eps) / signal
            return {"epsilon": eps, "v_prediction": signal * eps - noise * clean, "sample": clean}[prediction_type]

        indices = torch.zeros(count, dtype=torch.int64)
        guided = classifier.guided_prediction(predict, model_input, t, scheduler, indices, scale=1.0, clip=None)
        latents = scheduler.step(guided, t, latents, **options).prev_sample
    return latents.flatten().numpy()


SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, 50),
    "euler": (diffusers.EulerDiscreteScheduler, {}, 40),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}, 40),
    "euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, 80),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, 80),
    "sde-dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 60),
}


CASES = [(name, kind, 1.0) for name, kind in zip(SAMPLERS, 2 * PREDICTION_TYPES, strict=True)]
CASES += [("ddim", "sample", 3.0), ("euler", "epsilon", 3.0), ("sde-dpm++", "v_prediction", 3.0)]


@pytest.mark.parametrize(("name", "prediction_type", "power"), CASES)
def test_guided_samples_of_a_mixture_follow_the_tilted_distribution(name, prediction_type, power):
    """p(x) p(y | x) ** power, whose class has two modes that must keep their shares."""
    kind, options, steps = SAMPLERS[name]
    scheduler = kind(**SCHEDULE, prediction_type=prediction_type, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(steps)
    found = draw(scheduler, prediction_type, power)
    density = torch.exp(log_components(GRID).logsumexp(dim=1) + power * log_posterior(GRID)[:, 0]).numpy()
    cumulative = np.cumsum(density) / density.sum()
    distance = ks_1samp(found, lambda x: np.interp(x, GRID.numpy(), cumulative)).statistic
    assert distance < 0.06  # unguided samples are at a distance of 0.5
    share = density[GRID.numpy() < -1].sum() / density.sum()
    assert np.mean(found < -1) == pytest.approx(share, abs=0.04)


# samplers that read the network's output in ways of their own
KARRAS = {"sigma_data": 0.7}
OTHERS = {
    "edm": diffusers.EDMEulerScheduler(prediction_type="epsilon", **KARRAS),
    "edm dpm++": diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", **KARRAS),
    "consistency": diffusers.CMStochasticIterativeScheduler(clip_denoised=False, **KARRAS),
    "ipndm": diffusers.IPNDMScheduler(),
    "flow": diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


class Steps:
    """The steps of a sampler by its own formulas: signal and noise of its latents, their scale, its clean latents."""

    def __init__(self, name, steps=5):
        self.name, self.scheduler = name, OTHERS[name]
        self.scheduler.set_timesteps(steps)
        if name == "ipndm":
            self.levels = list(zip(self.scheduler.alphas, self.scheduler.betas, strict=True))
        elif name == "flow":
            self.levels = [(1 - t / 1000, t / 1000) for t in self.scheduler.timesteps]  # they are rounded
        else:
            self.levels = [(torch.tensor(1.0), sigma) for sigma in self.scheduler.sigmas]

    def __iter__(self):
        return iter([(t, *level) for t, level in zip(self.scheduler.timesteps, self.levels, strict=False)][1:])

    def seen(self, noised, sigma):
        return noised if self.name in ("ipndm", "flow") else noised / (sigma**2 + KARRAS["sigma_data"] ** 2).sqrt()

    def denoised(self, noised, output, signal, noise):
        if self.name == "ipndm":
            return (
                signal * noised - noise * output
            )  # a velocity: its step makes noise of noised * beta + output * alpha
        if self.name == "flow":
            return noised - noise * output
        if self.name == "consistency":
            skip, out = self.scheduler.get_scalings_for_boundary_condition(noise)
            return skip * noised + out * output
        return self.scheduler.precondition_outputs(noised, output, noise)


@pytest.mark.parametrize("name", OTHERS)
def test_samplers_with_formulas_of_their_own_move_the_clean_latent_as_well(pipe, name):
    """What they make of the guided output is what they make of the plain one, and the shift by Tweedie's formula."""
    steps, indices = Steps(name), torch.tensor([1])
    latents, output, largest = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), []
    for t, signal, noise in steps:
        noised = latents * (signal**2 + noise**2).sqrt()
        seen = steps.seen(noised, noise)
        guided = pipe.classifier.guided_prediction(lambda _: output, seen, t, steps.scheduler, indices, 2.0, None)
        plain, moved = (steps.denoised(noised, each, signal, noise) for each in (output, guided))

        def log_probabilities(x, signal=signal, noise=noise):
            timestep = pipe.classifier.timestep_of(signal, noise)
            return pipe.classifier.log_probabilities(x / (signal**2 + noise**2).sqrt(), timestep)

        expected = 2.0 * noise**2 / signal * log_probability_gradient(log_probabilities, noised, indices)
        torch.testing.assert_close(moved - plain, expected, atol=1e-3, rtol=1e-2)
        largest.append(expected.abs().max().item())
    assert max(largest) > 0.1  # the test would see no shift at all


# ---- classifiers that never saw noise ----


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_both_jacobians_are_exact_for_normal_latents(prediction_type):
    """Standard normal latents: the clean prediction is signal * x, so log p(y | x) is log p(y | signal * x)."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    signal, noise = noise_coefficients(scheduler, 500)
    latents = torch.randn(2, 3, 2, 2)

    def predict(x):
        clean = signal * x
        eps = (x - signal * clean) / noise
        return {"epsilon": eps, "v_prediction": signal * eps - noise * clean, "sample": clean}[prediction_type]

    def scores(clean):
        return torch.stack([clean.flatten(1).sum(dim=1), clean.flatten(1).square().sum(dim=1)], dim=1)

    expected = log_probability_gradient(
        lambda x: scores(signal * x).log_softmax(dim=1), latents, torch.zeros(2, dtype=torch.int64)
    )
    expected = shift_prediction(
        predict(latents), clean_shift(expected, signal, noise, 2.0, None), signal, noise, prediction_type
    )
    for jacobian in ("unet", "scaled"):
        judge = CleanClassifier(scores, ("a", "b"), jacobian=jacobian)
        guided = judge.guided_prediction(predict, latents, 500, scheduler, judge.class_indices(["a", "A"]), 2.0, None)
        torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("jacobian", ["unet", "scaled"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_clean_classifier_knows_the_formulas_of_other_samplers(name, jacobian):
    """As above, of standard normal latents, whose clean latent is expected at signal * x / (signal**2 + noise**2)."""
    steps = Steps(name)

    def scores(clean):
        return torch.stack([clean.flatten(1).sum(dim=1), clean.flatten(1).square().sum(dim=1)], dim=1)

    judge = CleanClassifier(scores, ("a", "b"), jacobian=jacobian)
    for t, signal, noise in steps:
        noised = torch.randn(2, 3, 2, 2) * (signal**2 + noise**2).sqrt()
        scale = steps.seen(torch.ones(()), noise)

        def expectation(x, signal=signal, noise=noise):
            return signal * x / (signal**2 + noise**2)

        def predict(seen, signal=signal, noise=noise, scale=scale):  # the output that means the expectation
            x = seen / scale
            zero, one = (steps.denoised(x, torch.full_like(x, value), signal, noise) for value in (0.0, 1.0))
            return (expectation(x, signal, noise) - zero) / (one - zero)

        indices = judge.class_indices(["a", "b"])
        guided = judge.guided_prediction(predict, scale * noised, t, steps.scheduler, indices, 0.5, None)
        gradient = log_probability_gradient(lambda x: scores(expectation(x)).log_softmax(dim=1), noised, indices)
        expected = expectation(noised) + 0.5 * noise**2 / signal * gradient
        torch.testing.assert_close(steps.denoised(noised, guided, signal, noise), expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("jacobian", ["unet", "scaled"])
def test_an_image_classifier_leads_to_its_class_through_the_decoder(pipe, jacobian):
    def brightness(images):
        assert images.shape[1:] == (3, 32, 32)
        mean = 50 * (images.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-mean, mean], dim=1)

    judge = CleanClassifier(brightness, ("dark", "bright"), decode=pipe.decode_latents, jacobian=jacobian)
    dark, bright = (sample(pipe, class_label=name, classifier=judge).mean() for name in judge.classes)
    assert dark < sample(pipe).mean() < bright


def test_a_clean_classifier_is_checked():
    with pytest.raises(ValueError, match="jacobian 'none' is not one of: unet, scaled"):
        CleanClassifier(torch.nn.Identity(), ("a", "b"), jacobian="none")
    with pytest.raises(ValueError, match="at least two classes"):
        CleanClassifier(torch.nn.Identity(), ("a",))
    judge = CleanClassifier(lambda latents: latents.flatten(1), ("a", "b"))
    with pytest.raises(ValueError, match=r"gave \(1, 16\) for 2 classes"):
        judge.log_probabilities(torch.zeros(1, 4, 2, 2))


# ---- in the pipeline ----

MORE_SCHEDULERS = ["EDMDPMSolverMultistepScheduler", "IPNDMScheduler", "CMStochasticIterativeScheduler"]


@pytest.mark.parametrize("name", [each.name for each in KarrasDiffusionSchedulers] + MORE_SCHEDULERS)
def test_every_scheduler_can_be_guided(pipe, name):
    own = pipe.scheduler
    try:
        # another schedule than the classifier's; on its own KDPM2Ancestral's timesteps are not finite with few steps
        pipe.scheduler = getattr(diffusers, name).from_config(own.config, beta_schedule="scaled_linear")
        plain, guided = (sample(pipe, num_inference_steps=4, **label) for label in ({}, {"class_label": "glioma"}))
    except ImportError as error:  # DPMSolverSDEScheduler needs torchsde
        pytest.skip(str(error))
    finally:
        pipe.scheduler = own
    assert np.isfinite(guided).all()
    assert np.abs(plain - guided).max() > 1e-4


def test_an_image_does_not_depend_on_its_batch(pipe):
    names = ["glioma", None, "no tumor"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = sample(pipe, class_label=names, generator=generators)
    for seed, name in enumerate(names):
        alone = sample(pipe, class_label=name, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(together[seed], alone[0], atol=1e-4)
    twice = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    again = sample(pipe, class_label="GLIOMA", num_images_per_prompt=2, generator=twice)
    np.testing.assert_allclose(again[0], together[0], atol=1e-4)
    assert len(again) == 2


def test_guidance_stays_in_its_interval_and_a_scale_of_zero_does_nothing(pipe):
    plain, guided = sample(pipe), sample(pipe, class_label="glioma")
    assert np.abs(plain - guided).max() > 1e-3
    np.testing.assert_array_equal(sample(pipe, class_label="glioma", classifier_guidance_interval=(0.0, 0.0)), plain)
    unmoved = sample(pipe, class_label="glioma", classifier_guidance_scale=0.0)
    np.testing.assert_allclose(unmoved, plain, atol=1e-5)


def test_classifier_free_guidance_comes_first():
    pipe = tiny_pipeline(("labels",))

    class Listener(CleanClassifier):
        def guided_prediction(self, predict, sample, *others, **options):
            return predict(sample)

    listener = Listener(torch.nn.Identity(), CLASSES)
    options = {"labels": "gc=1", "guidance_scale": 4.0}
    np.testing.assert_array_equal(
        sample(pipe, **options, class_label="glioma", classifier=listener), sample(pipe, **options)
    )
    attach_classifier(pipe, tiny_classifier(pipe))
    assert np.abs(sample(pipe, **options, class_label="glioma") - sample(pipe, **options)).max() > 1e-3


def test_gradients_of_a_half_precision_pipeline_are_float32():
    pipe = tiny_pipeline(())
    attach_classifier(pipe, tiny_classifier(pipe))
    latents = torch.randn(2, 4, 4, 4)
    expected = pipe.classifier.log_probabilities(latents, 300)
    pipe.to(torch.bfloat16)
    found = pipe.classifier.log_probabilities(latents.bfloat16(), 300)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
    gradient = log_probability_gradient(
        lambda x: pipe.classifier.log_probabilities(x, 300), latents.bfloat16(), torch.tensor([0, 1])
    )
    assert gradient.dtype == torch.float32
    assert np.isfinite(sample(pipe, class_label="glioma")).all()
    assert not any(parameter.grad is not None for parameter in pipe.classifier.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_label": "lymphoma"},
            "'lymphoma' is not a class of the classifier; valid: glioma, meningioma, no tum",
        ),
        ({"class_label": ["glioma", "x"]}, "class_label 'x' is not a class"),
        (
            {"class_label": "glioma", "classifier_guidance_scale": float("nan")},
            "scale must be a finite number, not nan",
        ),
        (
            {"class_label": "glioma", "classifier_guidance_interval": (0.9, 0.1)},
            "classifier_guidance_interval must be",
        ),
        ({"class_label": "glioma", "classifier_guidance_clip": 0.0}, "classifier_guidance_clip must be above 0"),
    ],
)
def test_wrong_arguments_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, **options)


def test_a_class_needs_a_classifier():
    with pytest.raises(ValueError, match="class_label needs a classifier, which this model does not carry"):
        sample(tiny_pipeline(()), class_label="glioma")


def test_a_classifier_for_other_latents_is_refused(pipe):
    other = tiny_pipeline((), seed=1)
    with pytest.raises(ValueError, match="the classifier is for other latents: it was trained with another autoenc"):
        attach_classifier(other, pipe.classifier)
    with pytest.raises(ValueError, match="the classifier is for other latents"):
        sample(other, class_label="glioma", classifier=pipe.classifier)
    wide = MediSynLatentClassifier(classes=CLASSES, in_channels=8, block_out_channels=(16,) * 3)
    with pytest.raises(ValueError, match="it takes 8 channels, this model has 4"):
        attach_classifier(other, wide)
    half = tiny_pipeline(()).to(torch.bfloat16)  # the same autoencoder in another precision
    assert attach_classifier(half, tiny_classifier(tiny_pipeline(()))).classifier.dtype == torch.bfloat16


# ---- the model by itself ----


@pytest.mark.parametrize(("channels", "size"), [(4, (5, 7)), (8, (9, 3)), (16, (16, 16))])
def test_channels_and_sizes(channels, size):
    classifier = MediSynLatentClassifier(classes=CLASSES, in_channels=channels, block_out_channels=(16, 16, 32)).eval()
    found = classifier.log_probabilities(torch.randn(2, channels, *size), torch.tensor([0, 999]))
    torch.testing.assert_close(found, torch.full((2, 3), 1 / 3).log())  # untrained: every class alike


def test_temperatures_flatten_probabilities_at_their_noise_level(pipe):
    sharp = tiny_classifier(pipe)
    sharp.register_to_config(temperature_levels=[0.2, 0.6], temperatures=[1.0, 4.0])
    latents = torch.randn(3, 4, 4, 4)
    timesteps = torch.tensor([100.0, 400.0, 900.0])
    assert sharp.temperature(timesteps).flatten().tolist() == pytest.approx([1.0, 2.5, 4.0])
    expected = (sharp(latents, timesteps) / torch.tensor([[1.0], [2.5], [4.0]])).log_softmax(dim=1)
    torch.testing.assert_close(sharp.log_probabilities(latents, timesteps), expected)


def test_it_starts_from_the_encoder_half_of_the_unet(pipe):
    weights = pipe.unet.state_dict()
    classifier = tiny_classifier(pipe)
    shared = [name for name in classifier.state_dict() if name in weights]
    assert {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"} <= set(shared)
    assert all(torch.equal(classifier.state_dict()[name], weights[name]) for name in shared)
    with pytest.raises(ValueError, match="other layers"):
        with_classes = UNet2DConditionModel(**pipe.unet.config | {"time_embedding_dim": 32})
        MediSynLatentClassifier.from_unet(with_classes, pipe.scheduler, CLASSES)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least two classes"):
        MediSynLatentClassifier(classes=["glioma"])


class TestSaving:
    @pytest.fixture(autouse=True)
    def own_module_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def test_round_trips_with_and_without_the_package(self, pipe, tmp_path):
        expected = sample(pipe, class_label="no tumor")
        pipe.save_pretrained(tmp_path / "first")
        index = json.loads((tmp_path / "first" / "model_index.json").read_text())
        assert index["classifier"] == ["medisyn_latent_classifier", "MediSynLatentClassifier"]

        def remote(folder):
            return DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)

        for load in (load_pipeline, remote):
            again = load(tmp_path / "first")
            again.set_progress_bar_config(disable=True)
            np.testing.assert_array_equal(sample(again, class_label="no tumor"), expected)
            again.save_pretrained(tmp_path / "second")
            for load_again in (load_pipeline, remote):
                third = load_again(tmp_path / "second")
                third.set_progress_bar_config(disable=True)
                np.testing.assert_array_equal(sample(third, class_label="no tumor"), expected)
        assert isinstance(load_pipeline(tmp_path / "second").classifier, MediSynLatentClassifier)
        for file in (tmp_path / "second").rglob("*.json"):
            assert str(tmp_path) not in file.read_text(), file

    def test_a_fresh_process_loads_it_by_name(self, pipe, tmp_path):
        """Diffusers refuses components of modules that nothing has imported."""
        pipe.save_pretrained(tmp_path)
        script = f"import medisyn; print(*medisyn.load_pipeline({str(tmp_path)!r}).classifier.classes, sep=', ')"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.stdout.strip() == ", ".join(CLASSES), result.stderr

    def test_no_remote_code_is_run_unasked(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        (tmp_path / "classifier" / "medisyn_latent_classifier.py").write_text("raise RuntimeError('must not run')")
        assert load_pipeline(tmp_path).classifier.classes == CLASSES

    def test_a_model_without_a_classifier_is_written_as_ever(self, tmp_path):
        tiny_pipeline(()).save_pretrained(tmp_path)
        assert "classifier" not in (tmp_path / "model_index.json").read_text()

    def test_a_classifier_is_found_in_its_folder_a_run_and_a_pipeline(self, pipe, tmp_path):
        pipe.classifier.save_pretrained(tmp_path / "run" / "classifier")
        pipe.save_pretrained(tmp_path / "model")
        for place in ("run", "run/classifier", "model"):
            assert load_classifier(tmp_path / place).classes == CLASSES
        with pytest.raises(FileNotFoundError, match="no latent classifier .*nowhere"):
            load_classifier(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="holds a UNet2DConditionModel, not a MediSynLatentClassifier"):
            load_classifier(tmp_path / "model" / "unet")

    def test_its_file_needs_torch_and_diffusers_only(self):
        tree = ast.parse(medisyn_latent_classifier._SOURCE)
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        standard = {"collections", "hashlib", "math", "pathlib", "sys", "typing"}
        assert {name.partition(".")[0] for name in names} <= standard | {"torch", "diffusers"}
