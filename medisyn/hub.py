"""Files of Hub repositories: which are wanted, how they get here, and why they do not.

- What a repository holds is looked at before anything large is downloaded, and pickled weights never are.
- A gated or missing repository, no network and offline mode each have their own line: what, why, and what to do.
- Without a network, what was downloaded before is used.

    folder = from_hub("adapter", "owner/lora", lambda files: adapter_files("owner/lora", files), ADAPTER_MARKS)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

INDEX = "model_index.json"
WITH_WEIGHTS = ("unet", "vae", "text_encoder", "image_encoder", "classifier")
WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BESIDE_WEIGHTS = ("README.md", "training_images.json")  # the card and the record of training images
ADAPTER_MARKS = ("adapter.json", "pytorch_lora_weights.safetensors", "README.md")
TIMEOUT = 20.0  # seconds until the Hub counts as out of reach
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` has the form owner/repository, perhaps with `@revision`: a branch, tag or commit."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w./-]*)?", str(name)) is not None


def split_revision(name: str) -> tuple[str, str | None]:
    """owner/repository@revision to its two parts; None is the newest revision."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def from_hub(
    kind: str,
    name: str,
    wanted: Callable[[Sequence[str]], Sequence[str]],
    marks: Sequence[str],
    tried: Sequence[Path] = (),
) -> Path:
    """The local snapshot of a repository.

    Args:
        kind: model, autoencoder or adapter, for messages.
        name: owner/repository, or owner/repository@revision.
        wanted: chooses among the repository's files; raises ValueError if they are not what is looked for.
        marks: files of which one is here if the repository was downloaded before.
        tried: local places that were looked at before, for messages.

    Raises:
        PermissionError: the repository is gated.
        FileNotFoundError: there is none, or no such revision, or it cannot be reached and was not downloaded before.
        ValueError: from `wanted`.
    """
    hub, (repository, revision) = constants.ENDPOINT, split_revision(name)
    cause: Exception
    try:
        listed = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT).siblings or []
        files = [one.rfilename for one in listed]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted(files))))
    except GatedRepoError as error:
        page = f"{hub}/{repository}"
        raise PermissionError(f"{kind} {name!r} is gated: accept its conditions on {page}, then {LOG_IN}") from error
    except RepositoryNotFoundError as error:
        reason = f"{hub} has none of this name, or a private one: check the name, or {LOG_IN}"
        raise _missing(kind, name, tried, reason) from error
    except RevisionNotFoundError as error:
        reason = f"{repository} has no branch, tag or commit {revision}: its page is {hub}/{repository}"
        raise _missing(kind, name, tried, reason) from error
    except OfflineModeIsEnabled as error:
        reason, cause = "offline mode is on (HF_HUB_OFFLINE) and it was not downloaded before: go online once", error
    except HfHubHTTPError as error:
        reason, cause = f"{hub} answered: {first_line(error)}: try again later", error
    except ValueError:  # of `wanted`
        raise
    except Exception as error:  # noqa: BLE001 - what a missing network raises depends on the HTTP library
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, not the network
            raise
        reason = f"{hub} cannot be reached and it was not downloaded before: check the network; {first_line(error)}"
        cause = error
    for mark in marks:
        cached = try_to_load_from_cache(repository, mark, revision=revision)
        if isinstance(cached, str):
            return Path(cached.removesuffix(mark))
    raise _missing(kind, name, tried, reason) from cause


def model_files(name: str, files: Sequence[str], parts: Mapping[str, str]) -> list[str]:
    """Configurations of the components that a `MediSynPipeline` has, their weights, the card and the record.

    Args:
        name: of the repository, for messages.
        files: of the repository.
        parts: component names to class names.

    Raises:
        ValueError: a component has no safetensors; nothing was downloaded then.
    """
    chosen = [file for file in BESIDE_WEIGHTS if file in files]
    for part in (*WITH_WEIGHTS, *WITHOUT_WEIGHTS):
        if part in parts:
            inside = _inside(part, files)
            chosen += [file for file in inside if file.endswith((".json", ".txt", ".model")) and not _is_variant(file)]
            chosen += _weights(f"model {name!r}: {part}", inside) if part in WITH_WEIGHTS else []
    return chosen


def autoencoder_files(name: str, files: Sequence[str]) -> list[str]:
    """The autoencoder of a pipeline's repository, or one by itself. Raises ValueError if there is none."""
    folder = next((folder for folder in ("vae", ".") if str(PurePosixPath(folder) / "config.json") in files), None)
    if folder is None:
        raise ValueError(f"no autoencoder in {name!r}: neither vae/config.json nor config.json is there")
    weights = _weights(f"autoencoder {name!r}", _inside(folder, files))
    return [str(PurePosixPath(folder) / "config.json"), *weights]


def adapter_files(name: str, files: Sequence[str]) -> list[str]:
    """What an adapter has at its top. Raises ValueError for a model, for pickles, and where there are no weights."""
    if INDEX in files:
        raise ValueError(f"adapter {name!r} is a whole model ({INDEX}): name it as the model")
    top = [file for file in files if "/" not in file]
    if not any(file.endswith(".safetensors") for file in top):
        pickles = [file for file in top if file.endswith(PICKLES)]
        none = f"adapter {name!r} has no weights: no .safetensors file is there"
        raise ValueError(pickled_only(f"adapter {name!r}", pickles) if pickles else none)
    return [file for file in top if file.endswith((".safetensors", ".json", ".md", ".png"))]


def without_index(name: str, files: Sequence[str]) -> str:
    """Why a repository without `model_index.json` is no model."""
    if any(mark in files for mark in ADAPTER_MARKS[:2]):
        return f"model {name!r} is an adapter, not a model: name it as the adapter"
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        return pickled_only(f"model {name!r}", pickles)
    return f"model {name!r} is not in diffusers' format: the repository has no {INDEX}"


def pickled_only(where: str, pickles: Sequence[str]) -> str:
    """The refusal of weights that can run code."""
    return (
        f"{where} has pickled weights only ({', '.join(pickles[:3])}); valid are .safetensors files, since a pickle "
        "can run any code: ask its author for them"
    )


def first_line(error: BaseException) -> str:
    """What an error says first; further lines of the libraries' errors are advice to programmers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _missing(kind: str, name: str, tried: Sequence[Path], reason: str) -> FileNotFoundError:
    places = ", ".join([*map(str, tried), f"Hub repository {name}"])
    return FileNotFoundError(f"no {kind} {name!r}; tried: {places} ({reason})")


def _inside(folder: str, files: Sequence[str]) -> list[str]:
    return [file for file in files if PurePosixPath(file).parent == PurePosixPath(folder)]


def _weights(where: str, files: Sequence[str]) -> list[str]:
    """The safetensors of one component, with the index of their shards, but no other variants such as fp16."""
    found = [file for file in files if file.endswith((".safetensors", ".safetensors.index.json"))]
    plain = [file for file in found if not _is_variant(file)]
    if plain:
        return plain
    if found:
        raise ValueError(f"{where} has weights of other variants only ({', '.join(found[:3])})")
    pickles = [file for file in files if file.endswith(PICKLES)]
    raise ValueError(pickled_only(where, pickles) if pickles else f"{where} has no .safetensors file")


def _is_variant(file: str) -> bool:
    """As diffusion_pytorch_model.fp16.safetensors is one."""
    stem = PurePosixPath(file).name.removesuffix(".index.json")
    return stem.endswith(".safetensors") and "." in stem.removesuffix(".safetensors")
