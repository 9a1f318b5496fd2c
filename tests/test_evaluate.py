"""The whole evaluation: folders and pipelines in, report, table and grid out."""

import json

import numpy as np
import pytest
from PIL import Image

from medisyn.backbone import model_hash
from medisyn.data.loading import load_images
from medisyn.evaluation import format_table
from medisyn.evaluation.inputs import nested_values
from medisyn.evaluation.sampling import draw_rows, generate_like
from medisyn.generation.provenance import read_provenance, write_png
from tests.evaluation import evaluation_data, nodules_for_everything, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return evaluation_data(tmp_path_factory.mktemp("data"))


def test_a_folder_of_images_gets_all_measures_as_a_file_a_table_and_a_grid(data, tmp_path, capsys):
    report = run(data, data["synthetic"], tmp_path / "out", train=data["train"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    printed = capsys.readouterr().out
    assert printed.strip() == format_table(report).strip() == (tmp_path / "out" / "report.md").read_text().strip()
    assert "| fundus / normal" in printed and "Nearest training image" in printed
    assert report["images"] == {"real": 168, "synthetic": 90, "train": 90}
    assert report["extractor"]["resolution"] == 32 and len(report["extractor"]["weights_sha256"]) == 64
    overall = report["fidelity"]["overall"]
    assert overall["images"] == 84  # half of the real images
    # Drawn from the distribution of the real images, these are as good as real.
    assert 0.5 < overall["frechet_distance"]["ratio"] < 2
    assert set(report["fidelity"]["modality"]) == {"CT", "fundus"}
    assert report["fidelity"]["finding"]["CT / nodule"]["images"] == 28
    assert report["agreement"]["modality"]["synthetic"]["accuracy"] == 1
    assert report["agreement"]["finding"]["synthetic"]["by_outer_value"]["CT"]["accuracy"] == 1
    assert "fundus / normal" in report["agreement"]["finding"]["omitted_classes"]
    nearest = report["nearest_training_image"]
    assert nearest["synthetic"]["median"] == pytest.approx(nearest["real"]["median"], rel=0.5)
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 8 * 32 and grid.height > 2 * 32


def test_a_codec_is_named_in_the_report(data, tmp_path):
    plain, coded = (
        run(data, data["synthetic"], tmp_path / name, codec=codec) for name, codec in (("a", None), ("b", "webp:50"))
    )
    assert coded["extractor"]["codec"] == "webp:50" and "saw all images through webp:50" in format_table(coded)
    assert "all images through" not in format_table(plain)
    distances = [report["fidelity"]["overall"]["frechet_distance"]["synthetic"] for report in (plain, coded)]
    assert distances[0] != distances[1]


def test_wrong_images_are_found_out(data, tmp_path):
    folder = nodules_for_everything(tmp_path / "images", 60)
    report = run(data, folder, tmp_path / "out", train=data["train"])
    assert report["agreement"]["finding"]["synthetic"]["balanced_accuracy"] == pytest.approx(0.5)
    assert report["fidelity"]["overall"]["frechet_distance"]["ratio"] > 5
    assert report["fidelity"]["overall"]["recall"]["synthetic"] < 0.7


def test_images_without_labels_and_without_training_images_get_what_can_be_measured(data, tmp_path):
    report = run(data, data["unlabelled"], tmp_path / "out")
    assert report["fidelity"]["overall"]["images"] == 30 and set(report["fidelity"]) == {"overall"}
    assert "no training images" in report["agreement"]["omitted"]
    assert any("no column modality, finding" in note for note in report["notes"])
    report = run(data, data["unlabelled"], tmp_path / "out", train=data["train"], per=["modality"])
    assert "synthetic" not in report["agreement"]["modality"]
    assert report["agreement"]["modality"]["real"]["accuracy"] == 1


def test_a_pipeline_makes_one_image_per_caption_with_its_labels(data, tmp_path, tiny_pipeline):
    options = {"num_images": 10, "num_inference_steps": 2, "per": ["modality"], "seed": 7}
    report = run(data, tiny_pipeline(), tmp_path / "out", batch_size=4, **options)
    assert report["subject"]["conditions"] == ["text"] and report["subject"]["num_inference_steps"] == 2
    assert "omitted" in report["fidelity"]["overall"]  # ten images are too few
    made = load_images(str(tmp_path / "out" / "images"), caption_column=None)
    assert len(made) == 10
    assert all(
        prompt.startswith(modality)
        for prompt, modality in zip(made.column("prompt"), made.column("modality"), strict=True)
    )
    assert made.column("seed") == list(range(7, 17))
    assert sum(modality == "CT" for modality in made.column("modality")) in (6, 7)  # two thirds of the real images
    with Image.open(tmp_path / "out" / "images" / "000000.png") as image:
        assert image.text["synthetic"] == "true"

    # The batch size changes nothing, and the folder can be evaluated again.
    run(data, tiny_pipeline(), tmp_path / "again", batch_size=10, **options)
    again = load_images(str(tmp_path / "again" / "images"), caption_column=None)
    difference = [np.abs(np.asarray(made.image(i), int) - np.asarray(again.image(i), int)).max() for i in range(10)]
    assert max(difference) <= 1
    assert run(data, str(tmp_path / "out" / "images"), tmp_path / "folder")["images"]["synthetic"] == 10


def test_every_image_says_how_it_was_made(data, tmp_path, tiny_pipeline):
    pipe = tiny_pipeline(kinds=("text", "labels"))
    code = next(name for name, field in pipe.label_schema["fields"].items() if field["type"] == "binary")
    real = load_images(data["real"])
    real.labels = [{code: 1} if index % 2 else None for index in range(len(real))]
    settings = {"num_inference_steps": 1, "guidance_scale": {"text": 1.5, "labels": 2.0}}
    made = generate_like(pipe, real, tmp_path / "images", ["finding"], 6, 3, 4, False, **settings)
    found = [read_provenance(tmp_path / "images" / f"{index:06d}.png") for index in range(6)]
    assert [each["seed"] for each in found] == made.column("seed") == list(range(3, 9))
    assert {json.dumps(each.get("labels")) for each in found} <= {"null", json.dumps({code: "1"})}
    assert any("labels" in each for each in found)
    for each in found:
        assert each["prompt"].endswith(each["finding"]) and settings.items() <= each.items()
        assert each["model_hash"] == model_hash(pipe) and each["synthetic"] is True
        assert each["scheduler"] == type(pipe.scheduler).__name__ and each["software"].startswith("medisyn ")
    assert made.column("model_hash") == [model_hash(pipe)] * 6


def test_only_what_an_evaluation_made_is_replaced(data, tmp_path, tiny_pipeline):
    out, options = tmp_path / "out", {"num_images": 2, "num_inference_steps": 1}
    images = out / "images"

    def refused(name):
        before = sorted((file, file.stat().st_mtime_ns) for file in out.rglob("*"))
        with pytest.raises(OSError, match=name) as caught:
            run(data, tiny_pipeline(), out, **options)
        assert "\n" not in str(caught.value)
        assert sorted((file, file.stat().st_mtime_ns) for file in out.rglob("*")) == before

    # The user's own images, even when they are called like ours.
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "000000.png")
    refused("holds 000000.png, which no evaluation made")
    (images / "000000.png").unlink()
    (images / "metadata.jsonl").write_text('{"file_name": "000000.png"}\n')
    refused("holds metadata.jsonl")
    (images / "metadata.jsonl").unlink()
    # Images of `medisyn generate` are not the evaluation's either.
    write_png(Image.new("RGB", (8, 8)), images / "00000_brain_mri.png", {"seed": 0})
    refused("holds 00000_brain_mri.png")
    (images / "00000_brain_mri.png").unlink()

    run(data, tiny_pipeline(), out, **options)
    assert len(load_images(str(images), caption_column=None)) == 2
    run(data, tiny_pipeline(), out, **options | {"num_images": 1})
    assert len(load_images(str(images), caption_column=None)) == 1
    (images / "notes").mkdir()
    refused("holds notes")
    (images / "notes").rmdir()
    # The hidden folder of a killed run is replaced, with the same care.
    hidden = out / ".images.partial"
    hidden.mkdir()
    (hidden / ".000004.png.partial").write_bytes(b"half")
    run(data, tiny_pipeline(), out, **options)
    assert not hidden.exists()
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    refused("is not a folder of generated images")


def test_models_with_other_conditions_are_asked_in_their_own_way(data, tmp_path, tiny_pipeline):
    real = load_images(data["real"])
    options = {"num_images": 2, "num_inference_steps": 1}
    for kinds in (("image",), ()):
        report = run(data | {"real": real}, tiny_pipeline(kinds=kinds), tmp_path / "out", **options)
        assert report["subject"]["conditions"] == list(kinds)
    with pytest.raises(ValueError, match="has none; map them"):
        run(data | {"real": real}, tiny_pipeline(kinds=("labels",)), tmp_path / "out", **options)


def test_images_that_the_model_was_trained_on_are_refused(data, tmp_path, tiny_pipeline):
    hashes = load_images(data["real"], caption_column=None).hashes()
    folder = tmp_path / "model"
    tiny_pipeline().save_pretrained(folder)
    options = {"num_images": 2, "num_inference_steps": 1}

    def trained_on(seen):
        (folder / "training_images.json").write_text(json.dumps({"hashes": seen, "datasets": [], "config": ""}))

    trained_on(hashes[:20])
    with pytest.raises(ValueError, match="20 of 168 real images are among the model's training images"):
        run(data, str(folder), tmp_path / "out", **options)
    assert not (tmp_path / "out" / "images").exists()
    report = run(data, str(folder), tmp_path / "out", allow_overlap=True, **options)
    assert report["overlap"]["model"] == 20 and report["images"]["real"] == 168
    assert any(note.startswith("LEAKAGE: 20") for note in report["notes"])
    # A few copies, as public collections have them between their splits, are left out instead.
    trained_on(hashes[:2])
    report = run(data, str(folder), tmp_path / "out", **options)
    assert report["overlap"] == {"model": 2, "train": None, "left_out": 2} and report["images"]["real"] == 166
    with pytest.raises(ValueError, match="168 of 168 real images are among the images given as train"):
        run(data, data["synthetic"], tmp_path / "out", train=data["real"])


def test_a_damaged_training_record_is_named(data, tmp_path, tiny_pipeline):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for content in ('{"nothing": 1}', "{"):
        (tmp_path / "model" / "training_images.json").write_text(content)
        with pytest.raises(ValueError, match="training_images.json is not a record of training images"):
            run(data, str(tmp_path / "model"), tmp_path / "out")


def test_bad_requests_are_named_before_anything_is_made(data, tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="'organ'.*modality"):
        run(data, data["synthetic"], tmp_path / "out", per=["organ"])
    with pytest.raises(ValueError, match="unknown feature extractor 'vgg'"):
        run(data, tiny_pipeline(), tmp_path / "out", extractor="vgg")
    with pytest.raises(ValueError, match="Unknown codec 'png'.*webp"):
        run(data, tiny_pipeline(), tmp_path / "out", codec="png:90")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        run(data, tiny_pipeline(), tmp_path / "out", num_images=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(data | {"real": str(tmp_path / "nowhere")}, data["synthetic"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(data, str(tmp_path / "nowhere"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(data, data["synthetic"], tmp_path / "file")
    assert not (tmp_path / "out" / "images").exists()


def test_rows_are_drawn_in_proportion_and_not_twice():
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    rows = draw_rows(strata, 20, seed=0)
    counts = {name: sum(strata[row] == name for row in rows) for name in "abc"}
    assert len(set(rows)) == 20
    assert abs(counts["a"] - 12) <= 1 and abs(counts["b"] - 6) <= 1 and abs(counts["c"] - 2) <= 1
    assert sorted(draw_rows(strata, 100, seed=1)) == list(range(100))
    assert len(draw_rows(strata, 150, seed=1)) == 150


def test_columns_nest(data):
    values = nested_values(load_images(data["real"]), ["modality", "finding"])
    assert set(values["modality"]) == {"CT", "fundus"}
    assert set(values["finding"]) == {"CT / normal", "CT / nodule", "fundus / normal"}
