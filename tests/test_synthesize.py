"""Folders of generated images: reproducible, resumable, traceable, and usable as data.

python -m pytest tests/test_synthesize.py
"""

import json
import resource

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from PIL import Image, ImageChops, ImageFont

import medisyn
from medisyn.backbone import model_hash
from medisyn.data.loading import load_images
from medisyn.generation.grid import draw_grid, wrap
from medisyn.generation.provenance import adapter_hash, read_provenance, write_png
from medisyn.generation.requests import Request, make_requests, read_prompts
from medisyn.generation.schedulers import SCHEDULERS, make_scheduler
from medisyn.generation.synthesize import synthesize
from tests.components import tiny_pipeline

FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(("text", "labels"))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- what is written ------------------------------------------------------------------------------------------------


def test_folder_holds_images_metadata_and_grid(pipe, tmp_path):
    files = synthesize(pipe, make_requests(["Brain MRI, T1!", "a retina"], 2, seed=5), tmp_path / "a" / "b", **FAST)
    names = ["00000_brain_mri_t1.png", "00001_brain_mri_t1.png", "00002_a_retina.png", "00003_a_retina.png"]
    assert [file.name for file in files] == names
    assert {file.name for file in (tmp_path / "a" / "b").iterdir()} == {*names, "metadata.jsonl", "grid.png"}
    lines = lines_of(tmp_path / "a" / "b")
    assert [line["file_name"] for line in lines] == names
    assert [line["seed"] for line in lines] == [5, 6, 7, 8]
    assert [line["caption"] for line in lines] == ["Brain MRI, T1!"] * 2 + ["a retina"] * 2
    assert all(line["synthetic"] is True for line in lines)
    assert len({file.read_bytes() for file in files}) == 4


def test_png_says_where_it_comes_from(pipe, tmp_path):
    request = Request("Fundus ä ✓", "blurred", {"Glaucoma": "yes", "dr_grade": 3, "eye_side": None}, seed=7)
    settings = {"guidance_scale": {"text": 2.0, "labels": 1.5}, "scheduler": "ddim", "num_inference_steps": 3}
    (file,) = synthesize(pipe, [request], tmp_path, model="tiny", adapter="", **settings)
    assert read_provenance(file) == {
        "software": f"medisyn {medisyn.__version__}",
        "model": "tiny",
        "model_hash": model_hash(pipe),
        "prompt": "Fundus ä ✓",
        "negative_prompt": "blurred",
        "labels": {"gc": "1", "dr_grade": "3"},
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": {"text": 2.0, "labels": 1.5},
        "guidance_interval": [0.0, 0.95],
        "scheduler": "DDIMScheduler",
        "synthetic": True,
        "notice": "synthetic image, not for diagnosis",
    }
    with Image.open(file) as image:
        assert image.text["synthetic"] == "true"
        assert image.mode == "RGB"
    assert read_provenance(tmp_path / "grid.png")["synthetic"] is True


def test_conditioning_files_are_recorded_by_name_and_hash(tmp_path):
    Image.radial_gradient("L").resize((40, 60)).save(tmp_path / "like.png")
    Image.linear_gradient("L").save(tmp_path / "start.png")
    requests = make_requests([Request()], 2, like=tmp_path / "like.png", init_image=tmp_path / "start.png")
    image_pipe = tiny_pipeline(("image",))
    first, _ = synthesize(image_pipe, requests, tmp_path / "out", strength=0.5, num_inference_steps=4)
    found = read_provenance(first)
    assert found["like"].startswith("like.png sha256:") and found["init_image"].startswith("start.png sha256:")
    assert found["strength"] == 0.5
    assert str(tmp_path) not in str(found)
    Image.new("L", (40, 60)).save(tmp_path / "like.png")  # another image under the same name is another request
    with pytest.raises(FileExistsError, match="like is"):
        synthesize(image_pipe, requests, tmp_path / "out", strength=0.5, num_inference_steps=4)


def test_provenance_of_other_files_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="no medisyn provenance"):
        read_provenance(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="text.png"):
        read_provenance(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read_provenance(tmp_path / "absent.png")


def test_adapter_has_a_hash_of_its_own(tmp_path):
    pipe = tiny_pipeline()
    before = model_hash(pipe)
    assert adapter_hash(pipe) is None
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]))
    (file,) = synthesize(pipe, [Request("x")], tmp_path, adapter="mine", **FAST)
    found = read_provenance(file)
    assert found["adapter"] == "mine" and found["adapter_hash"] == adapter_hash(pipe) is not None
    assert found["model_hash"] == before
    pipe.unet.delete_adapters("default")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
    assert adapter_hash(pipe) != found["adapter_hash"]


# ---- the same request gives the same images -------------------------------------------------------------------------


def test_image_does_not_depend_on_its_batch(pipe, tmp_path):
    requests = make_requests(["a chest X-ray"], 8, seed=3)
    together = synthesize(pipe, requests, tmp_path / "8", batch_size=8, num_inference_steps=4)
    alone = synthesize(pipe, requests, tmp_path / "1", batch_size=1, num_inference_steps=4)
    for one, other in zip(together, alone, strict=True):
        difference = ImageChops.difference(Image.open(one), Image.open(other))
        assert max(high for _, high in difference.getextrema()) <= 1  # rounding of a differently shaped product
    shifted = synthesize(pipe, make_requests(["a chest X-ray"], 1, seed=6), tmp_path / "6", num_inference_steps=4)
    difference = ImageChops.difference(Image.open(shifted[0]), Image.open(together[3]))
    assert max(high for _, high in difference.getextrema()) <= 1


def test_reruns_are_bit_identical(pipe, tmp_path):
    requests = make_requests(["a", "b"], 2)
    for name in ("one", "two"):
        synthesize(pipe, requests, tmp_path / name, **FAST)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_run_continues_where_it_stopped(pipe, tmp_path):
    requests = make_requests(["a"], 6)
    files = synthesize(pipe, requests, tmp_path, batch_size=4, **FAST)
    finished = contents(tmp_path)
    # as after a kill: one image has no line yet, one line has no image, two have neither, and a file is half-written
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[1:4]))
    for file in (files[2], files[4], files[5], tmp_path / "grid.png"):
        file.unlink()
    (tmp_path / f".{files[4].name}.partial").write_bytes(b"\x89PNG")
    kept = {file: file.stat().st_mtime_ns for file in (files[0], files[1], files[3])}
    synthesize(pipe, requests, tmp_path, batch_size=4, **FAST)
    assert contents(tmp_path) == finished
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_more_images_of_the_same_request_are_added(pipe, tmp_path):
    first = synthesize(pipe, make_requests(["a"], 2), tmp_path, **FAST)
    times = [file.stat().st_mtime_ns for file in first]
    assert synthesize(pipe, make_requests(["a"], 3), tmp_path, **FAST)[:2] == first
    assert [file.stat().st_mtime_ns for file in first] == times
    assert len(lines_of(tmp_path)) == 3


def test_guidance_is_recorded_and_never_left_out_silently(pipe, tmp_path):
    requests = make_requests(["a"], 2)
    options = {"guidance_interval": (0.2, 0.7), "guidance_rescale": 0.5}
    file, _ = synthesize(pipe, requests, tmp_path / "out", **options, **FAST)
    assert {name: read_provenance(file)[name] for name in options} == options | {"guidance_interval": [0.2, 0.7]}
    assert lines_of(tmp_path / "out")[0]["guidance_rescale"] == 0.5
    (tmp_path / "out" / "metadata.jsonl").unlink()  # as if the run had been killed before it was written
    for other in ({}, {"guidance_rescale": 0.5}):
        with pytest.raises(FileExistsError, match="another request"):
            synthesize(pipe, requests, tmp_path / "out", **other, **FAST)
    assert synthesize(pipe, requests, tmp_path / "out", **options, **FAST)[0] == file
    plain, _ = synthesize(pipe, requests, tmp_path / "plain", **FAST)
    default = {"guidance_interval": (0.0, 0.95), "guidance_rescale": 0.0}
    asked, _ = synthesize(pipe, requests, tmp_path / "asked", **default, **FAST)
    assert read_provenance(plain)["guidance_interval"] == [0.0, 0.95]
    assert plain.read_bytes() == asked.read_bytes() != file.read_bytes()


# ---- other people's files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ["b"]},
        {"num_images": 1},
        {"seed": 1},
        {"guidance_scale": 5.0},
        {"guidance_interval": (0.2, 0.8)},
        {"guidance_rescale": 0.5},
        {"num_inference_steps": 3},
        {"scheduler": "euler"},
        {"model": "another"},
    ],
    ids=str,
)
def test_other_request_is_refused(pipe, tmp_path, change):
    synthesize(pipe, make_requests(["a"], 2), tmp_path, **FAST)
    before = contents(tmp_path)
    request = {"prompts": ["a"], "num_images": 2, "seed": 0}
    request |= {name: change[name] for name in change.keys() & request.keys()}
    settings = FAST | {name: change[name] for name in change.keys() - request.keys()}
    with pytest.raises(FileExistsError, match="another request"):
        synthesize(pipe, make_requests(**request), tmp_path, **settings)
    assert contents(tmp_path) == before


def test_overwrite_replaces_this_runs_images_only(pipe, tmp_path):
    synthesize(pipe, make_requests(["a"], 3), tmp_path, **FAST)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    files = synthesize(pipe, make_requests(["b"], 2), tmp_path, overwrite=True, **FAST)
    assert {file.name for file in tmp_path.glob("0*.png")} == {"00000_b.png", "00001_b.png", "00002_a.png"}
    assert [line["file_name"] for line in lines_of(tmp_path)] == ["00000_b.png", "00001_b.png", "00002_a.png"]
    assert contents(tmp_path)["00002_a.png"] == before["00002_a.png"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    times = [file.stat().st_mtime_ns for file in files]
    synthesize(pipe, make_requests(["b"], 2), tmp_path, overwrite=True, **FAST)
    assert [file.stat().st_mtime_ns for file in files] == times  # what is right already stays


@pytest.mark.parametrize("name", ["00000_a.png", "grid.png"])
def test_image_of_someone_else_is_not_replaced(pipe, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=name):
        synthesize(pipe, make_requests(["a"]), tmp_path, **FAST)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["not json\n", '["a list"]\n', '{"no": "file name"}\n'])
def test_metadata_of_someone_else_is_not_replaced(pipe, tmp_path, text):
    (tmp_path / "metadata.jsonl").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="metadata.jsonl"):
            synthesize(pipe, make_requests(["a"]), tmp_path, overwrite=overwrite, **FAST)
    assert contents(tmp_path) == {"metadata.jsonl": text.encode()}


def test_write_that_fails_leaves_nothing_half_done(pipe, tmp_path):
    """A limit on the size of files stands for a full disk: writing fails at the same place in the same way."""
    synthesize(pipe, make_requests(["a"], 1), tmp_path, **FAST)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="00001_a.png"):
            synthesize(pipe, make_requests(["a"], 2), tmp_path, **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


# ---- as data --------------------------------------------------------------------------------------------------------


def test_folder_is_an_imagefolder(pipe, tmp_path):
    templates = [
        Request("a", labels={"gc": 1, "eye_side": "left"}, columns={"modality": "fundus photography"}),
        Request("b", labels={"gc": 0}),
        Request("c", columns={"modality": "CT"}),
    ]
    out = tmp_path / "out"
    synthesize(pipe, make_requests(templates, 2), out, **FAST)
    rows = load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 6  # without grid.png
    assert rows["prompt"] == ["a", "a", "b", "b", "c", "c"]
    assert rows[0]["image"].size == (32, 32)
    images = load_images(str(out), label_columns={"gc": "labels.gc", "eye_side": "labels.eye_side"})
    assert images.captions == ["a", "a", "b", "b", "c", "c"]
    assert [row["gc"] for row in images.labels[::2]] == ["1", "0", None]
    assert images.column("modality")[::2] == ["fundus photography", None, "CT"]


def test_prompts_file(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n  two \n", encoding="utf-8")
    assert [request.prompt for request in read_prompts(text)] == ["one", "two"]
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"prompt": "one", "finding": "glioma"}\n{"labels": {"gc": 1}}\n', encoding="utf-8")
    assert read_prompts(table) == [
        Request(prompt="one", columns={"finding": "glioma"}),
        Request(labels={"gc": 1}),
    ]


# ---- samplers, grid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples(pipe, tmp_path, name):
    own = pipe.scheduler
    if name == "euler-ancestral":  # divides by the huge last sigma of the cosine schedule
        pipe.scheduler = make_scheduler("dpm", {**own.config, "beta_schedule": "scaled_linear"})
    trained = pipe.scheduler
    try:
        (file,) = synthesize(pipe, [Request("a")], tmp_path, scheduler=name, num_inference_steps=4)
        assert pipe.scheduler is trained
    finally:
        pipe.scheduler = own
    assert read_provenance(file)["scheduler"] == SCHEDULERS[name]
    changed = make_scheduler(name, trained.config)
    assert changed.config.prediction_type == "v_prediction"
    assert (changed.alphas_cumprod - trained.alphas_cumprod).abs().max() < 1e-6


def test_diverged_image_is_an_error(tmp_path):
    pipe = tiny_pipeline()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        synthesize(pipe, [Request("a")], tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_grid_groups_images_of_one_caption():
    image = Image.new("RGB", (128, 128), (255, 0, 0))
    single = draw_grid([(name, image) for name in "abcd"], 4)
    grouped = draw_grid([("a", image)] * 4, 4)
    assert single.width < grouped.width  # 2 x 2 with captions, and one row under one caption
    assert draw_grid([("word " * 60, image)] * 2, 2).height > draw_grid([("word", image)] * 2, 2).height
    assert draw_grid([("a", Image.new("RGB", (16, 16)))], 1).width >= 176  # small images are enlarged


def test_captions_wrap_within_their_cell():
    font = ImageFont.load_default(14)
    text = "an unusually long caption with Pneumonoultramicroscopicsilicovolcanoconiosis in it"
    lines = wrap(text, 100, font)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_png_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "image.png"
    write_png(Image.new("RGB", (4, 4)), file, {"seed": 1})
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_png(Image.new("RGB", (4, 4)), file, {"seed": object()})
    assert contents(tmp_path) == {"image.png": before}
