"""What a pipeline does with its inputs: conditions, guidance, latents, schedulers, seeds, and errors."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from medisyn.pipelines.medisyn_pipeline import MediSynPipeline, label_vector, label_width, neutral_greys, parse_labels
from tests.components import IMAGE_SIZE, IMAGE_WIDTH, LABEL_SCHEMA, TEXT_WIDTH, TEXT_WINDOW, tiny_pipeline

JOINT = ("text", "image", "labels")


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def sample(pipe: MediSynPipeline, *args, seed: int = 0, **kwargs) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "np", "generator": seeds(seed)[0]}
    return pipe(*args, **options | kwargs).images


def picture(seed: int = 0, size: int = IMAGE_SIZE) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


class TestLabelVectors:
    def test_groups_come_in_field_order_and_unknown_is_zero(self):
        assert label_width(LABEL_SCHEMA) == 9
        assert label_vector(LABEL_SCHEMA, {"gc": 1, "dr_grade": 3}) == [0, 0, 0, 1, 0, 0, 1, 0, 0]
        for nothing in (None, {}, {"gc": None}, {"gc": float("nan")}, {"gc": "unknown", "eye_side": ""}):
            assert label_vector(LABEL_SCHEMA, nothing) == [0] * 9

    @pytest.mark.parametrize("yes", [1, "1", 1.0, True, "yes", "True", np.int64(1), np.bool_(True)])
    def test_binary_values_have_many_spellings(self, yes):
        assert label_vector(LABEL_SCHEMA, {"Glaucoma": yes})[5:7] == [0, 1]

    def test_strings_are_parsed(self):
        assert parse_labels("glaucoma=1, dr_grade=3") == {"glaucoma": "1", "dr_grade": "3"}
        assert label_vector(LABEL_SCHEMA, "eye side=LEFT") == [0, 0, 0, 0, 0, 0, 0, 0, 1]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ({"cataract": 1}, "'cataract'.*fields are: dr_grade .*gc.*Glaucoma"),
            ({"dr_grade": 5}, "dr_grade=5 .*valid are: 0, 1, 2, 3, 4"),
            ({"dr_grade": 1.5}, "dr_grade=1.5"),
            ({"gc": 1, "Glaucoma": 0}, "twice"),
            ("gc=1, gc=0", "twice"),
            ("gc", "field=value"),
            ("", "field=value"),
        ],
    )
    def test_what_is_outside_the_schema_is_refused(self, labels, message):
        with pytest.raises(ValueError, match=message):
            label_vector(LABEL_SCHEMA, labels)


class TestConditions:
    @pytest.mark.parametrize(
        ("kinds", "given"),
        [
            ((), {}),
            (("text",), {"prompt": "chest"}),
            (("labels",), {"labels": "gc=1"}),
            (("image",), {"image": picture()}),
            (("text", "labels"), {"prompt": "fundus", "labels": {"dr_grade": 2}}),
            (("image", "labels"), {"image": picture(), "labels": {"dr_grade": 2}}),
            (JOINT, {"prompt": "fundus", "image": picture(), "labels": {"dr_grade": 2}}),
        ],
    )
    def test_every_kind_steers_the_image(self, kinds, given):
        pipe = tiny_pipeline(kinds)
        assert pipe.kinds == kinds
        images = sample(pipe, **given)
        assert images.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3) and np.isfinite(images).all()
        assert (given == {}) == np.array_equal(images, sample(pipe))

    @pytest.mark.parametrize("tokens", ["global", "patch"])
    @pytest.mark.parametrize("registers", [0, 4])
    def test_image_tokens(self, tokens, registers):
        pipe = tiny_pipeline(("image",), image_tokens=tokens, registers=registers)
        embeds = pipe.encode_image([picture(0), picture(1)])
        assert embeds.shape == (2, 1 if tokens == "global" else 4, IMAGE_WIDTH) == pipe.null_embeds("image", 2).shape
        hidden = pipe.image_encoder(
            pipe.feature_extractor(picture(0), return_tensors="pt").pixel_values
        ).last_hidden_state
        expected = hidden[:, :1] if tokens == "global" else hidden[:, -4:]
        torch.testing.assert_close(embeds[:1], expected)

    def test_pictures_arrays_and_tensors_mean_the_same(self):
        pipe = tiny_pipeline(("image",))
        # smooth, because resizing works on bytes for pictures and on floats for the others
        ramp = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)
        array = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 0.5), axis=-1).astype(np.float32)
        expected = pipe.encode_image(PIL.Image.fromarray((array * 255).round().astype(np.uint8)))
        for same in (array, array[None], torch.tensor(array).permute(2, 0, 1), [torch.tensor(array).permute(2, 0, 1)]):
            torch.testing.assert_close(pipe.encode_image(same), expected, atol=0.02, rtol=0.02)
        gray = picture().convert("L")
        torch.testing.assert_close(pipe.encode_image(gray), pipe.encode_image(gray.convert("RGB")))

    def test_text_encoding_is_differentiable_and_padded_to_the_window(self):
        pipe = tiny_pipeline()
        embeds = pipe.encode_prompt(["a", "chest"])
        assert embeds.shape == (2, TEXT_WINDOW, TEXT_WIDTH) and embeds.requires_grad
        torch.testing.assert_close(pipe.encode_prompt([None]), pipe.null_embeds("text"))

    def test_long_prompts_are_counted_in_a_warning(self, capture_warnings):
        pipe = tiny_pipeline()
        pipe.encode_prompt(["short", "x" * 20, "y" * 30])
        (message,) = capture_warnings
        assert "2 of 3 prompts" in message and "window of 16 tokens" in message and "up to 32" in message

    def test_embeddings_may_replace_inputs(self):
        pipe = tiny_pipeline(JOINT)
        inputs = {"prompt": "fundus", "image": picture(), "labels": "gc=1"}
        embeds = {
            "prompt_embeds": pipe.encode_prompt(["fundus"]),
            "image_embeds": pipe.encode_image(picture()),
            "label_embeds": pipe.encode_labels("gc=1"),
        }
        np.testing.assert_array_equal(sample(pipe, **inputs), sample(pipe, **embeds))

    def test_a_pipeline_without_its_encoders_takes_embeddings(self):
        pipe = tiny_pipeline(("text", "image"))
        embeds = {"prompt_embeds": pipe.encode_prompt(["x"]), "image_embeds": pipe.encode_image(picture())}
        embeds["negative_prompt_embeds"] = pipe.null_embeds("text")
        expected = sample(pipe, **embeds)
        pipe.register_modules(text_encoder=None, tokenizer=None, image_encoder=None, feature_extractor=None)
        assert pipe.kinds == ("text", "image")
        np.testing.assert_array_equal(sample(pipe, **embeds), expected)
        with pytest.raises(ValueError, match="prompt: this pipeline has no text_encoder"):
            sample(pipe, "x")

    def test_joint_tokens_are_block_wise(self):
        pipe = tiny_pipeline(("text", "image"))
        text, image = torch.randn(2, 5, TEXT_WIDTH), torch.randn(2, 3, IMAGE_WIDTH)
        tokens = pipe.unet_conditions(text, image)["encoder_hidden_states"]
        assert tokens.shape == (2, 8, TEXT_WIDTH + IMAGE_WIDTH)
        torch.testing.assert_close(tokens[:, :5, :TEXT_WIDTH], text)
        torch.testing.assert_close(tokens[:, 5:, TEXT_WIDTH:], image)
        assert not tokens[:, :5, TEXT_WIDTH:].any() and not tokens[:, 5:, :TEXT_WIDTH].any()

    def test_a_null_image_beside_text_draws_no_attention(self):
        pipe = tiny_pipeline(("text", "image"))
        text, noise = pipe.encode_prompt(["x"]), torch.randn(1, 4, 4, 4)

        def predict(tokens):
            return pipe.unet(noise, 5, **pipe.unet_conditions(text, torch.zeros(1, tokens, IMAGE_WIDTH))).sample

        torch.testing.assert_close(predict(1), predict(9))

    def test_missing_kinds_are_null(self):
        pipe = tiny_pipeline(JOINT)
        text = pipe.encode_prompt(["a", "b"])
        conditions = pipe.unet_conditions(text)
        explicit = pipe.unet_conditions(text, torch.zeros(2, 1, IMAGE_WIDTH), torch.zeros(2, 9))
        assert conditions.keys() == explicit.keys()
        for name, value in conditions.items():
            torch.testing.assert_close(value, explicit[name])
        assert pipe.unet_conditions(batch_size=3)["class_labels"].shape == (3, 9)


class TestLatents:
    @pytest.mark.parametrize("vae", ["dc", "kl"])
    def test_moments_and_scaling(self, vae):
        pipe = tiny_pipeline(vae=vae)
        images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
        moments = pipe.encode_latents(images)
        assert moments.keys() == ({"mean"} if vae == "dc" else {"mean", "logvar"})
        assert all(value.shape == (2, 4, 4, 4) for value in moments.values())
        scaled = pipe.scale_latents(moments["mean"])
        torch.testing.assert_close(scaled, moments["mean"] * pipe.vae.config.scaling_factor)
        torch.testing.assert_close(pipe.unscale_latents(scaled), moments["mean"])
        decoded = pipe.decode_latents(scaled)
        assert decoded.shape == images.shape and decoded.abs().max() <= 1

    @pytest.mark.parametrize(("tint", "is_grey"), [(0.5, True), (1.5, True), (8.0, False)])
    def test_an_image_without_colour_is_exactly_grey_and_one_with_colour_is_left_alone(self, tint, is_grey):
        grey = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).repeat(1, 3, 1, 1)
        tinted = grey + tint / 127.5 * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
        colour = torch.rand(1, 3, 8, 8, generator=seeds(0)[0]) * 2 - 1
        images = neutral_greys(torch.cat([tinted, colour]))
        assert torch.equal(images[1:], colour)
        if is_grey:
            assert torch.equal(images[0, 0], images[0, 1]) and torch.equal(images[0, 0], images[0, 2])
            torch.testing.assert_close(images[:1], grey, atol=1.5 * tint / 127.5, rtol=0.0)
        else:
            assert torch.equal(images[:1], tinted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_grey_is_left_as_it_is_in_every_precision(self, dtype):
        grey = torch.linspace(-1, 1, 256, dtype=dtype).repeat(1, 3, 4, 1)
        images = neutral_greys(grey)
        assert images.dtype == dtype and images.abs().max() <= 1
        assert torch.equal(*((part.float() * 127.5 + 127.5).round() for part in (images, grey)))

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_only_three_channels_are_looked_at_for_colour(self, channels):
        images = torch.rand(2, channels, 4, 4, generator=seeds(0)[0])
        assert torch.equal(neutral_greys(images), images)

    @pytest.mark.parametrize("tint", [0.5, 30.0])
    def test_gradients_reach_an_image_that_becomes_grey_and_one_that_does_not(self, tint):
        images = torch.zeros(1, 3, 4, 4) + tint / 127.5 * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
        neutral_greys(images.requires_grad_()).sum().backward()
        assert images.grad.sum().item() == pytest.approx(48.0) and (images.grad > 0).all()

    def test_a_spot_of_colour_keeps_an_image_in_colour(self):
        doppler = torch.zeros(1, 3, 128, 128)
        doppler[:, 0, 40:52, 40:52] = 0.8  # 1 % of the area
        assert torch.equal(neutral_greys(doppler), doppler)
        assert doppler.sub(doppler.mean(1, keepdim=True)).abs().mean() < 2 / 127.5

    def test_greyscale_samples_have_one_value_in_all_channels(self):
        pipe = tiny_pipeline(vae="kl")
        head = pipe.vae.decoder.conv_out
        with torch.no_grad():  # a decoder whose channels differ by less than a level of 255
            head.weight.copy_(head.weight[:1].expand_as(head.weight))
            head.bias.copy_(torch.tensor([0.0, 0.004, -0.004]))
        images = (sample(pipe, "x") * 255).round()
        assert np.ptp(images, axis=-1).max() == 0 and np.ptp(images) > 0

    def test_shift_factor(self):
        pipe = tiny_pipeline(vae="kl")
        pipe.vae.register_to_config(shift_factor=0.25)
        torch.testing.assert_close(pipe.scale_latents(torch.ones(1)), torch.tensor([0.75 * 0.5]))
        torch.testing.assert_close(pipe.unscale_latents(torch.tensor([0.375])), torch.ones(1))

    def test_latents_are_an_output_and_an_input(self):
        pipe = tiny_pipeline()
        latents = pipe("x", num_inference_steps=2, generator=seeds(3)[0], output_type="latent").images
        decoded = pipe.image_processor.postprocess(pipe.decode_latents(latents).detach(), output_type="np")
        np.testing.assert_array_equal(decoded, sample(pipe, "x", seed=3))
        noise = torch.randn(1, 4, 4, 4, generator=seeds(3)[0])
        np.testing.assert_array_equal(sample(pipe, "x", latents=noise), decoded)


class TestSeedsAndBatches:
    def test_an_image_depends_on_its_own_seed_only(self):
        pipe = tiny_pipeline(("text", "labels"))
        prompts, labels = ["a", "b", "c", "d"], [None, "gc=1", {"dr_grade": 0}, "gc=0"]
        batch = sample(pipe, prompts, labels=labels, generator=seeds(7, 8, 9, 10))
        for i in range(4):
            alone = sample(pipe, prompts[i], labels=labels[i], generator=seeds(7 + i))
            np.testing.assert_allclose(batch[i], alone[0], atol=1e-5)

    def test_ancestral_samplers_take_a_generator_for_each_image(self):
        pipe = tiny_pipeline()
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        batch = sample(pipe, ["a", "b"], generator=seeds(0, 1), num_inference_steps=3)
        alone = sample(pipe, "b", generator=seeds(1), num_inference_steps=3)
        np.testing.assert_allclose(batch[1], alone[0], atol=1e-5)

    def test_one_value_serves_the_batch_and_images_per_prompt_repeat_it(self):
        pipe = tiny_pipeline(("text", "labels"))
        images = sample(pipe, ["a", "b"], labels="gc=1", num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
        alone = sample(pipe, "b", labels="gc=1", generator=seeds(2))
        assert len(images) == 4
        np.testing.assert_allclose(images[2], alone[0], atol=1e-5)

    def test_a_prompt_may_be_absent_in_a_batch(self):
        pipe = tiny_pipeline()
        images = sample(pipe, ["a", None], generator=seeds(0, 1))
        np.testing.assert_allclose(images[1], sample(pipe, generator=seeds(1))[0], atol=1e-5)

    def test_half_precision_starts_from_the_same_noise(self):
        options = {"output_type": "latent", "num_inference_steps": 1, "guidance_scale": 1.0}
        full = tiny_pipeline()("x", generator=seeds(0)[0], **options).images
        half = tiny_pipeline().to(torch.bfloat16)("x", generator=seeds(0)[0], **options).images
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


class TestGuidance:
    def predictions(self, pipe, prompt, labels, noise, t):
        """e(null), e(text), e(text, labels) for one image."""
        text, vector = pipe.encode_prompt([prompt]), pipe.encode_labels(labels)
        with torch.no_grad():
            return [
                pipe.unet(noise, t, **pipe.unet_conditions(*arguments)).sample
                for arguments in ((None, None, None), (text, None, None), (text, None, vector))
            ]

    @pytest.mark.parametrize(
        ("scale", "weights"),
        [
            (1.0, (1, 1)),
            (3.0, (3, 3)),
            (0.0, (0, 0)),
            ({"text": 3.0, "labels": 1.5}, (3, 1.5)),
            ({"labels": 2.0}, (1, 2)),
            ({"text": 2.0}, (2, 1)),
            ({"text": 2.0, "labels": 2.0}, (2, 2)),
        ],
    )
    def test_the_chain_of_weights(self, scale, weights):
        pipe = tiny_pipeline(("text", "labels"))
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        noise = torch.randn(1, 4, 4, 4, generator=seeds(0)[0])
        options = {"latents": noise, "num_inference_steps": 1, "output_type": "latent"}
        options["guidance_interval"] = (0.0, 1.0)
        result = pipe("x", labels="gc=1", guidance_scale=scale, **options).images
        t = pipe.scheduler.timesteps[0]
        null, text, both = self.predictions(pipe, "x", "gc=1", noise, t)
        guided = null + weights[0] * (text - null) + weights[1] * (both - text)
        expected = pipe.scheduler.step(guided, t, noise).prev_sample
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("scale", "evaluations"), [(1.0, 1), (2.0, 2), ({"text": 2.0, "labels": 3.0}, 3), ({"labels": 2.0}, 2)]
    )
    def test_only_needed_predictions_are_made(self, scale, evaluations, unet_batches):
        pipe = tiny_pipeline(("text", "labels"))
        batches = unet_batches(pipe)
        sample(pipe, "x", labels="gc=1", guidance_scale=scale, guidance_interval=(0.0, 1.0))
        assert batches == [evaluations] * 2
        batches.clear()
        sample(pipe, guidance_scale=scale)
        assert batches == [1, 1]  # nothing to guide towards

    def test_interval(self, unet_batches):
        pipe = tiny_pipeline()
        batches = unet_batches(pipe)
        sample(pipe, "x", guidance_interval=(0.25, 0.75), num_inference_steps=10)
        fractions = [float(t) / 1000 for t in pipe.scheduler.timesteps]
        assert batches == [2 if 0.25 <= fraction <= 0.75 else 1 for fraction in fractions]
        batches.clear()
        sample(pipe, "x", num_inference_steps=10)
        assert batches == [2 if fraction <= 0.95 else 1 for fraction in fractions]
        everywhere = sample(pipe, "x", guidance_scale=1.0)
        np.testing.assert_array_equal(sample(pipe, "x", guidance_scale=5.0, guidance_interval=(0, 0)), everywhere)

    @pytest.mark.parametrize("scale", [4.0, {"text": 5.0, "labels": 2.0}])
    def test_rescaling_brings_the_deviation_back_to_that_of_the_conditional_prediction(self, scale):
        pipe = tiny_pipeline(("text", "labels"))
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        noise = torch.randn(1, 4, 4, 4, generator=seeds(0)[0])
        options = {"latents": noise, "num_inference_steps": 1, "output_type": "latent", "guidance_scale": scale}
        result = pipe("x", labels="gc=1", guidance_rescale=0.7, **options).images
        t = pipe.scheduler.timesteps[0]
        null, text, both = self.predictions(pipe, "x", "gc=1", noise, t)
        weights = (4.0, 4.0) if scale == 4.0 else (5.0, 2.0)
        guided = null + weights[0] * (text - null) + weights[1] * (both - text)
        guided = 0.7 * guided * both.std() / guided.std() + 0.3 * guided  # Lin et al. 2024, eq. 15 and 16
        expected = pipe.scheduler.step(guided, t, noise).prev_sample
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
        plain = pipe("x", labels="gc=1", guidance_scale=1.0, output_type="np", latents=noise).images
        rescaled = pipe("x", labels="gc=1", guidance_scale=1.0, output_type="np", latents=noise, guidance_rescale=1.0)
        np.testing.assert_array_equal(rescaled.images, plain)  # without guidance there is nothing to rescale

    def test_negative_prompt_replaces_the_null(self):
        pipe = tiny_pipeline()
        assert not np.array_equal(sample(pipe, "x", negative_prompt="blurred"), sample(pipe, "x"))
        embeds = pipe.encode_prompt(["blurred"])
        np.testing.assert_array_equal(
            sample(pipe, "x", negative_prompt="blurred"), sample(pipe, "x", negative_prompt_embeds=embeds)
        )
        images = sample(pipe, ["x", "y"], negative_prompt="blurred", generator=seeds(0, 1))
        np.testing.assert_allclose(images[0], sample(pipe, "x", negative_prompt="blurred")[0], atol=1e-5)
        np.testing.assert_array_equal(
            sample(pipe, "x", negative_prompt="blurred", guidance_scale=1.0), sample(pipe, "x", guidance_scale=1.0)
        )


class TestSchedulers:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
    def test_a_perfect_model_gives_back_its_image(self, prediction_type, name):
        """The prediction that belongs to one latent leads there, whatever it is called."""
        pipe = tiny_pipeline(prediction_type=prediction_type)
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, clip_sample=False)
        target = torch.randn(1, 4, 4, 4, generator=seeds(1)[0])

        def perfect(sample, t, **kwargs):
            alpha = pipe.scheduler.alphas_cumprod[int(t)]
            epsilon = (sample - alpha.sqrt() * target) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * target
            return ({"epsilon": epsilon, "v_prediction": velocity, "sample": target}[prediction_type],)

        pipe.unet.forward = perfect
        latents = pipe(num_inference_steps=10, generator=seeds(0)[0], output_type="latent").images
        torch.testing.assert_close(latents, target, atol=0.08, rtol=0.05)

    def test_second_order_schedulers_count_whole_steps(self):
        pipe = tiny_pipeline()
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        steps = []
        sample(pipe, "x", num_inference_steps=4, callback_on_step_end=lambda pipe, i, t, tensors: steps.append(i))
        assert len(steps) == pipe.num_timesteps == 7


class TestImageToImage:
    @pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
    def test_strength(self, name):
        pipe = tiny_pipeline(vae="kl")
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, clip_sample=False)
        start = picture()
        pixels = pipe.image_processor.preprocess(start)
        origin = pipe.scale_latents(pipe.encode_latents(pixels)["mean"])
        distances = []
        for strength in (0.1, 0.5, 1.0):
            options = {"init_image": start, "strength": strength, "num_inference_steps": 10, "output_type": "latent"}
            latents = pipe("x", generator=seeds(0)[0], guidance_scale=1.0, **options).images
            distances.append((latents - origin).abs().mean().item())
        assert distances[0] < distances[1] < distances[2]

    def test_one_start_image_serves_several_prompts(self):
        pipe = tiny_pipeline()
        images = sample(pipe, ["x", "y"], init_image=picture(size=64), generator=seeds(0, 1))
        assert images.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
        alone = sample(pipe, "y", init_image=picture(size=64), generator=seeds(1))
        np.testing.assert_allclose(images[1], alone[0], atol=1e-5)

    def test_a_later_call_starts_from_noise_again(self):
        pipe = tiny_pipeline()
        before = sample(pipe, "x", num_inference_steps=4)
        sample(pipe, "x", init_image=picture(), num_inference_steps=4)
        np.testing.assert_array_equal(sample(pipe, "x", num_inference_steps=4), before)


class TestErrors:
    @pytest.mark.parametrize(
        ("kinds", "arguments", "message"),
        [
            (("labels",), {"prompt": "x"}, "prompt: this model has no text condition; its conditions are: labels"),
            ((), {"prompt": "x"}, "prompt: this model has no text condition; its conditions are: none"),
            (("text",), {"labels": "gc=1"}, "labels: this model has no labels condition; its conditions are: text"),
            (("text",), {"image": picture()}, "no image condition"),
            (("labels",), {"negative_prompt": "x"}, "negative_prompt: this model has no text condition"),
            (("text",), {"prompt": ""}, "prompt is empty"),
            (("text",), {"prompt": ["x", "  "]}, "prompt is empty"),
            (("text",), {"prompt": []}, "prompt is empty"),
            (("text",), {"prompt": 3}, "prompt must be a string"),
            (("text",), {"prompt": ["x", 3]}, "prompt must be a string"),
            (("text",), {"negative_prompt": 3}, "negative_prompt must be a string"),
            (("text",), {"prompt": "x", "prompt_embeds": torch.zeros(1, 2, TEXT_WIDTH)}, "both prompt and prompt_emb"),
            (("text",), {"prompt_embeds": torch.zeros(1, TEXT_WINDOW, 5)}, "width 5; this model's is 16"),
            (("text",), {"prompt_embeds": torch.zeros(1, 5)}, r"must be a tensor \(batch, tokens, width\)"),
            (("text",), {"prompt_embeds": torch.zeros(1, 2, TEXT_WIDTH)}, "differ in"),
            (("labels",), {"label_embeds": torch.zeros(1, 4)}, "width 4; this model's is 9"),
            (("labels",), {"labels": 3}, "labels must be a dict"),
            (("labels",), {"labels": {"flu": 1}}, "its fields are: dr_grade"),
            (("labels",), {"labels": "gc=7"}, "valid are: 0, 1, unknown"),
            (("image",), {"image": "scan.png"}, "image must be PIL images"),
            (("text",), {"prompt": ["x"] * 3, "negative_prompt": ["x"] * 2}, "different lengths"),
            (("text", "labels"), {"prompt": ["x"] * 3, "labels": ["gc=1"] * 2}, "different lengths: text 3, labels 2"),
            (("text",), {"height": 30}, "height must be a positive multiple of 8, not 30"),
            (("text",), {"width": 0}, "width must be a positive multiple of 8, not 0"),
            (("text",), {"width": "64"}, "width must be a positive multiple of 8"),
            (("text",), {"num_inference_steps": 0}, "num_inference_steps must be a positive whole number, not 0"),
            (("text",), {"num_inference_steps": 2.5}, "num_inference_steps"),
            (("text",), {"num_images_per_prompt": -1}, "num_images_per_prompt"),
            (("text",), {"guidance_scale": "3"}, "guidance_scale must be a finite number"),
            (("text",), {"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
            (("text",), {"guidance_scale": {"labels": 2.0}}, "has 'labels'; this model's conditions are: text"),
            (("text",), {"guidance_interval": (0.5, 0.1)}, "guidance_interval must be"),
            (("text",), {"guidance_rescale": 1.5}, "guidance_rescale must be in 0..1, not 1.5"),
            (("text",), {"init_image": picture(), "strength": 0}, "strength must be above 0"),
            (("text",), {"output_type": "jpg"}, "not one of: pil, np, pt, latent"),
            (("text",), {"generator": 42}, "generator must be a torch.Generator"),
            (("text",), {"generator": seeds(0, 1)}, "2 generators for 1 images"),
            (("text",), {"latents": torch.zeros(1, 4, 8, 8)}, r"these images need \(1, 4, 4, 4\)"),
            (("text",), {"callback_on_step_end_tensor_inputs": ["noise"]}, "are not some of: latents"),
        ],
    )
    def test_bad_arguments_are_named(self, kinds, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            tiny_pipeline(kinds)(num_inference_steps=arguments.pop("num_inference_steps", 1), **arguments)
        assert "\n" not in str(error.value)

    def test_constructor(self):
        with pytest.raises(ValueError, match="not one of: global, patch"):
            tiny_pipeline(image_tokens="all")
        components = tiny_pipeline().components
        with pytest.raises(ValueError, match="text, image, labels"):
            MediSynPipeline(**components, conditions="text+sound")
        with pytest.raises(ValueError, match="not one of: text, image, labels"):
            tiny_pipeline().null_embeds("sound")


@pytest.fixture
def capture_warnings(monkeypatch):
    messages = []
    monkeypatch.setattr("medisyn.pipelines.medisyn_pipeline.logger.warning", messages.append)
    return messages


@pytest.fixture
def unet_batches():
    def record(pipe) -> list[int]:
        batches = []
        pipe.unet.register_forward_pre_hook(lambda unet, arguments: batches.append(len(arguments[0])))
        return batches

    return record
