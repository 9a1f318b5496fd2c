"""Presets, starts from trained models, rewiring, loading and its errors, and the hash of a model."""

import json
from importlib import resources

import numpy as np
import peft
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers

from medisyn import backbone, loading
from medisyn.backbone import (
    PRESETS,
    adapt_unet,
    add_condition,
    create_autoencoder,
    create_pipeline,
    load_autoencoder,
    load_pipeline,
    model_hash,
)
from medisyn.conditions import ImageCondition, LabelSchema, LabelsCondition, TextCondition, conditions_of
from medisyn.eight_bits import to_eight_bits
from tests.components import (
    IMAGE_WIDTH,
    LABEL_SCHEMA,
    TEXT_WIDTH,
    tiny_image_encoder,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)


def text_condition(width: int = TEXT_WIDTH, seed: int = 0) -> TextCondition:
    tokenizer = tiny_tokenizer()
    return TextCondition(tiny_text_encoder(tokenizer, width, seed), tokenizer)


def image_condition() -> ImageCondition:
    return ImageCondition(*tiny_image_encoder())


def labels_condition() -> LabelsCondition:
    return LabelsCondition(LabelSchema.from_dict(LABEL_SCHEMA))


def predict(pipe, **embeds) -> torch.Tensor:
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(noise, 500, **pipe.unet_conditions(**embeds, batch_size=2)).sample


class TestPresets:
    def test_mini_is_the_documented_model(self):
        pipe = create_pipeline("mini", conditions=["text", "labels:synfundus"])
        assert pipe.kinds == ("text", "labels")
        config = pipe.unet.config
        assert (config.sample_size, config.in_channels, config.block_out_channels) == (16, 16, (96, 128, 176))
        assert (config.addition_embed_type, config.encoder_hid_dim_type) == ("text", None)
        assert config.projection_class_embeddings_input_dim == len(pipe.encode_labels(None)[0])
        assert isinstance(pipe.vae, AutoencoderDC) and pipe.vae_scale_factor == 8
        generator = torch.Generator().manual_seed(0)
        image = pipe("fundus", labels="glaucoma=1", num_inference_steps=1, generator=generator).images[0]
        assert image.size == (128, 128)
        # at most 32 MB of weights in half precision
        assert sum(value.num_parameters() for value in (pipe.vae, pipe.unet, pipe.text_encoder)) < 16e6

    def test_mini_wide_takes_twice_the_weights_and_stays_within_32_mb(self):
        """With its UNet's matrices in 8 bits and the image encoder of the embedded default beside it."""
        pipe = create_pipeline("mini-wide", conditions=["text", "labels"])
        assert pipe.unet.num_parameters() > 1.8 * create_pipeline("mini").unet.num_parameters()
        to_eight_bits(pipe.unet)
        stored = sum(weight.numel() * weight.element_size() for weight in pipe.unet.state_dict().values())
        halves = 2 * sum(part.num_parameters() for part in (pipe.vae, pipe.text_encoder))
        encoder = resources.files("medisyn") / "pretrained" / "image_encoder" / "model.safetensors"
        assert stored + halves + len(encoder.read_bytes()) < 32_000_000

    @pytest.mark.parametrize("name", PRESETS)
    def test_shapes_fit_together(self, name, monkeypatch):
        preset = PRESETS[name]
        monkeypatch.setattr(
            backbone, "DPMSolverMultistepScheduler", lambda **config: None
        )  # cannot be built without data
        with torch.device("meta"):  # a billion weights, none of them stored
            pipe = create_pipeline(name)
        assert pipe.unet.config.sample_size * pipe.vae_scale_factor == preset.resolution
        assert pipe.unet.config.in_channels == pipe.unet.config.out_channels == pipe.vae.config.latent_channels
        assert pipe.kinds == ()

    def test_another_autoencoder_sets_the_latent_size(self, tmp_path):
        pipe = create_pipeline("mini", vae=tiny_vae("kl"))
        assert (pipe.unet.config.in_channels, pipe.unet.config.sample_size) == (4, 16)
        tiny_vae("kl").save_pretrained(tmp_path / "vae")
        assert isinstance(create_pipeline("mini", vae=tmp_path).vae, AutoencoderKL)

    def test_joint_tokens_of_other_widths_are_projected(self):
        pipe = create_pipeline("mini", conditions=[text_condition(), image_condition()])
        assert pipe.unet.config.encoder_hid_dim == TEXT_WIDTH + IMAGE_WIDTH
        assert pipe.unet.config.encoder_hid_dim_type == "text_proj"
        options = {"num_inference_steps": 1, "output_type": "latent", "height": 32, "width": 32}
        assert pipe("x", **options).images.isfinite().all()

    def test_names_are_checked(self):
        with pytest.raises(ValueError, match="Did you mean 'mini'.*mini, mini-wide, small, sd"):
            create_pipeline("mimi")
        with pytest.raises(ValueError, match="Valid: mini, mini-wide, small, sd"):
            create_autoencoder("sd3")
        with pytest.raises(ValueError, match="Unknown kind of condition 'sound'.*text"):
            create_pipeline("mini", conditions=["sound"])
        with pytest.raises(ValueError, match="synfundus"):
            create_pipeline("mini", conditions=["labels:synfondus"])


class TestRewiring:
    def test_new_labels_change_nothing_at_first(self):
        pipe = tiny_pipeline()
        text = pipe.encode_prompt(["a", "b"])
        before = predict(pipe, prompt_embeds=text)
        new = add_condition(pipe, labels_condition())
        assert pipe.kinds == ("text", "labels")
        assert new == ["class_embedding.weight", "class_embedding.bias"]
        vectors = pipe.encode_labels(["gc=1", "dr_grade=4"])
        torch.testing.assert_close(predict(pipe, prompt_embeds=text, label_embeds=vectors), before)

    def test_images_beside_text_change_nothing_while_absent(self):
        pipe = tiny_pipeline()
        text = pipe.encode_prompt(["a", "b"])
        before = predict(pipe, prompt_embeds=text)
        new = add_condition(pipe, image_condition())
        assert pipe.kinds == ("text", "image")
        assert new == [f"encoder_hid_proj.weight[:, {TEXT_WIDTH}:{TEXT_WIDTH + IMAGE_WIDTH}]"]
        torch.testing.assert_close(predict(pipe, prompt_embeds=text), before)
        seen = torch.randn(2, 1, IMAGE_WIDTH)
        assert not torch.allclose(predict(pipe, prompt_embeds=text, image_embeds=seen), before, atol=1e-4)

    def test_kinds_keep_their_projections(self):
        pipe = tiny_pipeline(("text", "image", "labels"))
        image = torch.randn(2, 3, IMAGE_WIDTH)
        only_image = tiny_pipeline(("text", "image", "labels"))
        new = adapt_unet(only_image, [image_condition()])
        assert new == ["image_encoder"] and only_image.kinds == ("image",)
        torch.testing.assert_close(
            only_image.unet.encoder_hid_proj.weight, pipe.unet.encoder_hid_proj.weight[:, TEXT_WIDTH:]
        )
        assert predict(only_image, image_embeds=image).isfinite().all()
        assert (only_image.text_encoder, only_image.label_schema) == (None, None)

    def test_a_text_encoder_of_another_width_is_projected(self):
        pipe = tiny_pipeline()
        new = adapt_unet(pipe, [text_condition(width=20)])
        assert new == ["encoder_hid_proj.weight[:, 0:20]", "text_encoder"]
        assert predict(pipe, prompt_embeds=pipe.encode_prompt(["a", "b"])).isfinite().all()

    def test_the_same_conditions_leave_the_unet_alone(self):
        pipe = tiny_pipeline(("text", "labels"))
        unet = pipe.unet
        assert adapt_unet(pipe, conditions_of(pipe)) == []
        assert pipe.unet is unet

    def test_another_label_schema_keeps_the_columns_of_the_values_that_both_have(self):
        pipe = tiny_pipeline(("text", "labels"))
        torch.nn.init.normal_(pipe.unet.class_embedding.weight)
        old, text = pipe.unet.class_embedding.weight.clone(), pipe.encode_prompt(["a", "b"])
        before = predict(pipe, prompt_embeds=text, label_embeds=pipe.encode_labels(["gc=1", "gc=0"]))
        fields = pipe.label_schema["fields"]
        swapped = {"grade": {"type": "ordinal", "values": ["low", "high"]}} | dict(reversed(list(fields.items())))
        new = add_condition(pipe, LabelsCondition(LabelSchema.from_dict({"name": "other", "fields": swapped})))
        assert new == ["class_embedding.weight[:, 0]", "class_embedding.weight[:, 1]"]
        known = predict(pipe, prompt_embeds=text, label_embeds=pipe.encode_labels(["gc=1", "gc=0"]))
        torch.testing.assert_close(known, before)
        graded = predict(pipe, prompt_embeds=text, label_embeds=pipe.encode_labels(["gc=1, grade=low", "gc=0"]))
        torch.testing.assert_close(graded, before)
        assert pipe.unet.class_embedding.weight.shape[1] == old.shape[1] + 2
        same_width = dict(reversed(list(fields.items())))
        add_condition(pipe, LabelsCondition(LabelSchema.from_dict({"name": "third", "fields": same_width})))
        again = predict(pipe, prompt_embeds=text, label_embeds=pipe.encode_labels(["gc=1", "gc=0"]))
        torch.testing.assert_close(again, before)

    def test_what_belongs_to_a_condition_goes_with_it(self):
        records = {"known_words": ["a"], "prompt_vocabulary": {"modalities": []}}
        rules = [{"all": [["a"]], "labels": {"gc": "1"}}]
        pipe = tiny_pipeline(("text", "labels"))
        pipe.register_to_config(**records, prompt_labels=rules)
        adapt_unet(pipe, conditions_of(pipe))
        assert pipe.config.prompt_labels == rules and {name: pipe.config[name] for name in records} == records
        other = {"name": "other", "fields": {"grade": {"type": "ordinal", "values": ["low", "high"]}}}
        add_condition(pipe, LabelsCondition(LabelSchema.from_dict(other)))
        assert pipe.config.prompt_labels is None and pipe.config.known_words == ["a"]
        adapt_unet(pipe, [labels_condition()])
        assert {name: pipe.config[name] for name in records} == dict.fromkeys(records)

    def test_another_encoder_of_the_same_width_is_reported(self):
        pipe = tiny_pipeline(("text", "image"))
        assert adapt_unet(pipe, [text_condition(seed=1), *conditions_of(pipe)[1:]]) == ["text_encoder"]
        assert adapt_unet(pipe, [conditions_of(pipe)[0], image_condition()]) == ["image_encoder"]

    def test_pooled_tokens_are_learned_anew_when_their_width_changes(self):
        """A pool over text and images is not the pool over text, even while images are absent; this is no secret."""
        pipe = tiny_pipeline()
        pipe.register_modules(unet=tiny_unet(addition_embed_type="text", addition_embed_type_num_heads=16))
        text = pipe.encode_prompt(["a", "b"])
        before, old = predict(pipe, prompt_embeds=text), pipe.unet.state_dict()
        assert add_condition(pipe, labels_condition()) == ["class_embedding.weight", "class_embedding.bias"]
        torch.testing.assert_close(predict(pipe, prompt_embeds=text), before)
        new = add_condition(pipe, image_condition())
        pooled = {name for name in old if name.startswith("add_embedding.")}
        kept = {"add_embedding.proj.bias", "add_embedding.norm2.weight", "add_embedding.norm2.bias"}
        assert {name for name in new if name.startswith("add_embedding.")} == pooled - kept
        assert all(torch.equal(pipe.unet.state_dict()[name], old[name]) for name in kept)
        assert predict(pipe, prompt_embeds=text).isfinite().all()  # 40 columns: 8 heads, not 16

    def test_latent_channels_follow_the_autoencoder(self):
        """As from an inpainting model: nine input channels, of which the first four are the latents."""
        pipe = tiny_pipeline()
        wide = tiny_unet(in_channels=9)
        pipe.register_modules(unet=wide)
        assert adapt_unet(pipe, conditions_of(pipe)) == []
        torch.testing.assert_close(pipe.unet.conv_in.weight, wide.conv_in.weight[:, :4])
        narrow = tiny_unet(in_channels=3, out_channels=3)
        pipe.register_modules(unet=narrow)
        new = adapt_unet(pipe, conditions_of(pipe))
        assert new == ["conv_in.weight[:, 3:]", "conv_out.weight[3:]", "conv_out.bias[3:]"]
        assert not pipe.unet.conv_in.weight[:, 3:].any()

    def test_adapters_have_to_go_first(self):
        pipe = tiny_pipeline()
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match="adapters on: fuse or unload"):
            add_condition(pipe, labels_condition())

    def test_a_rewired_pipeline_is_saved_and_loaded(self, tmp_path):
        pipe = tiny_pipeline()
        add_condition(pipe, labels_condition())
        add_condition(pipe, image_condition())
        pipe.save_pretrained(tmp_path)
        loaded = load_pipeline(tmp_path)
        assert loaded.kinds == ("text", "image", "labels") and loaded.label_schema == pipe.label_schema
        torch.testing.assert_close(predict(loaded), predict(pipe))

    def test_from_a_stable_diffusion_folder(self, tmp_path):
        start = tiny_pipeline(vae="kl")
        start.export_stable_diffusion(tmp_path)
        same = create_pipeline(str(tmp_path))
        text = start.encode_prompt(["a", "b"])
        torch.testing.assert_close(predict(same, prompt_embeds=text), predict(start, prompt_embeds=text))
        joint = create_pipeline(str(tmp_path), conditions=[text_condition(), labels_condition()])
        torch.testing.assert_close(predict(joint, prompt_embeds=text), predict(start, prompt_embeds=text))
        labels_only = create_pipeline(str(tmp_path), conditions=[labels_condition()], vae=tiny_vae("dc"))
        assert labels_only.kinds == ("labels",) and isinstance(labels_only.vae, AutoencoderDC)
        assert labels_only(labels="gc=1", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)

    def test_a_bare_kind_is_what_the_trained_start_has(self, tmp_path):
        start = tiny_pipeline(("text", "image", "labels"), image_tokens="patch")
        start.save_pretrained(tmp_path / "start")
        pipe = create_pipeline(str(tmp_path / "start"), conditions=["text", "image", "labels"])
        assert model_hash(pipe) == model_hash(start) and pipe.config.image_tokens == "patch"
        other = create_pipeline(str(tmp_path / "start"), conditions=["text", "labels:odir8"])
        assert torch.equal(other.encode_prompt(["a"]), start.encode_prompt(["a"]))
        assert other.label_schema["name"] == "odir8"
        start = tiny_pipeline(("labels",))
        start.save_pretrained(tmp_path / "labels")
        joint = create_pipeline(str(tmp_path / "labels"), conditions=["text", "labels"])  # text is new here
        assert joint.kinds == ("text", "labels") and joint.label_schema == start.label_schema


class TestLoading:
    def test_folders_and_run_folders(self, tmp_path):
        pipe = tiny_pipeline(("labels",))
        pipe.save_pretrained(tmp_path / "run" / "pipeline")
        for place in (tmp_path / "run", str(tmp_path / "run" / "pipeline")):
            assert model_hash(load_pipeline(place)) == model_hash(pipe)
        assert load_pipeline(tmp_path / "run", dtype="bfloat16").unet.dtype == torch.bfloat16
        assert isinstance(load_autoencoder(tmp_path / "run"), AutoencoderDC)
        assert isinstance(load_autoencoder(tmp_path / "run" / "pipeline" / "vae"), AutoencoderDC)

    def test_the_embedded_default(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loading.resources, "files", lambda package: tmp_path)
        with pytest.raises(FileNotFoundError, match="no embedded model"):
            load_pipeline()
        with pytest.raises(FileNotFoundError, match="no embedded model"):
            load_autoencoder("default")
        pipe = tiny_pipeline()
        pipe.save_pretrained(tmp_path / "pretrained")
        assert model_hash(load_pipeline()) == model_hash(pipe)
        assert isinstance(load_autoencoder("default"), AutoencoderDC)

    def test_a_missing_model_lists_what_was_tried(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match="nothing.model_index.json, .*pipeline.model_index.json; nor is it a Hub"
        ):
            load_pipeline("./nothing")
        with pytest.raises(FileNotFoundError, match="Hub repository somebody/nothing .*offline"):
            load_pipeline("somebody/nothing")
        with pytest.raises(FileNotFoundError, match="tried: "):
            load_pipeline(tmp_path)
        with pytest.raises(FileNotFoundError, match="no autoencoder .*tried: "):
            load_autoencoder(tmp_path)
        tiny_pipeline().save_pretrained(tmp_path / "model")
        with pytest.raises(FileNotFoundError, match="no adapter .*valid are"):
            load_pipeline(tmp_path / "model", adapter="./nothing")
        with pytest.raises(ValueError, match="Valid: float32, bfloat16, float16"):
            load_pipeline(tmp_path / "model", dtype="int8")

    def test_pickles_are_refused(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(ValueError, match=r"unet has pickled weights only \(diffusion_pytorch_model.bin\)"):
            load_pipeline(tmp_path)
        with pytest.raises(ValueError, match="pickled weights only"):
            load_autoencoder(tmp_path)

    def test_broken_and_foreign_folders(self, tmp_path):
        pipe = tiny_pipeline()
        pipe.save_pretrained(tmp_path)
        index_file = tmp_path / "model_index.json"
        index = json.loads(index_file.read_text())
        index_file.write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
        with pytest.raises(ValueError, match="not a MediSyn or Stable Diffusion .*text_encoder_2: CLIPTextModel"):
            load_pipeline(tmp_path)
        for broken in ("{", "[]", "{}"):
            index_file.write_text(broken)
            with pytest.raises(ValueError, match="not a pipeline's index"):
                load_pipeline(tmp_path)
        index_file.write_text(json.dumps(index))
        for component, name in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
            (tmp_path / component / f"{name}.safetensors").write_bytes(b"not weights")
            with pytest.raises(ValueError, match="cannot be loaded"):
                load_pipeline(tmp_path)
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="unet has no weights"):
            load_pipeline(tmp_path)

    def test_adapters(self, tmp_path):
        pipe = tiny_pipeline(("labels",))
        pipe.save_pretrained(tmp_path / "model")
        plain_hash = model_hash(pipe)
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
        metadata = _collate_lora_metadata({"unet": pipe.unet})
        pipe.save_lora_weights(tmp_path / "adapter", unet_lora_layers=weights, **metadata)
        loaded = load_pipeline(tmp_path / "model", adapter=tmp_path / "adapter")
        options = {"labels": "gc=1", "num_inference_steps": 2, "output_type": "np"}
        images = [one(**options, generator=torch.Generator().manual_seed(0)).images for one in (pipe, loaded)]
        np.testing.assert_allclose(images[0], images[1], atol=1e-5)
        assert model_hash(loaded) == plain_hash
        pipe.unet.save_lora_adapter(tmp_path / "of-a-unet")
        with pytest.raises(ValueError, match="no weights named 'unet.'"):
            load_pipeline(tmp_path / "model", adapter=tmp_path / "of-a-unet")
        (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"not weights")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_pipeline(tmp_path / "model", adapter=tmp_path / "adapter")


class TestModelHash:
    def test_it_names_weights_scale_and_schema(self, tmp_path):
        pipe = tiny_pipeline(("text", "labels"))
        first = model_hash(pipe)
        assert len(first) == 12 and int(first, 16) >= 0
        assert model_hash(tiny_pipeline(("text", "labels"))) == first
        pipe.save_pretrained(tmp_path)
        assert model_hash(load_pipeline(tmp_path)) == first
        others = {first, model_hash(tiny_pipeline(("text", "labels"), seed=1)), model_hash(tiny_pipeline())}
        others.add(model_hash(tiny_pipeline(("text", "labels"), prediction_type="epsilon")))
        pipe.vae.register_to_config(scaling_factor=1.5)
        others.add(model_hash(pipe))
        assert len(others) == 5

    def test_unet_is_stock(self):
        assert type(create_pipeline("mini").unet) is UNet2DConditionModel
