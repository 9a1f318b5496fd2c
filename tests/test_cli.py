"""The `medisyn` command on a tiny model: what each command prints and writes, and how it stops.

python -m pytest tests/test_cli.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import medisyn
from medisyn.cli import app
from medisyn.commands.arguments import model_name, parse_guidance
from medisyn.doctor import format_findings
from medisyn.generation.provenance import read_provenance
from medisyn.info import describe, format_description
from medisyn.prompts import demo_prompts
from medisyn.training_record import write_training_record
from tests.components import tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--steps", "2"]


def medisyn_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments, **environment):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "medisyn", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(("text", "labels")).save_pretrained(folder)
    return folder


def test_version_and_help():
    assert medisyn_command("--version").stdout == f"medisyn {medisyn.__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        result = medisyn_command(*arguments)
        assert result.exit_code == 0
        assert all(command in result.stdout for command in ("generate", "train", "evaluate", "info", "doctor"))


def test_help_needs_no_torch():
    code = "import sys; from medisyn.cli import main; sys.argv[1:] = ['generate', '--help']\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_in_a_process_of_its_own(model, tmp_path):
    process = start("generate", "a retina", "--labels", "gc=1", "--model", model, "--out", tmp_path / "out", *FAST)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert stdout == f"1 image, metadata.jsonl and grid.png are in {tmp_path / 'out'}\n"
    (file,) = (tmp_path / "out").glob("0*.png")
    found = read_provenance(file)
    assert (found["prompt"], found["labels"], found["model"]) == ("a retina", {"gc": "1"}, "tiny")


def test_generate_every_prompt_with_every_label_set(model, tmp_path):
    labels = ["--labels", "gc=1, eye_side=left", "--labels", "gc=0"]
    options = ["--num-images", 2, "--seed", 10, "--guidance", "text=2,labels=1.5", "--scheduler", "ddim", "--size", 64]
    result = medisyn_command(
        "generate", "a", "b", *labels, *options, *FAST, "--model", model, "--out", tmp_path, "--negative-prompt", "c"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["labels"]["gc"]) for line in lines[::2]] == [
        ("a", "1"),
        ("a", "0"),
        ("b", "1"),
        ("b", "0"),
    ]
    assert [line["seed"] for line in lines] == list(range(10, 18))
    assert lines[0]["guidance_scale"] == {"text": 2.0, "labels": 1.5}
    assert (lines[0]["scheduler"], lines[0]["negative_prompt"]) == ("DDIMScheduler", "c")
    assert Image.open(tmp_path / lines[0]["file_name"]).size == (64, 64)


def test_generate_demo_shows_every_modality(model, tmp_path):
    result = medisyn_command("generate", "--demo", "--model", model, "--out", tmp_path, *FAST)
    assert result.exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [one.prompt for one in demo_prompts()]
    # Their prompts are longer than the window of the tiny encoder, which is said once, not for each batch.
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("warning: ") and "window" in warning


def test_generate_from_images_and_files(tmp_path):
    tiny_pipeline(("image",)).save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").save(tmp_path / "image.png")
    image = tmp_path / "image.png"
    result = medisyn_command(
        *("generate", "--like", image, "--init-image", image, "--strength", 0.5, "--model", tmp_path / "model"),
        *("--out", tmp_path / "out", *FAST),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    (file,) = (tmp_path / "out").glob("0*.png")
    assert read_provenance(file)["strength"] == 0.5


def test_generate_from_a_prompts_file_and_without_conditions(model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a", "labels": {"gc": 1}, "modality": "CT"}\n{"prompt": "b"}\n'
    )
    result = medisyn_command(
        "generate", "--prompts-file", tmp_path / "prompts.jsonl", "--model", model, "--out", tmp_path / "out", *FAST
    )
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert lines[0]["modality"] == "CT" and lines[0]["labels"] == {"gc": "1"} and "labels" not in lines[1]
    tiny_pipeline(()).save_pretrained(tmp_path / "unconditional")
    result = medisyn_command("generate", "--model", tmp_path / "unconditional", "--out", tmp_path / "any", *FAST)
    assert (result.exit_code, result.stderr) == (0, "")


def test_default_folder_is_the_requests_own(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt in ("a retina", "a lung", "a lung"):
        assert medisyn_command("generate", prompt, "--model", model, *FAST).exit_code == 0
    more = medisyn_command("generate", "a lung", "--num-images", 2, "--model", model, *FAST)
    assert more.exit_code == 0
    retina, lung = sorted((tmp_path / "outputs").iterdir(), key=lambda folder: "lung" in folder.name)
    assert retina.name.startswith("a_retina-") and len(list(lung.glob("0*.png"))) == 2


def test_default_folder_of_several_prompts_depends_on_the_number_of_images(model, tmp_path, monkeypatch):
    """Image 1 shows another prompt when there are more images of the first one."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 1):
        result = medisyn_command("generate", "a", "b", "--num-images", number, "--model", model, *FAST)
        assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(len(list(folder.glob("0*.png"))) for folder in (tmp_path / "outputs").iterdir()) == [2, 4]


def test_refusal_names_the_way_out(model, tmp_path):
    arguments = ["--model", model, "--out", tmp_path, *FAST]
    assert medisyn_command("generate", "a", *arguments).exit_code == 0
    refused = medisyn_command("generate", "b", *arguments)
    assert refused.exit_code == 2 and "overwrite" in refused.stderr
    assert medisyn_command("generate", "b", *arguments, "--overwrite").exit_code == 0
    assert [file.name for file in tmp_path.glob("0*.png")] == ["00000_b.png"]


def test_interrupted_run_keeps_what_is_finished_and_continues(model, tmp_path):
    arguments = ["generate", "a", "--num-images", 400, "--batch-size", 1, "--model", model, "--out", tmp_path, *FAST]
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("0*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stderr == "interrupted; what is finished is kept, and the same command continues\n"
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == sorted(file.name for file in tmp_path.glob("0*.png"))
    assert 0 < len(lines) < 400
    times = {line["file_name"]: (tmp_path / line["file_name"]).stat().st_mtime_ns for line in lines}
    arguments[3] = len(lines) + 2
    assert medisyn_command(*arguments).exit_code == 0
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    assert len(list(tmp_path.glob("0*.png"))) == len(lines) + 2


# ---- info, doctor, train --------------------------------------------------------------------------------------------


def test_info_says_what_a_model_is(model, tmp_path):
    tiny_pipeline(("text", "labels")).save_pretrained(tmp_path / "run" / "pipeline")
    folder = tmp_path / "run" / "pipeline"
    data = {"hashes": ["0" * 16] * 3, "datasets": [{"name": "busi", "license": "CC0", "images": 3}], "config": ""}
    (folder / "training_images.json").write_text(json.dumps(data))
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    result = medisyn_command("info", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    for fact in ("UNet2DConditionModel", "text, labels", "Glaucoma (binary): 0, 1", "right, left", "32 x 32"):
        assert fact in result.stdout
    for fact in ("DPMSolverMultistepScheduler, v_prediction", "busi", "CC0", "cc-by-nc-4.0", "not for diagnosis"):
        assert fact in result.stdout
    facts = json.loads(medisyn_command("info", folder, "--json").stdout)
    assert facts["training_data"] == {"images": 3, "datasets": data["datasets"]}
    assert facts["model"] == "run" and len(facts["hash"]) == 12
    assert facts["components"]["unet"]["parameters"] > 10_000
    assert json.loads(medisyn_command("info", model, "--json").stdout)["training_data"] is None


def test_info_reads_the_licence_from_the_record_then_the_card_then_the_data(tmp_path):
    pipe = tiny_pipeline(())
    pipe.save_pretrained(tmp_path)
    pipe.register_to_config(_name_or_path=str(tmp_path))

    def stated(**record):
        write_training_record(tmp_path, {"hashes": [], **record})
        text = format_description(describe(pipe, "tiny"))
        return next(line for line in text.splitlines() if line.startswith("licence")).removeprefix("licence").strip()

    free, restricted = {"name": "a", "license": "CC BY 4.0"}, {"name": "b", "license": "CC BY-NC 4.0"}
    assert stated(datasets=[]) == stated(datasets=[free]) == "not stated"
    assert stated(datasets=[free, restricted]) == "research only (see the training data)"
    assert stated(datasets=[{"name": "c", "images": 3}]) == "research only (see the training data)"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert stated(datasets=[restricted]) == "mit"
    assert stated(datasets=[restricted], license="cc-by-nc-4.0") == "cc-by-nc-4.0"


def test_info_of_an_unconditional_model():
    assert "none (unconditional)" in format_description(describe(tiny_pipeline(()), "tiny"))


def test_info_says_what_an_adapter_is(tmp_path):
    from tests.test_publishing import make_adapter, publish

    adapter = make_adapter(tmp_path)
    metrics = [{"name": "precision", "subset": "all", "value": 0.25, "real": 0.875, "images": 600, "extractor": "x"}]
    schema = {"name": "ribs", "fields": {"grade": {"type": "ordinal", "values": ["0", "1"], "display": "Grade"}}}
    manifest = json.loads((adapter / "adapter.json").read_text())
    changed = manifest | {"metrics": metrics, "label_schema": schema, "tokens": ["costal"]}
    (adapter / "adapter.json").write_text(json.dumps(changed))
    result = medisyn_command("info", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (0, "")
    for fact in (
        f"owner/sd, hash {manifest['base_hash']}",
        "LoRA, rank 2, alpha 6",
        "conditions: text",
        "new words: costal",
    ):
        assert fact in result.stdout
    for fact in (
        "Grade (ordinal): 0, 1",
        "captions:\n  chest",
        "busi",
        "CC BY-NC 4.0",
        "0.250    0.875",
        "research only (see the training data)",
    ):
        assert fact in result.stdout
    facts = json.loads(medisyn_command("info", adapter, "--json").stdout)
    assert facts["training_data"]["datasets"] == manifest["training_data"] and facts["metrics"] == metrics
    assert facts["base"] == {"model": "owner/sd", "hash": manifest["base_hash"]}
    # of a published one, the licence of its card and the numbers that matter
    (adapter / "adapter.json").write_text(json.dumps(manifest))
    published = publish(adapter, "owner/ribs", dry_run=tmp_path / "out")
    text = medisyn_command("info", published).stdout
    assert "research-only" in text and "the requested modality, accuracy" in text and "balanced" not in text
    (published / "adapter.json").unlink()
    result = medisyn_command("info", published)
    assert result.exit_code == 2 and "is an adapter without adapter.json" in result.stderr


def test_doctor_measures_and_explains(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = medisyn_command("doctor", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    findings = json.loads(result.stdout)
    assert findings["versions"]["medisyn"] == medisyn.__version__
    assert findings["devices"]["cpu"]["milliseconds"]["float32"] > 0
    assert set(findings["extras"]) == {"eval", "medical", "demo", "search", "ssl", "track"}
    assert any("HF_HUB_OFFLINE" in problem for problem in findings["problems"])
    missing = [name for name, modules in findings["extras"].items() if modules]
    assert all(any(f"medisyn[{name}]" in problem for problem in findings["problems"]) for name in missing)
    text = format_findings(findings)
    assert all(part in text for part in ("torch", "bfloat16", "offline (HF_HUB_OFFLINE)", "what will not work"))


def test_train_dry_run_prints_the_resolved_configuration(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path / 'run'}\ndata: {{source: images}}\ntask: {{type: autoencoder}}\n")
    result = medisyn_command("train", config, "train.steps=7", "optim.learning_rate=1e-3", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    resolved = yaml.safe_load(result.stdout)
    assert (resolved["train"]["steps"], resolved["optim"]["learning_rate"]) == (7, 1e-3)
    assert resolved["train"]["batch_size"] > 0  # defaults are spelled out
    assert not (tmp_path / "run").exists()


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_debug_mode_shows_the_traceback():
    process = start("generate", " ", MEDISYN_DEBUG="1")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" in stderr and "ValueError" in stderr


def test_guidance_is_a_number_or_one_for_each_kind():
    assert parse_guidance("3") == 3.0
    assert parse_guidance("text=3, labels=2.5") == {"text": 3.0, "labels": 2.5}


def test_names_in_images_give_no_path_away(tmp_path):
    (tmp_path / "chest" / "pipeline").mkdir(parents=True)
    assert model_name(str(tmp_path / "chest")) == model_name(str(tmp_path / "chest" / "pipeline")) == "chest"
    assert model_name("owner/model") == "owner/model"
    assert model_name(None) == model_name("default")
