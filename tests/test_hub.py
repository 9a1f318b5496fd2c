"""Models and adapters of the Hub, on a local stand-in: loading by name, and what is said when that is not possible.

python -m pytest tests/test_hub.py
"""

import hashlib
import json
import shutil

import pytest
from PIL import Image

from tests.components import tiny_pipeline
from tests.hub import LocalHub, Repository

# Publishes, once or twice, then prints what it said; the stand-in of the command line as long as it is not registered.
PUBLISH = """
    import json, sys
    import typer
    from typer.testing import CliRunner
    from medisyn.commands.publish import register
    from medisyn.console import OneLineErrors
    app = typer.Typer(cls=OneLineErrors)
    app.command()(lambda: None)
    register(app)
    result = CliRunner().invoke(app, ["publish", *{arguments!r}])
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""

# Runs several command lines in one process; prints [exit code, stderr] of each as JSON.
COMMANDS = """
    import json, sys
    from typer.testing import CliRunner
    from medisyn.cli import app
    results = []
    for arguments in json.loads(sys.argv[1] if len(sys.argv) > 1 else {arguments!r}):
        result = CliRunner().invoke(app, arguments)
        results.append([result.exit_code, result.stderr])
    print(json.dumps(results))
"""


def commands(hub, *lines, **environment):
    done = hub.python(COMMANDS.format(arguments=json.dumps([list(map(str, line)) for line in lines])), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def generate(out, **options):
    named = [text for name, value in options.items() for text in (f"--{name}", value)]
    return ["generate", "chest", "--steps", "2", "--out", out, *named]


def lora_of(pipe, folder):
    """A random LoRA of the UNet, as other software publishes it."""
    import peft
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=weights, **_collate_lora_metadata({"unet": pipe.unet}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with LocalHub(folder) as hub:
        pipe = tiny_pipeline(vae="kl")
        pipe.export_stable_diffusion(folder / "sd")
        index = json.loads((folder / "sd" / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        (folder / "sd" / "model_index.json").write_text(json.dumps(index))
        (folder / "sd" / "safety_checker").mkdir()
        (folder / "sd" / "safety_checker" / "model.safetensors").write_bytes(b"not wanted")
        (folder / "sd" / "v1-5-pruned.ckpt").write_bytes(b"not wanted")
        weights = folder / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
        shutil.copy(weights, weights.with_suffix(".bin"))
        shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
        hub.add("stable-diffusion-v1-5/tiny", folder / "sd")
        hub.add("owner/gated", folder / "sd", gated=True)
        for file in weights.parent.glob("*.safetensors"):
            file.unlink()
        hub.add("owner/pickled", folder / "sd")
        lora_of(pipe, folder / "lora")
        hub.add("user/lora", folder / "lora")
        hub.add("user/gated", folder / "lora", gated=True)
        lora = folder / "lora" / "pytorch_lora_weights.safetensors"
        lora.rename(lora.with_suffix(".bin"))
        hub.add("user/pickled", folder / "lora")
        yield hub


def test_a_model_and_an_adapter_of_the_hub_generate(hub, tmp_path):
    model, adapter = "stable-diffusion-v1-5/tiny", "user/lora"
    plain, adapted, again = commands(
        hub,
        generate(tmp_path / "plain", model=model),
        generate(tmp_path / "adapted", model=model, adapter=adapter),
        ["info", model],
    )
    assert [plain, adapted, again] == [[0, ""]] * 3
    images = [next((tmp_path / name).glob("0*.png")).read_bytes() for name in ("plain", "adapted")]
    assert images[0] != images[1]
    # nothing else is downloaded: no pickles, no safety checker, no second precision
    asked = {path.rpartition("main/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert not [path for path in asked if path.endswith((".bin", ".ckpt")) or "safety" in path or "fp16" in path]
    # what was downloaded before needs no network
    offline = commands(hub, ["info", model], generate(tmp_path / "again", model=model), HF_HUB_OFFLINE="1")
    assert offline == [[0, ""]] * 2
    nowhere = commands(hub, generate(tmp_path / "c", model=model, adapter=adapter), HF_ENDPOINT="http://127.0.0.1:9")
    assert nowhere == [[0, ""]]


def test_a_revision_is_pinned_after_an_at_sign(hub, tmp_path):
    hub.repositories["owner/moving"] = repository = Repository()
    repository.commit(hub.repositories["stable-diffusion-v1-5/tiny"].files)
    first = repository.head
    repository.commit({"README.md": b"moved"})
    assert commands(hub, ["info", f"owner/moving@{first}"]) == [[0, ""]]
    assert commands(hub, ["info", f"owner/moving@{first}"], HF_HUB_OFFLINE="1") == [[0, ""]]
    cases = {
        "newest": ({"model": "owner/moving"}, ["'owner/moving' is not in diffusers' format"]),
        "unknown": ({"model": "owner/moving@v9"}, ["owner/moving has no branch, tag or commit v9"]),
    }
    results = commands(hub, *(generate(tmp_path / "out", **options) for options, _ in cases.values()))
    check(results, cases, tmp_path / "out")


def test_refusals_say_what_and_why_and_what_to_do(hub, tmp_path):
    model = "stable-diffusion-v1-5/tiny"
    cases = {
        "gated model": ({"model": "owner/gated"}, ["'owner/gated' is gated", f"{hub.endpoint}/owner/gated", "log in"]),
        "missing model": ({"model": "owner/none"}, ["no model 'owner/none'", "none of this name", "check the name"]),
        "pickled model": ({"model": "owner/pickled"}, ["unet has pickled weights only", ".safetensors", "any code"]),
        "adapter as model": ({"model": "user/lora"}, ["'user/lora' is an adapter, not a model"]),
        "gated adapter": ({"model": model, "adapter": "user/gated"}, ["adapter 'user/gated' is gated", "log in"]),
        "missing adapter": ({"model": model, "adapter": "user/none"}, ["no adapter 'user/none'", "check the name"]),
        "pickled adapter": ({"model": model, "adapter": "user/pickled"}, ["adapter 'user/pickled' has pickled"]),
        "model as adapter": ({"model": model, "adapter": model}, ["is a whole model"]),
    }
    results = commands(hub, *(generate(tmp_path / "out", **options) for options, _ in cases.values()))
    check(results, cases, tmp_path / "out")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, ["offline mode is on (HF_HUB_OFFLINE)", "go online"]),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["http://127.0.0.1:9 cannot be reached", "check the network"]),
    ],
    ids=["offline", "no network"],
)
def test_without_a_hub(hub, tmp_path, environment, words):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    cases = {
        "model": ({"model": "owner/model"}, ["no model 'owner/model'", *words]),
        "adapter": ({"model": tmp_path / "model", "adapter": "user/other"}, ["no adapter 'user/other'", *words]),
    }
    results = commands(hub, *(generate(tmp_path / "out", **options) for options, _ in cases.values()), **environment)
    check(results, cases, tmp_path / "out")


def check(results, cases, out):
    for (code, stderr), (name, (_, words)) in zip(results, cases.items(), strict=True):
        assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, (name, stderr)
        assert all(word in stderr for word in words), (name, stderr)
    assert not out.exists()


def test_nothing_private_goes_into_a_public_repository(hub, tmp_path):
    from tests.test_publishing import make_run

    run = make_run(tmp_path / "run", tiny_pipeline(("text",)))
    Image.new("RGB", (8, 8)).save(run / "samples.png")
    results = []
    for more in ([], ["--private"]):
        done = hub.python(PUBLISH.format(arguments=[str(run), "tester/open", *more]))
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
        if not more:
            hub.requests.clear()
    assert results[0][0] == 0
    code, _, stderr = results[1]
    assert code == 2 and stderr.startswith("error: tester/open is there already and public")
    assert not any(method == "PUT" for method, _ in hub.requests)


def test_push_survives_a_failure_and_the_result_loads_by_name(hub, tmp_path):
    from medisyn.backbone import model_hash
    from tests.test_publishing import contents, make_run

    pipe = tiny_pipeline(("text", "labels"))
    run = make_run(tmp_path / "run", pipe)
    Image.new("RGB", (8, 8)).save(run / "samples.png")
    name, lost = "tester/chest", "unet/diffusion_pytorch_model.safetensors"
    hub.failing = {hashlib.sha256((run / "pipeline" / lost).read_bytes()).hexdigest()}
    arguments = [str(run), name, "--private"]

    def publish(*more):
        done = hub.python(PUBLISH.format(arguments=[*arguments, *more]))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    code, _, stderr = publish()
    assert code == 2 and stderr.startswith("error: the upload to tester/chest stopped") and stderr.count("\n") == 1
    assert lost in stderr and "The same command again continues" in stderr
    assert set(hub.repositories[name].files) == {".gitattributes"}  # a commit is whole or not there
    arrived = set(hub.stored)
    assert arrived
    hub.failing.clear()
    hub.requests.clear()
    code, stdout, stderr = publish()
    assert (code, stdout, stderr) == (0, f"published: {hub.endpoint}/{name}\n", "")
    sent = {path.rpartition("/")[2] for method, path in hub.requests if method == "PUT"}
    assert sent and not sent & arrived  # nothing is sent twice
    assert hub.repositories[name].private

    # what a dry run writes is what was uploaded
    assert publish("--dry-run", str(tmp_path / "dry"))[0] == 0
    there = {path: content for path, content in hub.repositories[name].files.items() if path != ".gitattributes"}
    assert contents(tmp_path / "dry") == there

    done = hub.python(
        f"""
        import medisyn
        from medisyn.backbone import model_hash
        print(model_hash(medisyn.load_pipeline({name!r})))
        medisyn.MediSynPipeline.from_pretrained({name!r}, trust_remote_code=True)
        """
    )
    assert done.stdout.split() == [model_hash(pipe)], done.stderr
    stock = hub.python(
        f"""
        import sys
        sys.modules["medisyn"] = None
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({name!r}, trust_remote_code=True)
        print(pipe("chest", labels="gc=1", num_inference_steps=1).images[0].size)
        """,
        cache="another-cache",
    )
    assert stock.stdout.strip() == "(32, 32)", stock.stderr
    # a private repository is not there for others
    ((code, stderr),) = commands(hub, ["info", name], HF_TOKEN="", cache="of-others")
    assert code == 2 and "or a private one" in stderr


def test_an_adapter_is_pushed_loads_by_name_and_refuses_another_base(hub, tmp_path):
    from medisyn.adapter_folder import weights_hash
    from medisyn.backbone import base_hash
    from tests.test_publishing import contents, make_adapter

    adapter = make_adapter(tmp_path)
    (adapter / "card.md").write_text("Draws ribs.\n\n## How it was made\n\nAt night.\n")
    other = tiny_pipeline(vae="kl", seed=1)
    other.save_pretrained(tmp_path / "other")
    hub.add("owner/sd", tmp_path / "sd")
    hub.add("owner/other", tmp_path / "other")
    done = hub.python(PUBLISH.format(arguments=[str(tmp_path / "run"), "tester/ribs"]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, f"published: {hub.endpoint}/tester/ribs\n", ""]
    there = hub.repositories["tester/ribs"].files
    for name in ("pytorch_lora_weights.safetensors", "adapter.json", "report.json", "card.md", "samples.png"):
        assert name in there
    done = hub.python(
        """
        import medisyn, torch
        from medisyn.lora import loaded_adapters
        def draw(pipe):
            generator = torch.Generator().manual_seed(0)
            return pipe("chest", num_inference_steps=1, generator=generator, output_type="np").images
        pipe = medisyn.load_pipeline("owner/sd", adapter="tester/ribs")
        print(*(each.hash for each in loaded_adapters(pipe).values()))
        print((draw(pipe) != draw(medisyn.load_pipeline("owner/sd"))).any())
        """
    )
    assert done.stdout.split() == [weights_hash(adapter), "True"], done.stderr
    info, (code, stderr) = commands(
        hub,
        ["info", "tester/ribs"],
        generate(tmp_path / "out", model="owner/other", adapter="tester/ribs"),
    )
    assert info == [0, ""]
    own = json.loads((adapter / "adapter.json").read_text())["base_hash"]
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "'tester/ribs' was trained on owner/sd" in stderr and own in stderr and base_hash(other) in stderr
    assert own != base_hash(other) and not (tmp_path / "out").exists()

    # the downloaded folder can be published again as it is
    done = hub.python(
        f"""
        from huggingface_hub import snapshot_download
        from medisyn.publishing import publish
        publish(snapshot_download("tester/ribs"), "tester/ribs", dry_run={str(tmp_path / "again")!r})
        """
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "again") == {
        name: content for name, content in there.items() if name != ".gitattributes"
    }


def test_a_classifier_comes_along_without_its_code(hub, tmp_path):
    from medisyn.backbone import model_hash
    from medisyn.publishing import publish
    from tests.test_publishing import make_run, pipeline_with_classifier

    pipe, name = pipeline_with_classifier(), "owner/guided"
    hub.add(name, publish(make_run(tmp_path / "run", pipe), name, dry_run=tmp_path / "repository"))
    hub.requests.clear()
    done = hub.python(
        f"""
        import medisyn
        from medisyn.backbone import model_hash
        pipe = medisyn.load_pipeline({name!r})
        print(model_hash(pipe), *pipe.classifier.classes)
        """
    )
    assert done.stdout.split() == [model_hash(pipe), "benign", "malignant"], done.stderr
    assert not [path for _, path in hub.requests if path.endswith(".py")]
    stock = hub.python(
        f"""
        import sys
        sys.modules["medisyn"] = None
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({name!r}, trust_remote_code=True)
        print(pipe(class_label="benign", num_inference_steps=1).images[0].size)
        """,
        cache="another-cache",
    )
    assert stock.stdout.strip() == "(32, 32)", stock.stderr


def test_push_without_a_right_token(hub, tmp_path):
    from tests.test_publishing import make_run

    run = make_run(tmp_path / "run", tiny_pipeline(()))
    Image.new("RGB", (8, 8)).save(run / "samples.png")
    for token, words in (("hf_wrong", "refuses this token"), ("", "not logged in")):
        done = hub.python(PUBLISH.format(arguments=[str(run), "tester/other"]), cache="no-login", HF_TOKEN=token)
        code, _, stderr = json.loads(done.stdout.splitlines()[-1])
        assert code == 2 and words in stderr and stderr.count("\n") == 1
    assert "tester/other" not in hub.repositories


def test_pickles_are_never_downloaded(hub):
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".ckpt"))]
