"""Selection: rules on features whose right answer is known, and a folder of images in, a smaller one out."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from medisyn.cli import app
from medisyn.data.loading import load_images
from medisyn.evaluation.fidelity import frechet_distance
from medisyn.generation import selection_search
from medisyn.generation.selected_folder import AUDIT, REPORT, select_folder
from medisyn.generation.selection import DEFAULT_RULES, PASSED, RULES, parse_rules, select
from medisyn.generation.selection_parsing import FORMS
from medisyn.generation.selection_report import measure_diversity, vendi_score
from medisyn.generation.selection_search import CosineIndex, calibrate_threshold, drop_near_duplicates, unit_rows
from medisyn.generation.selection_subsets import farthest_points
from tests.evaluation import evaluation_data, write_images

WIDTH = 8


def cloud(number, centre, seed, spread=1.0):
    """Normal features (number, WIDTH) around `centre` times the first axis, or around a vector."""
    middle = np.zeros(WIDTH)
    middle[: np.size(centre)] = centre
    return (middle + spread * np.random.default_rng(seed).normal(size=(number, WIDTH))).astype(np.float32)


@pytest.fixture
def two_classes():
    """Real classes a and b, apart along the first axis; every fourth generated image shows the other class."""
    real = np.concatenate([cloud(40, 4, 0), cloud(40, -4, 1)])
    shown = np.array([4 if row % 4 else -4 for row in range(40)] + [-4 if row % 4 else 4 for row in range(40)])
    generated = cloud(80, 0, 2)
    generated[:, 0] += shown
    return {
        "features": generated,
        "labels": ["a"] * 40 + ["b"] * 40,
        "real_features": real,
        "real_labels": ["a"] * 40 + ["b"] * 40,
    }


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["confidence:0.5", "centroid:1.0"])
def test_images_of_the_wrong_class_are_dropped(two_classes, rules):
    selection = select(**two_classes, rules=rules)
    assert selection.kept.tolist() == [row for row in range(80) if row % 4]
    assert selection.report["kept"] == {"a": 30, "b": 30}


def test_confidence_has_thresholds_of_three_kinds(two_classes):
    scores = [each["scores"]["confidence"] for each in select(**two_classes, rules="").records if each["scores"]]
    assert not scores  # nobody asked for a classifier
    fixed = select(**two_classes, rules=[{"confidence": {"threshold": {"a": 0.5, "b": 1.0}}}])
    assert fixed.report["kept"]["a"] == 30 and fixed.report["kept"]["b"] < 30
    quantile = select(**two_classes, rules="confidence:quantile=0.3")
    assert quantile.report["kept"] == {"a": 29, "b": 29}  # 11 of 39 gaps are below the quantile
    for each in quantile.records:
        threshold = each["thresholds"]["confidence:quantile=0.3"]
        assert each["kept"] == (each["scores"]["confidence"] >= threshold - 1e-6)
    real = select(**two_classes, rules="confidence:real=0.1")
    thresholds = real.report["steps"][0]["thresholds"]
    assert all(0.5 < value < 1 for value in thresholds.values())
    for each in real.records:
        assert each["kept"] == (each["scores"]["confidence"] >= each["thresholds"]["confidence:real=0.1"] - 1e-6)


def test_confidence_takes_the_probabilities_of_another_classifier(two_classes):
    table = np.tile([0.9, 0.1], (80, 1))
    assert select(**two_classes, rules="confidence:0.5", probabilities=table, classes=["a", "b"]).report["kept"] == {
        "a": 40,
        "b": 0,
    }
    for message, arguments in {
        "no class 'b'": {"probabilities": table, "classes": ["a", "c"]},
        "images x classes": {"probabilities": table[:5], "classes": ["a", "b"]},
        "0..1": {"probabilities": 2 * table, "classes": ["a", "b"]},
        "fits classifiers of its own": {"probabilities": table, "classes": ["a", "b"], "rules": "confidence:real=0.1"},
    }.items():
        with pytest.raises(ValueError, match=message):
            select(**two_classes, **{"rules": "confidence:0.5"} | arguments)


def test_centroid_keeps_the_closer_half(two_classes):
    selection = select(**two_classes, rules="centroid:0.5")
    assert selection.report["kept"] == {"a": 15, "b": 15}
    for label in "ab":
        own = [each for each in selection.records if each["label"] == label]
        near = [each for each in own if each["scores"]["nearest_centroid"] == label]
        kept = {each["index"] for each in own if each["kept"]}
        closest = sorted(near, key=lambda each: each["scores"]["centroid_distance"])[:15]
        assert kept == {each["index"] for each in closest}
    assert select(**two_classes, rules="centroid:7").report["kept"] == {"a": 7, "b": 7}


def test_near_duplicates_of_training_images_and_of_better_images_are_dropped(two_classes):
    features = two_classes["features"].copy()
    features[1] = 3 * two_classes["real_features"][5]  # a copy whatever its length
    train = cloud(10, 1, 7)
    features[2] = train[4]
    features[9] = features[6] * 1.001  # 9 and 6 are alike
    data = two_classes | {"features": features}
    selection = select(**data, train_features=train, rules="duplicates:0.999")
    dropped = {each["index"]: each["reason"] for each in selection.records if not each["kept"]}
    assert set(dropped) == {1, 2, 9}
    assert "real image 5 " in dropped[1] and "training image 4 " in dropped[2] and "selected image 6 " in dropped[9]
    # A scoring rule before it decides which of a pair stays: 9 is a little farther out, so more confident.
    better = select(**data, train_features=train, rules="confidence:0.0,duplicates:0.999")
    scores = [better.records[row]["scores"]["confidence"] for row in (6, 9)]
    assert scores[1] > scores[0]
    assert {each["index"] for each in better.records if not each["kept"]} == {1, 2, 6}


def test_no_two_kept_images_are_alike_also_over_several_blocks(monkeypatch):
    monkeypatch.setattr(selection_search, "BLOCK", 16)
    features = cloud(300, 3, 0, spread=0.7)
    kept, dropped = drop_near_duplicates(features, range(300), 0.95)
    unit = unit_rows(features)
    cosines = unit[kept] @ unit[kept].T - 2 * np.eye(len(kept))
    assert cosines.max() <= 0.95 and set(kept) | set(dropped) == set(range(300)) and len(dropped) > 20
    for index, (other, cosine) in dropped.items():
        assert other in kept and other < index
        assert unit[index] @ unit[other] == pytest.approx(cosine, abs=1e-5) and cosine > 0.95
    monkeypatch.setattr(selection_search, "BLOCK", 512)
    assert drop_near_duplicates(features, range(300), 0.95)[0] == kept


def test_the_automatic_threshold_drops_at_most_its_rate_of_real_images():
    train, held_out = cloud(300, 2, 0), cloud(250, 2, 1)
    found = calibrate_threshold(train, held_out=held_out)
    highest = (unit_rows(held_out) @ unit_rows(train).T).max(1)
    assert (highest > found["threshold"]).sum() == 2 and found["dropped_share"] == 2 / 250
    # No lower value does: one image more would be above it.
    assert (highest > found["threshold"] - 1e-4).sum() > 2
    # Images of one patient are alike, and that is no copy.
    pairs = np.concatenate([train, train + 0.01])
    patients = [*range(300), *range(300)]
    grouped, alone = calibrate_threshold(pairs, patients), calibrate_threshold(pairs)
    assert grouped["threshold"] < 0.999 < alone["threshold"]
    # Exact copies are one image.
    assert calibrate_threshold(np.concatenate([train, train]))["threshold"] < 0.999
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibrate_threshold(train, ["one"] * 300)


def test_the_automatic_threshold_is_in_the_audit_and_warns_where_it_is_of_no_use(two_classes):
    selection = select(**two_classes, rules="duplicates:auto", held_out_features=cloud(50, 4, 9))
    step = selection.report["steps"][0]
    calibration = step["facts"]["calibration"]
    assert calibration["compared"] == "held-out images" and calibration["images"] == 50
    assert selection.records[0]["thresholds"]["duplicates:auto=0.01"] == pytest.approx(calibration["threshold"], 1e-5)
    pairs = np.concatenate([two_classes["real_features"], two_classes["real_features"] + 0.02])
    data = two_classes | {"real_features": pairs, "real_labels": two_classes["real_labels"] * 2}
    assert any(
        "near-copies of each other" in each for each in select(**data, rules="duplicates:auto").report["warnings"]
    )
    patients = select(**data, rules="duplicates:auto", real_groups=[*range(80), *range(80)])
    assert not any("near-copies" in each for each in patients.report["warnings"])


def test_covariance_matching_comes_closer_than_a_random_choice():
    real = cloud(60, 0, 0) * np.linspace(0.3, 2, WIDTH, dtype=np.float32)
    generated = cloud(400, 0.8, 1, spread=1.5)
    selection = select(generated, ["a"] * 400, real, ["a"] * 60, rules="covariance:50")
    ours = frechet_distance(real, generated[selection.kept])
    random = [
        frechet_distance(
            real, generated[select(generated, ["a"] * 400, real, ["a"] * 60, rules="random:50", seed=s).kept]
        )
        for s in range(5)
    ]
    assert len(selection.kept) == 50 and ours < 0.6 * min(random)
    distance = selection.report["steps"][0]["facts"]["by_class"]["a"]["frechet_distance"]
    assert distance["after"] < 0.6 * distance["before"]
    with pytest.raises(ValueError, match="two real images of each class; 'a' has 1"):
        select(generated, ["a"] * 400, real[:1], ["a"], rules="covariance:50")


def test_farthest_points_cover_the_class():
    # Two tight heaps and one image between: three points find all three places.
    features = np.concatenate([cloud(30, [5, 0], 0, 0.01), cloud(30, [0, 5], 1, 0.01), cloud(1, [3, 3], 2, 0.01)])
    chosen, radius = farthest_points(unit_rows(features), 3)
    assert sorted(row // 30 for row in chosen) == [0, 1, 2] and radius < 0.05
    assert sorted(farthest_points(unit_rows(np.ones((4, 2))), 4)[0]) == [0, 1, 2, 3]  # equal images, each once
    selection = select(features, ["a"] * 61, features, ["a"] * 61, rules="diverse:0.5")
    assert len(selection.kept) == 31
    order = [each["scores"].get("farthest_point_order") for each in selection.records]
    assert sorted(rank for rank in order if rank is not None) == list(range(31))


def test_rules_are_applied_in_order_and_every_image_has_its_record(two_classes, tmp_path):
    rules = "confidence:0.5,centroid:0.5,duplicates:0.99,diverse:5"
    names = [f"{row:03d}.png" for row in range(80)]
    selection = select(**two_classes, rules=rules, names=names)
    steps = selection.report["steps"]
    assert [step["rule"] for step in steps] == selection.report["rules"] == rules.split(",")
    assert all(step["after"] == following["before"] for step, following in zip(steps, steps[1:], strict=False))
    assert selection.report["kept"] == {"a": 5, "b": 5}
    assert [each["index"] for each in selection.records] == list(range(80))
    assert [each["index"] for each in selection.records if each["kept"]] == selection.kept.tolist()
    for step in steps:
        dropped = [each for each in selection.records if each["rule"] == step["rule"]]
        assert len(dropped) == step["dropped"] and not any(each["kept"] for each in dropped)
        assert all(each["reason"] for each in dropped)
    assert {each["rule"] for each in selection.records if each["kept"]} == {PASSED}
    # What is known of an image does not depend on who dropped it.
    assert all({"confidence", "centroid_distance"} <= set(each["scores"]) for each in selection.records)
    selection.write_audit(tmp_path / "audit.jsonl")
    read = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert read == selection.records and read[3]["name"] == "003.png"
    again = select(**two_classes, rules=rules, names=names)
    assert again.records == selection.records and again.report == selection.report


def test_a_class_does_not_depend_on_the_others(two_classes):
    for rules in ("covariance:9", "diverse:9", "random:9", "centroid:9"):
        both = select(**two_classes, rules=rules)
        first = {name: value[:40] for name, value in two_classes.items() if not name.startswith("real")}
        one = select(**two_classes | first, rules=rules)
        assert one.kept.tolist() == [row for row in both.kept if row < 40]


def test_the_baseline_is_random_and_has_as_many_images_of_each_class(two_classes):
    selection = select(**two_classes, rules="confidence:0.5,centroid:0.3")
    labels = np.array(two_classes["labels"])
    assert [(labels[selection.baseline] == name).sum() for name in "ab"] == list(selection.report["kept"].values())
    other = select(**two_classes, rules="confidence:0.5,centroid:0.3", seed=1)
    assert other.kept.tolist() == selection.kept.tolist() and other.baseline.tolist() != selection.baseline.tolist()


def test_no_rule_keeps_everything(two_classes):
    for rules in ("", [], " "):
        selection = select(**two_classes, rules=rules)
        assert len(selection.kept) == 80 and selection.report["steps"] == []
        assert selection.baseline.tolist() == list(range(80)) and not selection.report["warnings"]


# --- over-filtering --------------------------------------------------------------------------------------------------


def test_over_filtering_is_warned_of_and_diverse_choice_is_not(two_classes):
    data = two_classes | {"features": cloud(80, 0, 3) + np.repeat(np.eye(1, WIDTH) * [[4], [-4]], 40, 0)}
    narrow = select(**data, rules="centroid:8")
    ratios = narrow.report["diversity"]["by_class"]["a"]["ratio"]
    assert ratios["mean_pairwise_distance"] < 0.8
    assert any(each.startswith("over-filtering: mean pairwise distance of 'a'") for each in narrow.report["warnings"])
    wide = select(**data, rules="diverse:8").report["diversity"]["by_class"]["a"]
    assert wide["ratio"]["mean_pairwise_distance"] > 1 and wide["ratio"]["vendi_score"] > 1
    assert wide["before"]["images"] == 40 and wide["after"]["images"] == wide["random"]["images"] == 8
    assert not [each for each in select(**data, rules="centroid:8", warn_below=0.0).report["warnings"]]


def test_a_class_that_is_lost_is_warned_of(two_classes):
    table = np.tile([1.0, 0.0], (80, 1))
    selection = select(**two_classes, rules="confidence:0.5,diverse:5", probabilities=table, classes=["a", "b"])
    assert selection.report["kept"] == {"a": 5, "b": 0}
    assert "no image of 'b' is left of 40" in selection.report["warnings"]
    single = select(**two_classes, rules="random:1").report["warnings"]
    assert [each for each in single if each.startswith("only one image of 'a' is left of 40")]
    nothing = select(**two_classes, rules="confidence:1,duplicates:-1")
    assert not len(nothing.kept) and not len(nothing.baseline) and len(nothing.report["warnings"]) >= 2


def test_diversity_is_that_of_the_literature():
    same, different = np.tile(cloud(1, 2, 0), (20, 1)), np.eye(6, WIDTH)
    assert vendi_score(same) == pytest.approx(1) and vendi_score(different) == pytest.approx(6)
    found = measure_diversity(different, cloud(30, 0, 1))
    assert found["mean_pairwise_distance"] == pytest.approx(1)
    assert measure_diversity(same, cloud(30, 0, 1))["mean_pairwise_distance"] == pytest.approx(0, abs=1e-6)
    assert measure_diversity(different[:3], cloud(30, 0, 1))["recall"] is None


# --- how rules are written -------------------------------------------------------------------------------------------


def test_rules_as_text_as_yaml_and_as_a_list_are_the_same(tmp_path):
    text = "confidence:quantile=0.3, centroid:0.5,duplicates:auto=0.02,diverse:500"
    listed = [{"confidence": {"quantile": 0.3}}, "centroid:0.5", {"duplicates": {"rate": 0.02}}, {"diverse": 500}]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(listed))
    (tmp_path / "named.yml").write_text(yaml.safe_dump({"rules": listed}))
    parsed = parse_rules(text)
    assert parsed == parse_rules(listed) == parse_rules(str(tmp_path / "rules.yaml")) == parse_rules(parsed)
    assert parsed == parse_rules(tmp_path / "named.yml")
    assert ",".join(rule.spec() for rule in parsed) == text.replace(" ", "")
    for form in FORMS:
        assert parse_rules(parse_rules(form)[0].spec()) == parse_rules(form)
    assert {form.partition(":")[0] for form in FORMS} == set(RULES)
    assert [type(rule).name for rule in parse_rules(DEFAULT_RULES)] == ["confidence", "duplicates"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("sharpness:3", "unknown rule 'sharpness'; valid: confidence, centroid"),
        ("confidence:0.8,", "unknown rule ''"),
        ("confidence", "takes one of"),
        ("confidence:80", "0..1, not 80"),
        ("confidence:high", "0..1, not 'high'"),
        ("confidence:nan", "0..1, not nan"),
        ("centroid:0", "not 0"),
        ("centroid:1.5", "not 1.5"),
        ("centroid:half", "not 'half'"),
        ("diverse:-3", "not -3"),
        ("diverse:size=3", "no option 'size'; valid: amount"),
        ("duplicates:2", "cosine in -1..1 or auto, not 2"),
        ("duplicates:auto=3", "rate of duplicates:auto"),
        ([{"confidence": 0.5, "centroid": 0.5}], "mapping with one key"),
        ([{"confidence": {"threshold": {"a": 2}}}], "0..1, not 2"),
        ([{"confidence": {"threshold": {"a": 0.5}}}], "has none for 'b'; classes: a, b"),
        ([3], "not 3"),
        (3, "text or a list, not 3"),
    ],
)
def test_wrong_rules_are_named(two_classes, rules, message):
    with pytest.raises(ValueError, match=message) as caught:
        select(**two_classes, rules=rules)
    assert "\n" not in str(caught.value)


def test_sets_that_do_not_fit_are_named(two_classes):
    one_class = {"real_features": two_classes["real_features"][:40], "real_labels": ["a"] * 40}
    broken = two_classes["features"].copy()
    broken[7, 3] = np.nan
    alone = {"real_labels": ["b"] + ["a"] * 79}
    for message, changes in {
        "no real image has the class 'b'; classes of the real images: a": one_class,
        "two classes of real images": one_class | {"labels": ["a"] * 80},
        "row 7 has values": {"features": broken},
        "real_features has 3 columns, features has 8": {"real_features": np.ones((80, 3))},
        "train_features has 3 columns": {"train_features": np.ones((2, 3))},
        "not empty": {"features": np.ones((0, WIDTH)), "labels": []},
        "labels has 3 entries for 80 images": {"labels": ["a"] * 3},
        "image 2 has no class": {"labels": ["a", "a", None] + ["a"] * 77},
        "real_groups has 1 entries": {"real_groups": ["p"]},
        "2 names for 80": {"names": ["x", "y"]},
        "there is one of 'b'": alone | {"rules": "confidence:real=0.1"},
        "'b' has one": {"real_groups": [*range(40), *["p"] * 40], "rules": "confidence:real=0.1"},  # a single patient
        "unknown search 'annoy'": {"search": "annoy"},
        "warn_below must lie in 0..1, not 3": {"warn_below": 3},
    }.items():
        with pytest.raises(ValueError, match=message):
            select(**{"rules": "confidence:0.5"} | two_classes | changes)


def test_a_class_of_one_real_image_is_refused_by_confidence_and_warned_of_by_centroid(two_classes):
    rows = [0, *range(40, 80)]
    one = {"real_features": two_classes["real_features"][rows], "real_labels": ["a"] + ["b"] * 40}
    for rules in ("confidence:quantile=0.5", "confidence:0.8", "duplicates:0.95,confidence:0.8"):
        with pytest.raises(ValueError, match="2 real images or more of each class; there is one of 'a'"):
            select(**two_classes | one, rules=rules)
    warned = select(**two_classes | one, rules="centroid:0.5").report["warnings"]
    assert [each for each in warned if each.startswith("the rule centroid has a single real image of 'a'")]
    assert not [each for each in select(**two_classes, rules="centroid:0.5").report["warnings"] if "single" in each]
    table = np.tile([0.9, 0.1], (80, 1))  # probabilities of one's own need no real images
    select(**two_classes | one, rules="confidence:0.05", probabilities=table, classes=["a", "b"])
    # A class that no image was asked for may be rare.
    only_b = {"features": two_classes["features"][40:], "labels": ["b"] * 40}
    select(**two_classes | one | only_b, rules="confidence:quantile=0.5")


# --- search ----------------------------------------------------------------------------------------------------------


def test_faiss_and_torch_find_the_same():
    pytest.importorskip("faiss")
    features, training = cloud(700, 1, 0), cloud(300, 1, 1)
    found = []
    for search in ("torch", "faiss"):
        index = CosineIndex(WIDTH, search=search)
        index.add(training[:100])
        index.add(training[100:])
        found.append(index.best(features))
    assert np.array_equal(found[0][1], found[1][1])
    assert np.allclose(found[0][0], found[1][0], atol=1e-6)
    kept = [drop_near_duplicates(features, range(700), 0.9, search)[0] for search in ("torch", "faiss")]
    assert kept[0] == kept[1] and len(kept[0]) < 700


def test_a_large_search_asks_for_faiss(monkeypatch):
    assert CosineIndex(3, 10**6).search == "torch" and CosineIndex(3, 10**12, "torch").search == "torch"
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install medisyn\[search\]"):
        CosineIndex(3, 10**9)
    similarity, row = CosineIndex(WIDTH).best(cloud(2, 0, 0))
    assert row.tolist() == [-1, -1] and similarity.tolist() == [-1, -1]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    found = evaluation_data(folder)
    lines = (folder / "synthetic" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"seed": number, "labels": {"n": number % 2}} for number, line in enumerate(lines)]
    for row in rows[::5]:  # every fifth claims the other finding
        row["finding"] = (
            {"normal": "nodule", "nodule": "normal"}[row["finding"]] if row["modality"] == "CT" else "normal"
        )
    (folder / "synthetic" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def run_folder(data, out, **options):
    columns = ["modality", "finding"]
    options = {"extractor": data["extractor"], "cache_dir": data["cache_dir"], "progress": False} | options
    rules = options.pop("rules", "confidence:0.5,duplicates:auto,diverse:10")
    return select_folder(data["synthetic"], data["train"], columns, rules, out=out, **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_becomes_a_smaller_one_with_its_provenance_and_an_audit(data, tmp_path):
    out, baseline = tmp_path / "selected", tmp_path / "random"
    selection = run_folder(data, out, held_out=data["real"], baseline=baseline)
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    original = {
        row["file_name"]: row for row in map(json.loads, (out.parent / data["synthetic"] / "metadata.jsonl").open())
    }
    assert 10 <= len(lines) <= 30 and all(line == original[line["file_name"]] for line in lines)
    for line in lines:
        source = out.parent / data["synthetic"] / line["file_name"]
        assert (out / line["file_name"]).read_bytes() == source.read_bytes()
    audit = [json.loads(line) for line in (out / AUDIT).read_text().splitlines()]
    assert len(audit) == 90 and {each["name"] for each in audit if each["kept"]} == {
        line["file_name"] for line in lines
    }
    assert all(len(each["content_hash"]) == 16 and each["rule"] for each in audit)
    # Those that claim the other finding were found out by their looks.
    liars = [each for each in audit if each["index"] % 5 == 0 and each["label"].startswith("CT")]
    assert liars and all(each["rule"] == "confidence:0.5" for each in liars)
    report = json.loads((out / REPORT).read_text())
    assert report["rules"] == selection.report["rules"] and report["counts"]["held_out"] == 168
    assert len(report["extractor"]["weights_sha256"]) == 64 and report["extractor"]["resolution"] == 32
    images = load_images(str(out), caption_column=None)
    assert len(images) == len(lines) and set(images.column("modality")) == {"CT", "fundus"}
    drawn = load_images(str(baseline), caption_column=None)
    assert len(drawn) == len(images) and not (baseline / AUDIT).exists()
    assert sorted(drawn.column("modality")) == sorted(images.column("modality"))


def test_the_same_selection_again_changes_nothing_and_another_one_is_refused(data, tmp_path):
    out = tmp_path / "selected"
    partial = tmp_path / ".selected.partial"
    partial.mkdir()
    (partial / "half").write_text("of a run that was killed")
    run_folder(data, out)
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run_folder(data, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps and not partial.exists()
    with pytest.raises(FileExistsError, match="holds another selection"):
        run_folder(data, out, rules="random:5")
    assert contents(out) == before
    run_folder(data, out, rules="random:5", overwrite=True)
    assert len(load_images(str(out), caption_column=None)) == 15
    run_folder(data, out, overwrite=True)
    assert contents(out) == before and sorted(path.name for path in tmp_path.iterdir()) == ["selected"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt, which no selection made"):
        run_folder(data, out, rules="random:5", overwrite=True)


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_images_can_be_linked(data, tmp_path, link):
    out = tmp_path / "selected"
    run_folder(data, out, rules="random:3", link=link)
    files = [path for path in out.iterdir() if path.suffix == ".png"]
    assert len(files) == 9 and len(load_images(str(out), caption_column=None)) == 9
    for file in files:
        source = tmp_path / data["synthetic"] / file.name
        assert file.samefile(source) and file.is_symlink() == (link == "symlink")


def test_training_images_are_not_among_the_selected(data, tmp_path):
    # The generator "drew" three of its training images.
    folder = tmp_path / "generated"
    write_images(folder, 10, 9, pairs=[("CT", "normal")])
    training = load_images(data["train"], caption_column=None)
    for row, name in enumerate(("CT-normal-2.png", "CT-normal-4.png", "CT-normal-6.png")):
        training.image(row).save(folder / name)
    options = {"extractor": data["extractor"], "progress": False, "out": tmp_path / "out", "train": data["train"]}
    selection = select_folder(str(folder), data["real"], ["modality", "finding"], "duplicates:auto", **options)
    dropped = {each["name"] for each in selection.records if each["rule"].startswith("duplicates")}
    assert {"CT-normal-2.png", "CT-normal-4.png", "CT-normal-6.png"} <= dropped


def test_the_command(data, tmp_path):
    arguments = ["select", data["synthetic"], "--real", data["train"], "--extractor", data["extractor"]]
    arguments += ["--label-column", "modality,finding", "--cache", str(data["cache_dir"])]
    done = CliRunner().invoke(app, [*arguments, "--rules", "confidence:0.5,diverse:4", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "12 of 90 images" in done.stdout and "CT / nodule: 4 of" in done.stdout
    only = [*arguments, "--rules", "random:4", "--out", str(tmp_path / "only"), "--where", "modality=CT"]
    assert "no real image has the class 'fundus / normal'" in CliRunner().invoke(app, only).stderr


def test_the_command_refuses_one_real_image_of_a_class_before_features_are_taken(tmp_path):
    write_images(tmp_path / "made", 4, 1, pairs=[("CT", "normal"), ("CT", "nodule")])
    write_images(tmp_path / "real", 1, 2, pairs=[("CT", "normal"), ("CT", "nodule")])
    arguments = ["select", str(tmp_path / "made"), "--real", str(tmp_path / "real"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)  # no weights of the default extractor are needed for the answer
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "2 real images or more of each class; there is one of 'nodule', 'normal'" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "nowhere"}, "no folder 'nowhere'"),
        ({"folder": "empty"}, "has no metadata.jsonl"),
        ({"folder": "no_lines"}, "names no images"),
        ({"folder": "damaged"}, "line 2 of"),
        ({"folder": "escaping"}, "line 1 of"),
        ({"folder": "missing"}, "a.png is missing"),
        ({"--real": "nowhere"}, "nowhere"),
        ({"--real": ""}, "--real is empty"),
        ({"--train": "nowhere/*.parquet"}, "no file matches"),
        ({"--rules": "sharpness:3"}, "unknown rule 'sharpness'"),
        ({"--rules": "none.yaml"}, "no file of rules"),
        ({"--rules": "confidence:1.0,duplicates:-1"}, "no image passes the rules"),
        ({"--label-column": "organ"}, "no class in the column 'organ'"),
        ({"--label-column": "finding,"}, "label column must be names"),
        ({"--real-label-column": "organ"}, "no column 'organ'"),
        ({"--group-column": "doctor"}, "no column 'doctor' of patients"),
        ({"--extractor": "vgg"}, "unknown feature extractor 'vgg'"),
        ({"--link": "teleport"}, "valid: copy, hardlink, symlink"),
        ({"--search": "annoy"}, "unknown search 'annoy'"),
        ({"--where": "modality"}, "--where must be COLUMN=VALUE"),
        ({"--where": "modality=PET"}, "no real image has modality='PET'; values: CT, fundus"),
        ({"--out": "foreign"}, "which no selection made"),
        ({"--out": "file"}, "file"),
        ({"--baseline": "out"}, "folders of their own"),
    ],
)
def test_wrong_input_is_one_line_and_changes_nothing(data, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "no_lines": "\n",
        "damaged": '{"file_name": "a.png"}\n{\n',
        "escaping": '{"file_name": "../a.png"}\n',
        "missing": '{"file_name": "a.png"}\n',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text(text)
    (tmp_path / "damaged" / "a.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    options = {"--real": data["train"], "--extractor": data["extractor"], "--out": "out"}
    options |= {"--label-column": "modality,finding", "--rules": "random:2", "--cache": str(data["cache_dir"])}
    folder = changes.get("folder", data["synthetic"])
    options |= {name: value for name, value in changes.items() if name != "folder"}
    result = CliRunner().invoke(app, ["select", folder, *(part for pair in options.items() for part in pair)])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert contents(tmp_path) == before
