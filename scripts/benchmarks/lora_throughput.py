"""Images per second of LoRA training: medisyn beside diffusers' script and beside a bare UNet step loop.

- One model, data set, batch, number format and machine for all three. The model is Stable Diffusion 1.5 at a quarter
  of its width (UNet, autoencoder and text encoder alike; 77 tokens), with random weights, so that what the script
  encodes anew in each step weighs as much beside the UNet as it does in the original.
- The bare loop is the least that a step can be: forward, loss, backward, clipping, AdamW on the LoRA parameters, with
  all inputs ready.
- A step is what passes between one backward call and the next, so loading and caching do not count; the median of
  each run counts. The three run in turn, several times, so that a busy machine slows all of them alike. On a machine
  that others use, `--clock cpu` with OMP_NUM_THREADS=1 counts the time of this process alone.
- diffusers' script is not part of this package: give the path of `examples/text_to_image/train_text_to_image_lora.py`
  from its repository. Without it, only the other two are compared.

    python scripts/benchmarks/lora_throughput.py --reference train_text_to_image_lora.py --rounds 3
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNNERS = ("reference", "medisyn", "bare")
WARM_UP = 3  # steps that do not count
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WORDS = ("chest x-ray", "fundus photograph", "brain MRI", "skin lesion", "no finding", "opacity", "left", "right")


def main() -> None:
    """Measure and print, or be one of the runs."""
    arguments = parse_arguments()
    work = Path(arguments.work)
    if arguments.only is not None:
        stamps = RUN[arguments.only](arguments, work)
        steps = [later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False)][WARM_UP:]
        (work / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
        return
    if not (work / "model").is_dir():
        write_model(work / "model")
    if not (work / "images").is_dir():
        write_images(work / "images", arguments.images, arguments.resolution)
    chosen = [name for name in RUNNERS if name != "reference" or arguments.reference is not None]
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(arguments.rounds):
        for name in chosen:
            rates[name].append(arguments.batch_size / statistics.median(measure(name, number, work)))
            print(f"round {number + 1}: {name:9} {rates[name][-1]:7.2f} images/s", flush=True)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"\nbatch {arguments.batch_size}, {arguments.resolution} px, rank {arguments.rank}, "
        f"mixed precision {arguments.mixed_precision}, {arguments.clock} clock, "
        f"{arguments.rounds} x {arguments.steps - 1 - WARM_UP} steps"
    )
    for name in chosen:
        spread = f"{min(rates[name]):.2f} to {max(rates[name]):.2f}"
        print(f"{name:9} {rate[name]:7.2f} images/s ({spread}), {rate[name] / rate['bare']:.3f} of the bare loop")
    if "reference" in rate:
        print(
            f"medisyn is {rate['medisyn'] / rate['reference']:.2f} times as fast as {Path(arguments.reference).name}"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", metavar="FILE", help="train_text_to_image_lora.py of diffusers")
    parser.add_argument("--work", metavar="DIR", default="outputs/lora_throughput", help="model, images and runs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--steps", type=int, default=20, help=f"steps of a run; the first {WARM_UP} do not count")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128, help="pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--images", type=int, default=64, help="in the generated data set")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--only", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP + 3:
        parser.error(f"--steps must be at least {WARM_UP + 3}")
    if arguments.reference is not None and not Path(arguments.reference).is_file():
        parser.error(f"--reference: no file {arguments.reference}")
    return arguments


def measure(name: str, number: int, work: Path) -> list[float]:
    """Seconds of each step of one run, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--round", str(number)]
    log = work / f"{name}_{number}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"the {name} run failed; {log} ends with:\n{log.read_text(encoding='utf-8')[-1500:]}")
    return json.loads((work / "steps.json").read_text(encoding="utf-8"))


# ---- the three ------------------------------------------------------------------------------------------------------


def stamp_backward(clock: str) -> list[float]:
    """A list that gets the time of each call of `Accelerator.backward`."""
    from accelerate import Accelerator

    stamps: list[float] = []
    original = Accelerator.backward

    def backward(self: Accelerator, loss, **options) -> None:
        stamps.append(moment(clock))
        original(self, loss, **options)

    Accelerator.backward = backward
    return stamps


def moment(clock: str) -> float:
    """Seconds, when all that was asked of a GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def run_reference(arguments: argparse.Namespace, work: Path) -> list[float]:
    """diffusers' script as it is, under its own arguments."""
    stamps = stamp_backward(arguments.clock)
    sys.argv = [arguments.reference, "--pretrained_model_name_or_path", str(work / "model")]
    sys.argv += ["--train_data_dir", str(work / "images"), "--caption_column", "text", "--center_crop"]
    sys.argv += ["--output_dir", str(work / f"reference_{arguments.round}"), "--cache_dir", str(work / "datasets")]
    sys.argv += ["--resolution", str(arguments.resolution), "--train_batch_size", str(arguments.batch_size)]
    sys.argv += ["--max_train_steps", str(arguments.steps), "--rank", str(arguments.rank), "--seed", "0"]
    sys.argv += ["--mixed_precision", arguments.mixed_precision, "--snr_gamma", "5.0", "--lr_warmup_steps", "0"]
    runpy.run_path(arguments.reference, run_name="__main__")
    return stamps


def run_medisyn(arguments: argparse.Namespace, work: Path) -> list[float]:
    """medisyn's trainer with its defaults."""
    import shutil

    from medisyn.config import parse_config
    from medisyn.trainer import Trainer

    folder = work / f"medisyn_{arguments.round}"
    shutil.rmtree(folder, ignore_errors=True)  # a finished run would train no further
    data = {"source": str(work / "images"), "caption_column": "text", "resolution": arguments.resolution}
    task = {"type": "diffusion", "preset": None, "base": str(work / "model"), "lora": {"rank": arguments.rank}}
    task["cache_dir"] = str(work / f"cache_{arguments.resolution}_{arguments.mixed_precision}")
    loop = {"steps": arguments.steps, "batch_size": arguments.batch_size, "mixed_precision": arguments.mixed_precision}
    config = {"output_dir": str(folder), "data": data, "task": task, "optim": {"warmup_steps": 0}, "train": loop}
    stamps = stamp_backward(arguments.clock)
    Trainer(parse_config(config)).fit()
    return stamps


def run_bare(arguments: argparse.Namespace, work: Path) -> list[float]:
    """The UNet and nothing else."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from torch.nn.functional import mse_loss

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = UNet2DConditionModel.from_pretrained(work / "model" / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=arguments.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.to(device).train()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    side = arguments.resolution // 8
    noisy, target = torch.randn(2, arguments.batch_size, 4, side, side, device=device)
    tokens = torch.randn(arguments.batch_size, 77, unet.config.cross_attention_dim, device=device)
    timesteps = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    stamps = []
    for _ in range(arguments.steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.mixed_precision == "bf16"):
            prediction = unet(noisy, timesteps, encoder_hidden_states=tokens).sample
        loss = mse_loss(prediction.float(), target)
        stamps.append(moment(arguments.clock))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return stamps


RUN = {"reference": run_reference, "medisyn": run_medisyn, "bare": run_bare}


# ---- model and data -------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """Stable Diffusion 1.5 at a quarter of its width, with random weights."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 128, 128),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=16,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(80, 160, 320, 320),
            layers_per_block=2,
            cross_attention_dim=192,
            attention_head_dim=8,
            norm_num_groups=16,
        ),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    pipe.save_pretrained(partial)
    partial.rename(folder)


def write_images(folder: Path, count: int, side: int) -> None:
    """An imagefolder with captions in `text`."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side * 5 // 4, side * 5 // 4)).save(folder / f"{i:04d}.png")
        caption = ", ".join(rng.choice(WORDS, 3, replace=False))
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
