"""What all conditions share: the registry, the wiring, dropout; and the image condition with vision transformers."""

import doctest
import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image

from medisyn import conditions
from medisyn.conditions import (
    Condition,
    ImageCondition,
    LabelSchema,
    LabelsCondition,
    NoCondition,
    TextCondition,
    base,
    condition_dropout,
    conditions_of,
    drop,
    get_condition,
    get_schema,
    list_conditions,
    unet_kwargs,
)
from medisyn.config import ImageConditionConfig, LabelsConditionConfig, TextConditionConfig
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.components import (
    IMAGE_WIDTH,
    LABEL_SCHEMA,
    TEXT_WIDTH,
    TEXT_WINDOW,
    tiny_image_encoder,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

KINDS = [(), ("text",), ("image",), ("labels",), ("text", "labels"), ("image", "labels"), ("text", "image", "labels")]


@pytest.mark.parametrize("module", [base, conditions])
def test_documented_snippets(module):
    assert doctest.testmod(module).failed == 0


def noise_image(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# ---- registry and protocol


def test_the_registry_names_its_members():
    assert set(list_conditions()) == {"text", "image", "labels", "none"}
    assert get_condition("labels") is LabelsCondition
    with pytest.raises(ValueError, match="'label'.*Did you mean 'labels'.*image.*text"):
        get_condition("label")


@pytest.mark.parametrize("kinds", KINDS)
def test_the_conditions_of_a_pipeline_are_its_kinds(kinds, tiny_pipeline):
    found = conditions_of(tiny_pipeline(kinds=kinds))
    assert tuple(condition.kind for condition in found) == kinds
    assert all(isinstance(condition, Condition) for condition in [*found, NoCondition()])


@pytest.mark.parametrize("kinds", KINDS)
def test_encoded_conditions_and_nulls_run_through_the_unet_alone_and_joint(kinds, tiny_pipeline):
    pipe = tiny_pipeline(kinds=kinds)
    examples = [
        {"caption": "a polyp", "labels": {"gc": 1}, "image": noise_image(0)},
        {"caption": None, "labels": None, "image": noise_image(1)},
    ]
    found = conditions_of(pipe)
    embeds = {condition.embeds_name: condition.encode(pipe, examples) for condition in found}
    nulls = {condition.embeds_name: condition.null(pipe, 2) for condition in found}
    for condition in found:
        tensor, null = embeds[condition.embeds_name], nulls[condition.embeds_name]
        assert tensor.shape == null.shape and tensor.shape[-1] == condition.token_width() or condition.vector_width()
        assert not torch.equal(tensor[0], null[0])
    latents, step = torch.zeros(2, 4, 4, 4), torch.tensor([500, 500])
    with torch.no_grad():
        outputs = [
            pipe.unet(latents, step, **pipe.unet_conditions(**each, batch_size=2)).sample
            for each in (embeds, nulls, {})
        ]
    assert torch.allclose(outputs[1], outputs[2])  # what is not given is the null
    assert torch.equal(outputs[0], outputs[1]) == (not kinds)
    assert unet_kwargs(found, TEXT_WIDTH).items() <= pipe.unet.config.items()


def test_a_pipeline_saved_without_its_encoder_says_so(tiny_pipeline):
    for kind, name in (("text", "text_encoder"), ("image", "image_encoder")):
        pipe = tiny_pipeline(kinds=(kind,))
        pipe.register_modules(**{name: None})
        with pytest.raises(ValueError, match=name):
            conditions_of(pipe)


def test_a_text_encoder_is_cacheable_when_it_is_not_trained(tiny_pipeline):
    pipe = tiny_pipeline(kinds=("text", "image", "labels"))
    for trained in (True, False):
        pipe.text_encoder.requires_grad_(trained)
        assert [condition.cacheable for condition in conditions_of(pipe)] == [not trained, True, True]


def test_conditions_from_a_configuration(tmp_path):
    encoder, processor = tiny_image_encoder()
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    described = [
        TextConditionConfig(hidden_size=16, num_layers=1, max_length=9, train_encoder=True),
        ImageConditionConfig(encoder=str(tmp_path), tokens="patch"),
        LabelsConditionConfig(schema="odir8"),
    ]
    text, image, labels = [get_condition(one.type).from_config(one, ["a zebra", None]) for one in described]
    assert text.token_width() == 16 and text.tokenizer.model_max_length == 9
    assert text.tokenizer.tokenize("zebra glioma") == ["zebra</w>", "glioma</w>"]
    assert image.tokens == "patch" and image.token_width() == IMAGE_WIDTH
    assert labels.schema == get_schema("odir8")


def test_long_captions_of_a_training_set_are_counted_once(caplog):
    long = "axial chest CT slice showing a malignant nodule in the left lung"
    config = TextConditionConfig(hidden_size=16, num_layers=1, max_length=8, train_encoder=True)
    with caplog.at_level(logging.WARNING):
        condition = TextCondition.from_config(config, ["a polyp", long, None, long])
    assert len(caplog.records) == 1 and "2 of 3" in caplog.text and "window of 8" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert condition.count_truncated(["a polyp", long]) == 1
        caplog.clear()
        assert condition.count_truncated(["a polyp", None]) == condition.count_truncated([]) == 0
        TextCondition.from_config(replace(config, max_length=None), ["a polyp", long])
    assert not caplog.records


def test_a_new_text_encoder_has_to_be_trained():
    with pytest.raises(ValueError, match="set train_encoder: true"):
        TextCondition.from_config(TextConditionConfig(hidden_size=16, num_layers=1), ["a polyp"])


def test_windows_of_a_configuration(tmp_path, tiny_pipeline):
    new = TextCondition.from_config(TextConditionConfig(hidden_size=16, num_layers=1, train_encoder=True), ["a polyp"])
    assert new.tokenizer.model_max_length == new.encoder.config.max_position_embeddings == 24

    start = tiny_pipeline()
    kept = TextCondition.from_config(TextConditionConfig(), ["a polyp"], start)
    assert kept.encoder is start.text_encoder and kept.cacheable and start.text_window == TEXT_WINDOW
    TextCondition.from_config(TextConditionConfig(max_length=7), ["a polyp"], start)
    assert start.text_window == 7 and start.encode_prompt(["a polyp"]).shape[1] == 7
    with pytest.raises(ValueError, match="max_length must be in 3.."):
        TextCondition.from_config(TextConditionConfig(max_length=99), ["a polyp"], start)

    (tokenizer := tiny_tokenizer()).save_pretrained(tmp_path)
    tiny_text_encoder(tokenizer).save_pretrained(tmp_path)
    named = TextCondition.from_config(TextConditionConfig(encoder=str(tmp_path)), ["a polyp"])
    assert named.tokenizer.model_max_length == TEXT_WINDOW


# ---- wiring


def test_tokens_of_the_right_width_go_in_as_they_are(tiny_pipeline):
    [text] = conditions_of(tiny_pipeline(kinds=("text",)))
    assert unet_kwargs([text], TEXT_WIDTH)["encoder_hid_dim_type"] is None
    assert unet_kwargs([text], 32)["encoder_hid_dim"] == TEXT_WIDTH


def test_token_kinds_share_one_projection_and_labels_have_their_own():
    encoder, processor = tiny_image_encoder()
    image, schema = ImageCondition(encoder, processor), LabelSchema.from_dict(LABEL_SCHEMA)
    text = TextCondition.from_captions(["a polyp"], hidden_size=16, num_layers=1)
    assert unet_kwargs([text, image, LabelsCondition(schema)], 16) == {
        "cross_attention_dim": 16,
        "encoder_hid_dim_type": "text_proj",
        "encoder_hid_dim": 16 + IMAGE_WIDTH,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 9,
    }
    assert unet_kwargs([], 16) == unet_kwargs([NoCondition()], 16)
    assert set(unet_kwargs([], 16).values()) == {16, None}
    with pytest.raises(ValueError, match="text, text"):
        unet_kwargs([text, text], 16)


def test_a_pipeline_is_made_of_its_conditions_components(tiny_pipeline):
    encoder, processor = tiny_image_encoder(registers=2)
    parts = [
        TextCondition.from_captions(["a polyp"], hidden_size=16, num_layers=1),
        ImageCondition(encoder, processor, tokens="patch"),
        LabelsCondition(LabelSchema.from_dict(LABEL_SCHEMA)),
    ]
    components = {name: value for part in parts for name, value in part.components().items()}
    scheduler = tiny_pipeline().scheduler
    unet = tiny_unet(kinds=(), **unet_kwargs(parts, TEXT_WIDTH))
    pipe = MediSynPipeline(vae=tiny_vae(), unet=unet, scheduler=scheduler, **components)
    assert pipe.kinds == ("text", "image", "labels")
    images = pipe("a polyp", image=noise_image(0), labels="glaucoma=1", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


# ---- dropout


def test_dropout_follows_the_numbers_it_is_given():
    uniforms = torch.tensor([[0.05, 0.5, 0.9], [0.5, 0.15, 0.9], [0.5, 0.5, 0.01], [0.5, 0.5, 0.9]])
    keep = condition_dropout({"text": 0.1, "labels": 0.2}, uniforms, joint=0.05)
    assert keep["text"].tolist() == [False, True, False, True]
    assert keep["labels"].tolist() == [True, False, False, True]


def test_dropout_has_the_probabilities_it_is_given():
    uniforms = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))
    keep = condition_dropout({"text": 0.1, "labels": 0.3}, uniforms, joint=0.2)
    assert keep["text"].float().mean().item() == pytest.approx(0.9 * 0.8, abs=0.01)
    assert keep["labels"].float().mean().item() == pytest.approx(0.7 * 0.8, abs=0.01)
    neither = ~keep["text"] & ~keep["labels"]
    assert neither.float().mean().item() == pytest.approx(0.2 + 0.8 * 0.03, abs=0.01)
    extremes = condition_dropout({"text": 0.0, "labels": 1.0}, uniforms)
    assert extremes["text"].all() and not extremes["labels"].any()


def test_impossible_dropout_is_refused():
    with pytest.raises(ValueError, match="'text'.*1.5"):
        condition_dropout({"text": 1.5}, torch.rand(2, 2))
    with pytest.raises(ValueError, match="'joint'.*-0.1"):
        condition_dropout({"text": 0.5}, torch.rand(2, 2), joint=-0.1)
    with pytest.raises(ValueError, match=r"\(batch, 3\).*text, labels, joint.*\(2, 2\)"):
        condition_dropout({"text": 0.5, "labels": 0.5}, torch.rand(2, 2))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_dropped_embeddings_are_the_null_and_gradients_follow(shape):
    embeds = torch.ones(shape, requires_grad=True)
    null = torch.zeros(1, *shape[1:], requires_grad=True)
    kept = drop(embeds, null, torch.tensor([True, False, True]))
    assert kept.flatten(1).mean(1).tolist() == [1.0, 0.0, 1.0]
    kept.sum().backward()
    assert embeds.grad.flatten(1).mean(1).tolist() == [1.0, 0.0, 1.0] and null.grad.mean() == 1.0


# ---- images

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def vision_transformer(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if family == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2))
    if family == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=4)
        return transformers.Dinov2WithRegistersModel(config)
    if family == "dinov3_vit":
        config = transformers.DINOv3ViTConfig(**SHAPE, intermediate_size=32, num_register_tokens=4)
        return transformers.DINOv3ViTModel(config)
    return transformers.ViTModel(transformers.ViTConfig(**SHAPE, intermediate_size=32), add_pooling_layer=False)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vit"])
def test_vision_transformers(family, tmp_path, tiny_pipeline):
    model = vision_transformer(family).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_image_encoder()[1].save_pretrained(tmp_path / "model")
    registers = getattr(model.config, "num_register_tokens", 0)
    features = {}
    for tokens in ("global", "patch"):
        condition = ImageCondition.from_pretrained(str(tmp_path / "model"), tokens=tokens)
        assert type(condition.encoder) is type(model) and condition.cacheable and condition.token_width() == 16
        unet = tiny_unet(cross_attention_dim=16)
        pipe = MediSynPipeline(
            vae=tiny_vae(), unet=unet, scheduler=tiny_pipeline().scheduler, **condition.components()
        )
        [again] = conditions_of(pipe)
        assert again.tokens == tokens
        features[tokens] = again.encode(pipe, [{"image": noise_image(0)}, {"image": noise_image(1).convert("L")}])
        assert again.null(pipe, 2).shape == features[tokens].shape
        pipe.save_pretrained(tmp_path / tokens)
        loaded = MediSynPipeline.from_pretrained(tmp_path / tokens)
        assert torch.equal(loaded.encode_image([noise_image(0)]), pipe.encode_image([noise_image(0)]))
        with torch.no_grad():
            pixels = condition.processor([noise_image(0)], return_tensors="pt").pixel_values
            every = model(pixels).last_hidden_state
        expected = every[:, :1] if tokens == "global" else every[:, 1 + registers :]
        assert torch.allclose(pipe.encode_image([noise_image(0)]), expected, atol=1e-5)
    assert features["global"].shape == (2, 1, 16) and features["patch"].shape == (2, 4, 16)


def test_what_is_not_a_vision_transformer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="'resnet'.*dinov2"):
        ImageCondition.from_pretrained(str(tmp_path))
    with pytest.raises(OSError):
        ImageCondition.from_pretrained(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="'cls'.*global, patch"):
        ImageCondition(*tiny_image_encoder(), tokens="cls")


def test_the_image_condition_needs_images(tiny_pipeline):
    pipe = tiny_pipeline(kinds=("image",))
    [condition] = conditions_of(pipe)
    with pytest.raises(ValueError, match="image in every example"):
        condition.encode(pipe, [{"image": noise_image(0)}, {"image": None}])
