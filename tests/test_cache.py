"""Latent and embedding caches: content keys, resuming after a kill, refusal of other keys."""

import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from medisyn.data.cache import (
    DECODING,
    build_caption_embedding_cache,
    build_image_embedding_cache,
    build_latent_cache,
    module_hash,
)
from medisyn.data.loading import load_images
from medisyn.data.preprocessing import Preprocessor
from medisyn.data.storage import ArrayCache, fill

KEY = {"kind": "test"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i % 6).integers(0, 256, (32, 32, 3), dtype=np.uint8)  # 6 is a copy of 0
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return load_images(folder, caption_column=None)


def encoded(pipe, images, indices, flip=False):
    tensors = torch.stack([Preprocessor(32)(images.image(i), flip=flip) for i in indices])
    with torch.no_grad():
        return pipe.encode_latents(tensors)


@pytest.mark.parametrize("vae", ["dc", "kl"])
def test_moments_are_those_of_the_pipeline(tiny_pipeline, images, tmp_path, vae):
    pipe = tiny_pipeline(kinds=(), vae=vae)
    cache = build_latent_cache(pipe, images, Preprocessor(32), tmp_path / "cache", batch_size=4, flips=True)
    moments = cache.moments([3, 5, 3], flip=[False, True, False])
    plain, mirrored = encoded(pipe, images, [3]), encoded(pipe, images, [5], flip=True)
    assert set(moments) == set(plain) == ({"mean"} if vae == "dc" else {"mean", "logvar"})
    for name, values in moments.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values[:1], plain[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values[1:2], mirrored[name], rtol=1e-3, atol=1e-3)
        assert torch.equal(values[0], values[2]) and torch.equal(values[0], cache.moments(3)[name])


def test_identical_images_share_a_row_and_parts_read_the_whole(tiny_pipeline, images, tmp_path):
    pipe = tiny_pipeline(kinds=())
    cache = build_latent_cache(pipe, images, Preprocessor(32), tmp_path / "cache")
    assert cache.rows[6] == cache.rows[0] and len(set(cache.rows)) == 6
    part = build_latent_cache(pipe, images.select([5, 2]), Preprocessor(32), tmp_path / "cache")
    assert torch.equal(part.moments(0)["mean"], cache.moments(5)["mean"])
    with pytest.raises(ValueError, match="flips=True"):
        cache.moments(0, flip=True)


def test_workers_reopen_the_maps(tiny_pipeline, images, tmp_path):
    cache = build_latent_cache(tiny_pipeline(kinds=()), images, Preprocessor(32), tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.moments([1, 2])["mean"], cache.moments([1, 2])["mean"])
    assert isinstance(copy._arrays["mean"], np.memmap)


def test_another_key_is_refused_with_both_named(tiny_pipeline, images, tmp_path):
    pipe, folder = tiny_pipeline(kinds=()), tmp_path / "cache"
    build_latent_cache(pipe, images.select([0, 1]), Preprocessor(32), folder)
    before = {file.name: file.read_bytes() for file in folder.glob("*.npy")}
    other = tiny_pipeline(kinds=(), seed=1)
    encoder = module_hash(other.vae, without=DECODING)
    attempts = {
        encoder: lambda: build_latent_cache(other, images.select([0, 1]), Preprocessor(32), folder),
        "center 64": lambda: build_latent_cache(pipe, images.select([0, 1]), Preprocessor(64), folder),
        "flips=True": lambda: build_latent_cache(pipe, images.select([0, 1]), Preprocessor(32), folder, flips=True),
        "content": lambda: build_latent_cache(pipe, images, Preprocessor(32), folder),
        "bf16=True": lambda: build_latent_cache(pipe, images.select([0, 1]), Preprocessor(32), folder, bf16=True),
    }
    for wanted, attempt in attempts.items():
        with pytest.raises(ValueError, match=wanted) as error:
            attempt()
        assert " not for " in str(error.value) and "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in folder.glob("*.npy")} == before


def test_latents_stay_where_the_decoder_alone_is_another(tiny_pipeline, images, tmp_path):
    pipe = tiny_pipeline(kinds=())
    before = build_latent_cache(pipe, images, Preprocessor(32), tmp_path / "cache").moments(0)["mean"]
    with torch.no_grad():
        for parameter in pipe.vae.decoder.parameters():
            parameter.add_(1.0)
    after = build_latent_cache(pipe, images, Preprocessor(32), tmp_path / "cache").moments(0)["mean"]
    assert torch.equal(before, after)
    with torch.no_grad():
        next(pipe.vae.encoder.parameters()).add_(1.0)
    with pytest.raises(ValueError, match=" not for "):
        build_latent_cache(pipe, images, Preprocessor(32), tmp_path / "cache")


def test_random_crops_are_refused(tiny_pipeline, images, tmp_path):
    with pytest.raises(ValueError, match="random"):
        build_latent_cache(tiny_pipeline(kinds=()), images, Preprocessor(32, crop="random"), tmp_path / "cache")


def test_unreadable_images_have_no_row(tiny_pipeline, images, tmp_path):
    (tmp_path / "images" / "2.png").write_bytes(b"damaged")
    damaged = load_images(tmp_path / "images", caption_column=None, on_error="skip")
    cache = build_latent_cache(tiny_pipeline(kinds=()), damaged, Preprocessor(32), tmp_path / "cache")
    assert cache.rows[2] == -1 and list(damaged.skipped) == [2]
    assert cache.moments(3)["mean"].shape == (4, 4, 4)
    with pytest.raises(ValueError, match="item 2"):
        cache.moments([1, 2])


def test_second_build_neither_decodes_nor_encodes(tiny_pipeline, images, tmp_path, monkeypatch):
    pipe = tiny_pipeline(kinds=())
    first = build_latent_cache(pipe, images, Preprocessor(32), tmp_path / "cache")
    again = load_images(tmp_path / "images", caption_column=None)

    def unexpected(*_):
        raise AssertionError("done a second time")

    monkeypatch.setattr(again, "image", unexpected)
    monkeypatch.setattr(pipe, "encode_latents", unexpected)
    second = build_latent_cache(pipe, again, Preprocessor(32), tmp_path / "cache")
    assert torch.equal(first.moments([0, 4])["mean"], second.moments([0, 4])["mean"])


def test_embeddings_of_images_and_captions(tiny_pipeline, images, tmp_path):
    pipe = tiny_pipeline(kinds=("text", "image"))
    of_images = build_image_embedding_cache(pipe, images, tmp_path / "images-cache", flips=True)
    with torch.no_grad():
        expected = pipe.encode_image([images.image(4)])
    torch.testing.assert_close(of_images.embeddings([4]), expected, rtol=1e-2, atol=1e-2)
    assert not torch.equal(of_images.embeddings(4), of_images.embeddings(4, flip=True))
    captions = ["an eye", None, "a chest", "an eye"]
    of_captions = build_caption_embedding_cache(pipe, captions, tmp_path / "captions-cache")
    assert of_captions.rows.tolist() == [0, 1, 2, 0]
    with torch.no_grad():
        expected = pipe.encode_prompt(["an eye", ""])
    torch.testing.assert_close(of_captions.embeddings([3, 1]), expected, rtol=1e-2, atol=1e-2)


def encode_numbers(numbers):
    return {"values": torch.tensor(numbers, dtype=torch.float32)[:, None, None] * torch.ones(2, 3)}


def run_slowly(folder, log, count):
    def encode(numbers):
        with open(log, "a") as file:
            file.write("".join(f"{number}\n" for number in numbers))
        time.sleep(0.01)
        return encode_numbers(numbers)

    fill(folder, KEY, [f"content {i}" for i in range(count)], lambda item: [item], encode, batch_size=3)


def test_killed_at_any_moment_a_build_goes_on_where_it_was(tmp_path):
    folder, log, count = tmp_path / "cache", tmp_path / "log", 60
    context = multiprocessing.get_context("fork")
    for _ in range(6):
        child = context.Process(target=run_slowly, args=(folder, log, count))
        seen = log.stat().st_size if log.exists() else 0
        child.start()
        while child.is_alive() and (not log.exists() or log.stat().st_size < seen + 20):
            time.sleep(0.002)
        time.sleep(float(np.random.default_rng(seen).uniform(0, 0.02)))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
    run_slowly(folder, log, count)
    cache = ArrayCache(folder, [f"content {i}" for i in reversed(range(count))])
    expected = encode_numbers(list(reversed(range(count))))["values"]
    assert torch.equal(cache.read("values", range(count)), expected)
    computed = log.read_text().split()
    assert set(computed) == {str(i) for i in range(count)}
    assert len(computed) <= count + 6 * 3  # at most the batch in hand is lost by a kill


def test_unmarked_rows_are_never_trusted(tmp_path):
    contents = ["a", "b", "c"]
    fill(tmp_path, KEY, contents, lambda item: [item], encode_numbers_2d, batch_size=1)
    values = np.load(tmp_path / "values.float16.npy", mmap_mode="r+")
    done = np.load(tmp_path / "done.npy", mmap_mode="r+")
    values[1], done[1] = 77, 0  # as if killed while row 1 was being written
    fill(tmp_path, KEY, contents, lambda item: [item], encode_numbers_2d, batch_size=1)
    assert ArrayCache(tmp_path, contents).read("values", [0, 1, 2])[:, 0].tolist() == [0.0, 1.0, 2.0]


def encode_numbers_2d(numbers):
    return {"values": torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 4)}


def test_values_beyond_half_precision_make_the_array_single_precision(tmp_path):
    contents = [str(i) for i in range(6)]
    fill(tmp_path, KEY, contents, lambda item: [10.0**item], encode_numbers_2d, batch_size=2)
    assert json.loads((tmp_path / "cache.json").read_text())["arrays"] == {"values": "float32"}
    assert not (tmp_path / "values.float16.npy").exists()
    read = ArrayCache(tmp_path, contents).read("values", range(6))[:, 0].tolist()
    assert read == [1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]


def test_values_that_are_not_finite_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        fill(tmp_path, KEY, ["a"], lambda item: [float("nan")], encode_numbers_2d, batch_size=2)


def test_damaged_manifest_is_one_line(tmp_path):
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        fill(tmp_path, KEY, ["a"], lambda item: [item], encode_numbers_2d, batch_size=2)


def test_two_processes_build_one_folder_once(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=run_slowly, args=(folder, log, 20)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(log.read_text().split()) == 20
