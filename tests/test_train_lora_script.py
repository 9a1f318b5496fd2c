"""`scripts/train_lora.py`: the arguments of diffusers' LoRA script mean the same here, and none is dropped unsaid."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medisyn.config import load_config
from medisyn.diffusers_arguments import IGNORED, REFUSED, make_parser, translate
from medisyn.trainer import learning_rate_factor
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
]


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


def run_script(folder: Path, *options: str, launcher=()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(SCRIPT), "--pretrained_model_name_or_path", str(folder / "base")]
    command += ["--train_data_dir", str(folder / "images"), "--resolution", "32", "--report_to", "none", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
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


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_the_learning_rate_follows_diffusers_schedule_of_that_name(folder, name):
    import torch
    from diffusers.optimization import get_scheduler

    config, _ = translate(arguments_of(folder, f"--lr_scheduler {name} --lr_warmup_steps 10 --max_train_steps 50"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        ours = learning_rate_factor(step, 50, config.optim)
        # the warm-up begins at 1/10 here and at 0 there, where the first step is lost
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=0.1 + 1e-9 if step < 10 else 1e-9)
        optimizer.step()
        theirs.step()


def test_what_is_ignored_is_said(folder):
    values = {"validation_epochs": "2", "local_rank": "0", "use_8bit_adam": None}
    values |= {"enable_xformers_memory_efficient_attention": None}
    for name in IGNORED:
        value = values.get(name, "lanczos")
        _, notes = translate(arguments_of(folder, f"--{name} {value or ''}"))
        assert any(note.startswith(f"--{name} is ignored: ") for note in notes)
    _, notes = translate(arguments_of(folder, "--center_crop"))
    assert not notes


@pytest.mark.parametrize(
    ("text", "message"),
    [(f"--{name} 3", f"--{name} is not possible here; use") for name in REFUSED]
    + [
        ("--lr_scheduler polynomial", "constant, constant_with_warmup, linear, cosine"),
        ("--report_to comet_ml", "tensorboard, wandb, none"),
        ("--adam_epsilon 0.1", "1e-08"),
        ("--rank 0", "--rank must be greater than 0"),
        ("--push_to_hub", "--hub_model_id owner/name"),
        ("--caption_column caption_text", "columns: .*text"),
        ("--mixed_precision fp8", "mixed_precision"),
        ("--resume_from_checkpoint checkpoint-500", "use latest"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_use_instead(folder, text, message):
    with pytest.raises(ValueError, match=message):
        translate(arguments_of(folder, text))


def test_a_data_set_on_the_hub_is_named_with_its_configuration(folder):
    arguments = arguments_of(folder, "--dataset_name owner/images --dataset_config_name small")
    with pytest.raises((FileNotFoundError, ConnectionError), match="owner/images"):
        translate(arguments)


def test_it_trains_draws_the_prompt_and_continues(folder):
    short = ["--max_train_steps", "2", "--train_batch_size", "2", "--rank", "2", "--output_dir", "run"]
    first = run_script(folder, *short, "--validation_prompt", "bright square", "--num_validation_images", "2")
    assert first.returncode == 0, first.stderr[-2000:]
    assert (folder / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((folder / "run" / "validation").glob("0*.png"))) == 2
    again = run_script(folder, *short[2:], "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr[-2000:]
    assert (folder / "run" / "checkpoints" / "step_00000003").is_dir()


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
