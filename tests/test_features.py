"""Feature extractors: preprocessing, cache, and what a wrong specification says."""

import hashlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from medisyn.data.loading import load_images
from medisyn.evaluation.codec import Codec
from medisyn.evaluation.features import EXTRACTORS, extract_features, load_extractor
from tests.components import tiny_image_encoder

MODEL = "test_efficientnet"  # 0.1 million parameters, 256 features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("weights") / "tiny.pth"
        torch.save(timm.create_model(MODEL).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "6.png").write_bytes((folder / "0.png").read_bytes())
    return load_images(str(folder), caption_column=None)


def test_timm_features_are_the_pooled_ones_of_the_whole_normalised_image(weights):
    extractor = load_extractor(f"timm:{MODEL}@{weights}?size=32")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    model = timm.create_model(MODEL).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    mean, std = (np.array(model.pretrained_cfg[name]) for name in ("mean", "std"))
    batch = torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert torch.allclose(extractor([Image.fromarray(pixels)]), expected, atol=1e-4)
    assert extractor.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_options_change_the_preprocessing_and_the_cache_key(weights):
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    default = load_extractor(f"timm:{MODEL}@{weights}?size=32")
    other = load_extractor(f"timm:{MODEL}@{weights}?size=32&mean=0.5&std=0.1,0.2,0.3")
    assert not torch.allclose(default([image]), other([image]))
    assert default.key != other.key


def test_resolution_removes_detail_and_is_part_of_the_key(weights):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = load_extractor(f"timm:{MODEL}@{weights}?size=64")
    small = load_extractor(f"timm:{MODEL}@{weights}?size=64", resolution=8)
    smoothed = noise.resize((8, 8), Image.Resampling.BICUBIC)
    assert torch.allclose(small([noise]), plain([smoothed]), atol=1e-5)
    assert plain.key != small.key


def test_a_codec_gives_all_images_the_same_traces(weights):
    """What was a JPEG file once is nearer to its original when both go through the codec, and the key tells."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    original = Image.fromarray(np.clip(np.array(smooth) + rng.normal(0, 4, (64, 64, 3)), 0, 255).astype(np.uint8))
    codec = Codec.parse("jpeg:50")
    stored = codec(original)
    plain, same = (load_extractor(f"timm:{MODEL}@{weights}?size=64", codec=each) for each in (None, codec))
    distances = [float((extractor([original]) - extractor([stored])).norm()) for extractor in (plain, same)]
    assert distances[1] < 0.5 * distances[0] and plain.key != same.key


@pytest.mark.parametrize("text", ["png:90", "webp", "webp:0", "jpeg:101", "jpeg:best", ""])
def test_a_codec_that_there_is_not_is_named(text):
    with pytest.raises(ValueError, match=r"codec"):
        Codec.parse(text)


def test_features_do_not_depend_on_the_batch_size_and_equal_images_are_computed_once(weights, images):
    extractor = load_extractor(f"timm:{MODEL}@{weights}?size=32")
    one = extract_features(extractor, images, batch_size=1, progress=False)
    four = extract_features(extractor, images, batch_size=4, progress=False)
    assert one.shape == (7, 256) and one.dtype == np.float32
    np.testing.assert_allclose(one, four, atol=1e-5)
    np.testing.assert_array_equal(four[0], four[6])


def test_the_cache_is_used_for_known_images_and_survives_a_move_of_the_weights(weights, images, tmp_path):
    moved = tmp_path / "moved.pth"
    moved.write_bytes(weights.read_bytes())
    cache = tmp_path / "cache"
    part = images.select([0, 1, 2])
    expected = extract_features(load_extractor(f"timm:{MODEL}@{weights}?size=32"), part, cache, progress=False)

    extractor = load_extractor(f"timm:{MODEL}@{moved}?size=32")
    seen = []
    extractor.network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = extract_features(extractor, images, cache, progress=False)
    assert sum(seen) == 3  # of seven images, three were known and one is a copy
    np.testing.assert_array_equal(found[:3], expected)
    extract_features(extractor, images, cache, progress=False)
    assert sum(seen) == 3


def test_a_vision_transformer_from_a_folder_and_the_pipelines_own_encoder_agree(tmp_path, tiny_pipeline):
    encoder, processor = tiny_image_encoder(registers=2)
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    by_folder = load_extractor(f"dinov2:{tmp_path}")
    pipe = tiny_pipeline(kinds=("image",), registers=2)
    by_pipeline = load_extractor("model", pipe)
    assert torch.allclose(by_folder([image]), by_pipeline([image]), atol=1e-5)
    assert torch.allclose(by_pipeline([image]), pipe.encode_image([image])[:, 0], atol=1e-5)
    assert by_folder.weights_sha256 == by_pipeline.weights_sha256


def test_the_image_encoder_of_a_saved_pipeline_has_its_preprocessing_beside_it(tmp_path, tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline(kinds=("image",))
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "image_encoder" / "preprocessor_config.json").exists()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    expected = load_extractor("model", pipe)([image])
    assert torch.allclose(load_extractor(f"dinov2:{tmp_path / 'image_encoder'}")([image]), expected, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    assert torch.allclose(load_extractor("dinov2:image_encoder")([image]), expected, atol=1e-5)
    (tmp_path / "feature_extractor").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="cannot load the feature extractor 'image_encoder'"):
        load_extractor("dinov2:image_encoder")


@pytest.mark.parametrize("spec", ["resnet", "timm:", "dinov2:", "clip:ViT-B-32"])
def test_an_unknown_form_lists_the_valid_ones(spec):
    with pytest.raises(ValueError) as error:
        load_extractor(spec)
    assert repr(spec) in str(error.value) and all(form in str(error.value) for form in EXTRACTORS)


def test_bad_timm_specifications_say_what_is_wrong(weights, tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="names no weights file"):
        load_extractor(f"timm:{MODEL}")
    with pytest.raises(ValueError, match="unknown timm model 'test_nonsense'"):
        load_extractor(f"timm:test_nonsense@{weights}")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_extractor(f"timm:{MODEL}@nowhere.pth")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_extractor(f"timm:{MODEL}@{broken}")
    with pytest.raises(ValueError, match="does not fit"):
        load_extractor(f"timm:test_resnet@{weights}")
    with pytest.raises(ValueError, match="'crop'.*size, mean, std"):
        load_extractor(f"timm:{MODEL}@{weights}?crop=1")
    with pytest.raises(ValueError, match="size='big'"):
        load_extractor(f"timm:{MODEL}@{weights}?size=big")


def test_the_pipelines_encoder_cannot_be_used_where_there_is_none(tiny_pipeline):
    with pytest.raises(ValueError, match="no pipeline.*inception"):
        load_extractor("model")
    with pytest.raises(ValueError, match="MediSynPipeline has no image encoder.*timm:"):
        load_extractor("model", tiny_pipeline(kinds=("text",)))


def test_offline_extractors_fail_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match="HF_HUB_OFFLINE.*timm:") as error:
        load_extractor("inception")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_extractor("inception@nowhere.pth")
    with pytest.raises(OSError, match="owner/no-such-encoder") as error:
        load_extractor("dinov2:owner/no-such-encoder")
    assert "\n" not in str(error.value)


def test_the_quoted_extractor_loads_the_reference_weights(shared_folder):
    extractor = load_extractor(f"timm:tf_efficientnet_lite0@{shared_folder}/weights/efficientnet_lite0.pth")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    assert extractor.transform(image).shape == (3, 224, 224)
    assert extractor([image]).shape == (1, 1280)
