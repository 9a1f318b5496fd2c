"""What this machine can do: versions, devices, number formats, network, extras, and what will not work and why.

- Number formats are measured, not looked up: a convolution and a matrix product are run on the device in each.
- A missing extra is reported together with what needs it.

    medisyn doctor
"""

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import medisyn

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "open-clip-torch", "peft", "accelerate", "datasets")
# What an extra brings, the modules that show whether it is there, and what does not work without it.
EXTRAS = {
    "eval": (("torchmetrics", "torch_fidelity", "timm", "sklearn", "scipy", "matplotlib"), "medisyn evaluate"),
    "medical": (("pydicom", "nibabel"), "training on DICOM and NIfTI files"),
    "demo": (("gradio",), "the demonstration in the browser"),
    "track": (("tensorboard",), "train.tracker=tensorboard"),
    "search": (("faiss",), "medisyn select on millions of images"),
    "ssl": (("lightly",), "training a self-supervised encoder"),
}
DTYPES = ("float32", "bfloat16", "float16")
SLOW = 3.0  # times slower than float32 is worth a warning
LEAST_DISK = 2**30  # bytes


def examine() -> dict:
    """All findings as plain data; `problems` lists what will not work, one sentence each."""
    import torch

    problems: list[str] = []
    versions: dict[str, str | None] = {"medisyn": medisyn.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
            problems.append(f"{library} is not installed: reinstall medisyn with its dependencies")
    devices = {}
    for device in _devices():
        dtypes = {name: _measure(device, getattr(torch, name)) for name in DTYPES}
        devices[device] = {"name": _device_name(device), "milliseconds": dtypes}
        for name, milliseconds in dtypes.items():
            if milliseconds is None:
                problems.append(f"{name} does not work on {device}: use another dtype there")
            elif dtypes["float32"] and milliseconds > SLOW * dtypes["float32"]:
                problems.append(
                    f"{name} is {milliseconds / dtypes['float32']:.0f} times slower than float32 on {device}"
                )
    if list(devices) == ["cpu"]:
        problems.append("no accelerator: the mini preset works well on a CPU, presets small and sd train very slowly")
    extras = {}
    for extra, (modules, needed_for) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        extras[extra] = missing
        if missing:
            problems.append(
                f"{needed_for} will not work: {', '.join(missing)} missing; pip install 'medisyn[{extra}]'"
            )
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if offline:
        problems.append("HF_HUB_OFFLINE is set: Hub names work only for models that are in the cache")
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        problems.append(f"{place} is not writable: models from the Hub cannot be kept (set HF_HOME)")
    elif free < LEAST_DISK:
        problems.append(f"{free / 2**20:.0f} MiB are free in {place}: too few for models from the Hub (set HF_HOME)")
    default = Path(medisyn.__file__).parent / "pretrained"
    embedded = any(default.rglob("model_index.json"))
    if not embedded:
        problems.append("this installation has no embedded model: medisyn generate needs --model")
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "devices": devices,
        "extras": extras,
        "offline": offline,
        "cache": {"folder": str(cache), "free_gib": round(free / 2**30, 1)},
        "embedded_model": embedded,
        "problems": problems,
    }


def format_findings(findings: dict) -> str:
    """The findings for a reader, one topic per paragraph."""
    lines = ["versions"]
    lines += [f"  {name:16} {number or 'missing'}" for name, number in findings["versions"].items()]
    lines += ["", f"devices (a convolution and a matrix product; {findings['threads']} CPU threads)"]
    for device, found in findings["devices"].items():
        measured = (
            f"{name} {'does not work' if value is None else f'{value:.1f} ms'}"
            for name, value in found["milliseconds"].items()
        )
        lines.append(f"  {device:8} {found['name']}: {', '.join(measured)}")
    lines += ["", "extras"]
    for extra, missing in findings["extras"].items():
        lines.append(f"  {extra:16} {'installed' if not missing else 'missing ' + ', '.join(missing)}")
    lines += ["", "models"]
    lines.append(f"  {'embedded':16} {'there' if findings['embedded_model'] else 'missing'}")
    lines.append(
        f"  {'Hub':16} {'offline (HF_HUB_OFFLINE)' if findings['offline'] else 'online, if there is a network'}"
    )
    lines.append(f"  {'cache':16} {findings['cache']['folder']}, {findings['cache']['free_gib']} GiB free")
    lines += ["", "what will not work, or not well"]
    lines += [f"  - {problem}" for problem in findings["problems"]] or ["  nothing found"]
    return "\n".join(lines)


def best_device() -> str:
    """The device that commands use unless told otherwise: an accelerator if there is one."""
    return _devices()[-1]


def check_device(name: str) -> str:
    """`name` if this machine has that device. Raises ValueError listing those it has."""
    import torch

    valid = _devices()
    try:
        kind = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; this machine has: {', '.join(valid)}") from None
    count = torch.cuda.device_count() if kind.type == "cuda" else 1
    if kind.type not in valid or (kind.index or 0) >= count:
        raise ValueError(f"no device {name!r}; this machine has: {', '.join(valid)}")
    return name


def _devices() -> list[str]:
    import torch

    available = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    return ["cpu", *(name for name, there in available.items() if there)]


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def _measure(device: str, dtype) -> float | None:
    """Milliseconds of a convolution and a matrix product, the best of three; None if the device cannot do them."""
    import torch

    try:
        image = torch.ones(4, 64, 32, 32, device=device, dtype=dtype)
        kernel = torch.ones(64, 64, 3, 3, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            features = torch.nn.functional.conv2d(image, kernel, padding=1).flatten(1)
            total = (features @ features.T).float().sum().item()  # .item() waits for the device
            best = min(best, 1000 * (time.perf_counter() - start))
        return best if total == total else None
    except (RuntimeError, NotImplementedError):
        return None
