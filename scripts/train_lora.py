"""Train a LoRA under the arguments of diffusers' `train_text_to_image_lora.py`.

- The arguments are translated (`medisyn/diffusers_arguments.py`), then medisyn's own trainer runs: latents and caption
  embeddings are computed once, and the same command again continues the run.
- OUTPUT_DIR/config.yaml holds the translation: from then on, `medisyn train OUTPUT_DIR/config.yaml` does the same.
- OUTPUT_DIR/pytorch_lora_weights.safetensors is the LoRA where that script leaves it, for `load_lora_weights`;
  OUTPUT_DIR/adapter has it with what else belongs to it (new words, the hash of its base).
- Stable-Diffusion-family bases, MediSyn folders, and `default`, the model in the package.

    accelerate launch scripts/train_lora.py --pretrained_model_name_or_path default --train_data_dir images \\
        --caption_column text --resolution 128 --rank 16 --max_train_steps 500 --validation_prompt "knee X-ray"
"""

import argparse
import json
import os
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medisyn.console import one_line_errors
from medisyn.diffusers_arguments import EMBEDDED, make_parser, translate

if TYPE_CHECKING:
    from PIL import Image

    from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

VALIDATION_STEPS = 30  # of sampling, as there


def main() -> None:
    """Train; failures are one line and exit code 2."""
    arguments = make_parser().parse_args()
    with one_line_errors():
        train(arguments)


def train(arguments: argparse.Namespace) -> None:
    """Translate, train, draw the validation images, publish."""
    if arguments.cache_dir is not None:  # read by the libraries when they are imported
        os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = str(Path(arguments.cache_dir).expanduser())
    if arguments.hub_token is not None:
        os.environ["HF_TOKEN"] = arguments.hub_token
    config, notes = translate(arguments)
    notes += check_resolution(config.task.base, config.data.resolution)

    import torch

    from medisyn.adapter_folder import LORA_WEIGHTS
    from medisyn.trainer import Trainer

    is_first = os.environ.get("RANK", "0") == "0"
    for note in notes if is_first else ():
        print(note, file=sys.stderr)
    if arguments.prediction_type is not None:
        require_prediction_type(config.task.base, arguments.prediction_type)
    repository = claim_repository(arguments) if arguments.push_to_hub and is_first else None
    if arguments.allow_tf32:
        torch.set_float32_matmul_precision("high")
    trainer = Trainer(config)
    if config.train.preview_every:  # in place of images for captions of the training data
        trainer.task.preview = lambda: validation_grid(arguments, trainer.task.pipe)
    run = trainer.fit()
    if not is_first:
        return
    link(run / "adapter" / LORA_WEIGHTS, run / LORA_WEIGHTS)
    print(f"finished: {run / 'adapter'}")
    if arguments.validation_prompt is not None:
        draw(arguments, config.task.base, run)
    if repository is not None:
        from medisyn.publishing import publish

        # forced: nothing was measured yet, and the card says so
        print(f"published, as not evaluated: {publish(run, repository, force=True)}")


# ---- before training ------------------------------------------------------------------------------------------------


def check_resolution(base: str, resolution: int) -> list[str]:
    """A line if the base was trained on another resolution. Reads the configurations of its components alone.

    Raises:
        ValueError: Its autoencoder takes no images of this size.
    """
    unet, vae = (component_config(base, part) for part in ("unet", "vae"))
    stages = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if not stages:
        return []
    factor, size = 2 ** (len(stages) - 1), unet.get("sample_size")
    if vae["_class_name"] == "AutoencoderDC" and resolution % factor:  # AutoencoderKL leaves out what is over
        raise ValueError(f"--resolution must be a multiple of {factor} for this base, not {resolution}")
    own = factor * (size if isinstance(size, int) else min(size)) if size else resolution
    if resolution == own:
        return []
    return [f"--resolution {resolution} is not what the base was trained on: --resolution {own} suits it better"]


def component_config(base: str, part: str) -> dict[str, Any]:
    """The configuration of a component of the base; empty if it cannot be had: loading the base will say why."""
    folder = Path(str(resources.files("medisyn"))) / "pretrained" if base == EMBEDDED else Path(base).expanduser()
    places = [place / part / "config.json" for place in (folder, folder / "pipeline")]
    file = next((place for place in places if place.is_file()), None)
    if file is None and not folder.exists():
        from huggingface_hub import hf_hub_download

        from medisyn.hub import is_hub_name, split_revision

        repository, revision = split_revision(base)
        try:
            if is_hub_name(base):
                file = Path(hf_hub_download(repository, f"{part}/config.json", revision=revision))
        except Exception:  # noqa: BLE001 - what a missing network raises depends on the HTTP library
            return {}
    return json.loads(file.read_text(encoding="utf-8")) if file is not None else {}


def require_prediction_type(base: str, wanted: str) -> None:
    """The base was trained for one prediction type; an adapter cannot change it."""
    from medisyn import load_pipeline

    own = load_pipeline(base).scheduler.config.prediction_type
    if wanted != own:
        raise ValueError(f"--prediction_type {wanted!r}: this base predicts {own}; leave the argument out")


def claim_repository(arguments: argparse.Namespace) -> str:
    """The repository of `--push_to_hub`, made if it is not there, as by that script before its first step.

    Raises:
        ValueError: Offline, not logged in, no Hub name, or not allowed to write there.
        OSError: The Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    from medisyn.hub import LOG_IN, first_line, is_hub_name, split_revision

    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub: offline mode is on (HF_HUB_OFFLINE): unset it, or leave the argument out")
    if get_token() is None:
        raise ValueError(f"--push_to_hub: not logged in to the Hub: {LOG_IN}")
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        user = HfApi().whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"--push_to_hub: this token may only read: {LOG_IN}, with one that may write")
        name = name if "/" in name else f"{user['name']}/{name}"
        if not is_hub_name(name) or split_revision(name)[1]:
            raise ValueError(f"--push_to_hub: {name!r} is not a Hub name; choose one by --hub_model_id owner/name")
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - what a missing network raises depends on the HTTP library
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise ValueError(f"--push_to_hub: the Hub refuses this token for {name}: {LOG_IN}") from error
        raise OSError(
            f"--push_to_hub: {constants.ENDPOINT} does not answer as it should: {first_line(error)}"
        ) from error


# ---- results --------------------------------------------------------------------------------------------------------


def validation_grid(arguments: argparse.Namespace, pipe: "MediSynPipeline") -> "Image.Image":
    """Images for the validation prompt by the adapter as it is in training, as one picture."""
    import torch

    from medisyn.tasks.base import image_grid

    count, seed = arguments.num_validation_images, arguments.seed or 0
    with torch.no_grad():
        images = pipe(
            arguments.validation_prompt,
            num_images_per_prompt=count,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
            num_inference_steps=VALIDATION_STEPS,
            output_type="pt",
        ).images
    return image_grid(images * 2 - 1, columns=count)


def draw(arguments: argparse.Namespace, base: str, run: Path) -> None:
    """Images for the validation prompt by the base with its new adapter, into RUN/validation."""
    from medisyn import load_pipeline
    from medisyn.doctor import best_device
    from medisyn.generation.requests import Request, make_requests
    from medisyn.generation.synthesize import synthesize
    from medisyn.tasks.diffusion import base_name

    pipe = load_pipeline(base, adapter=run / "adapter").to(best_device())
    template = Request(prompt=arguments.validation_prompt)
    requests = make_requests([template], arguments.num_validation_images, arguments.seed or 0)
    folder = run / "validation"
    names = {"model": base_name(base), "adapter": run.name}
    synthesize(pipe, requests, folder, num_inference_steps=VALIDATION_STEPS, overwrite=True, **names)
    print(f"images: {folder}")


def link(file: Path, name: Path) -> None:
    """A second name of a file, or a copy where the file system has no links; an earlier file of it is replaced."""
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


if __name__ == "__main__":
    main()
