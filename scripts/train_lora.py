"""Train a LoRA under the arguments of diffusers' `train_text_to_image_lora.py`.

- The arguments are translated (`medisyn/diffusers_arguments.py`), then medisyn's own trainer runs: latents and caption
  embeddings are computed once, and the same command again continues the run.
- OUTPUT_DIR/config.yaml holds the translation: from then on, `medisyn train OUTPUT_DIR/config.yaml` does the same.
- Stable-Diffusion-family bases, MediSyn folders, and `default`, the model in the package.

    accelerate launch scripts/train_lora.py --pretrained_model_name_or_path default --train_data_dir images \\
        --caption_column text --resolution 128 --rank 16 --max_train_steps 500 --validation_prompt "knee X-ray"
"""

import argparse
import os
import sys
from pathlib import Path

from medisyn.console import one_line_errors
from medisyn.diffusers_arguments import make_parser, translate


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

    import torch

    from medisyn.trainer import Trainer

    is_first = os.environ.get("RANK", "0") == "0"
    for note in notes if is_first else ():
        print(note, file=sys.stderr)
    if arguments.prediction_type is not None:
        require_prediction_type(config.task.base, arguments.prediction_type)
    if arguments.allow_tf32:
        torch.set_float32_matmul_precision("high")
    run = Trainer(config).fit()
    if not is_first:
        return
    print(f"finished: {run / 'adapter'}")
    if arguments.validation_prompt is not None:
        draw(arguments, config.task.base, run)
    if arguments.push_to_hub:
        from medisyn.publishing import publish

        print(f"published: {publish(run, arguments.hub_model_id, force=arguments.force)}")


def require_prediction_type(base: str, wanted: str) -> None:
    """The base was trained for one prediction type; an adapter cannot change it."""
    from medisyn import load_pipeline

    own = load_pipeline(base).scheduler.config.prediction_type
    if wanted != own:
        raise ValueError(f"--prediction_type {wanted!r}: this base predicts {own}; leave the argument out")


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
    synthesize(pipe, requests, folder, num_inference_steps=30, overwrite=True, **names)
    print(f"images: {folder}")


if __name__ == "__main__":
    main()
