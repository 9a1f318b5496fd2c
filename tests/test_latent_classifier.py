"""The latent classifier's task: what it learns, reports and exports, and what it refuses."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from medisyn import load_pipeline
from medisyn.config import parse_config
from medisyn.data.loading import load_images
from medisyn.guidance import load_classifier
from medisyn.tasks import pseudo_labels
from medisyn.tasks.calibration import fit_temperature
from medisyn.tasks.labelled_rows import held_out_rows, rows_apart_from
from medisyn.tasks.latent_classifier import NOISE_LEVELS, LatentClassifierTask, labelled_subset
from medisyn.trainer import Trainer
from medisyn.training_record import read_training_record
from tests.training import write_base, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images of three brightnesses (`kind`), and an untrained unconditional model."""
    folder = tmp_path_factory.mktemp("latent_classifier")
    write_images(folder / "images")
    write_base(folder / "base", kinds=())
    return folder


CALIBRATED = {"calibration_fraction": 0.4}  # of eight images of each class


def config(folder, run="run", task=(), train=(), data=(), **changes):
    images = {"source": str(folder / "images"), "caption_column": None, "resolution": 32}
    tree = {
        "output_dir": str(folder / run),
        "data": images | {"group_column": "patient", "license_column": "license"} | dict(data),
        "validation": images,
        "task": {"type": "latent_classifier", "base": str(folder / "base"), "class_column": "kind"} | dict(task),
        "optim": {"warmup_steps": 0, "decay_fraction": 0.0, "learning_rate": 3e-3},
        "train": {"steps": 4, "batch_size": 6, "log_every": 1, "checkpoint_every": 2, "ema_decay": 0.0} | dict(train),
    }
    tree["task"] |= {} if "cache_dir" in tree["task"] else {"cache_dir": str(folder / "cache")}
    return parse_config(tree | changes)


@pytest.fixture(scope="module")
def run(folder):
    """A run that has learnt to tell the brightnesses apart, by 15 images, and was calibrated on 9 others."""
    train = {"steps": 120, "batch_size": 24, "checkpoint_every": 120, "validate_every": 120}
    return Trainer(config(folder, "learnt", task=CALIBRATED, train=train)).fit()


def test_it_learns_and_is_better_where_there_is_less_noise(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = {key.removeprefix("validation/"): v for line in lines for key, v in line.items() if "validation/" in key}
    for name in ("loss", "accuracy", "calibration_error"):
        assert {name} | {f"{name}_at_{level}" for level in NOISE_LEVELS} <= last.keys()
    assert last["accuracy_at_0.05"] > 0.9
    assert last["loss_at_0.05"] < last["loss_at_0.8"]


def test_calibration_fits_a_temperature_for_each_noise_level(run):
    report = json.loads((run / "classifier.json").read_text())
    assert report["classes"] == ["0", "1", "2"]
    assert report["images_by_class"] == {"0": 8, "1": 8, "2": 8}
    assert (report["calibration_images"], report["validation_images"]) == (10, 24)
    assert [row["noise_level"] for row in report["by_noise_level"]] == list(NOISE_LEVELS)
    assert NOISE_LEVELS[-1] >= 0.95  # guidance acts there as well
    classifier = load_classifier(run)
    assert classifier.config.temperatures == [row["temperature"] for row in report["by_noise_level"]]
    before = [row["calibration_error_before"] for row in report["by_noise_level"]]
    after = [row["calibration_error"] for row in report["by_noise_level"]]
    assert sum(after) < sum(before) + 0.05


def test_a_temperature_is_that_of_logits_which_are_too_large():
    """Probabilities are right at a temperature of 2; nine images that are all told apart do not sharpen much."""
    logits = 3 * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.multinomial((logits / 2).softmax(dim=1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    assert fit_temperature(logits, classes, 4000) == pytest.approx(2.0, abs=0.15)
    right = 3 * torch.eye(3).repeat(12, 1), torch.arange(3).repeat(12)
    assert 0.4 < fit_temperature(*right, 9) < 1
    assert fit_temperature(*right, 9) > fit_temperature(*right, 36)


def test_images_for_the_temperatures_are_of_patients_that_the_classifier_does_not_learn_from(folder):
    task = LatentClassifierTask(config(folder, "held", task=CALIBRATED))
    held = task._other_images["calibration"]
    assert sorted([*task.images.rows, *held.rows]) == list(range(24)) and len(task) == len(task.images) == 14
    assert not set(held.column("patient")) & set(task.images.column("patient"))
    assert min(held.column("kind").count(kind) for kind in range(3)) >= 3
    other = LatentClassifierTask(config(folder, "held", task=CALIBRATED | {"label_seed": 1}))
    assert other._other_images["calibration"].rows.tolist() != held.rows.tolist()


def test_the_temperatures_do_not_depend_on_validation_images(run, folder, tmp_path):
    """The same run with wrong labels in the validation data gives the same classifier."""
    shutil.copytree(folder / "images", tmp_path / "images")
    write_kinds(tmp_path / "images", [(row + 1) % 3 for row in range(24)])
    wrong = {"source": str(tmp_path / "images"), "caption_column": None, "resolution": 32}
    temperatures, scores = [], []
    for name, changes in (("right", {}), ("wrong", {"validation": wrong}), ("none", {"validation": None})):
        task = LatentClassifierTask(config(folder, name, task=CALIBRATED, **changes))
        task.classifier.load_state_dict(load_classifier(run).state_dict())
        task.export(tmp_path / name)
        temperatures.append(load_classifier(tmp_path / name).config.temperatures)
        scores.append(json.loads((tmp_path / name / "classifier.json").read_text())["by_noise_level"][0])
    assert temperatures[0] == temperatures[1] == temperatures[2] == load_classifier(run).config.temperatures
    assert scores[0]["accuracy"] > 0.9 > 0.1 > scores[1]["accuracy"]
    assert set(scores[2]) == {"noise_level", "temperature"}


def test_too_few_images_leave_the_temperatures_at_one(folder, caplog):
    run = Trainer(config(folder, "few", task={"calibration_fraction": 0.2}, train={"steps": 1})).fit()
    assert "the temperatures stay 1: task.calibration_fraction=0.2" in caplog.text
    classifier = load_classifier(run)
    assert (classifier.config.temperatures, classifier.temperature(950.0).item()) == ([1.0], 1.0)
    assert "calibration_images" not in json.loads((run / "classifier.json").read_text())


PSEUDO = {"label_fraction": 0.5, "pseudo_labels": {"steps": 60, "threshold": 0.5, "resolution": 32}}


def test_images_without_a_label_are_learnt_from_by_what_a_cnn_takes_them_for(folder):
    task = LatentClassifierTask(config(folder, "pseudo", task=PSEUDO))
    labelled = set(task.labelled.rows.tolist())
    assert len(labelled) == 12 < len(task.images) == len(task) <= 24 and labelled < set(task.images.rows.tolist())
    truth = task._indices(task.images)
    assert [task.targets[i] == truth[i] for i in range(len(truth))].count(False) <= 2
    assert all(task.targets[i] == truth[i] for i, row in enumerate(task.images.rows.tolist()) if row in labelled)
    run = Trainer(config(folder, "pseudo", task=PSEUDO, train={"steps": 1})).fit()
    report = json.loads((run / "classifier.json").read_text())
    pseudo = report["pseudo_labels"]
    assert pseudo["images"] == len(task) - 12 == sum(pseudo["images_by_class"].values()) and pseudo["of_images"] == 12
    assert pseudo["validation_accuracy"] > 0.8 and report["images"] == 12
    kept = json.loads((run / "pseudo_labels.json").read_text())  # for a student of the same images
    assert (kept["class_column"], kept["label_fraction"], kept["label_seed"]) == ("kind", 0.5, 0)
    given = dict(zip(task.images.hashes(), task.targets, strict=True))
    assert len(kept["images"]) == pseudo["images"] and not kept["images"].keys() & set(task.labelled.hashes())
    assert all(given[content] == int(name) for content, name in kept["images"].items())
    judge = pseudo_labels.guessing_judge(str(run), task.classes)  # that of generated images
    assert judge.classes == tuple((name,) for name in task.classes)
    guessed = [i for i, content in enumerate(task.images.hashes()) if content in kept["images"]]
    probabilities = judge.verdict(task.images.select(guessed))["probabilities"]
    assert probabilities.argmax(1).tolist() == [task.targets[i] for i in guessed] and probabilities.max(1).min() >= 0.5
    record = read_training_record(run / "classifier")
    assert len(record["labels"]["hashes"]) == 12 < len(record["hashes"]) == 24  # the CNN has seen them all


def test_pseudo_labels_are_made_once(folder, monkeypatch):
    first = LatentClassifierTask(config(folder, "again", task=PSEUDO))
    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "_train", None)
        assert LatentClassifierTask(config(folder, "again", task=PSEUDO)).targets == first.targets
        with pytest.raises(TypeError):  # other labels: another network
            LatentClassifierTask(config(folder, "again", task=PSEUDO | {"label_seed": 1}))


def test_images_for_the_temperatures_get_no_pseudo_label(folder, caplog):
    unsure = {
        "label_fraction": 0.75,
        "calibration_fraction": 0.5,
        "pseudo_labels": {"steps": 1, "threshold": 0.99, "resolution": 32},
    }
    task = LatentClassifierTask(config(folder, "pseudo_held", task=unsure))
    assert "no other image is surely 0, 1, 2" in caplog.text
    held = set(task._other_images["calibration"].rows.tolist())
    assert len(held) >= 9 and not held & set(task.images.rows.tolist())


def test_no_image_of_a_patient_for_the_temperatures_is_learnt_from(folder):
    """Patients have images of two classes: of those that are held out some images have no label."""
    few = CALIBRATED | {"calibration_fraction": 0.5, "label_fraction": 0.75, "pseudo_labels": {"steps": 1}}
    task = LatentClassifierTask(config(folder, "mixed", task=few))
    held, patients = task._other_images["calibration"], task._sources.column("patient")
    apart = rows_apart_from(task._sources, held)
    assert len(task._sources) == 24 > len(apart) + len(held)
    assert not {patients[row] for row in apart} & set(held.column("patient"))
    assert set(task.images.rows.tolist()) <= set(apart.tolist())


def test_copies_of_images_that_are_labelled_or_held_out_keep_no_guess(folder):
    images = load_images(str(folder / "images"), caption_column=None)
    hashes = images.hashes()
    kept = pseudo_labels.by_hash(images, {0: "a", 1: "b", 2: "c"}, (images.select([1, 5]), images.select([])))
    assert kept == {hashes[0]: "a", hashes[2]: "c"}


def test_pseudo_labels_need_every_image_to_be_of_a_class_and_some_without_a_label(folder, caplog):
    with pytest.raises(ValueError, match=r"there are images of 2: leave them out by data\.filter"):
        LatentClassifierTask(config(folder, "subset", task=PSEUDO | {"classes": ["0", "1"]}))
    every = PSEUDO | {"label_fraction": 1.0, "calibration_fraction": 0.0}
    assert len(LatentClassifierTask(config(folder, "every", task=every))) == 24
    assert "has nothing to label" in caplog.text


def test_strong_changes_differ_for_each_image_and_repeat_by_their_generator():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1) * 2 - 1
    changed = pseudo_labels.strongly_changed(image, torch.Generator().manual_seed(1))
    assert changed.shape == image.shape and changed.isfinite().all()
    assert all(not torch.equal(changed[i], changed[j]) for i in range(4) for j in range(i))
    assert torch.equal(changed, pseudo_labels.strongly_changed(image, torch.Generator().manual_seed(1)))
    assert all(0.02 < (each == 0).all(dim=0).float().mean() < 0.3 for each in changed)  # the blanked square


def test_the_record_says_which_labels_were_used(folder):
    task = {"label_fraction": 0.5, "label_seed": 1, "class_column": "kind"}
    run = Trainer(config(folder, "labels", task=task, train={"steps": 1})).fit()
    labelled = labelled_subset(config(folder, "labels", task=task), load_images(str(folder / "images")))[0]
    for part in ("classifier", "pipeline"):
        record = read_training_record(run / part)
        labels = record["labels"]
        assert labels["hashes"] == sorted(labelled.hashes()) and set(labels["hashes"]) <= set(record["hashes"])
        assert {name: labels[name] for name in task} == task and labels["classes"] == ["0", "1", "2"]
        assert labels["group_column"] == "patient"


def test_a_classifier_with_fewer_noise_levels_is_as_it_was(run):
    """Saved before the last level was added: its temperatures hold, the last one up to the end of the schedule."""
    levels, temperatures = [0.05, 0.2, 0.4, 0.6, 0.8], [1.0, 1.2, 1.4, 1.6, 2.0]
    classifier = load_classifier(run)
    classifier.register_to_config(temperature_levels=levels, temperatures=temperatures)
    classifier.save_pretrained(run / "older")
    found = load_classifier(run / "older").temperature(torch.tensor([0.0, 500.0, 800.0, 990.0]))[:, 0]
    assert found.tolist() == pytest.approx([1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize(
    ("classes", "groups", "expected"),
    [
        ("a" * 15 + "b" * 30, None, {"a": 3, "b": 6}),
        ("a" * 14 + "b" * 30, None, {"a": 3, "b": 6}),
        ("a" * 10 + "b" * 30, None, {}),  # two images are too few
        ("ab" * 15, [row // 2 for row in range(30)], {"a": 3, "b": 3}),  # patients with both classes
        ("a" * 15 + "b" * 15, ["x"] * 8 + ["y"] * 22, {}),  # a patient would be too much
        ("a" * 15 + "b" * 15, [""] * 30, {"a": 3, "b": 3}),  # not known: each a patient of its own
    ],
)
def test_what_is_held_out_is_a_share_of_every_class(classes, groups, expected):
    rows = held_out_rows(list(classes), groups, 0.2, 0)
    assert Counter(classes[row] for row in rows) == expected
    if groups is not None and expected and groups[0] != "":
        rest = set(range(len(classes))) - set(rows.tolist())
        assert not {groups[row] for row in rows} & {groups[row] for row in rest}


def test_the_base_comes_back_with_its_classifier_and_is_otherwise_as_it_was(run, folder):
    pipe, base = load_pipeline(run), load_pipeline(folder / "base")
    assert pipe.classifier.classes == ("0", "1", "2")
    for name in ("unet", "vae"):
        same = load_file(run / "pipeline" / name / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, same[key]) for key, value in getattr(base, name).state_dict().items())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_label=["0", "2"], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    for part in ("classifier", "pipeline"):
        assert len(read_training_record(run / part)["hashes"]) == 24


def test_guided_latents_are_of_the_class(run):
    """The classifier's own judgement, at no noise, of latents drawn for each class and for none."""
    pipe = load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "output_type": "latent"}

    def probability(name, **more):
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        latents = pipe(num_images_per_prompt=8, generator=generators, **options, **more).images
        with torch.no_grad():
            return pipe.classifier.log_probabilities(latents, 0).exp()[:, int(name)].mean().item()

    for name in pipe.classifier.classes:
        assert probability(name, class_label=name) > max(probability(name) + 0.1, 0.5)


@pytest.mark.parametrize("task", [{"dropout": 0.2}, {"backbone_learning_rate": 1e-4}], ids=["dropout", "two rates"])
def test_four_steps_are_two_and_two_more(folder, tmp_path, task):
    weights = []
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        for steps in stops:
            changes = {"output_dir": str(tmp_path / name), "train": {"steps": steps, "ema_decay": 0.9}}
            run = Trainer(config(folder, task=task, **changes)).fit()
        weights.append(load_file(run / "classifier" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_an_item_does_not_depend_on_its_batch(folder):
    task = LatentClassifierTask(config(folder, "items")).eval()
    torch.nn.init.normal_(task.classifier.head[1].weight)
    seeds, rows = torch.tensor([11, 12, 13]), range(3)
    batch = task.collate([{**task.latents.moments(row), "target": task.targets[row]} for row in rows])
    together = task(batch | {"seed": seeds}, 0)["loss"]
    alone = [task({name: v[i : i + 1] for name, v in (batch | {"seed": seeds}).items()}, 0)["loss"] for i in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-5, rtol=1e-4)


def test_a_share_of_the_labels_in_whole_patients_and_classes_drawn_evenly(folder):
    task = LatentClassifierTask(config(folder, "few", task={"label_fraction": 0.5, "label_seed": 1}))
    assert [task.targets.count(i) for i in range(3)] == [4, 4, 4]
    again = LatentClassifierTask(config(folder, "few", task={"label_fraction": 0.5, "label_seed": 1}))
    assert task.images.rows.tolist() == again.images.rows.tolist()
    other = LatentClassifierTask(config(folder, "few", task={"label_fraction": 0.5, "label_seed": 2}))
    assert task.images.rows.tolist() != other.images.rows.tolist()
    two = LatentClassifierTask(config(folder, "two", task={"classes": ["2", "0"]}))
    assert two.classes == ("2", "0")
    assert sorted(set(two.targets)) == [0, 1] and len(two) == 16
    assert two.row_weights[[0, 1]].sum() == pytest.approx(2 / 8)


def test_what_comes_from_the_base_may_have_a_learning_rate_of_its_own(folder):
    task = LatentClassifierTask(config(folder, "rates", task={"backbone_learning_rate": 1e-5}))
    rates = {id(p): group.get("lr") for group in task.parameter_groups(task.config.optim) for p in group["params"]}
    assert len(rates) == len(list(task.parameters()))
    assert rates[id(task.classifier.conv_in.weight)] == 1e-5
    assert rates[id(task.classifier.head[1].weight)] is None


def test_a_random_start_has_a_shape_of_its_own(folder):
    shape = {"initialize": "random", "block_out_channels": [16, 32], "layers_per_block": 2}
    task = LatentClassifierTask(config(folder, "random", task=shape))
    assert list(task.classifier.config.block_out_channels) == [16, 32]
    assert task.classifier(torch.zeros(2, 4, 4, 4), 5).shape == (2, 3)


def write_kinds(folder, kinds):
    """The images of `write_images` with other classes."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps(line | {"kind": kind}) for line, kind in zip(lines, kinds, strict=True))
    (folder / "metadata.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("kinds", "task", "message"),
    [
        (["a"] * 24, {}, r"at least two classes are needed; classes in the labelled data: a \(24\)"),
        (["a"] * 12 + ["b"] * 11 + ["c"], {}, "class 'c' has 1 image in the labelled data, at least 2 are needed"),
        (["a"] * 12 + ["b"] * 12, {"classes": ["a", "x"]}, r"class 'x' has no image .*a \(12\), b \(12\)"),
        (["a"] * 21 + ["b"] * 3, {"label_fraction": 0.2}, "class 'b' has 1 image"),
        (["a"] * 12 + ["b"] * 12, {"class_column": "finding"}, "no column 'finding'"),
        (["a"] * 12 + ["b"] * 12, {"label_fraction": 0.0}, "label_fraction must be above 0"),
    ],
)
def test_too_little_data_is_refused(folder, tmp_path, kinds, task, message):
    shutil.copytree(folder / "images", tmp_path / "images")
    shutil.copytree(folder / "base", tmp_path / "base")
    write_kinds(tmp_path / "images", kinds)
    with pytest.raises(ValueError, match=message):
        LatentClassifierTask(config(tmp_path, task=task, data={"group_column": None}))


def test_validation_needs_the_classes(folder, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    write_kinds(tmp_path / "images", ["x"] * 24)
    validation = {"source": str(tmp_path / "images"), "caption_column": None, "resolution": 32}
    with pytest.raises(ValueError, match="no validation image has one of the classes 0, 1, 2"):
        LatentClassifierTask(config(folder, "foreign", validation=validation))


def test_random_crops_and_unknown_keys_are_refused(folder):
    with pytest.raises(ValueError, match="does not go with cached latents"):
        config(folder, data={"crop": "random"})
    with pytest.raises(ValueError, match="unknown key task.latent_classifier.clases .did you mean classes"):
        config(folder, task={"clases": ["a"]})


class TestCommands:
    def test_generate_for_a_class(self, run, tmp_path):
        from typer.testing import CliRunner

        from medisyn.cli import app

        arguments = ["generate", "--model", str(run), "--class-label", "0", "--class-label", "2", "--steps", "2"]
        arguments += ["--num-images", "2", "--classifier-guidance", "5", "--out", str(tmp_path / "out")]
        for _ in range(2):  # the second time nothing is left to do
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
        assert [line["class_label"] for line in lines] == ["0", "0", "2", "2"]
        assert {line["classifier_guidance_scale"] for line in lines} == {5.0}
        elsewhere = [*arguments[:-1], str(tmp_path / "elsewhere"), "--classifier-guidance-interval", "0", "0.5"]
        for clip, code in (("0.5", 0), ("0.5", 0), ("0.7", 2)):  # another one is another request
            result = CliRunner().invoke(app, [*elsewhere, "--classifier-guidance-clip", clip])
            assert result.exit_code == code, result.output
        line = json.loads((tmp_path / "elsewhere" / "metadata.jsonl").read_text().splitlines()[0])
        assert (line["classifier_guidance_interval"], line["classifier_guidance_clip"]) == ([0.0, 0.5], 0.5)
        assert "classifier_guidance_clip" not in lines[0]

    @pytest.mark.parametrize(
        ("model", "label", "message"),
        [("run", "x", "valid: 0, 1, 2"), ("base", "0", "this model carries no latent classifier")],
    )
    def test_what_the_model_cannot_do(self, run, folder, tmp_path, model, label, message):
        from medisyn.cli import app
        from medisyn.generation.requests import Request, make_requests
        from medisyn.generation.synthesize import synthesize

        assert app is not None
        pipe = load_pipeline(run if model == "run" else folder / "base")
        with pytest.raises(ValueError, match=message):
            synthesize(pipe, make_requests([Request(class_label=label)]), tmp_path / "out")
        assert not (tmp_path / "out").exists()
