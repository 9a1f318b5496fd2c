"""Saving and loading: with the class, by remote code without medisyn, again and again, and side by side."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers

from medisyn.extension import extend_labels, extension_parameters
from medisyn.lora import load_adapter, loaded_adapters
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.components import LABEL_SCHEMA, tiny_pipeline

INPUTS = {"text": {"prompt": "chest"}, "labels": {"labels": "gc=1, eye_side=left"}}


def sample(pipe, **inputs) -> np.ndarray:
    """An image of fixed seed and, unless others are given, fixed text and labels."""
    pipe.set_progress_bar_config(disable=True)
    for kind in pipe.kinds:
        inputs = INPUTS.get(kind, {}) | inputs
    return pipe(**inputs, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def load_remote(folder) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)


def dtypes(pipe) -> set[torch.dtype]:
    return {component.dtype for component in pipe.components.values() if isinstance(component, torch.nn.Module)}


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path, monkeypatch):
    """Remote code is copied into a cache folder; each test gets its own."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("kinds", [("text",), ("labels",), ("text", "image", "labels"), ()])
def test_two_generations_by_both_ways_give_the_same_images(kinds, tmp_path):
    pipe = tiny_pipeline(kinds)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path / "first")
    for load in (MediSynPipeline.from_pretrained, load_remote):
        again = load(tmp_path / "first")
        np.testing.assert_array_equal(sample(again), expected)
        again.save_pretrained(tmp_path / "second")
        for load_again in (MediSynPipeline.from_pretrained, load_remote):
            third = load_again(tmp_path / "second")
            np.testing.assert_array_equal(sample(third), expected)
            assert third.kinds == kinds


def test_a_published_folder_is_complete_without_medisyn(tmp_path):
    """In a process where medisyn cannot be imported: load, sample, save, load, sample."""
    pipe = tiny_pipeline(("text", "labels"))
    pipe.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "expected.npy", sample(pipe, prompt="chest", labels="Glaucoma=1"))
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    MediSynPipeline.save_lora_weights(tmp_path / "adapter", unet_lora_layers=weights)
    (tmp_path / "adapter" / "adapter.json").write_text('{"base_model": "another", "base_hash": "0123456789ab"}')
    script = f"""
        import sys
        sys.modules["medisyn"] = None  # any import of it raises ImportError
        import numpy, torch
        from diffusers import DiffusionPipeline
        folder = {str(tmp_path)!r}
        for name in ("model", "again"):
            pipe = DiffusionPipeline.from_pretrained(f"{{folder}}/{{name}}", trust_remote_code=True)
            options = {{"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}}
            images = pipe("chest", labels="Glaucoma=1", **options).images
            numpy.testing.assert_array_equal(images, numpy.load(folder + "/expected.npy"))
            pipe.save_pretrained(folder + "/again")
        pipe.load_lora_weights(folder + "/adapter", adapter_name="one")  # whose base only medisyn can tell
        pipe.set_adapters("one", 0.5)
        pipe.disable_lora()
        pipe.enable_lora()
        assert pipe.get_list_adapters() == {{"unet": ["one"]}}
        pipe.unload_lora_weights()
        try:
            import medisyn
        except ImportError:
            print("passed")
    """
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.stdout.strip() == "passed", result.stderr


def test_two_published_pipelines_do_not_disturb_each_other(tmp_path):
    """The second one has other code in a file of the same name, as another version of the package would write it."""
    tiny_pipeline(("labels",)).save_pretrained(tmp_path / "old")
    tiny_pipeline(("labels",), seed=1).save_pretrained(tmp_path / "new")
    code = tmp_path / "new" / "medisyn_pipeline.py"
    code.write_text(code.read_text() + "\n\ndef label_vector(schema, labels):\n    return [0.0] * 9\n")

    old = load_remote(tmp_path / "old")
    before = sample(old)
    new = load_remote(tmp_path / "new")
    np.testing.assert_allclose(sample(new), sample(new, labels=None), atol=1e-5)  # the other code ignores labels
    np.testing.assert_array_equal(sample(old), before)
    assert not np.allclose(before, sample(old, labels=None), atol=1e-5)
    for pipe, name in ((old, "old"), (new, "new")):
        pipe.save_pretrained(tmp_path / f"{name}-again")
        written = (tmp_path / f"{name}-again" / "medisyn_pipeline.py").read_text()
        assert written == (tmp_path / name / "medisyn_pipeline.py").read_text()
        np.testing.assert_array_equal(sample(load_remote(tmp_path / f"{name}-again")), sample(pipe))


def test_remote_code_is_not_needed_and_not_run_unasked(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "medisyn_pipeline.py").write_text("raise RuntimeError('this code must not run')")
    MediSynPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(str(tmp_path))


def test_the_index_names_the_code_and_no_local_path(tmp_path):
    pipe = tiny_pipeline(("text", "image", "labels"))
    pipe.save_pretrained(tmp_path / "first")
    for load in (MediSynPipeline.from_pretrained, load_remote):
        load(tmp_path / "first").save_pretrained(tmp_path / "second")
        index = json.loads((tmp_path / "second" / "model_index.json").read_text())
        assert index["_class_name"] == ["medisyn_pipeline", "MediSynPipeline"]
        assert {value[0] for value in index.values() if isinstance(value, list)} <= {
            "medisyn_pipeline",
            "diffusers",
            "transformers",
        }
        assert list(index["label_schema"]["fields"]) == list(LABEL_SCHEMA["fields"])  # the order of the vector
        for file in (tmp_path / "second").rglob("*.json"):
            assert str(tmp_path) not in file.read_text(), file
            assert "name_or_path" not in file.read_text(), file


def test_training_image_hashes_travel_along(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "training_images.json").write_text('{"hashes": ["0123456789abcdef"]}')
    for load in (MediSynPipeline.from_pretrained, load_remote):
        load(tmp_path / "first").save_pretrained(tmp_path / load.__name__)
        assert "0123456789abcdef" in (tmp_path / load.__name__ / "training_images.json").read_text()


class TestPrecision:
    @pytest.mark.parametrize("load", [MediSynPipeline.from_pretrained, load_remote])
    def test_half_precision_files_load_as_float32_throughout(self, load, tmp_path):
        tiny_pipeline(("text", "image")).to(torch.float16).save_pretrained(tmp_path)
        pipe = load(tmp_path)
        assert dtypes(pipe) == {torch.float32}
        assert np.isfinite(sample(pipe)).all()

    def test_a_precision_is_for_all_components_and_a_dict_for_each(self, tmp_path):
        tiny_pipeline(("text", "image")).save_pretrained(tmp_path)
        assert dtypes(MediSynPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)) == {torch.bfloat16}
        assert dtypes(MediSynPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)) == {torch.bfloat16}
        wanted = {"text_encoder": torch.bfloat16, "default": torch.float32}
        pipe = MediSynPipeline.from_pretrained(tmp_path, dtype=wanted)
        assert (pipe.text_encoder.dtype, pipe.unet.dtype) == (torch.bfloat16, torch.float32)
        assert np.isfinite(sample(pipe)).all()

    def test_variants(self, tmp_path):
        pipe = tiny_pipeline()
        pipe.save_pretrained(tmp_path, variant="fp16")
        assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
        np.testing.assert_array_equal(sample(MediSynPipeline.from_pretrained(tmp_path, variant="fp16")), sample(pipe))


class TestStableDiffusionExport:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_same_images_for_the_same_latents(self, prediction_type, tmp_path):
        pipe = tiny_pipeline(vae="kl", prediction_type=prediction_type)
        pipe.export_stable_diffusion(tmp_path)
        plain = StableDiffusionPipeline.from_pretrained(tmp_path)
        plain.set_progress_bar_config(disable=True)
        options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np"}
        options |= {"latents": torch.randn(2, 4, 4, 4), "negative_prompt": ["blurred", "dark"]}
        prompts = ["chest X-ray", "a very long prompt, longer than the window of the text encoder"]
        ours = pipe(prompts, **options, guidance_interval=(0.0, 1.0)).images  # that pipeline guides everywhere
        np.testing.assert_allclose(plain(prompts, **options).images, ours, atol=1e-4)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
        assert not list(tmp_path.glob("*.py"))

    def test_a_plain_folder_loads_as_a_medisyn_pipeline(self, tmp_path):
        pipe = tiny_pipeline(vae="kl")
        pipe.export_stable_diffusion(tmp_path)
        loaded = MediSynPipeline.from_pretrained(tmp_path)
        assert loaded.kinds == ("text",)
        np.testing.assert_array_equal(sample(loaded), sample(pipe))

    def test_what_cannot_be_exported_says_why(self, tmp_path):
        with pytest.raises(ValueError, match="conditions are labels, not text alone; .*text encoder.*AutoencoderKL"):
            tiny_pipeline(("labels",)).export_stable_diffusion(tmp_path)
        pipe = tiny_pipeline(vae="kl")
        pipe.scheduler = diffusers.DDIMScheduler()
        with pytest.raises(ValueError, match="clips samples; its scheduler has a steps_offset"):
            pipe.export_stable_diffusion(tmp_path)
        assert not list(tmp_path.iterdir())


class TestLora:
    @pytest.fixture
    def adapter(self, tmp_path) -> Path:
        """A random LoRA of the UNet with alpha different from rank, saved with its metadata."""
        pipe = tiny_pipeline(("labels",))
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config)
        weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
        self.expected = sample(pipe)
        metadata = _collate_lora_metadata({"unet": pipe.unet})
        MediSynPipeline.save_lora_weights(tmp_path / "adapter", unet_lora_layers=weights, **metadata)
        return tmp_path / "adapter"

    @pytest.mark.parametrize("remote", [False, True])
    def test_load_set_fuse_unload(self, adapter, remote, tmp_path):
        pipe = tiny_pipeline(("labels",))  # has no text encoder
        if remote:
            pipe.save_pretrained(tmp_path / "model")
            pipe = load_remote(tmp_path / "model")
        plain = sample(pipe)
        pipe.load_lora_weights(str(adapter), adapter_name="tuned")
        np.testing.assert_allclose(sample(pipe), self.expected, atol=1e-5)
        assert not np.allclose(plain, self.expected, atol=1e-5)
        pipe.set_adapters(["tuned"], adapter_weights=[0.0])
        np.testing.assert_allclose(sample(pipe), plain, atol=1e-5)
        pipe.set_adapters(["tuned"], adapter_weights=[1.0])
        pipe.fuse_lora()
        np.testing.assert_allclose(sample(pipe), self.expected, atol=1e-4)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        np.testing.assert_allclose(sample(pipe), plain, atol=1e-4)

    def test_medisyn_keeps_account_of_adapters_on_a_published_pipeline(self, adapter, tmp_path):
        tiny_pipeline(("labels",)).save_pretrained(tmp_path / "model")
        pipe = load_remote(tmp_path / "model")
        plain = sample(pipe)
        load_adapter(pipe, adapter, adapter_name="tuned")
        extend_labels(pipe, {"grade": {"type": "ordinal", "values": ["0", "1"]}}, "tuned")
        extension_parameters(pipe, "tuned")["label_embedding"].data += 0.1
        pipe.set_adapters("tuned", 0.5)
        assert loaded_adapters(pipe)["tuned"].weight == 0.5
        expected = sample(pipe, labels="grade=1")
        pipe.save_pretrained(tmp_path / "again")
        for load in (MediSynPipeline.from_pretrained, load_remote):
            np.testing.assert_allclose(sample(load(tmp_path / "again"), labels="grade=1"), expected, atol=1e-5)
        pipe.unload_lora_weights()
        assert not loaded_adapters(pipe) and "grade" not in pipe.label_schema["fields"]
        np.testing.assert_array_equal(sample(pipe), plain)

    def test_text_encoder_weights_need_a_text_encoder(self):
        weights = {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
        with pytest.raises(ValueError, match="no text encoder"):
            MediSynPipeline.load_lora_into_text_encoder(weights, None, None)

    def test_a_text_pipeline_takes_them(self, adapter):
        pipe = tiny_pipeline(("text",))
        pipe.load_lora_weights(str(adapter))
        assert np.isfinite(sample(pipe)).all()
