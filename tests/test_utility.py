"""Utility of synthetic images: statistics against references, classifiers, folds, what keeps sets apart, the grid."""

import csv
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from typer.testing import CliRunner

from medisyn.cli import app
from medisyn.data.cache import module_hash
from medisyn.evaluation.features import load_extractor
from medisyn.evaluation.statistics import (
    FoldPredictions,
    compare,
    corrected_resampled_t,
    draw_scores,
    mcnemar_test,
    summarise,
)
from medisyn.evaluation.utility import measure_utility
from medisyn.evaluation.utility_classifier import CnnClassifier, Part, ProbeClassifier, augment
from medisyn.evaluation.utility_generators import learnt_labels
from medisyn.evaluation.utility_inputs import draw_labelled, open_labelled, split_folds
from medisyn.evaluation.utility_strategies import strategy_maker
from medisyn.generation.embedding_prior import fit_prior
from medisyn.training_record import write_training_record
from tests.components import IMAGE_WIDTH, tiny_pipeline
from tests.utility import KINDS, write_extractor, write_labelled

CNN = CnnClassifier(model="test_resnet", resolution=32, steps=6, batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("utility")
    return {
        "real": write_labelled(folder / "real", 12, 1),
        "test": write_labelled(folder / "test", 8, 2),
        "good": write_labelled(folder / "good", 20, 3, spread=10),
        "extractor": write_extractor(folder),
    }


@pytest.fixture
def probe(data):
    return ProbeClassifier(load_extractor(data["extractor"]))


def predictions(labels, skill, seed, classes=3, groups=None):
    """Random probabilities that favour the label by `skill`, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    exponents = np.exp(logits)
    probabilities = (exponents / exponents.sum(1, keepdims=True)).round(2)
    return FoldPredictions(np.asarray(labels), probabilities, groups or list(range(len(labels))))


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn():
    labels = np.random.default_rng(0).integers(0, 3, 120)
    folds = [predictions(labels, 1.0, seed, classes=4) for seed in range(3)]  # no image has the fourth class
    found = summarise(draw_scores(folds, "abcd", resamples=50))
    areas = [[roc_auc_score(labels == k, fold.probabilities[:, k]) for k in range(3)] for fold in folds]
    f1 = [
        f1_score(labels, fold.probabilities.argmax(1), labels=[0, 1, 2], average="macro", zero_division=0)
        for fold in folds
    ]
    assert set(found) == {"accuracy", "macro_f1", "auc_macro", "auc a", "auc b", "auc c"}
    assert found["auc b"]["value"] == pytest.approx(np.mean(areas, 0)[1])
    assert found["auc_macro"]["value"] == pytest.approx(np.mean(areas))
    assert found["macro_f1"]["value"] == pytest.approx(np.mean(f1))
    assert found["macro_f1"]["fold_deviation"] == pytest.approx(np.std(f1, ddof=1))
    for score in found.values():
        assert score["interval"][0] < score["value"] < score["interval"][1]


def test_draws_weigh_images_like_copies_of_them():
    """A draw that takes a patient twice scores as if the patient's images were there twice."""
    labels = np.array([0, 0, 1, 1, 1, 0])
    fold = predictions(labels, 0.5, 1, classes=2, groups=["a", "a", "b", "b", "c", "c"])
    drawn = draw_scores([fold], "xy", resamples=40, seed=5)
    rng = np.random.default_rng(5)
    for number, weight in enumerate(rng.multinomial(3, np.full(3, 1 / 3), size=40), start=1):
        copies = np.repeat(np.arange(6), np.repeat(weight, 2))
        probabilities, own = fold.probabilities[copies], labels[copies]
        assert drawn.values["accuracy"][0, number] == pytest.approx((probabilities.argmax(1) == own).mean())
        area = drawn.values["auc y"][0, number]
        assert area == pytest.approx(roc_auc_score(own, probabilities[:, 1])) if np.ptp(own) else np.isnan(area)


def test_intervals_widen_with_patients_and_with_folds_that_disagree():
    labels = np.random.default_rng(0).integers(0, 2, 200)
    right = np.repeat(np.random.default_rng(1).random(20) < 0.7, 10)
    probabilities = np.eye(2)[np.where(right, labels, 1 - labels)]

    def width(groups, folds=1):
        fold = FoldPredictions(labels, probabilities, groups)
        other = FoldPredictions(labels, np.eye(2)[labels], groups)
        low, high = summarise(draw_scores([fold, other][:folds], "ab"))["accuracy"]["interval"]
        return high - low

    images = list(range(200))
    assert width(images) == pytest.approx(2 * 1.96 * (right.mean() * (1 - right.mean()) / 200) ** 0.5, rel=0.2)
    assert width(np.repeat(np.arange(20), 10).tolist()) > 2 * width(images)
    assert width(images, folds=2) > 2 * width(images)


def test_gains_are_paired_and_tests_are_the_named_ones():
    labels = np.random.default_rng(0).integers(0, 3, 150)
    weak = [predictions(labels, 0.5, seed) for seed in range(4)]
    strong = [predictions(labels, 2.0, seed) for seed in range(4, 8)]
    same = compare(draw_scores(weak, "abc"), draw_scores(weak, "abc"))["accuracy"]
    assert same["gain"] == 0 and same["interval"] == [0, 0] and same["p"] == 1 and same["corrected_t"] is None
    assert same["mcnemar"]["p"] == 1
    found = compare(draw_scores(strong, "abc"), draw_scores(weak, "abc"))
    assert found["accuracy"]["interval"][0] > 0 and found["accuracy"]["p"] < 0.01
    right = [np.mean([fold.probabilities for fold in folds], 0).argmax(1) == labels for folds in (strong, weak)]
    assert found["accuracy"]["mcnemar"] == mcnemar_test(*right)
    with pytest.raises(ValueError, match="same test images"):
        compare(draw_scores(strong[:3], "abc"), draw_scores(weak, "abc"))
    # An effect that is not there is found in about one of twenty cases.
    chance = [
        compare(
            draw_scores([predictions(labels, 1, 2 * s)], "abc"),
            draw_scores([predictions(labels, 1, 2 * s + 1)], "abc"),
        )
        for s in range(40)
    ]
    assert np.mean([each["accuracy"]["p"] < 0.05 for each in chance]) <= 0.15


def test_mcnemar_is_the_binomial_test_and_the_corrected_t_is_more_careful():
    first, second = np.array([1] * 12 + [0] * 3 + [1] * 20, bool), np.array([0] * 12 + [1] * 3 + [1] * 20, bool)
    found = mcnemar_test(first, second)
    assert (found["first_only"], found["second_only"]) == (12, 3)
    assert found["p"] == pytest.approx(0.03515625)  # 2 * P(at most 3 of 15 at 1/2)
    differences = np.array([0.02, 0.05, 0.01, 0.04, 0.03])
    plain, corrected = ttest_rel(differences, np.zeros(5)), corrected_resampled_t(differences)
    assert corrected["t"] == pytest.approx(plain.statistic * ((1 / 5) / (1 / 5 + 1 / 4)) ** 0.5)
    assert corrected["p"] > plain.pvalue
    assert corrected_resampled_t(np.array([0.1])) is None


# ---- classifiers ----------------------------------------------------------------------------------------------------


def test_the_cnn_learns_and_depends_on_its_seed_alone(data):
    real, test = (open_labelled(data[name], "finding") for name in ("real", "test"))
    cnn = CnnClassifier(model="test_resnet", resolution=32, steps=60, batch_size=16, learning_rate=4e-3)
    labels, wanted = (torch.tensor([list(KINDS).index(label) for label in each.labels]) for each in (real, test))
    stages, inputs = [[Part(cnn.inputs(real.images), labels)]], cnn.inputs(test.images)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    found = cnn.fit_predict(stages, inputs, 3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found.argmax(1) == wanted.numpy()).mean() > 0.7
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    stages, inputs = [[Part(CNN.inputs(real.images), labels)]], CNN.inputs(test.images)
    first, again, other = (CNN.fit_predict(stages, inputs, 3, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_shares_of_a_batch_are_kept_and_steps_are_the_same_in_all_regimes(monkeypatch):
    seen = []

    def watch(images, rng, flip):
        seen.append(sorted(images[:, 0, 0, 0].round(decimals=2).tolist()))
        return augment(images, rng, flip)

    monkeypatch.setattr("medisyn.evaluation.utility_classifier.augment", watch)
    dark = Part(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), 0.25)
    bright = Part(torch.full((40, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(40) % 2, 0.75)
    CNN.fit([[dark, bright]], 2, seed=0)
    assert seen == [[-1.0] * 2 + [1.0] * 6] * 6
    seen.clear()
    CNN.fit([[Part(bright.inputs, bright.labels)], [Part(dark.inputs, dark.labels)]], 2, seed=0)
    assert seen == [[1.0] * 8] * 3 + [[-1.0] * 8] * 3


def test_augmentation_keeps_size_and_range_and_mirrors_only_on_request():
    ramp = torch.linspace(-0.5, 0.5, 16).expand(64, 3, 16, 16)
    images = augment(ramp, torch.Generator().manual_seed(0))
    assert images.shape == ramp.shape and images.abs().max() < 1
    rising = (images[..., -1] > images[..., 0]).all((1, 2))
    assert 10 < int(rising.sum()) < 54
    kept = augment(ramp, torch.Generator().manual_seed(0), horizontal_flip=False)
    assert (kept[..., -1] > kept[..., 0]).all()
    assert len({image.sum().item() for image in kept}) == 64  # each image has its own


def test_the_probe_is_scikit_learns_and_pre_training_is_its_prior(probe):
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (60, 8))
    labels = (features[:, 0] + 0.5 * rng.normal(0, 1, 60) > 0.3).astype(int)
    inputs, wanted = torch.from_numpy(features), torch.from_numpy(labels)
    standard = (features - features.mean(0)) / features.std(0)
    reference = LogisticRegression(C=probe.regularisation, class_weight="balanced", tol=1e-8).fit(standard, labels)
    found = probe.fit_predict([[Part(inputs, wanted)]], inputs, 2, 0)
    # Two columns of weights with an L2 norm are one column at half the penalty.
    doubled = LogisticRegression(C=2 * probe.regularisation, class_weight="balanced", tol=1e-8).fit(standard, labels)
    assert np.abs(found - doubled.predict_proba(standard)).max() < 1e-3
    assert np.abs(found - reference.predict_proba(standard)).max() < 0.1
    # Opposite labels first: the second fit starts from the wrong side, and few images do not turn it.
    few = Part(inputs[:4], torch.tensor([0, 1, 0, 1]))
    wrong = probe.fit_predict([[Part(inputs, 1 - wanted)], [few]], inputs, 2, 0)
    right = probe.fit_predict([[Part(inputs, wanted)], [few]], inputs, 2, 0)
    assert (right.argmax(1) == labels).mean() > 0.6 > 0.4 > (wrong.argmax(1) == labels).mean()


# ---- folds and the wall ---------------------------------------------------------------------------------------------


def test_folds_keep_patients_together_and_numbers_nest(data):
    real = open_labelled(data["real"], "finding")
    held = []
    for rest, out in split_folds(real, 3, seed=0):
        assert not {real.groups[row] for row in rest} & {real.groups[row] for row in out}
        small, large = (draw_labelled(real, rest, number, 5) for number in (6, 15))
        assert len(small) == 6 and len(large) == 15 and set(small) < set(large) <= set(rest)
        assert {real.labels[row] for row in small} == set(KINDS)
        assert np.array_equal(draw_labelled(real, rest, 0.5, 5), rest)
        held += out.tolist()
    assert sorted(held) == list(range(len(real)))
    with pytest.raises(ValueError, match="25 real images are asked for, but a fold has 24"):
        draw_labelled(real, split_folds(real, 3)[0][0], 25, 0)
    with pytest.raises(ValueError, match="40 folds need as many patients"):
        split_folds(real, 40)


def test_an_overlap_with_the_test_images_is_refused(data, tmp_path):
    def measure(**changes):
        options = {"real": data["real"], "test": data["test"], "strategies": {"good": data["good"]}}
        options |= {"amounts": (9,), "folds": 1, "classifiers": [CNN], "regimes": ["both"], "out": tmp_path / "out"}
        return measure_utility(**options | changes)

    mixed = tmp_path / "mixed"
    shutil.copytree(data["test"], mixed)
    shutil.copy(f"{data['real']}/dark-0.png", mixed / "dark-1.png")
    with pytest.raises(ValueError, match="1 of 24 test images are among the labelled images"):
        measure(test=str(mixed))
    assert not (tmp_path / "out").exists()
    assert measure(test=str(mixed), drop_overlap=True)["overlap"]["left_out"] == 1
    # The generator's training images, the pool itself, its parents, and the patients.
    hashes = open_labelled(data["test"], "finding").hashes
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    assert measure(generators=[str(model)])["overlap"]["generators_without_record"] == [str(model)]
    assert "LEAKAGE WAS NOT CHECKED" in (tmp_path / "out" / "utility.md").read_text()
    write_training_record(model, {"hashes": hashes[:2], "datasets": []})
    with pytest.raises(ValueError, match="2 of 24 test images are among the generator's training images"):
        measure(generators=[str(model)])
    with pytest.raises(ValueError, match="24 of 24 test images are among the images of strategy 'copies'"):
        measure(strategies={"copies": data["test"]})
    children = write_labelled(tmp_path / "children", 4, 9, parents=[hashes[3]])
    with pytest.raises(ValueError, match="1 of 24 test images are among the parents of strategy 'children'"):
        measure(strategies={"children": children})
    relatives = write_labelled(tmp_path / "relatives", 2, 11, group_id="1-dark-0")
    with pytest.raises(ValueError, match="6 of 6 test images are among the patients of the labelled images"):
        measure(test=relatives)
    with pytest.raises(FileNotFoundError, match="no model './nowhere'"):
        measure(generators=["./nowhere"])
    # Without test images a fold is asked about what the generator may have seen.
    write_training_record(model, {"hashes": open_labelled(data["real"], "finding").hashes[:1], "datasets": []})
    with pytest.raises(ValueError, match="1 of 36 test images are among the generator's"):
        measure(test=None, folds=3, generators=[str(model)])


def test_notes_tell_whether_the_generator_has_learnt_from_labels(data, tmp_path):
    def notes_of(*kinds):
        model = tmp_path / ("-".join(kinds) or "none")
        tiny_pipeline(kinds).save_pretrained(model)
        write_training_record(model, {"hashes": open_labelled(data["real"], "finding").hashes[:5], "datasets": []})
        options = {"amounts": (9,), "folds": 1, "classifiers": [CNN], "regimes": ["both"], "resamples": 20}
        report = measure_utility(
            data["real"], data["test"], strategies={"good": data["good"]}, generators=[str(model)],
            out=tmp_path / "out", **options,
        )  # fmt: skip
        assert report["overlap"]["labelled_images_of_generator"] == 5
        return (tmp_path / "out" / "utility.md").read_text()

    seen = notes_of("image")
    assert "Of the labelled images, 5 are; it may have seen others of their data set without labels." in seen
    assert "has learnt from labelled images" not in seen
    for kinds in (("text",), ("image", "labels")):
        taught = notes_of(*kinds)
        assert "Of the labelled images, 5 are." in taught and "without labels" not in taught
        assert f"{tmp_path / '-'.join(kinds)} takes text or labels, so it has learnt from labelled images" in taught


def test_what_a_generator_has_learnt_is_read_from_its_folder(tmp_path):
    assert learnt_labels("default") is True
    assert learnt_labels("owner/not-loaded") is None and learnt_labels(str(tmp_path / "absent")) is None
    vectors = torch.randn(30, IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
    fit_prior(vectors, list(KINDS) * 10, "e", "finding", components=(1,)).save(tmp_path / "prior")
    assert learnt_labels(str(tmp_path / "prior")) is True
    for name, manifest, expected in (
        ("adapter/adapter.json", {"conditions": ["text", "image"]}, True),
        ("images/adapter.json", {"conditions": ["image"]}, False),
        ("old/adapter.json", {}, None),
        ("pipeline/model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"], "unet": ["d", "U"]}, True),
        ("plain/model_index.json", {"text_encoder": [None, None], "unet": ["diffusers", "UNet2DModel"]}, False),
        ("classes/model_index.json", {"id2label": {"0": "tench"}}, True),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(manifest))
        assert learnt_labels(str((tmp_path / name).parent)) is expected, name
    assert learnt_labels(str(tmp_path)) is True  # a run, with its pipeline and its adapter


# ---- the grid -------------------------------------------------------------------------------------------------------


def test_the_grid_is_measured_reported_and_resumed(data, probe, tmp_path, monkeypatch):
    options = {"strategies": {"good": data["good"]}, "amounts": (9, 0.5), "folds": 2, "resamples": 100}
    options |= {"classifiers": [CNN, probe], "out": tmp_path, "ratios": (2,)}
    report = measure_utility(data["real"], data["test"], **options)
    assert json.loads((tmp_path / "utility.json").read_text()) == report
    # 2 classifiers x 2 amounts x (real only + 3 regimes), each in 2 folds
    assert len(report["results"]) == 16 and len(list((tmp_path / "cells").glob("*.npy"))) == 32
    first, *others = report["results"]
    assert first["regime"] == "real" and first["gain"] is None and first["synthetic_images"] == 0
    for row in others:
        assert row["test_images"] == 24 and set(row["scores"]) >= {"accuracy", "macro_f1", "auc_macro", "auc dark"}
        assert row["regime"] == "real" or row["synthetic_images"] == row["ratio"] * row["real_images"]
    assert {row["real_images"] for row in report["results"]} == {9}
    text = (tmp_path / "utility.md").read_text()
    assert "Gain over real images only" in text and "McNemar" in text and "6 optimizer steps" in text
    assert (tmp_path / "utility.png").is_file() == (find_spec("matplotlib") is not None) == ("no plot" not in text)
    with open(tmp_path / "utility.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 16 * 6
    # Again: nothing is trained. A larger grid: only what is new.
    trained = []
    fit = CnnClassifier.fit
    monkeypatch.setattr(CnnClassifier, "fit", lambda self, *given: trained.append(1) or fit(self, *given))
    assert measure_utility(data["real"], data["test"], **options) == report and not trained
    measure_utility(data["real"], data["test"], **options | {"amounts": (9, 12), "classifiers": [CNN]})
    assert len(trained) == 2 * 4


def test_without_test_images_each_fold_is_asked_about_its_own(data, probe, tmp_path):
    report = measure_utility(
        data["real"], strategies={}, amounts=(1.0,), folds=3, classifiers=[probe], resamples=50, out=tmp_path
    )
    (row,) = report["results"]
    assert row["test_images"] == 36 and row["real_images"] == 24 and report["sources"]["test"] is None
    assert row["scores"]["accuracy"]["value"] > 0.6
    assert "asked about the patients that it holds out" in (tmp_path / "utility.md").read_text()


def test_a_strategy_makes_its_images_from_those_of_the_fold(data, probe, tmp_path):
    asked = []

    def copies(real, wanted, folder, seed):
        """Each image of the fold once more, with one pixel changed."""
        asked.append((wanted, folder.name, set(real.hashes)))
        lines = []
        folder.mkdir(parents=True)
        for row, label in enumerate(real.labels):
            image = real.images.image(row)
            image.putpixel((0, 0), (1, 2, 3))
            image.save(folder / f"{row}.png")
            lines.append(json.dumps({"file_name": f"{row}.png", "finding": label, "parents": [real.hashes[row]]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return open_labelled(str(folder), "finding")

    report = measure_utility(
        data["real"], data["test"], strategies={"copies": copies}, amounts=(9,), folds=2, regimes=["synthetic"],
        classifiers=[probe], resamples=50, out=tmp_path,
    )  # fmt: skip
    assert [name for _, name, _ in asked] == ["copies-9-0", "copies-9-1"] and asked[0][2] != asked[1][2]
    assert all(wanted == {"dark": 3, "bright": 3, "green": 3} for wanted, _, _ in asked)
    real, synthetic = report["results"]
    assert synthetic["scores"]["accuracy"]["value"] == pytest.approx(real["scores"]["accuracy"]["value"], abs=0.1)


@pytest.mark.parametrize("strategy", ["interpolation:across=true", "prior"])
def test_a_pool_has_what_is_wanted_of_each_class(data, tmp_path, strategy):
    """Also where labels are drawn with the images, and where a prior knows more classes than the fold has."""
    pipe = tiny_pipeline(("image",))
    pipe.set_progress_bar_config(disable=True)
    real, wanted = open_labelled(data["real"], "finding"), {"dark": 24, "bright": 20, "green": 4}
    prior = None
    if strategy == "prior":
        vectors = torch.randn(80, IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
        labels = ["red"] * 60 + ["green", "dark", "bright", "dark"] * 5
        prior = fit_prior(vectors, labels, module_hash(pipe.image_encoder), "finding", components=(1,))
    make = strategy_maker(pipe, strategy, "finding", prior=prior, num_inference_steps=1)
    assert make(real, wanted, tmp_path / "pool", 0).counts() == wanted
    if prior is not None:
        with pytest.raises(ValueError, match="'blue'.*bright, dark, green, red"):
            make(real, wanted | {"blue": 1}, tmp_path / "other", 0)
        assert not (tmp_path / "other").exists()


def test_folds_share_a_cache_of_embeddings(data, tmp_path):
    pipe = tiny_pipeline(("image",))
    pipe.set_progress_bar_config(disable=True)
    make = strategy_maker(pipe, "reconstruction", "finding", cache_dir=tmp_path / "cache", num_inference_steps=1)
    real = open_labelled(data["real"], "finding")
    for fold, rows in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3])):
        part = real.select(rows)
        wanted = dict.fromkeys(part.labels, 2)
        assert make(part, wanted, tmp_path / f"pool{fold}", 0).counts() == wanted
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_strategies_are_compared_with_each_other_and_folds_of_seeds_share_images(data, tmp_path):
    pools = {"good": data["good"], "again": data["good"]}
    report = measure_utility(
        data["real"], data["test"], strategies=pools, amounts=(1.0,), ratios=(None,), regimes=["both"], folds=2,
        fold_kind="seeds", pairs=[("good", "again")], classifiers=[CNN], resamples=50, out=tmp_path,
    )  # fmt: skip
    real, good, again = report["results"]
    assert real["real_images"] == 36 and good["synthetic_images"] == 60 and again["against"] == {}
    assert good["against"]["again"]["accuracy"]["gain"] == 0
    assert "Strategy against strategy" in (tmp_path / "utility.md").read_text()
    assert real["scores"]["auc_macro"]["fold_deviation"] > 0  # the seeds differ


def test_bad_settings_are_named_before_anything_is_trained(data, tmp_path):
    def refused(match, error=ValueError, **changes):
        options = {"real": data["real"], "test": data["test"], "strategies": {"good": data["good"]}}
        options |= {"amounts": (9,), "folds": 2, "classifiers": [CNN], "out": tmp_path / "out"}
        with pytest.raises(error, match=match):
            measure_utility(**options | changes)
        assert not (tmp_path / "out").exists()

    refused("nowhere", FileNotFoundError, real=str(tmp_path / "nowhere"))
    refused("no column 'grade'.*finding", label_column="grade")
    refused("no image has group_id='x'", filter={"group_id": ["x"]})
    refused("class 'red' has no image", classes=["dark", "red"])
    refused("at least two classes", classes=["dark"])
    refused("regime.*'mixed'", regimes=["mixed"])
    refused("whole numbers, or shares above 0", amounts=(2.5,))
    refused("strategy 'good' has 20 images of class 'bright', 30 are needed", ratios=(10,))
    refused("at least 2 without test images", test=None, folds=1)
    refused("need test images", test=None, fold_kind="seeds")
    refused("strategy 'best'. Valid: good", pairs=[("good", "best")])
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("empty", real=str(empty))
    one = write_labelled(tmp_path / "one", 8, 12)
    table = tmp_path / "one" / "metadata.jsonl"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    lines[0]["finding"] = "rare"
    table.write_text("\n".join(map(json.dumps, lines)))
    refused("class 'rare' has 1 image", real=one)


# ---- the command ----------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_of_two_words_leaves_evaluate_as_it_is(data, tmp_path):
    quick = ["--cnn", "test_resnet", "--cnn-steps", 2, "--cnn-resolution", 32, "--folds", 2, "--num-real", "9"]
    result = command(
        *(
            "evaluate",
            "utility",
            "--real",
            data["real"],
            "--test",
            data["test"],
            "--synthetic",
            f"good={data['good']}",
        ),
        *("--synthetic", f"again={data['good']}", "--compare", "good,again"),
        *("--ratios", "1", "--regimes", "both", "--generator", "default", "--out", tmp_path / "out", *quick),
    )
    assert result.exit_code == 0, result.stderr
    assert f"is in {tmp_path / 'out'}" in result.stdout
    assert json.loads((tmp_path / "out" / "utility.json").read_text())["settings"]["generators"] == ["default"]
    for arguments, message in (
        (("--num-real", "many"), "--num-real must be numbers"),
        (("--synthetic", data["good"]), "--synthetic must be NAME=DATA"),
        (("--classifier", "svm"), "unknown classifier 'svm'; valid: cnn, probe"),
        (("--classifier", "probe"), "the probe needs features"),
        (("--cnn", "resnet9000"), "unknown timm model 'resnet9000'"),
        (("--model", tmp_path), "are for --strategy"),
        (("--where", "finding"), "--where must be COLUMN=VALUE"),
        (("--strategy", "teleport"), "teleport"),
    ):
        given = () if "--strategy" in arguments else ("--synthetic", f"pool={data['good']}")
        result = command("evaluate", "utility", "--real", data["real"], *given, *arguments, "--out", tmp_path / "bad")
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, (
            result.stderr
        )
    assert not (tmp_path / "bad").exists()
    # The older command: the same arguments, the same messages.
    assert "evaluate utility --help" in command("evaluate", "utility").stderr
    assert "(see medisyn evaluate --help)" in command("evaluate", "default").stderr
    assert "MODEL_OR_FOLDER" in command("evaluate", "--help").stdout
    assert command("evaluate", tmp_path / "utility", "--real", data["real"]).exit_code == 2


def test_the_command_makes_the_images_of_a_strategy(data, tmp_path):
    model = tmp_path / "model"
    tiny_pipeline(("image",)).save_pretrained(model)
    options = ["--cnn", "test_resnet", "--cnn-steps", 2, "--cnn-resolution", 32, "--folds", 1, "--num-real", "6"]
    result = command(
        *("evaluate", "utility", "--real", data["real"], "--test", data["test"], "--strategy", "reconstruction"),
        *(
            "--strategy",
            "sdedit",
            "--model",
            model,
            "--steps",
            2,
            "--ratios",
            "1",
            "--out",
            tmp_path / "out",
            *options,
        ),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "utility.json").read_text())
    assert {row["strategy"] for row in report["results"]} == {None, "reconstruction", "sdedit"}
    lines = (tmp_path / "out" / "pools" / "reconstruction-6-0" / "metadata.jsonl").read_text().splitlines()
    known = set(open_labelled(data["real"], "finding").hashes)
    assert all(set(json.loads(line)["parents"]) <= known for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to compare: give --synthetic or --strategy"),
        (("--regimes", "real,both"), "nothing to compare: give --synthetic or --strategy"),
        (("--strategy", "prior"), "strategy prior needs --prior"),
        (("--strategy", "prior:label=dark", "--strategy", "sdedit"), "strategy prior needs --prior"),
        (("--strategy", "mixture", "--prior", "absent"), "--prior is for --strategy prior"),
    ],
)
def test_the_command_tells_what_is_missing_before_it_reads_anything(tmp_path, arguments, message):
    """Neither the model nor the data exist, which would be told otherwise."""
    model = ("--model", tmp_path / "absent") if "--strategy" in arguments else ()
    result = command("evaluate", "utility", "--real", tmp_path / "none", *arguments, *model, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_a_maker_of_a_prior_needs_one_of_its_own_encoder():
    pipe = tiny_pipeline(("image",))
    with pytest.raises(ValueError, match="strategy prior needs a learned prior"):
        strategy_maker(pipe, "prior", "finding")
    vectors = torch.randn(30, IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
    other = fit_prior(vectors, list(KINDS) * 10, "another", "finding", components=(1,))
    with pytest.raises(ValueError, match="of the image encoder another"):
        strategy_maker(pipe, "prior", "finding", prior=other)


def test_the_command_refuses_a_prior_that_has_learnt_from_test_images(data, tmp_path):
    pipe = tiny_pipeline(("image",))
    pipe.save_pretrained(tmp_path / "model")
    vectors = torch.randn(30, IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
    prior = fit_prior(vectors, list(KINDS) * 10, module_hash(pipe.image_encoder), "finding", components=(1,))
    prior.save(tmp_path / "prior")
    seen = open_labelled(data["test"], "finding").hashes[:3]
    write_training_record(tmp_path / "prior", {"hashes": seen, "datasets": []})
    given = ("--strategy", "prior", "--prior", tmp_path / "prior", "--model", tmp_path / "model")
    sources = ("--real", data["real"], "--test", data["test"], "--num-real", 6, "--ratios", 1, "--steps", 1)
    result = command("evaluate", "utility", *sources, *given, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.stdout
    assert "3 of 24 test images are among the generator's training images" in result.stderr
