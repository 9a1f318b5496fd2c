"""The contract that diffusers' own pipeline tests hold every pipeline to, checked on MediSynPipeline.

diffusers keeps its tester mixins in its repository and does not install them; these tests state the same behaviours
in our words: call signature, saving, optional components, batching, outputs, precision, callbacks, schedulers.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.components import tiny_components, tiny_pipeline

KINDS = [("text",), ("labels",), ("text", "image", "labels")]
PROMPT = "A colour photograph of the fundus"


def inputs(kinds: tuple[str, ...], seed: int = 0) -> dict:
    given = {
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "output_type": "np",
    }
    if "text" in kinds:
        given["prompt"] = PROMPT
    if "labels" in kinds:
        given["labels"] = {"gc": 1}
    if "image" in kinds:
        given["image"] = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return given


def test_call_signature():
    parameters = inspect.signature(MediSynPipeline.__call__).parameters
    assert all(
        parameter.default is not inspect.Parameter.empty for name, parameter in parameters.items() if name != "self"
    )
    text_to_image = {"prompt", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds"}
    text_to_image |= {"negative_prompt_embeds", "cross_attention_kwargs"}
    always = {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
    always |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    assert text_to_image | always <= parameters.keys()


@pytest.mark.parametrize("kinds", KINDS)
def test_components_property_round_trip(kinds):
    components = tiny_components(kinds)
    schema = components.pop("label_schema", None)
    pipe = MediSynPipeline(**components, label_schema=schema)
    assert {name for name, value in pipe.components.items() if value is not None} == components.keys()
    twin = MediSynPipeline(**pipe.components, label_schema=schema)
    np.testing.assert_array_equal(twin(**inputs(kinds)).images, pipe(**inputs(kinds)).images)
    np.testing.assert_array_equal(
        MediSynPipeline.from_pipe(pipe)(**inputs(kinds)).images, pipe(**inputs(kinds)).images
    )


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("safe", [True, False])
def test_save_load_local(kinds, safe, tmp_path):
    pipe = tiny_pipeline(kinds)
    expected = pipe(**inputs(kinds)).images
    pipe.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = MediSynPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded(**inputs(kinds)).images, expected, atol=5e-4)


def test_save_load_optional_components(tmp_path):
    """Without any optional component the model still samples from embeddings, and stays so when saved."""
    pipe = tiny_pipeline(("text", "image"))
    given = inputs(())
    given["prompt_embeds"] = pipe.encode_prompt(PROMPT)
    given["negative_prompt_embeds"] = pipe.null_embeds("text")
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    expected = pipe(**given).images
    pipe.save_pretrained(tmp_path)
    loaded = MediSynPipeline.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in pipe._optional_components)
    given["generator"] = torch.Generator().manual_seed(0)
    np.testing.assert_allclose(loaded(**given).images, expected, atol=1e-4)


@pytest.mark.parametrize("kinds", KINDS)
def test_inference_batch_single_identical(kinds):
    pipe = tiny_pipeline(kinds)
    single = pipe(**inputs(kinds)).images
    batch = inputs(kinds)
    batch["generator"] = [torch.Generator().manual_seed(i) for i in range(3)]
    for name in ("prompt", "labels", "image"):
        if name in batch:
            batch[name] = 3 * [batch[name]]
    if "prompt" in batch:  # unequal lengths, one beyond the window
        batch["prompt"] = [PROMPT, PROMPT[: len(PROMPT) // 2], 100 * "very long"]
    images = pipe(**batch).images
    assert len(images) == 3
    np.testing.assert_allclose(images[0], single[0], atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_num_images_per_prompt(batch_size, num_images_per_prompt):
    given = inputs(("text",)) | {"prompt": batch_size * [PROMPT]}
    images = tiny_pipeline()(**given, num_images_per_prompt=num_images_per_prompt).images
    assert images.shape[0] == batch_size * num_images_per_prompt


@pytest.mark.parametrize("kinds", KINDS)
def test_outputs_agree_in_every_form(kinds):
    pipe = tiny_pipeline(kinds)
    array = pipe(**inputs(kinds)).images
    np.testing.assert_array_equal(pipe(**inputs(kinds), return_dict=False)[0], array)
    tensor = pipe(**inputs(kinds) | {"output_type": "pt"}).images
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array, atol=1e-6)
    picture = pipe(**inputs(kinds) | {"output_type": "pil"}).images[0]
    assert np.abs(np.asarray(picture) - (array[0] * 255).round()).max() < 2
    latents = pipe(**inputs(kinds) | {"output_type": "latent"}).images
    decoded = pipe.image_processor.postprocess(pipe.decode_latents(latents).detach(), output_type="np")
    np.testing.assert_allclose(decoded, array, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kinds", KINDS)
def test_half_precision(kinds, dtype, tmp_path):
    expected = tiny_pipeline(kinds)(**inputs(kinds)).images
    pipe = tiny_pipeline(kinds).to(dtype=dtype)
    modules = [value for value in pipe.components.values() if isinstance(value, torch.nn.Module)]
    assert all(module.dtype == dtype for module in modules)
    images = pipe(**inputs(kinds)).images
    assert np.abs(images - expected).mean() < 0.05
    pipe.save_pretrained(tmp_path)
    loaded = MediSynPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert all(getattr(loaded, name).dtype == dtype for name in ("unet", "vae"))
    np.testing.assert_allclose(loaded(**inputs(kinds)).images, images, atol=1e-2)


def test_torch_dtype_dict(tmp_path):
    tiny_pipeline(("text", "image")).save_pretrained(tmp_path)
    for name in ("vae", "unet", "text_encoder"):
        wanted = {name: torch.bfloat16, "default": torch.float16}
        pipe = MediSynPipeline.from_pretrained(tmp_path, torch_dtype=wanted)
        for component_name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                assert component.dtype == wanted.get(component_name, torch.float16)


@pytest.mark.parametrize("kinds", KINDS)
def test_guidance_keeps_the_shape(kinds):
    pipe = tiny_pipeline(kinds)
    without, with_guidance = (pipe(**inputs(kinds) | {"guidance_scale": scale}).images for scale in (1.0, 7.5))
    assert without.shape == with_guidance.shape and not np.array_equal(without, with_guidance)


class TestCallbacks:
    def test_they_get_the_tensors_they_ask_for(self):
        pipe, seen = tiny_pipeline(), []

        def record(pipe, i, t, tensors):
            seen.append((i, set(tensors)))
            return tensors

        for names in (["latents"], pipe._callback_tensor_inputs, []):
            pipe(**inputs(("text",)), callback_on_step_end=record, callback_on_step_end_tensor_inputs=names)
            assert seen == [(0, set(names)), (1, set(names))]
            seen.clear()

    def test_they_may_change_them(self):
        def zero_at_the_end(pipe, i, t, tensors):
            if i == pipe.num_timesteps - 1:
                tensors["latents"] = torch.zeros_like(tensors["latents"])
            return tensors

        given = inputs(("text",)) | {"output_type": "latent"}
        assert tiny_pipeline()(**given, callback_on_step_end=zero_at_the_end).images.abs().sum() == 0

    def test_they_may_change_the_guidance(self):
        def increase(pipe, i, t, tensors):
            pipe._guidance_scale += 1.0
            return tensors

        pipe = tiny_pipeline()
        pipe(**inputs(("text",)) | {"guidance_scale": 2.0}, callback_on_step_end=increase)
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_attention_slicing():
    pipe = tiny_pipeline()
    for component in pipe.components.values():
        if hasattr(component, "set_default_attn_processor"):
            component.set_default_attn_processor()
    expected = pipe(**inputs(("text",))).images
    pipe.enable_attention_slicing(slice_size=1)
    np.testing.assert_allclose(pipe(**inputs(("text",))).images, expected, atol=1e-3)


def test_encode_prompt_works_in_isolation():
    """A pipeline of a text encoder alone encodes, one without it samples from that."""
    components = tiny_components(("text",))
    absent = dict.fromkeys(("vae", "unet", "scheduler", "text_encoder", "tokenizer"))
    texts = {name: components[name] for name in ("text_encoder", "tokenizer")}
    encoder = MediSynPipeline(**absent | texts)
    with torch.no_grad():
        embeds = {
            "prompt_embeds": encoder.encode_prompt(PROMPT),
            "negative_prompt_embeds": encoder.null_embeds("text"),
        }
    sampler = MediSynPipeline(**components | dict.fromkeys(texts))
    images = sampler(**inputs(()), **embeds).images
    np.testing.assert_allclose(images, MediSynPipeline(**components)(**inputs(("text",))).images, atol=1e-4)


@pytest.mark.parametrize("from_image", [False, True])
@pytest.mark.parametrize("name", [scheduler.name for scheduler in KarrasDiffusionSchedulers])
def test_karras_schedulers(name, from_image):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(skip_prk_steps=True)  # PNDM without warm-up steps
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    given = inputs(("text",)) | {"num_inference_steps": 5}
    if from_image:
        given |= {"init_image": torch.rand(1, 3, 32, 32), "strength": 0.5}
    assert pipe(**given).images.shape == (1, 32, 32, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS)
def test_devices_and_offloading(kinds):
    expected = tiny_pipeline(kinds)(**inputs(kinds)).images
    on_device = tiny_pipeline(kinds).to("cuda")(**inputs(kinds)).images
    np.testing.assert_allclose(on_device, expected, atol=1e-2)
    for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipe = tiny_pipeline(kinds)
        getattr(pipe, offload)()
        np.testing.assert_allclose(pipe(**inputs(kinds)).images, on_device, atol=1e-3)
