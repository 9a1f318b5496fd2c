"""Images made of real ones: what each strategy does with its parents, what it records, and what it refuses.

python -m pytest tests/test_generate_like.py
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from medisyn.cli import app
from medisyn.data.cache import module_hash
from medisyn.data.loading import load_images, pixel_hash
from medisyn.generation.embedding_prior import fit_prior, load_prior
from medisyn.generation.embedding_space import slerp
from medisyn.generation.manifold_requests import embed_images, heaviest, like_requests
from medisyn.generation.provenance import read_provenance
from medisyn.generation.requests import Request
from medisyn.generation.strategies import STRATEGIES, Mixture, Perturbation, SDEdit, parse_strategy
from medisyn.generation.synthesize import synthesize
from medisyn.training_record import read_training_record
from tests.components import IMAGE_WIDTH, tiny_pipeline
from tests.training import write_images

ROOT = Path(__file__).resolve().parent.parent
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(("image",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("real") / "images", 12)


@pytest.fixture(scope="module")
def images(folder):
    return load_images(str(folder))


@pytest.fixture(scope="module")
def embeddings(pipe, images):
    return embed_images(pipe, images)


def rows_of(requests, images):
    """The rows of the parents of each request."""
    row_of = {found: row for row, found in enumerate(images.hashes())}
    return [[row_of[parent] for parent in request.origin.parents] for request in requests]


# ---- what each strategy makes ---------------------------------------------------------------------------------------


def test_reconstruction_has_its_parents_embedding_and_label(pipe, images, embeddings):
    requests = like_requests(pipe, "reconstruction", images, 24, seed=5, label_column="kind")
    rows = [row for (row,) in rows_of(requests, images)]
    assert sorted(rows) == sorted([*range(12)] * 2) and len(set(rows[:12])) == 12  # each once before one comes again
    for request, row in zip(requests, rows, strict=True):
        torch.testing.assert_close(request.origin.embedding, embeddings[row])
        assert request.columns == {"kind": str(row % 3)} and request.origin.weights == (1.0,)
    assert [request.seed for request in requests] == list(range(5, 29))


def test_interpolation_lies_between_two_of_a_class(pipe, images, embeddings):
    requests = like_requests(pipe, "interpolation", images, 20, label_column="kind")
    weights = [request.origin.weights[1] for request in requests]
    assert len(set(weights)) == 20 and 0 <= min(weights) < 0.3 and 0.7 < max(weights) <= 1
    for request, (first, second) in zip(requests, rows_of(requests, images), strict=True):
        assert first != second and first % 3 == second % 3
        expected = slerp(embeddings[first], embeddings[second], request.origin.weights[1])
        torch.testing.assert_close(request.origin.embedding, expected)
    half = like_requests(pipe, "interpolation:method=lerp,weight=0.5,across=true", images, 20, label_column="kind")
    pairs = rows_of(half, images)
    assert any(first % 3 != second % 3 for first, second in pairs)
    for request, (first, second) in zip(half, pairs, strict=True):
        torch.testing.assert_close(request.origin.embedding, (embeddings[first] + embeddings[second]) / 2)
        assert request.origin.labels == (str(first % 3), str(second % 3))
        assert request.columns["kind"] == str(first % 3)  # of equal weights the first


def test_two_images_keep_their_order(pipe, images, embeddings):
    for request in like_requests(pipe, "interpolation:weight=0.25", images.select([3, 1]), 4):
        torch.testing.assert_close(request.origin.embedding, slerp(embeddings[3], embeddings[1], 0.25))


def test_mixtures_are_convex_combinations_of_nearest_classmates(pipe, images, embeddings):
    requests = like_requests(pipe, "mixture:neighbours=2,concentration=0.5", images, 12, label_column="kind")
    unit = torch.nn.functional.normalize(embeddings[:, 0], dim=1)
    for request, rows in zip(requests, rows_of(requests, images), strict=True):
        weights = torch.tensor(request.origin.weights)
        assert len(rows) == 3 and weights.min() >= 0 and weights.sum() == pytest.approx(1)
        torch.testing.assert_close(request.origin.embedding[0], weights @ embeddings[rows, 0])
        classmates = [row for row in range(rows[0] % 3, 12, 3) if row != rows[0]]
        nearest = sorted(classmates, key=lambda row: -float(unit[row] @ unit[rows[0]]))[:2]
        assert rows[1:] == nearest
        assert request.columns["kind"] == str(rows[0] % 3)


def test_perturbation_scatters_as_the_classes_do(pipe, images, embeddings):
    requests = like_requests(pipe, "perturbation:scale=0.5", images.select([0, 3, 6, 9]), 3000)
    rows = rows_of(requests, images)
    moved = torch.stack([r.origin.embedding[0] - embeddings[row, 0] for r, (row,) in zip(requests, rows, strict=True)])
    from medisyn.generation.embedding_space import within_class_covariance

    expected = 0.25 * within_class_covariance(embeddings[[0, 3, 6, 9], 0], ["all"] * 4)
    found = np.cov(moved.T.numpy())
    assert np.linalg.norm(found - expected.numpy()) < 0.15 * np.linalg.norm(expected)
    assert np.abs(moved.mean(0)).max() < 0.1 * expected.diagonal().max() ** 0.5 * 2


def test_sdedit_starts_from_the_image_and_needs_no_image_condition(images, tmp_path):
    pipe = tiny_pipeline(("text",))
    little = like_requests(pipe, "sdedit:strength=0.1", images.select([0]), 1)
    (file,) = synthesize(pipe, little, tmp_path / "little", num_inference_steps=10, strength=0.1)
    found = read_provenance(file)
    assert (found["strategy"], found["strength"]) == ("sdedit:strength=0.1", 0.1)
    assert found["parents"] == [images.content_hash(0)] and found["parent_weights"] == [1.0]

    pixels = np.random.default_rng(3).integers(0, 255, (32, 48, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels[:, 8:40]).save(tmp_path / "square.png")
    made = []
    for name in ("wide", "square"):  # the middle is taken, as in training; nothing is squeezed
        source = load_images((str(tmp_path / f"{name}.png"),), caption_column=None)
        (file,) = synthesize(pipe, like_requests(pipe, SDEdit(0.5), source), tmp_path / name, strength=0.5, **FAST)
        made.append(np.asarray(Image.open(file)))
    assert np.array_equal(*made)


def test_an_image_depends_on_its_seed_and_not_on_how_many_there_are(pipe, images, tmp_path):
    for text in ("interpolation", "mixture:neighbours=2", "perturbation"):
        few, many = (like_requests(pipe, text, images, number, seed=3, label_column="kind") for number in (4, 30))
        for one, other in zip(few, many, strict=False):
            assert one == other and torch.equal(one.origin.embedding, other.origin.embedding)
    first = synthesize(pipe, few, tmp_path / "out", **FAST)
    times = [file.stat().st_mtime_ns for file in first]
    synthesize(pipe, many[:6], tmp_path / "out", **FAST)
    assert [file.stat().st_mtime_ns for file in first] == times  # the run was continued
    with pytest.raises(FileExistsError, match="another request"):
        synthesize(pipe, like_requests(pipe, "perturbation:scale=0.1", images, 4, seed=3), tmp_path / "out", **FAST)


def test_embeddings_condition_the_images_and_come_from_the_cache(pipe, images, embeddings, tmp_path):
    torch.testing.assert_close(embed_images(pipe, images, tmp_path / "cache"), embeddings, rtol=1e-3, atol=1e-3)
    requests = like_requests(pipe, "reconstruction", images.select([0, 1]), 2, cache_dir=tmp_path / "cache")
    for request in requests:
        generator = torch.Generator().manual_seed(request.seed)
        expected = pipe(image_embeds=request.origin.embedding[None], generator=generator, **FAST).images[0]
        (file,) = synthesize(pipe, [request], tmp_path / str(request.seed), **FAST)
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("text", ["reconstruction", "interpolation:across=true", "mixture:neighbours=2"])
def test_exact_numbers_of_each_class_are_those_draws_that_still_count(pipe, images, text):
    wanted = {"0": 11, "2": 3}
    requests = like_requests(pipe, text, images, wanted, seed=3, label_column="kind")
    labels = [request.columns["kind"] for request in requests]
    assert {label: labels.count(label) for label in labels} == wanted
    many = {each.seed: each for each in like_requests(pipe, text, images, 200, seed=3, label_column="kind")}
    assert all(many[request.seed] == request for request in requests)
    with pytest.raises(ValueError, match="class of the real images 'other'.*0, 1, 2"):
        like_requests(pipe, text, images, {"0": 1, "other": 1}, label_column="kind")


# ---- the learned prior ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clouds():
    """Two classes, one of them with two humps, that share a covariance."""
    rng = np.random.default_rng(0)
    scatter = rng.normal(0, 1, (IMAGE_WIDTH, IMAGE_WIDTH)) / 3
    kinds = np.repeat(["even", "odd"], 300)
    centres = rng.normal(0, 6, (3, IMAGE_WIDTH))
    which = np.concatenate([np.zeros(300, int), rng.integers(1, 3, 300)])
    return torch.from_numpy(centres[which] + rng.normal(0, 1, (600, IMAGE_WIDTH)) @ scatter).float(), kinds.tolist()


def test_prior_has_the_moments_of_its_classes(clouds, pipe):
    vectors, labels = clouds
    prior = fit_prior(vectors, labels, encoder="e", components=(1, 2))
    assert prior.facts["components"]["odd"].startswith("2") and prior.facts["components"]["even"].startswith("1")
    for name in ("even", "odd"):
        own = vectors[[label == name for label in labels]]
        drawn = torch.stack([prior.sample(name, np.random.default_rng(i)) for i in range(2000)])
        assert (drawn.mean(0) - own.mean(0)).norm() < 0.1 * own.std(0).norm()
        covariance = torch.cov(own.T)
        assert (torch.cov(drawn.T) - covariance).norm() < 0.2 * covariance.norm()
    own = vectors[:300]
    assert prior.log_likelihood(own, "even").mean() > prior.log_likelihood(own, "odd").mean() + 10
    # against the normal density that one component is
    other = torch.distributions.MultivariateNormal(own.mean(0), torch.cov(own.T)).log_prob(own).mean()
    assert prior.log_likelihood(own, "even").mean() == pytest.approx(other, abs=4)


def test_prior_does_not_close_around_a_few_images():
    rng = np.random.default_rng(1)
    vectors = torch.from_numpy(rng.normal(0, 1, (43, 30))).float()
    prior = fit_prior(vectors, ["many"] * 40 + ["few"] * 3, encoder="e")
    assert prior.facts["components"]["few"] == "1 pooled"
    drawn = torch.stack([prior.sample("few", np.random.default_rng(i)) for i in range(100)])
    assert torch.cdist(drawn, vectors[40:]).min() > 1
    with pytest.raises(ValueError, match="'lonely' has one image"):
        fit_prior(vectors, ["many"] * 42 + ["lonely"], encoder="e")


def test_prior_is_saved_and_makes_images_without_parents(pipe, clouds, tmp_path):
    prior = fit_prior(*clouds, encoder=module_hash(pipe.image_encoder), label_column="kind", components=(1,))
    prior.save(tmp_path / "prior")
    again = load_prior(tmp_path / "prior")
    assert again.hash == prior.hash and again.counts == {"even": 300, "odd": 300}
    assert torch.equal(again.sample("odd", np.random.default_rng(1)), prior.sample("odd", np.random.default_rng(1)))
    requests = like_requests(pipe, "prior", None, 6, prior=again)
    assert sorted(request.columns["kind"] for request in requests) == ["even"] * 3 + ["odd"] * 3
    (file, *_) = synthesize(pipe, requests[:1], tmp_path / "out", **FAST)
    found = read_provenance(file)
    assert found["strategy"] == f"prior:prior={prior.hash}" and found["label_rule"] == "requested"
    assert "parents" not in found
    only = like_requests(pipe, "prior:label=odd", None, 3, prior=again, label_column="finding")
    assert [request.columns for request in only] == [{"finding": "odd"}] * 3

    with pytest.raises(ValueError, match="'none'.*even, odd"):
        like_requests(pipe, "prior:label=none", None, prior=again)
    with pytest.raises(ValueError, match="encoder"):
        like_requests(tiny_pipeline(("image",), seed=1), "prior", None, prior=again)
    with pytest.raises(FileNotFoundError, match="prior.safetensors"):
        load_prior(tmp_path)
    manifest = json.loads((tmp_path / "prior" / "prior.json").read_text())
    (tmp_path / "prior" / "prior.json").write_text(json.dumps(manifest | {"encoder": "other"}))
    with pytest.raises(ValueError, match="different priors"):
        load_prior(tmp_path / "prior")


def test_script_learns_a_prior_from_images(pipe, folder, images, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    command = typer.Typer()
    command.command()(runpy.run_path(str(ROOT / "scripts" / "embedding_prior.py"))["main"])
    options = ["--model", tmp_path / "model", "--label-column", "kind", "--group-column", "patient"]
    options += ["--held-out", folder, "--cache", tmp_path / "cache"]
    arguments = [str(each) for each in (folder, tmp_path / "prior", *options)]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.stderr
    assert "held_out_log_likelihood: " in done.stdout and "3 classes, 12 images" in done.stdout
    refused = CliRunner().invoke(command, [*arguments, "--label-column", "absent"])
    assert refused.exit_code == 2 and "no column 'absent'" in refused.stderr
    prior = load_prior(tmp_path / "prior")
    assert prior.classes == ("0", "1", "2") and prior.label_column == "kind"
    assert prior.encoder == module_hash(pipe.image_encoder)
    assert read_training_record(tmp_path / "prior")["hashes"] == sorted(images.hashes())
    result = generate(tmp_path / "model", tmp_path / "out", "--prior", tmp_path / "prior", "--num-images", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(line["kind"] for line in lines_of(tmp_path / "out")) == ["0", "1", "2"]


def test_command_perturbs_two_images(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    likes = ["--like", folder / "00.png", "--like", folder / "01.png"]
    result = generate(tmp_path / "model", tmp_path / "out", *likes, "--strategy", "perturbation", "--num-images", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(lines_of(tmp_path / "out")) == 2


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"sdedit"}))
def test_models_without_an_image_condition(name, images):
    with pytest.raises(ValueError, match="no image condition; it has: text. Valid here: sdedit, which needs none"):
        like_requests(tiny_pipeline(("text",)), name, images)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mixing", "Unknown strategy 'mixing'.*mixture"),
        ("mixture:k=3", "'k=3'.*neighbours=..., concentration="),
        ("mixture:neighbours=3,neighbours=4", "each of these once"),
        ("mixture:neighbours=3.5", "whole number, not '3.5'"),
        ("mixture:neighbours=0", "at least 1, not 0"),
        ("mixture:concentration=nan", "above 0, not nan"),
        ("reconstruction:x=1", "takes none"),
        ("interpolation:weight=2", "0..1, not 2.0"),
        ("interpolation:method=curve", "'curve'.*slerp, lerp"),
        ("interpolation:across=perhaps", "'perhaps'.*true, false"),
        ("perturbation:scale=much", "number, not 'much'"),
        ("perturbation:scale=-1", "at least 0, not -1.0"),
        ("sdedit:strength=0", "above 0 and at most 1, not 0.0"),
    ],
)
def test_strategies_that_are_not(text, words):
    with pytest.raises(ValueError, match=words):
        parse_strategy(text)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_is_written_as_it_is_read(name):
    strategy = STRATEGIES[name]()
    assert parse_strategy(str(strategy)) == strategy
    assert parse_strategy("mixture:neighbours=7, concentration=0.25") == Mixture(7, 0.25)


def test_data_that_does_not_do(pipe, images):
    with pytest.raises(ValueError, match="the class '[012]' has 4 images.*set neighbours to 3 or less"):
        like_requests(pipe, "mixture:neighbours=4", images, label_column="kind")
    for strategy in ("interpolation", "interpolation:across=true", "mixture", "mixture:neighbours=1"):
        with pytest.raises(ValueError, match="^strategy [a-z]*: needs two or more images$"):
            like_requests(pipe, strategy, images.select([0]))
    with pytest.raises(
        ValueError, match="there are 3 images, which leaves no 5 neighbours; set neighbours to 2 or less$"
    ):
        like_requests(pipe, "mixture", images.select([0, 1, 2]))
    lonely = images.select([0, 3, 1])  # the kinds 0, 0 and 1
    with pytest.raises(
        ValueError, match="the class '1' has 1 image, which leaves no 1 neighbours; leave out the class$"
    ):
        like_requests(pipe, "mixture:neighbours=1", lonely, 3, label_column="kind")
    with pytest.raises(ValueError, match="the class '1' has 1 image; it needs two or more, or across=true$"):
        like_requests(pipe, "interpolation", lonely, 3, label_column="kind")
    with pytest.raises(ValueError, match="two different images"):
        like_requests(pipe, "perturbation", images.select([0]))
    with pytest.raises(ValueError, match="no column 'finding'"):
        like_requests(pipe, "reconstruction", images, label_column="finding")
    with pytest.raises(ValueError, match="'caption'"):
        like_requests(pipe, "reconstruction", images, label_column="caption")
    with pytest.raises(ValueError, match="scripts/embedding_prior.py"):
        like_requests(pipe, "prior", None)


def test_patch_tokens_can_be_copied_and_joined_but_not_modelled(images):
    pipe = tiny_pipeline(("image",), image_tokens="patch")
    for name in ("reconstruction", "interpolation"):
        (request,) = like_requests(pipe, name, images)
        assert request.origin.embedding.shape == (4, IMAGE_WIDTH)
    for strategy in (Mixture(2), Perturbation()):
        with pytest.raises(ValueError, match="patch tokens.*Valid here: reconstruction, interpolation, sdedit"):
            like_requests(pipe, strategy, images)


def test_the_majority_is_by_weight():
    assert heaviest(["a", "b", "b"], [0.4, 0.3, 0.3]) == "b"
    assert heaviest(["a", "b"], [0.5, 0.5]) == "a"


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(("text", "image")).save_pretrained(folder)
    return folder


def generate(model, out, *arguments):
    command = ["generate", *arguments, "--model", model, "--out", out, "--steps", 2]
    return CliRunner().invoke(app, [str(part) for part in command])


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_command_with_files(model, folder, tmp_path):
    first, second = folder / "00.png", folder / "01.png"
    result = generate(model, tmp_path / "one", "--like", first, "--num-images", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    hashes = [pixel_hash(Image.open(file).convert("RGB")) for file in (first, second)]
    for line in lines_of(tmp_path / "one"):
        assert (line["strategy"], line["label_rule"], line["parents"]) == ("reconstruction", "inherited", hashes[:1])
    assert {file.name for file in (tmp_path / "one").glob("0*")} == {
        "00000_reconstruction.png",
        "00001_reconstruction.png",
    }

    pair = ("--like", first, "--like", second)
    result = generate(model, tmp_path / "two", "a retina", *pair, "--strategy", "interpolation:weight=0.25")
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = lines_of(tmp_path / "two")
    assert (line["prompt"], line["parents"], line["parent_weights"]) == ("a retina", hashes, [0.75, 0.25])
    assert line["strategy"] == "interpolation:method=slerp,weight=0.25,across=false"
    assert "parent_labels" not in line

    result = generate(model, tmp_path / "three", "--like", first, "--strategy", "sdedit", "--strength", 0.5)
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines_of(tmp_path / "three")[0]["strength"] == 0.5


def test_command_with_a_dataset(model, folder, tmp_path):
    data = ("--like-data", folder, "--label-column", "kind", "--cache", tmp_path / "cache")
    result = generate(model, tmp_path / "out", *data, "--strategy", "mixture:neighbours=2", "--num-images", 5)
    assert result.exit_code == 0
    trained = set(load_images(str(folder)).hashes())
    for line in lines_of(tmp_path / "out"):
        assert set(line["parents"]) < trained and len(set(line["parents"])) == 3
        assert set(line["parent_labels"]) == {line["kind"]} and line["label_rule"] == "majority"
    again = load_images(str(tmp_path / "out"))  # a labelled dataset like any other
    assert again.column("kind") == [line["kind"] for line in lines_of(tmp_path / "out")]
    assert again.column("parent_weights")[0] == lines_of(tmp_path / "out")[0]["parent_weights"]
    assert (tmp_path / "cache" / "cache.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--like", "IMAGE", "--like-data", "FOLDER"], "--like and --like-data"),
        (["--like-data", "FOLDER"], "needs a --strategy: reconstruction, interpolation"),
        (["--like-data", "FOLDER", "--strategy", "mixing"], "Unknown strategy 'mixing'"),
        (["--like-data", "absent.parquet", "--strategy", "mixture"], "absent.parquet"),
        (["--like-data", "FOLDER", "--label-column", "absent", "--strategy", "mixture"], "no column 'absent'"),
        (["x", "--strategy", "mixture"], "--strategy needs --like"),
        (["--like", "IMAGE", "--strategy", "prior"], "strategy prior needs --prior"),
        (["--prior", "absent"], "no prior in absent"),
        (["--like", "IMAGE", "--strategy", "sdedit", "--init-image", "IMAGE"], "leave out --init-image"),
        (["--like", "IMAGE", "--label-column", "kind"], "--label-column is of --like-data"),
        (["--like", "IMAGE", "--strategy", ""], "--strategy is empty"),
    ],
)
def test_command_refuses_before_a_model_is_loaded(folder, tmp_path, arguments, words):
    named = {"IMAGE": folder / "00.png", "FOLDER": folder}
    result = generate("absent", tmp_path / "out", *(named.get(each, each) for each in arguments))
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_noise_is_for_models_that_were_trained_with_it(model, folder, tmp_path):
    result = generate(model, tmp_path / "out", "--like", folder / "00.png", "--image-noise", 0.2)
    assert result.exit_code == 2 and "which was trained without any, not 0.2" in result.stderr


def test_command_for_a_model_without_an_image_condition(folder, tmp_path):
    tiny_pipeline(("text",)).save_pretrained(tmp_path / "text")
    result = generate(tmp_path / "text", tmp_path / "out", "--like", folder / "00.png")
    assert result.exit_code == 2 and "no image condition" in result.stderr
    result = generate(tmp_path / "text", tmp_path / "out", "--like", folder / "00.png", "--strategy", "sdedit")
    assert (result.exit_code, result.stderr) == (0, "")


def test_template_conditions_go_beside_the_embedding(images):
    pipe = tiny_pipeline(("text", "image"))
    (request,) = like_requests(pipe, "reconstruction", images.select([0]), template=Request(prompt="a retina"))
    assert (request.prompt, request.caption()) == ("a retina", "a retina; reconstruction")
