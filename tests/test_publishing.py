"""Publishing into a folder: what is in it, that stock diffusers loads it, and what is refused.

python -m pytest tests/test_publishing.py
"""

import getpass
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib import resources
from pathlib import Path

import pytest
import typer
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from medisyn import publishing
from medisyn.adapter_folder import make_manifest, weights_hash
from medisyn.adapter_training import prepare_adapter, save_adapter
from medisyn.backbone import load_pipeline, model_hash
from medisyn.card_metrics import metrics_of_report
from medisyn.cleaning import clean_file, find_private, without_paths
from medisyn.commands.publish import register
from medisyn.config import LoraConfig
from medisyn.console import OneLineErrors
from medisyn.generation.provenance import read_provenance
from medisyn.guidance import attach_classifier
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier
from medisyn.publishing import publish
from medisyn.training_record import write_training_record
from tests.components import tiny_pipeline
from tests.test_cards import REPORT

DATA = [{"name": "busi", "license": "CC BY-NC 4.0", "images": 3}]
HAND_WRITTEN = """Draws ribs.

## How it was made

In an afternoon.

## Limitations

* No lungs.

## Samples

Drawn by hand.

## Failures

![What goes wrong](images/failures.png)
"""


def report_of(subject):
    """A report with one measured number, as `medisyn evaluate` writes it."""
    sources = {"real": "/home/somebody/data/validation-*.parquet"}
    return REPORT | {"subject": subject, "sources": sources}


def make_run(folder, pipe):
    """A finished run with an evaluation, full of paths."""
    pipe.save_pretrained(folder / "pipeline")
    write_training_record(folder / "pipeline", {"hashes": ["0" * 16, "1" * 16], "datasets": DATA})
    config = {
        "output_dir": str(folder),
        "data": {"source": [f"{folder}/train.parquet"]},
        "task": {"type": "diffusion"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "evaluation").mkdir()
    report = report_of({"model": "run", "model_hash": model_hash(pipe)})
    (folder / "evaluation" / "report.json").write_text(json.dumps(report))
    Image.new("RGB", (8, 8)).save(folder / "evaluation" / "grid.png")  # shows real images
    return folder


def pipeline_with_classifier():
    """An unconditional pipeline that a latent classifier of two classes can guide."""
    pipe = tiny_pipeline(())
    classifier = MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, ("benign", "malignant"))
    return attach_classifier(pipe, classifier)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "chest", tiny_pipeline(("text", "labels")))


@pytest.fixture(scope="module")
def published(run):
    return publish(run, "owner/chest", dry_run=run.parent / "published")


def make_adapter(folder):
    """A LoRA on a Stable Diffusion of a few thousand parameters, in a run; the base is in `folder / "sd"`."""
    pipe = tiny_pipeline(vae="kl")
    base_hash = model_hash(pipe)
    prepare_adapter(pipe, "lora", LoraConfig(rank=2, alpha=6))
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.1)
    options = {"rank": 2, "alpha": 6, "captions": ["chest"], "training_data": DATA}
    manifest = make_manifest("ribs", "lora", "owner/sd", base_hash, ["text"], **options)
    adapter = folder / "run" / "adapter"
    save_adapter(pipe, adapter, manifest)
    write_training_record(adapter, {"hashes": ["0" * 16], "datasets": DATA})
    tiny_pipeline(vae="kl").save_pretrained(folder / "sd")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"task": {"base": str(folder / "sd")}}))
    Image.new("RGB", (8, 8)).save(adapter / "samples.png")
    about = {"model_hash": base_hash, "adapters": {"ribs": 1.0}}
    about["adapter_hash"] = hashlib.sha256(json.dumps([[weights_hash(adapter), 1.0]]).encode()).hexdigest()[:12]
    (adapter / "report.json").write_text(json.dumps(report_of(about)))
    return adapter


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path)


def files(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


class TestModel:
    def test_numbers_of_an_adapter_are_not_the_models(self, run, tmp_path):
        report = json.loads((run / "evaluation" / "report.json").read_text())
        report["subject"] |= {"adapters": {"ribs": 1.0}, "adapter_hash": "0" * 12}
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match="with an adapter"):
            publish(run, "owner/chest", dry_run=tmp_path / "out", report=tmp_path / "report.json")
        del report["notes"]
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match="not a report"):
            publish(run, "owner/chest", dry_run=tmp_path / "out", report=tmp_path / "report.json")

    def test_the_folder_is_complete(self, published):
        there = files(published)
        assert {"README.md", "LICENSE", "config.yaml", "report.json", "samples.png", "training_images.json"} <= there
        assert {"model_index.json", "medisyn_pipeline.py", "tokenizer/tokenizer.json"} <= there
        for part in ("unet", "vae"):
            assert f"{part}/diffusion_pytorch_model.safetensors" in there
        assert not [name for name in there if name.endswith((".bin", ".ckpt", ".partial")) or "grid" in name]
        card = ModelCard.load(published / "README.md")
        assert card.data.license == "cc-by-nc-4.0" and card.data.eval_results
        assert "busi" in card.text and "not for diagnosis" in card.text
        assert "CC BY-NC 4.0" in (published / "LICENSE").read_text()
        assert Image.open(published / "samples.png").text["synthetic"] == "true"

    def test_no_path_and_no_user_name_is_left(self, published, run):
        private = [str(run), str(run.parent), "/home/", str(Path.home()) + "/", f"/{getpass.getuser()}/"]
        for name, content in contents(published).items():
            assert not [text for text in private if text.encode() in content], name
        config = yaml.safe_load((published / "config.yaml").read_text())
        assert (config["output_dir"], config["data"]["source"]) == ("chest", ["train.parquet"])
        report = json.loads((published / "report.json").read_text())
        assert report["sources"] == {"real": "validation-*.parquet"}
        assert report["extractor"]["spec"] == "timm:lite0@lite0.pth"

    def test_stock_diffusers_loads_it_without_medisyn(self, published, tmp_path):
        script = """
            import sys
            sys.modules["medisyn"] = None  # any import of it raises ImportError
            from diffusers import DiffusionPipeline
            pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
            print(pipe("chest", labels="gc=1", num_inference_steps=1).images[0].size)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(published)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert done.stdout.strip() == "(32, 32)", done.stderr

    def test_a_classifier_goes_along(self, tmp_path):
        pipe = pipeline_with_classifier()
        out = publish(make_run(tmp_path / "run", pipe), "owner/guided", dry_run=tmp_path / "out")
        names = ("config.json", "diffusion_pytorch_model.safetensors", "medisyn_latent_classifier.py")
        held = {name for name in files(out) if name.startswith("classifier/")}
        assert held == {f"classifier/{name}" for name in names}
        loaded = load_pipeline(out)
        assert loaded.classifier.classes == ("benign", "malignant") and model_hash(loaded) == model_hash(pipe)

    def test_publishing_again_gives_the_same_bytes(self, published, run, tmp_path):
        again = publish(run / "pipeline", "owner/chest", dry_run=tmp_path / "again")
        assert contents(again) == contents(published)
        assert publish(run, "owner/chest", dry_run=again) == again  # replaces what it wrote
        assert contents(again) == contents(published)

    def test_numbers_of_another_model_are_refused(self, run, tmp_path):
        (tmp_path / "report.json").write_text(json.dumps(report_of({"model_hash": "0" * 12})))
        with pytest.raises(ValueError, match="about the model 000000000000, this one is"):
            publish(run, "owner/chest", dry_run=tmp_path / "out", report=tmp_path / "report.json", force=True)
        assert files(tmp_path) == {"report.json"}

    def test_refused_unless_forced(self, tmp_path):
        tiny_pipeline(()).save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="no measured numbers"):
            publish(tmp_path / "model", "owner/model", dry_run=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        publish(tmp_path / "model", "owner/model", dry_run=tmp_path / "out", force=True, license="mit")
        text = (tmp_path / "out" / "README.md").read_text()
        assert "forced although it has no measured numbers" in text and "mit is looser" in text
        assert "report.json" not in files(tmp_path / "out")

    def test_hand_written_sections_of_the_run(self, run, tmp_path):
        (tmp_path / "card.md").write_text("Draws chests.\n\n## Limitations\n\n* No ribs.\n")
        out = publish(run, "owner/chest", dry_run=tmp_path / "out", card=tmp_path / "card.md")
        assert "* No ribs." in (out / "README.md").read_text()
        for place in ("/home/somebody/notes", "/usr/lib/notes"):
            (tmp_path / "card.md").write_text(f"See {place}, not https://a.org{place} or 1/2/3.\n")
            with pytest.raises(ValueError, match="a path of this machine would be published, README.md: /[hu]"):
                publish(run, "owner/chest", dry_run=out, card=tmp_path / "card.md")
        assert "* No ribs." in (out / "README.md").read_text()  # the earlier one stays

    def test_a_report_gives_no_path_away_in_the_card(self, run, tmp_path):
        report = json.loads((run / "evaluation" / "report.json").read_text())
        report["notes"] = ["12 images of /nfs/me/real.parquet were left out."]
        report["extractor"]["spec"] = "/nfs/me/weights/resnet"
        (tmp_path / "report.json").write_text(json.dumps(report))
        out = publish(run, "owner/chest", dry_run=tmp_path / "out", report=tmp_path / "report.json")
        assert not [name for name, content in contents(out).items() if b"nfs" in content]
        text = (out / "README.md").read_text()
        assert "* 12 images of real.parquet were left out." in text and "| resnet |" in text

    def test_the_embedded_default_has_its_report_and_card(self, tmp_path, monkeypatch):
        """In a package of its own, whose model is tiny."""
        package = tmp_path / "medisyn"
        pipe = tiny_pipeline(("text",))
        pipe.save_pretrained(package / "pretrained")
        shutil.copy(Path(publishing.__file__).with_name("card_template.md"), package)
        found = resources.files
        monkeypatch.setattr(resources, "files", lambda name: package if name == "medisyn" else found(name))
        with pytest.raises(ValueError, match="no measured numbers"):
            publish("default", "owner/mini", dry_run=tmp_path / "out")
        (package / "pretrained" / "report.json").write_text(json.dumps(report_of({"model_hash": model_hash(pipe)})))
        (package / "pretrained" / "card.md").write_text(HAND_WRITTEN.partition("## Samples")[0])
        Image.new("RGB", (8, 8)).save(package / "pretrained" / "samples.png")
        assert model_hash(load_pipeline("default")) == model_hash(pipe)  # neither is taken for weights
        out = publish("default", "owner/mini", dry_run=tmp_path / "out")
        assert {"report.json", "card.md", "medisyn_pipeline.py"} <= files(out)
        text = (out / "README.md").read_text()
        assert 'load_pipeline("owner/mini")' in text and "In an afternoon." in text and "| 0.800 |" in text


class TestAgain:
    """What was published is published again, with nothing else at hand."""

    @pytest.fixture
    def first(self, adapter, tmp_path):
        (tmp_path / "hand").mkdir()
        (tmp_path / "hand" / "ribs.md").write_text(HAND_WRITTEN)
        (tmp_path / "hand" / "images").mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / "hand" / "images" / "failures.png")
        return publish(adapter, "owner/ribs", dry_run=tmp_path / "first", card=tmp_path / "hand" / "ribs.md")

    def test_nothing_is_lost(self, first, tmp_path):
        assert {"card.md", "images/failures.png", "report.json", "samples.png"} <= files(first)
        text = (first / "README.md").read_text()
        parts = [
            "Draws ribs.",
            "## How it was made",
            "* No lungs.",
            "images/failures.png",
            "samples.png)\n\nDrawn by hand.",
        ]
        assert all(text.count(part) == 1 for part in parts)
        again = publish(first, "owner/ribs", dry_run=tmp_path / "again")
        assert contents(again) == contents(first)
        assert publish(first, "owner/ribs", dry_run=again) == again  # its pictures are no foreign files

    def test_its_snippets_name_the_repository_that_was_asked_for(self, first, tmp_path):
        text = (publish(first, "else/where", dry_run=tmp_path / "again") / "README.md").read_text()
        assert 'adapter="else/where")' in text and "owner/ribs" not in text and text.count("# where\n") == 1

    def test_another_card_wins(self, first, tmp_path):
        (tmp_path / "other.md").write_text("Draws bones.\n")
        again = publish(first, "owner/ribs", dry_run=tmp_path / "again", card=tmp_path / "other.md")
        text = (again / "README.md").read_text()
        assert "Draws bones." in text and "ribs.\n" not in text and "How it was made" not in text
        assert (again / "card.md").read_text() == "Draws bones.\n" and "images/failures.png" not in files(again)

    def test_a_card_without_its_file_is_not_replaced(self, first, tmp_path):
        (first / "card.md").unlink()
        with pytest.raises(
            ValueError, match=r"hand-written sections \(How it was made, Failures\) that would be lost"
        ):
            publish(first, "owner/ribs", dry_run=tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_a_picture_that_is_missing_or_elsewhere_is_refused(self, adapter, tmp_path):
        for shown, error, words in (
            ("images/none.png", FileNotFoundError, "picture images/none.png, which is not beside it"),
            ("../grid.png", ValueError, "valid are .png files"),
        ):
            (tmp_path / "card.md").write_text(f"Ribs.\n\n![ribs]({shown})\n")
            with pytest.raises(error, match=words):
                publish(adapter, "owner/ribs", dry_run=tmp_path / "out", card=tmp_path / "card.md")

    def test_how_samples_were_drawn(self, adapter, tmp_path):
        (adapter / "samples.png").unlink()
        manifest = json.loads((adapter / "adapter.json").read_text())
        (adapter / "adapter.json").write_text(json.dumps(manifest | {"base_model": "sd"}))  # here, not on the Hub
        first = publish(tmp_path / "run", "owner/ribs", dry_run=tmp_path / "out")
        note = "Drawn when this was published, with the seeds 0 to"
        assert f"samples.png)\n\n{note}" in (first / "README.md").read_text()
        assert read_provenance(first / "samples.png")["drawn"].startswith(note)
        (tmp_path / "moved").mkdir()
        for name in files(first) - {"README.md"}:
            shutil.copy(first / name, tmp_path / "moved" / name)
        again = publish(tmp_path / "moved", "owner/ribs", dry_run=tmp_path / "again")
        assert contents(again) == contents(first)


class TestAdapter:
    def test_the_folder_is_complete_and_loads_in_a_stock_pipeline(self, adapter, tmp_path):
        out = publish(tmp_path / "run", "owner/ribs", dry_run=tmp_path / "out")
        weights = "pytorch_lora_weights.safetensors"
        expected = {weights, "adapter.json", "training_images.json", "samples.png", "report.json", "config.yaml"}
        assert files(out) == expected | {"README.md", "LICENSE"}
        assert not [name for name, content in contents(out).items() if b"somebody" in content]
        data = ModelCard.load(out / "README.md").data.to_dict()
        assert (data["base_model"], data["license_name"]) == ("owner/sd", "research-only")  # of an unknown base
        assert {"lora", "peft"} <= set(data["tags"])
        metrics = json.loads((out / "adapter.json").read_text())["metrics"]
        assert metrics == metrics_of_report(REPORT)  # travel with the adapter
        assert publish(out, "owner/ribs", dry_run=tmp_path / "again") and contents(tmp_path / "again") == contents(out)
        tiny_pipeline(vae="kl").export_stable_diffusion(tmp_path / "plain")
        stock = StableDiffusionPipeline.from_pretrained(tmp_path / "plain")
        stock.load_lora_weights(str(out))
        assert next(iter(stock.unet.peft_config.values())).lora_alpha == 6
        changed = load_file(out / weights)
        assert all((changed[name] == value).all() for name, value in load_file(adapter / weights).items())
        (adapter / "report.json").write_text(json.dumps(report_of({"model_hash": "0" * 12})))
        with pytest.raises(ValueError, match="not about this adapter"):
            publish(adapter, "owner/ribs", dry_run=tmp_path / "other")

    def test_no_path_is_left_in_the_weights(self, adapter, tmp_path):
        file = adapter / "pytorch_lora_weights.safetensors"
        options = json.dumps({"text_encoder.base_model_name_or_path": "/home/somebody/sd", "unet.r": 2})
        save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": options})
        (adapter / "report.json").unlink()  # of other bytes
        out = publish(adapter, "owner/ribs", dry_run=tmp_path / "out", force=True)
        assert not [name for name, content in contents(out).items() if b"somebody" in content]
        assert load_file(out / file.name).keys() == load_file(file).keys()

    def test_guidance_that_is_built_in_is_said_and_not_given_twice(self, adapter, tmp_path):
        manifest = json.loads((adapter / "adapter.json").read_text())
        (adapter / "adapter.json").write_text(json.dumps(manifest | {"built_in_guidance": 4.0}))
        card = (publish(tmp_path / "run", "owner/ribs", dry_run=tmp_path / "out") / "README.md").read_text()
        assert "Guidance 4 is built in" in card and 'pipe("chest", guidance_scale=1.0)' in card
        plain = publish(make_adapter(tmp_path / "plain"), "owner/ribs", dry_run=tmp_path / "other") / "README.md"
        assert "guidance_scale" not in plain.read_text()

    def test_samples_are_drawn_where_there_are_none(self, adapter, tmp_path):
        (adapter / "samples.png").unlink()
        manifest = json.loads((adapter / "adapter.json").read_text())
        (adapter / "adapter.json").write_text(json.dumps(manifest | {"base_model": "sd"}))
        out = publish(tmp_path / "run", "owner/ribs", dry_run=tmp_path / "out", force=True)
        assert "samples.png" in files(out)
        (tmp_path / "run" / "config.yaml").unlink()
        with pytest.raises(ValueError, match="no samples.png .*base 'sd' is not here"):
            publish(adapter, "owner/ribs", dry_run=tmp_path / "other", force=True)


class TestDryRunFolder:
    def test_what_publish_did_not_write_is_kept(self, run, published, tmp_path):
        for name in ("notes.txt", "README.md"):
            folder = tmp_path / name.partition(".")[0]
            folder.mkdir()
            (folder / name).write_text("mine")
            with pytest.raises(FileExistsError, match="did not write"):
                publish(run, "owner/chest", dry_run=folder)
            assert contents(folder) == {name: b"mine"}
        (published / "mine.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="did not write: mine.txt"):
            publish(run, "owner/chest", dry_run=published)
        (published / "mine.txt").unlink()
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="not a folder"):
            publish(run, "owner/chest", dry_run=tmp_path / "file")
        for inside in (run, run / "pipeline", run.parent):
            with pytest.raises(FileExistsError, match="choose another"):
                publish(run, "owner/chest", dry_run=inside)

    def test_an_interruption_leaves_nothing(self, run, tmp_path, monkeypatch):
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(publishing, "make_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish(run, "owner/chest", dry_run=tmp_path / "out")
        assert not list(tmp_path.iterdir())


class TestCleaning:
    def test_paths_become_names(self):
        given = {
            "a": "/data/x/train-*.parquet",
            "b": ["~/y.png", "C:\\me\\z.pt"],
            "_name_or_path": "/m",
            "c": "a@/b/c",
        }
        assert without_paths(given) == {"a": "train-*.parquet", "b": ["y.png", "z.pt"], "c": "a@c"}
        kept = ["https://a.org/b/c", "owner/name", "CT / normal", "and/or", "runs/chest", "</s>", 3, None, True]
        assert without_paths(kept) == kept

    def test_headers_of_weights(self, tmp_path):
        import torch

        file = tmp_path / "unet" / "a.safetensors"
        file.parent.mkdir()
        tensors = {"w": torch.arange(5.0), "v": torch.ones(3, dtype=torch.float16)}
        nested = json.dumps({"base_model_name_or_path": "/home/me/sd", "r": 2, "target_modules": ["to_q"]})
        save_file(tensors, file, metadata={"format": "pt", "options": nested, "from": "/home/me/x.pt"})
        assert find_private(tmp_path, ["/home/me"])
        clean_file(file)
        assert not find_private(tmp_path, ["/home/me"])
        loaded = load_file(file)
        assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
        assert b'\\"r\\": 2' in file.read_bytes()

    def test_what_is_left_is_found(self, tmp_path):
        for name, text in {
            "a.md": "in /home/me/x",
            "b.py": r"re.sub(r'/(\w+)/x', y)",
            "c.txt": "a/b https://x.y/home/z",
        }.items():
            (tmp_path / name).write_text(text)
        assert find_private(tmp_path) == ["a.md: /home/m"]


class TestCommand:
    @pytest.fixture
    def app(self):
        app = typer.Typer(cls=OneLineErrors)
        app.command()(lambda: None)  # a group needs two
        register(app)
        return app

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["absent", "owner/x", "--dry-run", "out"], "nothing to publish in 'absent'"),
            (["absent", "owner", "--dry-run", "out"], "owner/name"),
            (["", "owner/x"], "--run is empty"),
            (["RUN", "owner/x", "--dry-run", ""], "--dry-run is empty"),
            (["RUN", "owner/x", "--dry-run", "out", "--license", "beerware"], "valid are: research-only"),
            (["RUN", "owner/x", "--dry-run", "out", "--license", "mit"], "looser"),
            (["RUN", "owner/x", "--dry-run", "out", "--card", "absent.md"], "absent.md"),
            (["RUN", "owner/x", "--dry-run", "out", "--report", "absent.json"], "absent.json"),
            (["RUN"], "REPO"),
            (["RUN", "owner/x"], "offline mode is on"),
        ],
    )
    def test_bad_input_is_one_line(self, app, run, tmp_path, monkeypatch, arguments, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        arguments = [str(run) if argument == "RUN" else argument for argument in arguments]
        result = CliRunner().invoke(app, ["publish", *arguments])
        assert result.exit_code == 2, result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr
        assert not list(tmp_path.iterdir())

    def test_a_dry_run(self, app, run, published, tmp_path):
        result = CliRunner().invoke(app, ["publish", str(run), "owner/chest", "--dry-run", str(tmp_path / "out")])
        assert result.exit_code == 0 and "error" not in result.stderr
        assert result.stdout == f"the repository is in {tmp_path / 'out'}; nothing was uploaded\n"
        assert contents(tmp_path / "out") == contents(published)
