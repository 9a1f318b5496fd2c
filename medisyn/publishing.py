"""A run, a pipeline or an adapter as a complete Hub repository, uploaded or written to a folder.

- The repository is assembled in a folder first, the same for an upload and for a dry run: weights as safetensors, the
  pipeline's own code, card, samples, configuration, hashes of the training images, licence, report. Only known files
  are taken along, paths of this machine are taken out, and a last look refuses what would still give some away.
- What was used goes along, `report.json`, the hand-written `card.md` with its pictures, the note in `samples.png`: the
  published folder, and the embedded default, can be published again with nothing else at hand.
- Sample images are synthetic ones. The grid of an evaluation also shows real images, so it is never published.
- `upload_folder` of huggingface_hub sends what is not on the Hub yet: the same command again continues an upload.

    medisyn publish runs/knee-osteoarthritis owner/knee-osteoarthritis --dry-run outputs/knee
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from .adapter_folder import MANIFEST, SAMPLES
from .card_metrics import metrics_of_report
from .cards import (
    MARK,
    License,
    license_note,
    make_card,
    own_headings,
    pictures_of,
    read_sections,
    settle_license,
)
from .cleaning import clean_file, find_private, without_paths
from .generation.provenance import read_provenance, write_png
from .hub import INDEX, WITH_WEIGHTS, WITHOUT_WEIGHTS, first_line, is_hub_name, split_revision
from .licenses import stated_license
from .training_record import TRAINING_RECORD

CARD, LICENSE, CONFIG, REPORT = "README.md", "LICENSE", "config.yaml", "report.json"
SECTIONS = "card.md"  # hand-written
TAKEN = (".safetensors", ".json", ".txt", ".model")  # files of a component
CODE = "medisyn_pipeline.py"
NOTE = "drawn"  # text chunk of samples.png: how it was made


@dataclass(frozen=True)
class Subject:
    """What is published.

    Attributes:
        kind: "model" or "adapter".
        folder: Of the pipeline or the adapter.
        run: The run's folder; without a run, the same.
    """

    kind: str
    folder: Path
    run: Path

    def file(self, *names: str) -> Path | None:
        """The first of these files that is there, of the folder itself or the run."""
        places = [place / name for name in names for place in (self.folder, self.run)]
        return next((place for place in places if place.is_file()), None)


def publish(
    run_or_folder: str | Path,
    repo_id: str,
    dry_run: str | Path | None = None,
    private: bool = False,
    force: bool = False,
    license: str | None = None,
    card: str | Path | None = None,
    report: str | Path | None = None,
) -> Path | str:
    """Publish a model or an adapter.

    Args:
        run_or_folder: A run, its `pipeline/` or `adapter/`, any folder of a pipeline or an adapter, or "default".
        repo_id: owner/name on the Hub; made if it is not there.
        dry_run: Write the repository into this folder and upload nothing.
        private: Make a new repository private.
        force: Publish although the card has no measured numbers or the licence is looser than the sources; the card
            then says so.
        license: Of the weights; by default what the training record states, else that of the strictest source.
        card: Hand-written sections; by default `card.md` of the folder or of the run.
        report: `report.json` of `medisyn evaluate`; by default that of the folder, or of the run or its `evaluation/`.

    Returns:
        The folder of a dry run, or the address of the repository.

    Raises:
        FileNotFoundError: There is nothing to publish.
        FileExistsError: The folder of the dry run holds something else.
        ValueError: A refused card, damaged files, or a report of another model.
        OSError: The Hub refuses or cannot be reached.
    """
    if not is_hub_name(repo_id) or split_revision(repo_id)[1]:
        raise ValueError(f"{repo_id!r} is not a Hub name of the form owner/name")
    subject = find_subject(run_or_folder)
    stated = None if license is None else stated_license(license)
    if dry_run is not None:
        target = Path(dry_run)
        _require_replaceable(target, subject)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.absolute().with_name(f".{target.absolute().name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            assemble(subject, repo_id, partial, stated, card, report, force)
            old = partial.with_suffix(".old")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)  # never half a folder under the final name
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target
    _require_login()
    with tempfile.TemporaryDirectory(prefix="medisyn-publish-") as folder:
        assemble(subject, repo_id, Path(folder) / "repository", stated, card, report, force)
        return upload(Path(folder) / "repository", repo_id, private)


def find_subject(run_or_folder: str | Path) -> Subject:
    """The pipeline or adapter of a run or folder; "default" is the embedded model. Raises FileNotFoundError."""
    folder = Path(run_or_folder).expanduser()
    if str(run_or_folder) == "default" and not folder.exists():
        folder = Path(str(resources.files("medisyn"))) / "pretrained"
    for kind, mark in (("model", INDEX), ("adapter", MANIFEST)):
        for place in (folder, folder / ("pipeline" if kind == "model" else "adapter")):
            if (place / mark).is_file():
                inside = place.name in ("pipeline", "adapter") and (place.parent / CONFIG).is_file()
                return Subject(kind, place, place.parent if inside or place != folder else place)
    tried = [folder / INDEX, folder / MANIFEST, folder / "pipeline" / INDEX, folder / "adapter" / MANIFEST]
    raise FileNotFoundError(
        f"nothing to publish in {str(run_or_folder)!r}; tried: {', '.join(map(str, tried))}. A run has a pipeline or "
        "an adapter when its training has finished"
    )


def assemble(
    subject: Subject,
    repo_id: str,
    folder: Path,
    license: License | None = None,
    card: str | Path | None = None,
    report: str | Path | None = None,
    force: bool = False,
) -> None:
    """Write the complete repository into a new folder; arguments as of `publish`."""
    from .published_facts import facts_of

    sections_file = Path(card) if card is not None else subject.file(SECTIONS)
    sections = {} if sections_file is None else read_sections(sections_file)
    if sections_file is None:
        _require_no_hand_written(subject)
    numbers = _read_report(Path(report) if report is not None else subject.file(REPORT, f"evaluation/{REPORT}"))
    folder.mkdir(parents=True)
    for source, name in _files(subject):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
        clean_file(folder / name)
    if sections_file is not None:
        _copy_sections(sections_file, folder)
    if numbers is not None:
        (folder / REPORT).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    config = subject.file(CONFIG)
    if config is not None:
        plain = without_paths(yaml.safe_load(config.read_text(encoding="utf-8")))
        (folder / CONFIG).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    facts, draw = facts_of(subject, repo_id, numbers, folder)
    if subject.kind == "adapter":
        clean_file(folder / MANIFEST)  # numbers were added to it
    facts = replace(facts, **{name: without_paths(getattr(facts, name)) for name in ("metrics", "notes", "facts")})
    settled = license or stated_license_of(subject) or settle_license(facts)
    if (folder / SAMPLES).is_file():
        facts = replace(facts, image=SAMPLES, image_note=_note_of(folder / SAMPLES))
    text = make_card(facts, settled, sections, force)  # refused before anything is drawn
    if facts.image is None:
        note = draw()
        if (folder / SAMPLES).is_file():
            with Image.open(folder / SAMPLES) as image:
                write_png(image, folder / SAMPLES, read_provenance(folder / SAMPLES) | {NOTE: note})
            text = make_card(replace(facts, image=SAMPLES, image_note=note), settled, sections, force)
    (folder / CARD).write_text(text, encoding="utf-8")
    (folder / LICENSE).write_text(license_note(facts, settled), encoding="utf-8")
    left = find_private(folder, [str(subject.folder.resolve()), str(subject.run.resolve())])
    left += _paths_of_this_machine(folder)
    if left:
        more = f" and in {len(left) - 1} more files" if len(left) > 1 else ""
        raise ValueError(f"a path of this machine would be published, {left[0]}{more}: take it out of its source")


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Bring a folder to the Hub; what is there already is not sent again. Returns the repository's address.

    Raises:
        ValueError: `private` is asked for, and there is a public repository of this name.
        OSError: The Hub refuses or cannot be reached; says how to continue.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is there already and public: make it private first, or choose another name")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish with medisyn",
            delete_patterns=["*.safetensors", "*.safetensors.index.json", SECTIONS, REPORT],  # of an earlier version
        )
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - what a lost connection raises depends on the HTTP library
        cause = error.__cause__ or error
        raise OSError(
            f"the upload to {repo_id} stopped: {first_line(error).rstrip('.')} ({first_line(cause).rstrip('.')}). The "
            "same command again continues; what has arrived is not sent again"
        ) from error
    return str(address)


def stated_license_of(subject: Subject) -> License | None:
    """The licence that the training record states; in words that no rule understands, research only."""
    from .published_facts import record_of

    text = (record_of(subject) or {}).get("license")
    if not text:
        return None
    try:
        return stated_license(text)
    except ValueError:
        return stated_license("research-only")


def _files(subject: Subject) -> list[tuple[Path, str]]:
    """The files to take along, with their names in the repository."""
    folder = subject.folder
    if subject.kind == "adapter":
        names = [file.name for file in sorted(folder.glob("*.safetensors"))]
        names += [name for name in (MANIFEST, TRAINING_RECORD) if (folder / name).is_file()]
    else:
        names = [name for name in (INDEX, CODE, TRAINING_RECORD) if (folder / name).is_file()]
        for part in (*WITH_WEIGHTS, *WITHOUT_WEIGHTS):
            inside = sorted((folder / part).glob("*")) if (folder / part).is_dir() else []
            taken = (*TAKEN, ".py") if part == "classifier" else TAKEN  # the one component with code of its own
            names += [f"{part}/{file.name}" for file in inside if file.suffix in taken]
    samples = subject.file(SAMPLES, "evaluation/samples.png")
    return [(folder / name, name) for name in names] + ([(samples, SAMPLES)] if samples else [])


def _read_report(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{file} is not JSON") from None
    if not isinstance(report, Mapping) or not isinstance(report.get("subject"), Mapping) or "notes" not in report:
        raise ValueError(f"{file} is not a report of medisyn evaluate")
    metrics_of_report(report)
    return without_paths(report)


def _copy_sections(file: Path, folder: Path) -> None:
    """Take a hand-written card along, and the pictures that it shows."""
    shutil.copyfile(file, folder / SECTIONS)
    for name in pictures_of(file.read_text(encoding="utf-8")):
        if not (file.parent / name).is_file():
            raise FileNotFoundError(f"{file} shows the picture {name}, which is not beside it")
        if name != SAMPLES:  # that of the model's folder
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.parent / name, folder / name)


def _require_no_hand_written(subject: Subject) -> None:
    """Refuse to replace a card whose hand-written sections nobody has brought along."""
    old = subject.folder / CARD
    text = old.read_text(encoding="utf-8", errors="replace") if old.is_file() else ""
    if MARK in text and (lost := own_headings(text)):
        raise ValueError(
            f"{old} has hand-written sections ({', '.join(lost)}) that would be lost: put their file beside it as "
            f"{SECTIONS}, or name it with --card"
        )


def _note_of(file: Path) -> str:
    """How `samples.png` was made, as the file itself says."""
    with Image.open(file) as image:
        return getattr(image, "text", {}).get(NOTE, "")


def _paths_of_this_machine(folder: Path) -> list[str]:
    """Absolute paths in the cards, which people write, that begin with a folder of this machine."""
    found = []
    for file in (folder / CARD, folder / SECTIONS):
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        paths = re.finditer(r"(?<![\w:/.<])/([\w.~-]+)/[\w.~/-]+", text)
        found += [f"{file.name}: {path[0]}" for path in paths if Path("/", path[1]).is_dir()][:1]
    return found


def _require_replaceable(target: Path, subject: Subject) -> None:
    """A dry run may write into a new or empty folder, or replace what another one left, and nothing else."""
    source = subject.run.resolve()
    if target.resolve() in (source, *source.parents, subject.folder.resolve()):
        raise FileExistsError(f"{target} is or contains what is to be published; choose another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"{target} is not a folder; choose another name")
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if not held:
        return
    known = {CARD, SECTIONS, LICENSE, CONFIG, REPORT, SAMPLES, INDEX, MANIFEST, TRAINING_RECORD, CODE}
    if SECTIONS in held:
        shown = pictures_of((target / SECTIONS).read_text(encoding="utf-8", errors="replace"))
        known |= {Path(name).parts[0] for name in shown}
    foreign = {name for name in held - known - {*WITH_WEIGHTS, *WITHOUT_WEIGHTS} if not name.endswith(".safetensors")}
    card = target / CARD
    if foreign or not card.is_file() or MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(
            f"{target} holds something that medisyn publish did not write"
            f"{': ' + min(foreign) if foreign else ''}; choose another folder"
        )


def _require_login() -> None:
    """Fail before anything is assembled."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError("offline mode is on (HF_HUB_OFFLINE): unset it, or use --dry-run")
    if get_token() is None:
        raise ValueError("not logged in to the Hub: log in with `hf auth login` or set HF_TOKEN, or use --dry-run")
    try:
        HfApi().whoami()
    except Exception as error:  # noqa: BLE001 - what a missing network raises depends on the HTTP library
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise ValueError("the Hub refuses this token: log in again with `hf auth login`") from error
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {first_line(error)}; check the network") from error
