"""The arguments of diffusers' `train_text_to_image_lora.py`, translated into a medisyn configuration.

- Every argument of that script is known here. What has a meaning in medisyn is translated; what changes nothing that
  is learnt is ignored with a line that says what is done instead; what would change it is refused with such a line.
- Where the two differ without an argument that says so: images are cropped at the centre (latents are cached), a
  tenth of the captions is dropped (guidance needs an unconditional model), a run in OUTPUT_DIR is continued, and the
  validation prompt is drawn after training alone.
- The embedded default is smaller than the models that script is for, and is adapted as its recipes do, with a line
  that says so (`scripts/mammography/lora.yaml`); medisyn's own arguments choose otherwise, there and for other bases.

    arguments = make_parser().parse_args(["--pretrained_model_name_or_path", "DIR", "--train_data_dir", "images"])
    config, notes = translate(arguments)
"""

import argparse
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from medisyn.config import DataConfig, TrainConfig, parse_config

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
COSINES = ("cosine", "cosine_with_restarts")  # that script asks for one cycle: the restart never comes
TRACKERS = ("tensorboard", "wandb", "none")
ADAM_EPSILON = 1e-8
EMBEDDED = "default"  # names the model in the package
# How that one is adapted: it has attention in its deepest level only.
_ATTENTION, _OTHERS = "to_q to_k to_v to_out.0", "proj net.2 proj_in proj_out time_emb_proj"
_CONVOLUTIONS = "conv1 conv2 conv_shortcut conv conv_in conv_out"
EMBEDDED_LAYERS = tuple(f"{_ATTENTION} {_OTHERS} {_CONVOLUTIONS}".split())
EMBEDDED_PRIOR = 0.5  # share of the drawn rows
PRIOR_IMAGES = 600

# argument -> what is done instead
IGNORED = {
    "variant": "the full-precision weights are loaded",
    "image_interpolation_mode": "images are resized by bicubic interpolation with antialiasing",
    "use_8bit_adam": "AdamW keeps 32-bit states; they belong to the adapter alone and are small",
    "logging_dir": "trackers write into OUTPUT_DIR/tracker",
    "local_rank": "`accelerate launch` tells each process its rank",
    "enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is always on",
}
# argument -> what to use instead; each would change the result
REFUSED = {"non_ema_revision": "--revision"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, as everywhere in medisyn."""
        print(f"error: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """A parser of that script's arguments, with its defaults."""
    parser = _Parser(description="Train a LoRA under the arguments of diffusers' train_text_to_image_lora.py.")

    def add(name: str, kind: Any = str, default: Any = None, text: str = "", **options: Any) -> None:
        replacement = IGNORED.get(name) or REFUSED.get(name)
        if replacement:
            text = f"{'ignored: ' if name in IGNORED else 'refused; instead: '}{replacement}"
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text.replace("%", "%%"))
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text, **options)

    add("pretrained_model_name_or_path", text="base: folder, Hub name, or `default`", required=True)
    add("revision", text="branch, tag or commit of a base on the Hub")
    add("non_ema_revision")
    add("variant")
    add("train_data_dir", text="folder of images with metadata.jsonl")
    add("dataset_name", text="folder, file or Hub dataset; comes before --train_data_dir")
    add("dataset_config_name", text="configuration of the Hub dataset")
    add("image_column", default="image")
    add("caption_column", default="text")
    add("max_train_samples", int, text="train on so many of the images, drawn at random")
    add("output_dir", default="sd-model-finetuned-lora", text="run folder; the adapter is in OUTPUT_DIR/adapter")
    add("cache_dir", text="where downloaded models and datasets are kept")
    add("seed", int, text="0 if not given")
    add("resolution", int, 512, "pixels, square")
    add("center_crop", bool, text="what is always done: latents are cached")
    add("random_flip", bool, text="mirror half of the images, never those whose caption states a side")
    add("image_interpolation_mode")
    add("train_batch_size", int, 16, "per process and accumulation step")
    add("num_train_epochs", int, 100)
    add("max_train_steps", int, text="comes before --num_train_epochs")
    add("gradient_accumulation_steps", int, 1)
    add("gradient_checkpointing", bool, text="less memory, slower")
    add("learning_rate", float, 1e-4)
    add("scale_lr", bool, text="multiply the rate by processes, accumulation and batch size")
    add("lr_scheduler", default="constant", text=", ".join(SCHEDULES))
    add("lr_warmup_steps", int, 500, "not of `constant`")
    add("snr_gamma", float, text="min-SNR weighting; without it, none")
    add("noise_offset", float, 0.0)
    add("prediction_type", text="epsilon or v_prediction; must be that of the base")
    add("rank", int, 4)
    add("use_8bit_adam", bool)
    add("adam_beta1", float, 0.9)
    add("adam_beta2", float, 0.999)
    add("adam_weight_decay", float, 1e-2)
    add("adam_epsilon", float, ADAM_EPSILON, f"only {ADAM_EPSILON:g}")
    add("max_grad_norm", float, 1.0)
    add("mixed_precision", text="no, bf16, fp16, auto; without it, that of `accelerate config`")
    add("allow_tf32", bool)
    add("dataloader_num_workers", int, 0)
    add("checkpointing_steps", int, 500)
    add("checkpoints_total_limit", int, text="without it, all are kept")
    add("resume_from_checkpoint", text="`latest`, which is always done, or that checkpoint's path")
    add("report_to", text=f"{', '.join(TRACKERS)}; without it, tensorboard if it is installed")
    add("logging_dir")
    add("local_rank", int)
    add("enable_xformers_memory_efficient_attention", bool)
    add("validation_prompt", text="draw images for it after training, into OUTPUT_DIR/validation")
    add("num_validation_images", int, 4)
    add("validation_epochs", int, text="draw them every so many epochs as well, into OUTPUT_DIR/previews")
    add("push_to_hub", bool, text="publish the adapter, with a card that says that it was not evaluated")
    add("hub_model_id", text="owner/name or name; without it, the name of OUTPUT_DIR")
    add("hub_token", text="better: `hf auth login`")
    # medisyn's own
    add("force", bool, text="what --push_to_hub always does: publish without measured numbers")
    help_text = "adapt the text encoder as well; without it, that of `default` alone"
    parser.add_argument("--train_text_encoder", action=argparse.BooleanOptionalAction, default=None, help=help_text)
    add("lora_layers", text="layers to adapt, endings of names with commas; without it, attention (`default`: more)")
    add("new_words", text="that the text encoder learns: `auto`, `none`, or a list with commas (`default`: auto)")
    add("prior_fraction", float, text=f"share of images that the base drew itself (`default`: {EMBEDDED_PRIOR})")
    add("num_prior_images", int, text=f"how many it draws, before training; {PRIOR_IMAGES} if not given")
    return parser


def translate(arguments: argparse.Namespace) -> tuple[TrainConfig, list[str]]:
    """The configuration that these arguments mean, and one line for each that is ignored.

    Opens the data set, whose length turns epochs into steps. The number of processes is that of the launcher.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: an argument that is refused or out of range; one line that names it and what to use instead.
    """
    notes = [
        f"--{name} is ignored: {instead}"
        for name, instead in IGNORED.items()
        if getattr(arguments, name) is not None and getattr(arguments, name) is not False  # a rank of 0 is given
    ]
    for name, instead in REFUSED.items():
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is not possible here; use {instead}")
    _require_in_range(arguments)
    if not arguments.center_crop:
        notes.append("crops are central, as with --center_crop: latents are computed once")
    if arguments.dataset_name and arguments.train_data_dir:
        notes.append("--train_data_dir is ignored: --dataset_name is given")
    data = {
        "source": _source(arguments),
        "image_column": arguments.image_column,
        "caption_column": arguments.caption_column,
        "resolution": arguments.resolution,
        "max_images": arguments.max_train_samples,
        "horizontal_flip": arguments.random_flip,
        "num_workers": arguments.dataloader_num_workers,
    }
    adaptation, choices = _adaptation(arguments)
    notes += choices
    batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * processes()
    epoch = math.ceil(_count_rows(DataConfig(**data)) / batch_size)  # steps
    steps = arguments.max_train_steps or arguments.num_train_epochs * epoch
    preview_every = epoch * (arguments.validation_epochs or 0) if arguments.validation_prompt is not None else 0
    if arguments.validation_epochs and not preview_every:
        notes.append("--validation_epochs is ignored: there is no --validation_prompt")
    if arguments.validation_prompt is not None and not preview_every:
        notes.append("--validation_prompt is drawn after training; with --validation_epochs N every N epochs as well")
    tree = {
        "output_dir": arguments.output_dir,
        "data": data,
        "task": {
            "type": "diffusion",
            "preset": None,
            "base": _base(arguments),
            **adaptation,
            "min_snr_gamma": arguments.snr_gamma or 0.0,
            "noise_offset": arguments.noise_offset,
            "gradient_checkpointing": arguments.gradient_checkpointing,
        },
        "optim": _optim(arguments, steps, batch_size),
        "train": {
            "steps": steps,
            "batch_size": batch_size,
            "accumulation": arguments.gradient_accumulation_steps,
            "seed": arguments.seed or 0,
            "mixed_precision": arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
            "ema_decay": 0.0,  # that script keeps no average
            "checkpoint_every": arguments.checkpointing_steps,
            "keep_checkpoints": arguments.checkpoints_total_limit or steps // arguments.checkpointing_steps + 1,
            "preview_every": preview_every,
            "tracker": _tracker(arguments),
        },
    }
    _require_resumable(arguments)
    return parse_config(tree, where="arguments"), notes


def processes() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _require_in_range(arguments: argparse.Namespace) -> None:
    positive: tuple[str, ...] = (
        "resolution",
        "train_batch_size",
        "num_train_epochs",
        "max_train_steps",
        "max_train_samples",
        "gradient_accumulation_steps",
    )
    positive += ("rank", "checkpointing_steps", "checkpoints_total_limit", "num_validation_images", "learning_rate")
    positive += ("validation_epochs", "num_prior_images")
    for name in positive:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be greater than 0, not {value}")
    if arguments.lr_scheduler not in SCHEDULES:
        raise ValueError(f"--lr_scheduler {arguments.lr_scheduler!r} is not one of: {', '.join(SCHEDULES)}")
    if arguments.adam_epsilon != ADAM_EPSILON:
        raise ValueError(f"--adam_epsilon is {ADAM_EPSILON:g} here, not {arguments.adam_epsilon:g}; leave it out")
    if arguments.prior_fraction is not None and not 0 <= arguments.prior_fraction < 1:
        raise ValueError(f"--prior_fraction must be at least 0 and below 1, not {arguments.prior_fraction:g}")


def _adaptation(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What of the base is adapted, and beside which images; with a line for what this script chose by itself."""
    is_embedded = arguments.pretrained_model_name_or_path == EMBEDDED
    count = arguments.num_prior_images or PRIOR_IMAGES
    texts = {
        "lora_layers": "its convolutions as well (--lora_layers)",
        "train_text_encoder": "and its text encoder (--no-train_text_encoder)",
        "new_words": "words that its tokenizer breaks to pieces are learned (--new_words none)",
        "prior_fraction": f"{EMBEDDED_PRIOR:.0%} of the rows are from {count} that it draws (--prior_fraction 0)",
    }
    chosen = [text for name, text in texts.items() if is_embedded and getattr(arguments, name) is None]

    def settle(name: str, embedded: Any, otherwise: Any) -> Any:
        given = getattr(arguments, name)
        return given if given is not None else embedded if is_embedded else otherwise

    layers = settle("lora_layers", ",".join(EMBEDDED_LAYERS), None)
    new_words = settle("new_words", "auto", "none")
    fraction = settle("prior_fraction", EMBEDDED_PRIOR, 0.0)
    if arguments.num_prior_images and not fraction:
        raise ValueError("--num_prior_images is of use with --prior_fraction above 0 only")
    lora = {"rank": arguments.rank, "text_encoder": settle("train_text_encoder", True, False)}
    task: dict[str, Any] = {"lora": lora if layers is None else lora | {"target_modules": _listed(layers)}}
    if is_embedded or new_words != "none":  # else every condition of the base
        words = new_words if new_words == "auto" else () if new_words == "none" else _listed(new_words)
        task["conditions"] = [{"type": "text", "new_words": words}]
        task["conditions"] += [{"type": "image"}] if is_embedded else []
    if fraction:
        task["prior"] = {"fraction": fraction, "num_images": count}
    return task, [f"default is adapted as in its recipes: {'; '.join(chosen)}"] if chosen else []


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _base(arguments: argparse.Namespace) -> str:
    name = arguments.pretrained_model_name_or_path
    if arguments.revision is None:
        return name
    if Path(name).exists() or not re.fullmatch("[^/@]+/[^/@]+", name):
        raise ValueError(f"--revision {arguments.revision!r} is of a Hub name owner/model, and {name!r} is none")
    return f"{name}@{arguments.revision}"


def _source(arguments: argparse.Namespace) -> str:
    if arguments.dataset_name:
        config = arguments.dataset_config_name
        return f"{arguments.dataset_name}:{config}" if config else arguments.dataset_name
    if not arguments.train_data_dir:
        raise ValueError("name the training images: --train_data_dir FOLDER or --dataset_name NAME")
    return arguments.train_data_dir


def _count_rows(data: DataConfig) -> int:
    from medisyn.data.loading import load_images

    images = load_images(data)
    if any(caption is not None and not isinstance(caption, str) for caption in images.captions):
        raise ValueError(f"--caption_column {data.caption_column!r} holds lists; make it one caption for each image")
    return len(images)


def _optim(arguments: argparse.Namespace, steps: int, batch_size: int) -> dict[str, Any]:
    """There, `constant` knows no warm-up, and the other falls last from the end of the warm-up to the end.

    `polynomial` has the power 1 there: a line, which ends at 1e-7 there and at 0 here.
    """
    warmup = 0 if arguments.lr_scheduler == "constant" else arguments.lr_warmup_steps
    falls = not arguments.lr_scheduler.startswith("constant")
    return {
        "learning_rate": arguments.learning_rate * (batch_size if arguments.scale_lr else 1),
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "weight_decay": arguments.adam_weight_decay,
        "warmup_steps": warmup,
        "decay_fraction": max(0.0, 1 - warmup / steps) if falls else 0.0,
        "decay": "cosine" if arguments.lr_scheduler in COSINES else "linear",
        "max_grad_norm": arguments.max_grad_norm,
    }


def _tracker(arguments: argparse.Namespace) -> str:
    if arguments.report_to is None:
        return "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if arguments.report_to not in TRACKERS:
        raise ValueError(f"--report_to {arguments.report_to!r} is not one of: {', '.join(TRACKERS)}")
    return arguments.report_to


def _require_resumable(arguments: argparse.Namespace) -> None:
    """A run continues the newest checkpoint of OUTPUT_DIR; another one cannot be chosen."""
    wanted = arguments.resume_from_checkpoint
    if wanted in (None, "latest"):
        return
    newest = max((Path(arguments.output_dir) / "checkpoints").glob("step_*"), default=None)
    if newest is None or Path(wanted).name != newest.name:
        raise ValueError(
            f"--resume_from_checkpoint {wanted!r}: a run continues from the newest checkpoint of --output_dir "
            f"({newest or 'there is none'}); use latest"
        )
