"""Augmentation, end to end, on a tiny model: what it asks for, keeps, writes and measures, and what it refuses."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from medisyn.augmentation import augment
from medisyn.augmentation_candidates import candidate_counts
from medisyn.augmentation_checks import check_labels, find_uncompared
from medisyn.augmented_dataset import write_dataset
from medisyn.cli import app
from medisyn.data.loading import load_images
from medisyn.data.subsets import stratified_subset
from medisyn.evaluation.judge import Judge
from medisyn.evaluation.utility_classifier import CnnClassifier
from medisyn.evaluation.utility_inputs import check_classes, choose_labels, open_labelled
from medisyn.generation.class_requests import class_requests, spread_requests
from medisyn.generation.provenance import read_provenance
from medisyn.guidance import attach_classifier
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.tasks.pseudo_labels import keep_pseudo_labels
from medisyn.training_record import write_training_record
from tests.components import LABEL_SCHEMA, tiny_components, tiny_pipeline
from tests.utility import KINDS, write_extractor, write_labelled

CNN = CnnClassifier(model="test_resnet", resolution=32, steps=4, batch_size=8)
QUICK = ["--cnn", "test_resnet", "--cnn-steps", "2", "--cnn-resolution", "32", "--folds", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augment")
    return {
        "real": write_labelled(folder / "real", 8, 1),
        "test": write_labelled(folder / "test", 6, 2),
        "extractor": write_extractor(folder),
    }


def run(data, pipe, out, **changes):
    options = {"ratio": 1.0, "sampling": {"num_inference_steps": 2}, "rules": "duplicates:0.999", "folds": 2}
    options |= {"extractor": data["extractor"], "classifiers": [CNN], "regimes": ["both"], "out": out}
    return augment(data["real"], data["test"], pipe, **options | changes)


def pipe_with_findings():
    """A tiny pipeline whose labels have the classes of the images."""
    schema = {"name": "findings", "fields": {**LABEL_SCHEMA["fields"]}}
    side = schema["fields"].pop("eye_side")
    schema["fields"]["dr_grade"] = {**schema["fields"]["dr_grade"], "values": ["0", "1", "2", "3"]}
    schema["fields"]["kind"] = {**side, "values": list(KINDS), "display": "Kind"}  # as many slots in all
    pipe = MediSynPipeline(**tiny_components(("labels",)) | {"label_schema": schema})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_from_a_few_labelled_images_to_an_augmented_set_and_its_worth(data, tmp_path):
    report = run(data, pipe_with_findings(), tmp_path / "out", label_fraction=0.5, seed=100)
    assert report["labelled_images"] == {"dark": 4, "bright": 4, "green": 4} == report["candidates"]
    assert report["generator"]["condition"] == "labels" and report["generator"]["seeds"] == [100, 111]
    assert json.loads((tmp_path / "out" / "augment.json").read_text()) == report

    # Every candidate has its class, and its seed, in the table and in the file.
    made = load_images(str(tmp_path / "out" / "candidates"), caption_column=None)
    assert sorted(made.column("finding")) == sorted(list(KINDS) * 4) and made.column("seed") == list(range(100, 112))
    first = sorted((tmp_path / "out" / "candidates").glob("0*.png"))[0]
    assert read_provenance(first)["labels"] == {"kind": made.column("finding")[0]}
    # Every one of them was kept or dropped for a stated reason; the random selection is as large.
    audit = [json.loads(line) for line in (tmp_path / "out" / "selected" / "selection.jsonl").read_text().splitlines()]
    selected, random = (open_labelled(str(tmp_path / "out" / name), "finding") for name in ("selected", "random"))
    assert len(audit) == 12 and sum(record["kept"] for record in audit) == len(selected)
    assert selected.counts() == random.counts()

    # The augmented set loads as it is, real and synthetic rows told apart.
    small = open_labelled(data["real"], "finding")
    both = load_images(str(tmp_path / "out" / "dataset"), caption_column=None)
    synthetic = both.column("synthetic")
    assert synthetic.count(False) == 12 and synthetic.count(True) == len(selected)
    assert both.hashes() == both.column("content_hash")
    real = [row for row, made_up in enumerate(synthetic) if not made_up]
    assert {both.column("content_hash")[row] for row in real} <= set(small.hashes)
    assert all((both.column("group_id")[row] is None) == synthetic[row] for row in range(len(both)))
    assert {both.column("seed")[row] for row in range(len(both)) if synthetic[row]} <= set(range(100, 112))

    # Classifiers with and without, selection on, off and random, compared with each other.
    results = report["utility"]["results"]
    pools = [row["strategy"] for row in results]
    assert pools == [None, "all candidates", "random selection", "selected"]
    assert all(row["real_images"] == 12 for row in results)  # every fold has all labels that the model had
    assert set(results[-1]["against"]) == {"random selection", "all candidates"}
    text = (tmp_path / "out" / "augment.md").read_text()
    assert "McNemar" in text and "asked by labels" in text and "Strategy against strategy" in text


def test_labelled_images_need_no_patients(data, tmp_path):
    """Neither does any image need a column group_id, nor is one asked for."""
    sources = {}
    for name in ("real", "test"):
        folder = shutil.copytree(data[name], tmp_path / name)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        lines = [json.dumps({key: value for key, value in row.items() if key != "group_id"}) for row in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        sources[name] = str(folder)
    report = run(data | sources, pipe_with_findings(), tmp_path / "out")
    assert report["utility"]["patients_known"] is False and report["dataset"]["real"] == 24


def test_the_same_call_continues_and_gives_the_same(data, tmp_path):
    pipe = pipe_with_findings()
    options = {"rules": "diverse:4"}
    report = run(data, pipe, tmp_path / "out", **options)
    files = [
        file for file in (tmp_path / "out").rglob("*") if file.suffix == ".npy" or file.parent.name == "candidates"
    ]
    times = {file: file.stat().st_mtime_ns for file in files if file.name[0] == "0" or file.suffix == ".npy"}
    assert len(times) == 24 + 8  # two folds of real only and three pools
    assert run(data, pipe, tmp_path / "out", **options) == report
    assert {file: file.stat().st_mtime_ns for file in times} == times
    with pytest.raises(FileExistsError, match="another request"):
        run(data, pipe, tmp_path / "out", **options, sampling={"num_inference_steps": 3})


def test_a_parquet_file_keeps_images_and_provenance(data, tmp_path):
    small = open_labelled(data["real"], "finding")
    synthetic = write_labelled(tmp_path / "made", 2, 5, labels={"kind": "dark"})
    write_dataset(small, tmp_path / "made", "finding", tmp_path / "set", "parquet")
    table = load_images(str(tmp_path / "set" / "train.parquet"), caption_column=None)
    assert len(table) == 24 + 6 and table.column("synthetic").count(True) == 6
    assert table.hashes() == table.column("content_hash")
    assert set(table.hashes()[24:]) == set(load_images(synthetic).hashes())
    assert json.loads(table.column("labels")[-1]) == {"kind": "dark"} and table.column("labels")[0] is None
    # A second time replaces it; another folder is refused.
    write_dataset(small, tmp_path / "made", "finding", tmp_path / "set", "parquet")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not made by an augmentation"):
        write_dataset(small, tmp_path / "made", "finding", tmp_path / "mine")


def test_a_class_is_asked_for_by_what_the_model_has(data):
    classes = list(KINDS)
    found = class_requests(pipe_with_findings(), classes)
    assert found["dark"].labels == {"kind": "dark"}
    text = tiny_pipeline(("text", "labels"))
    captions = {label: [None, "rare", f"a {label} one", f"a {label} one"] for label in classes}
    assert class_requests(text, classes, captions=captions)["green"].prompt == "a green one"
    assert class_requests(text, classes, prompt="one that is {label}")["dark"].prompt == "one that is dark"
    requests = spread_requests(found, {"dark": 2, "bright": 1, "green": 1}, "finding", seed=7)
    assert [request.seed for request in requests] == [7, 8, 9, 10]
    assert [request.columns["finding"] for request in requests] == ["dark", "dark", "bright", "green"]
    small = open_labelled(data["real"], "finding")
    small = small.select([row for row, label in enumerate(small.labels) if label != "dark" or row < 2])
    assert candidate_counts(small, classes, 2, balanced=False) == {"dark": 4, "bright": 16, "green": 16}
    assert candidate_counts(small, classes, 2, balanced=True) == {"dark": 12, "bright": 12, "green": 12}
    for pipe, changes, message in (
        (tiny_pipeline(()), {}, "cannot be asked for a class"),
        (text, {}, "no image of class 'dark' has a caption"),
        (text, {"prompt": "one"}, "must have {label}"),
        (
            text,
            {"condition": "labels"},
            "no label field of this model has the class 'dark'; its fields: dr_grade: 0, 1",
        ),
        (text, {"label_field": "dr_grade"}, "does not have all of dark"),
        (text, {"condition": "class_label"}, "no latent classifier"),
        (text, {"condition": "magic"}, "condition.*'magic'"),
        (pipe_with_findings(), {"condition": "prompt", "prompt": "{label}"}, "no text condition"),
    ):
        with pytest.raises(ValueError, match=message):
            class_requests(pipe, classes, **changes)


def test_a_class_that_a_model_with_labels_lacks_is_named_with_what_it_has():
    """Not that it has no label condition."""
    pipe = pipe_with_findings()
    with pytest.raises(ValueError) as caught:
        class_requests(pipe, ["dark", "violet"])
    assert "no label field of this model has the class 'violet'" in str(caught.value)
    assert "kind: dark, bright, green" in str(caught.value) and "dr_grade: 0, 1, 2, 3" in str(caught.value)
    with pytest.raises(ValueError, match="has all of dark, 0; its fields"):  # each is there, but in two fields
        class_requests(pipe, ["dark", "0"])
    with pytest.raises(ValueError, match="labels cannot be used: this model has no label condition"):
        class_requests(tiny_pipeline(("text",)), ["dark", "bright"], condition="labels")


def test_a_classifier_of_other_classes_hides_no_label_field():
    pipe = pipe_with_findings()
    other = MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, ["glioma", "meningioma"])
    attach_classifier(pipe, other)
    assert class_requests(pipe, list(KINDS))["dark"].labels == {"kind": "dark"}
    assert class_requests(pipe, ["glioma", "meningioma"])["glioma"].class_label == "glioma"
    with pytest.raises(ValueError, match="does not know the class 'dark'; valid: glioma, meningioma"):
        class_requests(pipe, list(KINDS), condition="class_label")
    with pytest.raises(ValueError, match="classifier does not know the class 'violet'.*no label field of this model"):
        class_requests(pipe, ["violet", "dark"])


def test_a_class_that_is_not_there_is_named_beside_all_that_are(data):
    found = open_labelled(data["real"], "finding", classes=["dark", "nope"])
    with pytest.raises(
        ValueError, match=r"class 'nope' has no image.*; classes there: bright \(8\), dark \(8\), green \(8\)"
    ):
        check_classes(found.select(range(4)), ["dark", "nope"])
    assert check_classes(open_labelled(data["real"], "finding", classes=["green", "dark"]), ["green", "dark"])


def test_a_latent_classifier_is_asked_first_and_guides_every_candidate(data, tmp_path):
    pipe = tiny_pipeline(())

    def attach(classes):
        attach_classifier(pipe, MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, classes))

    attach(sorted(KINDS))
    sampling = {"num_inference_steps": 2, "classifier_guidance_scale": 4.0}
    report = run(data, pipe, tmp_path / "out", ratio=0.25, sampling=sampling)
    assert report["generator"]["condition"] == "class_label"
    made = load_images(str(tmp_path / "out" / "candidates"), caption_column=None)
    assert made.column("class_label") == made.column("finding")
    assert set(made.column("classifier_guidance_scale")) == {4}
    attach(["dark", "bright"])
    with pytest.raises(ValueError, match="does not know the class 'green'; valid: dark, bright"):
        class_requests(pipe, list(KINDS))


def test_candidates_are_compared_with_all_real_images_and_the_rest_is_warned_of(data, tmp_path, caplog):
    """The generator has seen what the share of the labels, the classes and the filter leave out."""
    folder = tmp_path / "model"
    tiny_pipeline(()).save_pretrained(folder)
    hashes = open_labelled(data["real"], "finding").hashes
    write_training_record(folder, {"hashes": hashes, "datasets": []})
    options = {"model": str(folder), "label_fraction": 0.5, "classes": ["dark", "bright"]}
    report = run(data, pipe_with_findings(), tmp_path / "out", **options)
    counts = json.loads((tmp_path / "out" / "selected" / "selection.json").read_text())["counts"]
    assert (counts["real"], counts["train"]) == (8, 16)
    assert not [text for text in report["warnings"] if "no candidate is compared" in text]

    write_training_record(folder, {"hashes": [*hashes, "0123456789abcdef", "0123456789abcdee"], "datasets": []})
    caplog.clear()
    report = run(data, pipe_with_findings(), tmp_path / "out", **options)
    line = "the generator has seen 2 images that no candidate is compared with: name them by --train"
    assert line in report["warnings"] and line in caplog.messages
    assert f"WARNING: {line}" in (tmp_path / "out" / "augment.md").read_text()
    few = write_labelled(tmp_path / "few", 1, 9)
    found = find_uncompared([str(folder)], [*hashes[:20], *open_labelled(few, "finding").hashes])
    assert found == ["the generator has seen 6 images that no candidate is compared with: name them by --train"]


def test_candidates_can_be_made_of_the_labelled_images(data, tmp_path):
    """Each of one of its class, which is asked for beside it; whatever the strategy says, no label is read anew."""
    options = {"label_fraction": 0.5, "strategy": "sdedit:strength=0.5"}
    report = run(data, pipe_with_findings(), tmp_path / "out", **options)
    assert report["generator"]["sampling"]["strength"] == 0.5
    small = choose_labels(open_labelled(data["real"], "finding"), 0.5)
    classes = dict(zip(small.hashes, small.labels, strict=True))
    made = load_images(str(tmp_path / "out" / "candidates"), caption_column=None)
    assert len(made) == 12 and set(made.column("strength")) == {0.5}
    for parents, label, labels in zip(*map(made.column, ("parents", "finding", "labels")), strict=True):
        assert [classes[parent] for parent in parents] == [label] and labels["kind"] == label
    assert "Made by sdedit:strength=0.5 of the labelled images" in (tmp_path / "out" / "augment.md").read_text()
    for strategy, message in (
        ("prior", "has no real images"),
        ("mixture:neighbours=1", "no image condition"),
        ("magic", "magic"),
    ):
        with pytest.raises(ValueError, match=message):
            run(data, pipe_with_findings(), tmp_path / "bad", strategy=strategy)
    with pytest.raises(ValueError, match="images of one class"):
        run(data, tiny_pipeline(("image",)), tmp_path / "bad", strategy="interpolation:across=true")


def test_images_whose_class_was_guessed_are_parents_and_a_pool_of_their_own(data, tmp_path):
    """By the guess, not by their label; a judge of the same run gives the confidence of the selection."""
    labelled = open_labelled(data["real"], "finding")
    small = choose_labels(labelled, 0.5)
    wrong = {"dark": "bright", "bright": "green", "green": "dark"}
    truth = dict(zip(labelled.hashes, labelled.labels, strict=True))
    others = [content for content in labelled.hashes if content not in set(small.hashes)]
    guesses = {content: wrong[truth[content]] for content in others[:-1]}
    origin = {"class_column": "finding", "group_column": "group_id", "label_fraction": 0.5, "label_seed": 0}
    keep_pseudo_labels(tmp_path, origin, guesses)
    network = CNN.build(3).eval()
    judge = Judge(CNN, network, tuple((name,) for name in sorted(KINDS)))
    (tmp_path / "pseudo_labels.safetensors").write_bytes(judge.serialize())
    options = {"label_fraction": 0.5, "strategy": "sdedit:strength=0.5", "pseudo_labels": str(tmp_path), "ratio": 2.0}
    options |= {"judge": str(tmp_path), "rules": "confidence:quantile=0.5"}
    report = run(data, pipe_with_findings(), tmp_path / "out", **options)
    made = load_images(str(tmp_path / "out" / "candidates"), caption_column=None)
    parents = {label: set() for label in KINDS}
    for (parent,), label in zip(made.column("parents"), made.column("finding"), strict=True):
        parents[label].add(parent)
    for label, found in parents.items():
        guessed = found & set(guesses)
        assert guessed and {guesses[parent] for parent in guessed} == {label}
        assert {truth[parent] for parent in found - guessed} == {label} and others[-1] not in found

    audit = [json.loads(line) for line in (tmp_path / "out" / "selected" / "selection.jsonl").read_text().splitlines()]
    given = judge.verdict(made)["probabilities"][
        range(len(made)), [sorted(KINDS).index(name) for name in made.column("finding")]
    ]
    assert [record["scores"]["confidence"] for record in audit] == pytest.approx(given, abs=1e-5)
    results = report["utility"]["results"]
    assert [row["strategy"] for row in results][-1] == "guessed images"
    assert set(results[-2]["against"]) == {"random selection", "all candidates", "guessed images"}
    text = (tmp_path / "out" / "augment.md").read_text()
    assert f"those that {tmp_path} has guessed" in text and f"the network of {tmp_path}" in text

    chosen = json.loads((tmp_path / "out" / "selected" / "selection.json").read_text())
    assert chosen["judge"] == judge.identity() and len(judge.identity()["weights_sha256"]) == 64
    assert "judge" not in json.loads((tmp_path / "out" / "random" / "selection.json").read_text())

    few = {content: label for content, label in guesses.items() if label != "green"}
    keep_pseudo_labels(tmp_path, origin, few)
    report = run(data, pipe_with_findings(), tmp_path / "few", **options | {"rules": "random:2", "judge": None})
    assert "has guessed no image of class 'green'" in report["warnings"][-1]
    assert [row["strategy"] for row in report["utility"]["results"]][-1] == "selected"

    keep_pseudo_labels(tmp_path, origin, guesses)
    for changes, message in (
        ({"label_fraction": 0.75}, "label_fraction 0.5, not 0.75"),
        ({"classes": ["dark", "green"]}, "has guessed the class 'bright', which is none of: dark, green"),
        ({"rules": "random:2"}, "a judge needs the rule confidence"),
        ({"rules": "confidence:real=0.1"}, "cannot be used with given probabilities"),
        ({"train": data["test"]}, "--train lacks 11 of the images that candidates are made of"),
        ({"pseudo_labels": str(tmp_path / "no")}, "a finished run of the task latent_classifier"),
        ({"judge": str(tmp_path / "no")}, "a finished run of the task latent_classifier"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(data, pipe_with_findings(), tmp_path / "bad", **options | changes)
    other = Judge(CNN, CNN.build(2).eval(), (("dark",), ("green",)))
    (tmp_path / "pseudo_labels.safetensors").write_bytes(other.serialize())
    with pytest.raises(ValueError, match="does not know the class 'bright'; its classes: dark, green"):
        run(data, pipe_with_findings(), tmp_path / "bad", **options)
    (tmp_path / "pseudo_labels.safetensors").write_bytes(b"half of one")
    with pytest.raises(ValueError, match="no network that judges images, or is damaged"):
        run(data, pipe_with_findings(), tmp_path / "bad", **options)
    assert not (tmp_path / "bad").exists()


def test_images_without_a_label_need_none_to_be_guessed_and_test_images_are_of_no_parents_patient(data, tmp_path):
    """What the column says of them is not read, so it may say nothing; a patient of theirs is no stranger."""
    rows = [json.loads(line) for line in (Path(data["real"]) / "metadata.jsonl").read_text().splitlines()]
    folder = shutil.copytree(data["real"], tmp_path / "partly")
    for row in rows:
        row["finding"] = row["finding"] if row["file_name"][-5] in "0123" else None
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without = [row for row in rows if row["finding"] is None]
    assert len(without) == 12
    images = load_images(str(folder), caption_column=None)
    blank = [row for row, name in enumerate(images.column("finding")) if name is None]
    guesses = {images.hashes()[row]: images.column("caption")[row].split()[1] for row in blank}
    origin = {"class_column": "finding", "group_column": "group_id", "label_fraction": 1.0, "label_seed": 0}
    keep_pseudo_labels(tmp_path, origin, guesses)
    options = {"strategy": "sdedit:strength=0.5", "pseudo_labels": str(tmp_path), "ratio": 2.0}
    own = data | {"real": str(folder)}
    report = run(own, pipe_with_findings(), tmp_path / "out", **options)
    made = load_images(str(tmp_path / "out" / "candidates"), caption_column=None)
    assert {parent for (parent,) in made.column("parents")} & set(guesses)
    assert report["utility"]["images"]["guessed images"] == {"bright": 4, "dark": 4, "green": 4}

    # a test image of a patient that only an image without a label is of
    test = shutil.copytree(data["test"], tmp_path / "test")
    lines = [json.loads(line) for line in (test / "metadata.jsonl").read_text().splitlines()]
    lines[0]["group_id"] = without[0]["group_id"]
    (test / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="1 of 18 test images are among the patients of the labelled images"):
        run(own | {"test": str(test)}, pipe_with_findings(), tmp_path / "bad", **options)
    report = run(own | {"test": str(test)}, pipe_with_findings(), tmp_path / "less", **options, drop_overlap=True)
    assert sum(report["utility"]["images"]["test"].values()) == 17


def test_the_report_begins_with_what_the_selection_is_worth(data, tmp_path):
    report = run(data, pipe_with_findings(), tmp_path / "out", label_fraction=0.5)
    text = (tmp_path / "out" / "augment.md").read_text()
    worth = text.partition("## What the selection is worth")[2].partition("## Selection")[0]
    header, rows = worth.strip().splitlines()[0], worth.strip().splitlines()[2:]
    assert "p, paired bootstrap" in header and "p, McNemar" in header
    assert [row.split("|")[3].strip() for row in rows] == ["real only", "random selection", "all candidates"]
    gain = report["utility"]["results"][-1]["gain"]["accuracy"]
    assert f"{gain['gain']:+.3f}" in rows[0]
    shown = [cell.strip() for cell in rows[0].split("|")[5:7]]
    assert shown == ["<0.001" if p < 0.001 else f"{p:.3f}" for p in (gain["p"], gain["mcnemar"]["p"])]
    overall = report["selection"]["diversity"]["overall"]
    line = next(line for line in text.splitlines() if line.startswith("- Diversity"))
    for name in ("coverage", "recall", "mean_pairwise_distance"):
        assert f"{name.replace('_', ' ')} {overall['after'][name]:.3g}" in line
    # 12 of 24 labelled images are half of the labels, not all.
    assert "50 % (12)" in text and "100 %" not in text
    assert {row["amount"] for row in report["utility"]["results"]} == {0.5}
    assert json.loads((tmp_path / "out" / "utility" / "utility.json").read_text()) == report["utility"]
    assert "50 % (12)" in (tmp_path / "out" / "utility" / "utility.md").read_text()


def write_run(folder, hashes, task, learnt=()):
    """A run folder: its configuration, the record of its model, and that of its classifier."""
    write_training_record(folder / "pipeline", {"hashes": list(hashes), "datasets": []})
    (folder / "config.yaml").write_text(json.dumps({"task": task}))
    if learnt:
        write_training_record(folder / "classifier", {"hashes": list(learnt), "datasets": []})
    return str(folder)


def test_the_labelled_images_are_those_that_a_training_run_takes_with_the_same_fraction_and_seed(tmp_path):
    folder = write_labelled(tmp_path / "many", 40, 3)
    images = load_images(folder)
    for seed in (0, 1):
        rows = stratified_subset(images.column("finding"), images.column("group_id"), 0.2, seed)
        few = choose_labels(open_labelled(folder, "finding"), 0.2, seed)
        assert few.hashes == images.select(rows).hashes() and len(few) < len(images) / 2


def test_a_generator_that_learnt_from_other_labels_is_refused(data, tmp_path):
    labelled = open_labelled(data["real"], "finding")
    small = choose_labels(labelled, 0.5, 0)
    share = {"label_fraction": 0.5, "label_seed": 0}

    def check(*generators, fraction=0.5):
        return check_labels(generators, labelled, choose_labels(labelled, fraction, 0), fraction, 0)

    classifier = write_run(tmp_path / "a", labelled.hashes, {"type": "latent_classifier"} | share, small.hashes)
    guided = write_run(tmp_path / "b", labelled.hashes, {"type": "guided", "classifier": classifier} | share)
    assert check(classifier, guided, f"{guided}/pipeline") == []
    # Fewer labels are no advantage, but the same comparison they are not.
    assert check(classifier, fraction=1.0) == [
        f"{classifier} learnt from --label-fraction 0.5 --label-seed 0: fewer labels than the 1 of the classifiers "
        "beside it"
    ]
    for number, (task, message) in enumerate(
        (
            ({"type": "latent_classifier", "label_fraction": 1.0, "label_seed": 0}, "--label-fraction 1"),
            ({"type": "guided", "classifier": "", "label_fraction": 0.5, "label_seed": 3}, "--label-seed 3, not 0.5"),
        )
    ):
        run_folder = write_run(tmp_path / f"c{number}", labelled.hashes, task)
        with pytest.raises(ValueError, match=message):
            check(run_folder)
        strangers = write_run(tmp_path / f"d{number}", ["0123456789abcdef"], task)
        assert check(strangers) == []  # a model of other images
    teacher = write_run(tmp_path / "e", labelled.hashes, {"type": "latent_classifier"} | share | {"label_seed": 5})
    with pytest.raises(ValueError, match=f"{teacher} learnt from"):  # a student knows what its classifier knows
        check(write_run(tmp_path / "f", labelled.hashes, {"type": "guided", "classifier": teacher} | share))
    other = [content for content in labelled.hashes if content not in small.hashes]
    wrong = write_run(tmp_path / "g", labelled.hashes, {"type": "latent_classifier"} | share, other[:3])
    with pytest.raises(ValueError, match="labels of 3 images that are not among the 12 labelled ones"):
        check(wrong)
    # With pseudo-labels it has seen the others as well, without their labels.
    seen = {"hashes": sorted(labelled.hashes), "datasets": [], "labels": {"hashes": sorted(small.hashes)}}
    write_training_record(Path(wrong) / "classifier", seen)
    assert check(wrong) == []
    # A run may be called as its parts are: the recipe's own is runs/classifier.
    task = {"type": "latent_classifier"} | share | {"label_seed": 5}
    named = write_run(tmp_path / "classifier", labelled.hashes, task, small.hashes)
    for name in (named, f"{named}/classifier"):
        with pytest.raises(ValueError, match=f"{named} learnt from --label-fraction 0.5 --label-seed 5"):
            check(name)
    # What no run folder says is a warning where only a share of the labels is used.
    unknown = write_run(tmp_path / "h", labelled.hashes, {"type": "diffusion"})
    assert check(unknown) == [
        f"it cannot be checked that {unknown} learnt from these labels alone: no config.yaml of a run says so"
    ]
    assert check(unknown, fraction=1.0) == []
    (tmp_path / "h" / "config.yaml").write_text("task: [")
    assert len(check(unknown)) == 1
    # It is found out before anything is drawn.
    pipe = pipe_with_findings()
    with pytest.raises(ValueError, match="it knows labels that the classifiers beside it do not; give the same ones"):
        run(data, pipe, tmp_path / "out", model=guided, label_fraction=0.25)
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_seen_test_images_is_refused_before_it_draws(data, tmp_path):
    folder = tmp_path / "model"
    tiny_pipeline(()).save_pretrained(folder)
    write_training_record(folder, {"hashes": open_labelled(data["test"], "finding").hashes[:1], "datasets": []})
    with pytest.raises(ValueError, match="1 of 18 test images are among the generator's training images"):
        run(data, pipe_with_findings(), tmp_path / "out", model=str(folder))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no image passes the rules"):
        run(data, pipe_with_findings(), tmp_path / "out", rules="confidence:1.0")


def test_the_command_prints_where_everything_is_and_one_line_for_each_mistake(data, tmp_path):
    folder = tmp_path / "model"
    tiny_pipeline(("text",)).save_pretrained(folder)

    def command(*arguments):
        options = {"--real": data["real"], "--test": data["test"], "--model": folder, "--extractor": data["extractor"]}
        options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
        pairs = [(name, str(value).split() if "interval" in name else [value]) for name, value in options.items()]
        given = [str(part) for name, values in pairs for part in (name, *values)]
        return CliRunner().invoke(app, ["augment", *given, *QUICK])

    rules = ("--rules", "duplicates:0.9999", "--ratio", 1, "--format", "parquet", "--regimes", "both")
    result = command(*rules, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert str(tmp_path / "out") in result.stdout and (tmp_path / "out" / "dataset" / "train.parquet").is_file()
    report = json.loads((tmp_path / "out" / "augment.json").read_text())
    assert report["generator"]["condition"] == "prompt" and report["generator"]["example"] == "a bright one"

    # A model with a classifier takes where its guidance is on, and how far it may move a latent.
    pipe = tiny_pipeline(())
    attach_classifier(pipe, MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, sorted(KINDS)))
    pipe.save_pretrained(tmp_path / "guided")
    options = ("--classifier-guidance-interval", "0.2 0.7", "--classifier-guidance-clip", 0.4)
    result = command(*rules, *options, "--model", tmp_path / "guided", "--out", tmp_path / "guided_out")
    assert result.exit_code == 0, result.stderr
    made = load_images(str(tmp_path / "guided_out" / "candidates"), caption_column=None)
    assert set(map(tuple, made.column("classifier_guidance_interval"))) == {(0.2, 0.7)}
    assert set(made.column("classifier_guidance_clip")) == {0.4}

    one = write_labelled(tmp_path / "one", 4, 5, kinds=["dark"])
    for arguments, message in (
        (("--real", tmp_path / "nowhere"), "nowhere"),
        (("--label-column", "grade"), "no column 'grade'"),
        (("--real", one), "at least two classes"),
        (("--label-fraction", "5"), "--label-fraction must be above 0"),
        (("--rules", "magic:1"), "magic"),
        (("--format", "zip"), "zip"),
        (("--condition", "class_label"), "no latent classifier"),
        (("--classes", "dark,nope"), "classes there: bright (8), dark (8), green (8)"),
        (("--classifier-guidance-interval", "0.9 0.1"), "--classifier-guidance-interval must be LOW HIGH"),
        (("--classifier-guidance-clip", "0"), "--classifier-guidance-clip must be a number above 0"),
        (("--extractor", "timm:test_efficientnet@nowhere.pth"), "nowhere.pth"),
        (("--test", data["real"]), "test images are among the labelled images"),
    ):
        result = command(*arguments, "--out", tmp_path / "bad")
        assert result.exit_code == 2 and message in result.stderr, (arguments, result.stderr)
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("named", ["--model", "--models"])
def test_the_script_compares_candidates_with_all_that_the_model_has_seen(named, data, tmp_path, monkeypatch):
    """Not with the labelled share alone."""
    for part, name in (("train", "real"), ("validation", "test")):
        images = load_images(data[name])
        columns = {column: images.column(column) for column in ("finding", "group_id")}
        columns |= {"image": [images.image(row) for row in range(len(images))], "dataset": ["tiny"] * len(images)}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{part}-0.parquet")
    pipe_with_findings().save_pretrained(tmp_path / "models" / "tiny")
    models = {
        "--models": [tmp_path / "models", "--datasets", "tiny"],
        "--model": [f"tiny={tmp_path / 'models' / 'tiny'}"],
    }
    arguments = ["--corpus", tmp_path, named, *models[named], "--out", tmp_path / "out"]
    arguments += ["--extractor", data["extractor"]]
    arguments += ["--label-fraction", 0.5, "--ratio", 1, "--rules", "duplicates:0.9999", "--regimes", "both", *QUICK]
    monkeypatch.setattr(sys, "argv", ["augment_small_dataset.py", *map(str, arguments)])
    runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "augment_small_dataset.py"))["main"]()
    selection = json.loads((tmp_path / "out" / "tiny" / "selected" / "selection.json").read_text())
    assert (selection["counts"]["real"], selection["counts"].get("train")) == (12, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no model: give --model"),
        (["--model", "tiny"], "must be DATASET=RUN, each data set once, not 'tiny'"),
        (["--model", "a=x", "--model", "a=y"], "each data set once, not 'a=y'"),
        (["--model", "a=x", "--datasets", "a,b"], "no model of b: give --model b=RUN"),
        (["--model", "a=x", "--datasets", "b", "--models", "m"], "--model a: not a data set of b"),
    ],
)
def test_the_script_says_which_model_is_missing(given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["augment_small_dataset.py", "--corpus", "data", *given])
    main = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "augment_small_dataset.py"))["main"]
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_images_of_one_patient_stay_together_where_folds_leave_labels_out(data, tmp_path):
    report = run(data, pipe_with_findings(), tmp_path / "out", fold_kind="labels", classifiers=[replace(CNN, steps=2)])
    assert {row["real_images"] for row in report["utility"]["results"]} == {12}  # half of 24
