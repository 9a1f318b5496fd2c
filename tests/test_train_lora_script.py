"""`scripts/train_lora.py`: the arguments of diffusers' LoRA script mean the same here, and none is dropped unsaid."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from medisyn import load_pipeline
from medisyn.config import ImageConditionConfig, PriorConfig, TextConditionConfig, load_config
from medisyn.diffusers_arguments import IGNORED, REFUSED, SCHEDULES, make_parser, translate
from medisyn.trainer import learning_rate_factor
from tests.components import tiny_vae
from tests.hub import USER, LocalHub
from tests.training import write_base, write_images

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "train_lora.py"

# with each argument of that script, as of 2026, a value and where it must arrive
TRANSLATED = [
    ("--image_column image", "data.image_column", "image"),
    ("--resolution 64", "data.resolution", 64),
    ("--random_flip", "data.horizontal_flip", True),
    ("--center_crop", "data.crop", "center"),
    ("--dataloader_num_workers 2", "data.num_workers", 2),
    ("--train_batch_size 3", "train.batch_size", 3),
    ("--train_batch_size 3 --gradient_accumulation_steps 2", "train.batch_size", 6),
    ("--gradient_accumulation_steps 2", "train.accumulation", 2),
    ("--num_train_epochs 2 --train_batch_size 5", "train.steps", 10),  # 24 images are 5 batches
    ("--num_train_epochs 2 --max_train_steps 7", "train.steps", 7),
    ("--max_train_samples 3 --num_train_epochs 2 --train_batch_size 2", "train.steps", 4),
    ("--seed 5", "train.seed", 5),
    ("--mixed_precision bf16", "train.mixed_precision", "bf16"),
    ("--checkpointing_steps 3 --max_train_steps 9", "train.checkpoint_every", 3),
    ("--checkpoints_total_limit 4", "train.keep_checkpoints", 4),
    ("--report_to none", "train.tracker", "none"),
    ("--learning_rate 0.01", "optim.learning_rate", 0.01),
    ("--learning_rate 0.01 --scale_lr --train_batch_size 3", "optim.learning_rate", 0.03),
    ("--adam_beta1 0.8 --adam_beta2 0.95", "optim.betas", (0.8, 0.95)),
    ("--adam_weight_decay 0.5", "optim.weight_decay", 0.5),
    ("--max_grad_norm 2", "optim.max_grad_norm", 2.0),
    ("--rank 6", "task.lora.rank", 6),
    ("--snr_gamma 4", "task.min_snr_gamma", 4.0),
    ("", "task.min_snr_gamma", 0.0),
    ("--noise_offset 0.1", "task.noise_offset", 0.1),
    ("--gradient_checkpointing", "task.gradient_checkpointing", True),
    ("--output_dir here", "output_dir", "here"),
    ("", "train.preview_every", 0),
    ("--validation_prompt disc", "train.preview_every", 0),
    ("--validation_prompt disc --validation_epochs 3 --train_batch_size 5", "train.preview_every", 15),
    # medisyn's own
    ("", "task.conditions", ()),
    ("", "task.prior", None),
    ("", "task.lora.target_modules", ("to_q", "to_k", "to_v", "to_out.0")),
    ("", "task.lora.text_encoder", False),
    ("--train_text_encoder", "task.lora.text_encoder", True),
    ("--lora_layers to_q,conv1", "task.lora.target_modules", ("to_q", "conv1")),
    ("--new_words auto", "task.conditions", (TextConditionConfig(new_words="auto"),)),
    ("--new_words knee,hip", "task.conditions", (TextConditionConfig(new_words=("knee", "hip")),)),
    ("--prior_fraction 0.2 --num_prior_images 7", "task.prior", PriorConfig(fraction=0.2, num_images=7)),
]
RECIPE = load_config(ROOT / "scripts" / "mammography" / "lora.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    write_images(folder / "images")
    write_base(folder / "base")
    lines = [json.loads(line) for line in (folder / "images" / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(line | {"text": line["caption"]}) for line in lines]  # that script's default column
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def arguments_of(folder: Path, text: str = ""):
    base = ["--pretrained_model_name_or_path", str(folder / "base"), "--train_data_dir", str(folder / "images")]
    return make_parser().parse_args([*base, *text.split()])


def load_script():
    specification = importlib.util.spec_from_file_location("train_lora", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


def run_script(folder: Path, *options: str, launcher=(), environment=None) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(SCRIPT), "--pretrained_model_name_or_path", str(folder / "base")]
    command += ["--train_data_dir", str(folder / "images"), "--resolution", "32", "--report_to", "none", *options]
    environment = environment or os.environ | {"HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("text", "key", "expected"), TRANSLATED, ids=[row[0] + " " + row[1] for row in TRANSLATED])
def test_an_argument_arrives_in_the_configuration(folder, text, key, expected):
    value, _ = translate(arguments_of(folder, text))
    for part in key.split("."):
        value = getattr(value, part)
    assert value == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_the_batch_counts_all_processes(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, _ = translate(arguments_of(folder, "--train_batch_size 3 --gradient_accumulation_steps 4"))
    assert config.train.batch_size == 24


def test_the_number_format_is_that_of_the_launcher_unless_one_is_given(folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert translate(arguments_of(folder))[0].train.mixed_precision == "bf16"
    assert translate(arguments_of(folder, "--mixed_precision no"))[0].train.mixed_precision == "no"


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_follows_diffusers_schedule_of_that_name(folder, name):
    import torch
    from diffusers.optimization import get_scheduler

    config, _ = translate(arguments_of(folder, f"--lr_scheduler {name} --lr_warmup_steps 10 --max_train_steps 50"))
    # at their usual rate `polynomial` ends at a thousandth of it
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.learning_rate)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        ours = learning_rate_factor(step, 50, config.optim)
        wanted = theirs.get_last_lr()[0] / config.optim.learning_rate
        # the warm-up begins at 1/10 here and at 0 there, where the first step is lost
        assert ours == pytest.approx(wanted, abs=0.1 + 1e-9 if step < 10 else 1e-3 if name == "polynomial" else 1e-9)
        optimizer.step()
        theirs.step()


def test_what_is_ignored_is_said(folder):
    values = {"local_rank": "0", "use_8bit_adam": None}
    values |= {"enable_xformers_memory_efficient_attention": None}
    for name in IGNORED:
        value = values.get(name, "lanczos")
        _, notes = translate(arguments_of(folder, f"--{name} {value or ''}"))
        assert any(note.startswith(f"--{name} is ignored: ") for note in notes)
    _, notes = translate(arguments_of(folder, "--center_crop"))
    assert not notes
    _, notes = translate(arguments_of(folder, "--center_crop --validation_epochs 2"))
    assert notes == ["--validation_epochs is ignored: there is no --validation_prompt"]
    _, notes = translate(arguments_of(folder, "--center_crop --validation_prompt disc"))
    assert len(notes) == 1 and "drawn after training" in notes[0]
    assert not translate(arguments_of(folder, "--center_crop --validation_prompt disc --validation_epochs 1"))[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [(f"--{name} 3", f"--{name} is not possible here; use") for name in REFUSED]
    + [
        ("--lr_scheduler piecewise_constant", "constant, constant_with_warmup, linear, cosine"),
        ("--report_to comet_ml", "tensorboard, wandb, none"),
        ("--adam_epsilon 0.1", "1e-08"),
        ("--rank 0", "--rank must be greater than 0"),
        ("--validation_epochs 0 --validation_prompt disc", "--validation_epochs must be greater than 0"),
        ("--prior_fraction 1", "--prior_fraction must be at least 0 and below 1"),
        ("--num_prior_images 5", "with --prior_fraction above 0 only"),
        ("--caption_column caption_text", "columns: .*text"),
        ("--mixed_precision fp8", "mixed_precision"),
        ("--resume_from_checkpoint checkpoint-500", "use latest"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_use_instead(folder, text, message):
    with pytest.raises(ValueError, match=message):
        translate(arguments_of(folder, text))


def test_the_embedded_default_is_adapted_as_in_its_recipes(folder):
    arguments = arguments_of(folder, "--center_crop")
    arguments.pretrained_model_name_or_path = "default"
    config, (note,) = translate(arguments)
    task, recipe = config.task, RECIPE.task
    assert (task.conditions, task.prior) == (recipe.conditions, recipe.prior)
    assert set(task.lora.target_modules) == set(recipe.lora.target_modules) and task.lora.text_encoder
    assert all(name in note for name in ("--lora_layers", "--no-train_text_encoder", "--new_words", "50%"))

    own = arguments_of(folder, "--center_crop --lora_layers to_q --no-train_text_encoder --new_words none")
    own.pretrained_model_name_or_path, own.prior_fraction = "default", 0.0
    config, notes = translate(own)
    assert (config.task.prior, config.task.conditions) == (None, (TextConditionConfig(), ImageConditionConfig()))
    assert config.task.lora.target_modules == ("to_q",) and not config.task.lora.text_encoder
    assert not notes


def test_the_embedded_default_trains_with_these_settings(folder):
    from safetensors import safe_open

    options = ["--pretrained_model_name_or_path", "default", "--max_train_steps", "1", "--train_batch_size", "2"]
    done = run_script(folder, *options, "--resolution", "64", "--num_prior_images", "1", "--output_dir", "embedded")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert sum("adapted as in its recipes" in line for line in lines) == 1
    assert sum("--resolution 64 is not what the base was trained on: --resolution 128" in line for line in lines) == 1
    assert len(list((folder / "embedded" / "prior").glob("0*.png"))) == 1
    manifest = json.loads((folder / "embedded" / "adapter" / "adapter.json").read_text())
    assert {"conv1", "conv_in"} <= set(manifest["target_modules"]) and "stripes" in manifest["tokens"]
    with safe_open(folder / "embedded" / "pytorch_lora_weights.safetensors", "pt") as weights:
        parts = {name.partition(".")[0] for name in weights.keys()}  # noqa: SIM118 - not a mapping
    assert parts == {"unet", "text_encoder"}


def test_a_size_that_the_autoencoder_cannot_take_is_named_with_its_multiple(folder):
    done = run_script(folder, "--resolution", "33", "--center_crop", "--output_dir", "odd_size")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --resolution must be a multiple of 8 for this base, not 33"
    assert not (folder / "odd_size").exists()


def test_another_size_than_that_of_the_base_is_said_in_one_line(folder, tmp_path):
    script = load_script()
    assert not script.check_resolution(str(folder / "base"), 32)
    (line,) = script.check_resolution(str(folder / "base"), 64)
    assert "--resolution 64 is not" in line and "--resolution 32 suits" in line and "\n" not in line
    (line,) = script.check_resolution("default", 512)
    assert "--resolution 128 suits" in line
    write_base(tmp_path / "run" / "pipeline", vae="kl")
    assert len(script.check_resolution(str(tmp_path / "run"), 33)) == 1  # this kind of autoencoder takes it
    assert not script.check_resolution("owner/not-here", 33)  # that it cannot be loaded is said by whoever loads it


def test_a_data_set_on_the_hub_is_named_with_its_configuration(folder):
    arguments = arguments_of(folder, "--dataset_name owner/images --dataset_config_name small")
    with pytest.raises((FileNotFoundError, ConnectionError), match="owner/images"):
        translate(arguments)


@pytest.fixture(scope="module")
def trained(folder):
    """A run of three steps, an epoch being two, with a prompt that is drawn at each epoch."""
    prompt = ["--validation_prompt", "bright square", "--num_validation_images", "2", "--validation_epochs", "1"]
    options = ["--max_train_steps", "3", "--train_batch_size", "12", "--rank", "2", "--output_dir", "run"]
    done = run_script(folder, *options, *prompt)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_it_trains_draws_the_prompt_and_continues(folder, trained):
    weights = "pytorch_lora_weights.safetensors"
    earlier = (folder / "run" / "adapter" / weights).read_bytes()
    assert (folder / "run" / weights).read_bytes() == earlier
    assert len(list((folder / "run" / "validation").glob("0*.png"))) == 2
    previews = sorted((folder / "run" / "previews").iterdir())
    assert [file.name for file in previews] == [f"step_0000000{step}.png" for step in (0, 2, 3)]
    assert Image.open(previews[0]).size == (2 * 34 + 2, 36)  # of the prompt, not of 24 training rows
    assert "was trained on" not in trained.stderr
    options = ["--max_train_steps", "4", "--train_batch_size", "12", "--rank", "2", "--output_dir", "run"]
    again = run_script(folder, *options, "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr[-2000:]
    assert (folder / "run" / "checkpoints" / "step_00000004").is_dir()
    later = (folder / "run" / "adapter" / weights).read_bytes()
    assert (folder / "run" / weights).read_bytes() == later != earlier


def test_stock_diffusers_reads_the_output_folder(folder, trained):
    pipe = load_pipeline(folder / "base")
    parts = {name: getattr(pipe, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    stock = StableDiffusionPipeline(**parts | {"vae": tiny_vae("kl")}, **none)  # it knows no AutoencoderDC
    stock.load_lora_weights(str(folder / "run"))
    assert len(stock.get_list_adapters()["unet"]) == 1


def test_previews_are_those_of_the_prompt(folder):
    pipe, script = load_pipeline(folder / "base"), load_script()
    pictures = []
    for prompt in ("bright square", "dark disc", "dark disc"):
        arguments = arguments_of(folder, "--num_validation_images 1")
        arguments.validation_prompt = prompt
        pictures.append(script.validation_grid(arguments, pipe).tobytes())
    assert pictures[0] != pictures[1] == pictures[2]


@pytest.mark.parametrize("can_link", [True, False])
def test_the_weights_have_a_second_name_or_a_copy(tmp_path, monkeypatch, can_link):
    (tmp_path / "new").write_text("new")
    (tmp_path / "name").write_text("old")
    if not can_link:  # as on a FAT file system

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    load_script().link(tmp_path / "new", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "new"


def test_a_pushed_adapter_has_the_name_of_its_folder_and_an_honest_card(folder, tmp_path):
    options = ["--max_train_steps", "1", "--train_batch_size", "2", "--push_to_hub", "--output_dir", "runs/squares"]
    with LocalHub(tmp_path) as hub:
        done = run_script(folder, *options, environment=hub.environment())
        assert done.returncode == 0, done.stderr[-2000:]
        files = hub.repositories[f"{USER}/squares"].files
        assert done.stdout.splitlines()[-1].endswith(f"{hub.endpoint}/{USER}/squares")
    assert "forced although it has no measured numbers" in files["README.md"].decode()
    weights = (folder / "runs" / "squares" / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    assert files["pytorch_lora_weights.safetensors"] == weights


def test_what_cannot_be_pushed_is_not_trained(folder):
    done = run_script(folder, "--push_to_hub", "--center_crop", "--output_dir", "unpushed")  # offline
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --push_to_hub: offline mode is on")
    assert not (folder / "unpushed").exists()


CLAIM = """
    import argparse, runpy
    script = runpy.run_path({script!r})
    arguments = argparse.Namespace(output_dir="runs/mine", hub_model_id={model!r})
    try:
        print(script["claim_repository"](arguments))
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("model", "environment", "answer"),
    [
        (None, {}, f"{USER}/mine"),
        ("other", {}, f"{USER}/other"),
        ("owner/other", {}, "owner/other"),
        ("a/b/c", {}, "ValueError --push_to_hub: 'a/b/c' is not a Hub name"),
        (None, {"HF_TOKEN": ""}, "ValueError --push_to_hub: not logged in"),
        (None, {"HF_TOKEN": "hf_wrong"}, "ValueError --push_to_hub: the Hub refuses this token"),
        (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "OSError --push_to_hub: http://127.0.0.1:9 does not answer"),
    ],
)
def test_the_repository_is_there_before_training_or_nothing_is_trained(tmp_path, model, environment, answer):
    with LocalHub(tmp_path) as hub:
        done = hub.python(CLAIM.format(script=str(SCRIPT), model=model), **environment)
        assert done.stdout.startswith(answer), done.stderr
        assert ("Error" in answer) != (done.stdout.strip() in hub.repositories)


def test_a_data_set_with_lists_of_captions_is_refused_in_one_line(folder, tmp_path):
    images = write_images(tmp_path / "images", 2)
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(line | {"text": ["one", "two"]}) for line in lines]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    arguments = arguments_of(folder)
    arguments.train_data_dir = str(images)
    with pytest.raises(ValueError, match="--caption_column 'text' holds lists"):
        translate(arguments)


@pytest.mark.parametrize(
    ("launcher", "batch_size"),
    [
        # with --cpu, `accelerate launch` starts one process whatever --num_processes says, unless there is MPI
        ("accelerate.commands.launch --cpu --num_processes 1 --mixed_precision no --dynamo_backend no", 2),
        ("torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0", 4),
    ],
)
def test_it_runs_under_a_launcher(folder, launcher, batch_size):
    run = f"launched_{batch_size}"
    options = ["--max_train_steps", "2", "--train_batch_size", "2", "--output_dir", run, "--center_crop"]
    done = run_script(folder, *options, launcher=("-m", *launcher.split()))
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_config(folder / run / "config.yaml").train.batch_size == batch_size
    assert (folder / run / "adapter" / "adapter.json").is_file()


def test_a_revision_belongs_to_a_hub_name(folder):
    arguments = arguments_of(folder, "--revision v2")
    with pytest.raises(ValueError, match="--revision 'v2' is of a Hub name"):
        translate(arguments)
    arguments.pretrained_model_name_or_path = "owner/model"
    assert translate(arguments)[0].task.base == "owner/model@v2"


@pytest.mark.parametrize(
    "options", [["--rank", "no"], ["--rnk", "3"], ["--lr_scheduler", "odd"], ["--non_ema_revision", "a"]]
)
def test_bad_input_is_one_line_and_exit_code_2(folder, options):
    done = run_script(folder, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
