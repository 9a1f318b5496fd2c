"""Vision transformers as an image condition by one line of configuration: every family, registers, other sizes."""

import json

import pytest
import torch
import transformers
from PIL import Image

from medisyn.conditions import ImageCondition
from medisyn.config import ImageConditionConfig
from medisyn.data.loading import load_images
from medisyn.loading import load_pipeline
from medisyn.trainer import Trainer
from tests.components import tiny_image_encoder
from tests.training import diffusion_config, write_base, write_images

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
FAMILIES = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2)),  # RAD-DINO as well
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3)
    ),
    "dinov3_vit": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SHAPE, intermediate_size=32, num_register_tokens=4)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SHAPE, intermediate_size=32)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_condition")
    write_images(folder / "images")
    write_base(folder / "base", kinds=())
    return folder


def save_encoder(folder, family):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = FAMILIES[family]().eval()
    encoder.save_pretrained(folder / family)
    tiny_image_encoder()[1].save_pretrained(folder / family)
    return encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_one_line_of_configuration_trains_on_unlabelled_images(folder, family):
    encoder = save_encoder(folder, family)
    condition = {"type": "image", "encoder": str(folder / family), "dropout": 0.2}
    task = {"conditions": [condition], "cache_dir": str(folder / f"cache_{family}")}
    data = {"caption_column": None}
    trainer = Trainer(diffusion_config(folder, f"run_{family}", task=task, data=data, train={"steps": 2}))
    images = load_images(folder / "images", caption_column=None)
    pixels = tiny_image_encoder()[1]([images.image(0), images.image(1)], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = encoder(pixels)
    token = output.last_hidden_state[:, 0] if output.get("pooler_output") is None else output.pooler_output
    cached = trainer.task.data.embeddings("image", [0, 1])
    assert torch.allclose(cached[:, 0], token, atol=2e-3), "the cache holds the encoder's global token"
    pipe = load_pipeline(trainer.fit())
    assert pipe.kinds == ("image",) and type(pipe.image_encoder) is type(encoder)
    assert pipe(image=images.image(0), num_inference_steps=2).images[0].size == (32, 32)
    for name, value in encoder.state_dict().items():
        assert torch.equal(pipe.image_encoder.state_dict()[name], value), f"{name} was trained"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", ["global", "patch"])
def test_the_configuration_chooses_tokens_and_skips_registers(folder, family, tokens, tiny_pipeline):
    encoder = save_encoder(folder, family)
    condition = ImageCondition.from_config(ImageConditionConfig(encoder=str(folder / family), tokens=tokens), [])
    assert type(condition.encoder) is type(encoder) and not condition.encoder.training
    assert not any(parameter.requires_grad for parameter in condition.encoder.parameters())
    pipe = tiny_pipeline(kinds=())
    pipe.register_modules(image_encoder=condition.encoder, feature_extractor=condition.processor)
    pipe.register_to_config(image_tokens=tokens)
    with torch.no_grad():
        found = pipe.encode_image([Image.new("RGB", (40, 40), "red"), Image.new("L", (50, 30))])
    assert found.shape == (2, 1 if tokens == "global" else 4, 16)
    assert pipe.null_embeds("image", 2).shape == found.shape


def test_a_processor_of_another_size_than_the_encoder_was_made_for(folder):
    """The position embeddings are interpolated: a tiny encoder of 28 px reads 42 px, 9 patches."""
    encoder, processor = tiny_image_encoder(registers=2)
    encoder.save_pretrained(folder / "larger")
    processor.save_pretrained(folder / "larger")
    file = folder / "larger" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}))
    condition = ImageCondition.from_pretrained(str(folder / "larger"), tokens="patch")
    with torch.no_grad():
        pixels = condition.processor([Image.new("RGB", (60, 50), "red")], return_tensors="pt").pixel_values
        assert condition.encoder(pixels).last_hidden_state.shape == (1, 1 + 2 + 9, encoder.config.hidden_size)


def test_an_encoder_stored_in_half_precision_is_read_in_full(folder):
    """Else bf16 autocast finds two narrow types in one network, and stops."""
    encoder, processor = tiny_image_encoder()
    encoder.half().save_pretrained(folder / "half")
    processor.save_pretrained(folder / "half")
    condition = ImageCondition.from_pretrained(str(folder / "half"))
    assert condition.encoder.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pixels = condition.processor([Image.new("RGB", (60, 50), "red")], return_tensors="pt").pixel_values
        assert condition.encoder(pixels).last_hidden_state.isfinite().all()
