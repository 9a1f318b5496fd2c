"""Image features: the space in which every metric of this package measures.

Notable choices:

* An extractor is a string, so that a report can say exactly which one was used (`EXTRACTORS` lists the forms).
* Its weights are named by their SHA-256, and every report carries it: numbers from two extractors cannot be compared.
* Images can be brought to one `resolution` first. Generated images at 128 px against photographs at 512 px would
  otherwise measure the resolution and little else (Parmar et al. 2022, "On Aliased Resizing").
* Features are cached under the extractor's key and the content of each image: an interrupted run goes on where it
  stopped, and a second evaluation against the same real images costs seconds.

    extractor = load_extractor("timm:tf_efficientnet_lite0@efficientnet_lite0.pth")
    features = extract_features(extractor, load_images("photographs/"), cache_dir="features/")   # (N, 1280)
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from .codec import Codec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

    from medisyn.data.loading import ImageDataset

EXTRACTORS = (
    "inception[@WEIGHTS_FILE]",
    "dinov2:HUB_NAME_OR_FOLDER",
    "timm:MODEL@WEIGHTS_FILE[?size=..&mean=..&std=..]",
    "model",
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
IMAGES_PER_SHARD = 1024  # how much work an interrupted run can lose


class FeatureExtractor:
    """Turns RGB images into one feature vector each.

    Args:
        spec: The string it was loaded from; goes into reports.
        network: Maps a stacked batch of what `transform` returns to features (B, D).
        transform: RGB image of any size -> tensor.
        weights_sha256: Names the weights.
        resolution: Side in pixels to which every image is brought (centre crop to a square, antialiased) before
            `transform`; None leaves images as they are. May be set later.
        device: Where the network runs.
        codec: What every image passes through at that resolution; None leaves images as they are.
    """

    def __init__(  # noqa: D107 - described above
        self,
        spec: str,
        network: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        weights_sha256: str,
        resolution: int | None = None,
        device: str | torch.device = "cpu",
        codec: Codec | None = None,
    ):
        self.spec = spec
        self.network = network
        self.transform = transform
        self.weights_sha256 = weights_sha256
        self.resolution = resolution
        self.device = torch.device(device)
        self.codec = codec

    @property
    def key(self) -> str:
        """Name of the cache folder: changes with the weights, the preprocessing, the resolution and the codec."""
        # The weights' file may move: only its content counts, so the path between "@" and "?" is left out.
        name, _, rest = self.spec.partition("@")
        options = rest.partition("?")[2]
        text = f"{name}?{options} {self.weights_sha256} {self.resolution}" + (f" {self.codec}" if self.codec else "")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        """Features (B, D) of `images`, float32 on the CPU."""
        if self.resolution is not None:
            images = [_square(image, self.resolution) for image in images]
        if self.codec is not None:
            images = [self.codec(image) for image in images]
        batch = torch.stack([self.transform(image) for image in images])
        return self.network(batch.to(self.device)).float().cpu()


def load_extractor(
    spec: str,
    pipe: "DiffusionPipeline | None" = None,
    resolution: int | None = None,
    device: str | None = None,
    codec: Codec | None = None,
) -> FeatureExtractor:
    """Build the extractor that `spec` names.

    Args:
        spec: One of `EXTRACTORS`. `inception` is the network of the published FID numbers (torch-fidelity's port,
            downloaded once unless a file is given), `dinov2` any vision encoder of transformers, also the folder
            `image_encoder` of a pipeline, `timm` any timm model with weights from a local file, `model` the image
            encoder of the pipeline under evaluation.
        pipe: The pipeline under evaluation; only `model` needs it.
        resolution: See `FeatureExtractor`.
        device: Defaults to the first GPU, or the CPU.
        codec: See `FeatureExtractor`.

    Raises:
        ValueError: Unknown form, unknown timm model, weights that do not fit, or a pipeline without image encoder.
        FileNotFoundError: The weights file is missing.
        OSError: Weights have to be downloaded and cannot be.
        ImportError: An optional dependency is missing.
    """
    kind, _, rest = spec.partition(":")
    if kind == "timm" and rest:
        network, options, weights_sha256 = load_timm(rest)
        transform = _normalise(**options)  # the whole image, not timm's centre crop
    elif kind == "dinov2" and rest:
        network, transform, weights_sha256 = _dinov2(rest)
    elif spec == "inception" or spec.startswith("inception@"):
        network, transform, weights_sha256 = _inception(spec.partition("@")[2] or None)
    elif spec == "model":
        network, transform, weights_sha256 = _image_encoder(pipe)
    else:
        raise ValueError(f"unknown feature extractor {spec!r}; valid forms: {', '.join(EXTRACTORS)}")
    # A pipeline's own encoder stays where the pipeline is.
    device = pipe.device if spec == "model" else device or ("cuda" if torch.cuda.is_available() else "cpu")
    return FeatureExtractor(spec, network.eval().to(device), transform, weights_sha256, resolution, device, codec)


def extract_features(
    extractor: FeatureExtractor,
    dataset: "ImageDataset",
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> np.ndarray:
    """Features (N, D) float32 of every image of `dataset`, in its order; images seen before come from `cache_dir`."""
    hashes = dataset.hashes()
    folder = None if cache_dir is None else Path(cache_dir) / extractor.key
    known = {} if folder is None else _read_shards(folder)
    if None in hashes:
        raise ValueError(f"image {hashes.index(None)} cannot be read; leave such images out with drop_unreadable()")
    missing = list({content: index for index, content in enumerate(hashes) if content not in known}.values())
    with tqdm(total=len(missing), desc="features", unit="image", disable=not progress or not missing) as bar:
        for start in range(0, len(missing), IMAGES_PER_SHARD):
            shard: dict[str, np.ndarray] = {}
            indices = missing[start : start + IMAGES_PER_SHARD]
            for begin in range(0, len(indices), batch_size):
                chunk = indices[begin : begin + batch_size]
                vectors = extractor([dataset.image(index) for index in chunk]).numpy()
                shard.update((hashes[index], vector) for index, vector in zip(chunk, vectors, strict=True))
                bar.update(len(chunk))
            if folder is not None:
                _write_shard(folder, shard)
            known.update(shard)
    return np.stack([known[content] for content in hashes])


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    known: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as shard:
            known.update(zip(shard["hashes"].tolist(), shard["features"], strict=True))
    return known


def _write_shard(folder: Path, shard: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("".join(shard).encode()).hexdigest()[:16]
    # Written beside its place and moved: a killed run leaves no half shard behind.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        np.savez(file, hashes=np.array(list(shard)), features=np.stack(list(shard.values())))
    os.replace(file.name, folder / f"{name}.npz")


def _square(image: Image.Image, size: int) -> Image.Image:
    """Centre crop to a square and resize, with Pillow's antialiasing filter."""
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _normalise(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def transform(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(_square(image, size))).permute(2, 0, 1)
        return (pixels.float() / 255 - shift) / scale

    return transform


def load_timm(rest: str) -> tuple[nn.Module, dict[str, Any], str]:
    """The network that `MODEL@WEIGHTS_FILE[?size=..&mean=..&std=..]` names, its options and its weights' SHA-256.

    Raises:
        ValueError: unknown model or option, or weights that do not fit.
        FileNotFoundError: the weights file is missing.
    """
    import timm

    name, _, location = rest.partition("@")
    path, _, query = location.partition("?")
    if not path:
        raise ValueError(f"timm extractor {rest!r} names no weights file; write timm:MODEL@WEIGHTS_FILE")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(f"unknown timm model {name!r}; timm.list_models() lists the valid names, such as {near}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {path!r} of the extractor timm:{name} does not exist")
    network = timm.create_model(name, pretrained=False, num_classes=0)
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types for a file that is no checkpoint
        raise ValueError(f"{path!r} is not a readable checkpoint ({type(error).__name__})") from error
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    try:
        network.load_state_dict({key: value for key, value in state.items() if key.rpartition(".")[0] not in heads})
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{path!r} does not fit timm model {name!r}: {details[0][:200]}") from error
    data = timm.data.resolve_data_config(model=network)
    options = {"size": data["input_size"][-1], "mean": data["mean"], "std": data["std"]}
    for option, value in parse_qsl(query):
        if option not in options:
            raise ValueError(f"unknown option {option!r} of a timm extractor; valid options: {', '.join(options)}")
        try:
            numbers = tuple(float(number) for number in value.split(","))
        except ValueError:
            raise ValueError(f"option {option}={value!r} of a timm extractor is not a number") from None
        # One value stands for the three channels.
        options[option] = int(numbers[0]) if option == "size" else numbers * 3 if len(numbers) == 1 else numbers
    weights_sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return network.to(memory_format=torch.channels_last), options, weights_sha256


def _dinov2(name_or_folder: str):
    """Global token of a transformers vision encoder (DINOv2, with registers, DINOv3 and relatives)."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(_processor_folder(name_or_folder))
        encoder = AutoModel.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"cannot load the feature extractor {name_or_folder!r}: {reason}") from error

    def transform(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    return _GlobalToken(encoder), transform, _state_sha256(encoder)


def _processor_folder(name_or_folder: str) -> str:
    """Where the preprocessing of an encoder is: beside it, in `feature_extractor/`, where it is part of a pipeline."""
    folder = Path(name_or_folder)
    beside = folder.absolute().parent / "feature_extractor"
    own = any((folder / name).is_file() for name in PROCESSORS)
    part = folder.is_dir() and not own and any((beside / name).is_file() for name in PROCESSORS)
    return str(beside) if part else name_or_folder


def _inception(weights_file: str | None):
    """The Inception network of the FID paper, 2048 pooled features, from torch-fidelity through torchmetrics."""
    from huggingface_hub import is_offline_mode

    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ImportError(
            "the inception extractor needs torchmetrics and torch-fidelity: pip install medisyn[eval]"
        ) from error
    if weights_file is not None and not Path(weights_file).is_file():
        raise FileNotFoundError(f"weights file {weights_file!r} of the inception extractor does not exist")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    alternatives = f"give inception@FILE or another extractor ({', '.join(EXTRACTORS[1:])})"
    if weights_file is None and not cached.is_file() and is_offline_mode():
        raise OSError(f"the Inception weights are not in {str(cached)!r} and HF_HUB_OFFLINE is set; {alternatives}")
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights_file)
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot load the Inception weights ({reason}); {alternatives}") from error

    def transform(image: Image.Image) -> Tensor:
        # The network resizes to 299 px and normalises by itself, from bytes.
        return torch.from_numpy(np.array(_square(image, min(image.size)))).permute(2, 0, 1)

    return network, transform, _state_sha256(network)


def _image_encoder(pipe: "DiffusionPipeline | None"):
    """The evaluated pipeline's own image encoder and its preprocessing."""
    if pipe is None or getattr(pipe, "image_encoder", None) is None:
        which = "no pipeline is being evaluated" if pipe is None else f"{type(pipe).__name__} has no image encoder"
        raise ValueError(f"extractor 'model' cannot be used: {which}; valid forms: {', '.join(EXTRACTORS[:-1])}")

    def transform(image: Image.Image) -> Tensor:
        return pipe.feature_extractor(images=image, return_tensors="pt")["pixel_values"][0]

    return _GlobalToken(pipe.image_encoder), transform, _state_sha256(pipe.image_encoder)


class _GlobalToken(nn.Module):
    """The first token of a transformers vision encoder's last layer."""

    def __init__(self, encoder: "PreTrainedModel"):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values=pixel_values.to(self.encoder.dtype)).last_hidden_state[:, 0]


def _state_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
