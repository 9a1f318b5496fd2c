"""Files for others to read, without the paths of the machine that wrote them.

- In JSON, YAML and the headers of safetensors, a path becomes its last part: `/home/me/data/train.parquet` becomes
  `train.parquet`. Keys that only ever hold a path (`_name_or_path`) go.
- Weights keep their bytes; only the text before them changes.
- `find_private` looks into every file afterwards: what is left there is refused, not published.

    without_paths({"source": "/home/me/data/train-*.parquet"})    # {"source": "train-*.parquet"}
"""

import getpass
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "name_or_dir")
TEXT = (".json", ".yaml", ".yml", ".md", ".txt", ".py", ".jsonl", ".model", "")

# an absolute path, or one from a home or parent folder; not the end of an address or of a word: https://a/b, and/or
_PATH = re.compile(r"(?<![\w:/.\\<])(?:(?:~[\w.-]*|\.\.?)?/(?=[\w.~-])|[A-Za-z]:[\\/])[^\s,;\"'`()|<>]*")
# where people's files lie; for the last look, in which an `/x` of a formula or a regular expression is no path
_PLACES = re.compile(
    r"(?<![\w:/.])(?:/(?:home|Users|root|tmp|mnt|media|work|workspace|content|kaggle|data|scratch|private|var|opt|srv)"
    r"/[\w.~-]|[A-Za-z]:\\+[\w.~-])"
)


def without_paths(value: Any) -> Any:
    """Plain data with every path in its texts cut down to its last part, and without the keys of `PATH_KEYS`."""
    if isinstance(value, Mapping):
        return {_cut(str(key)): without_paths(one) for key, one in value.items() if key not in PATH_KEYS}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    return _cut(value) if isinstance(value, str) else value


def clean_file(file: Path) -> None:
    """Take the paths out of a JSON, YAML or safetensors file in place; other files stay as they are.

    Raises:
        ValueError: It is not what its name says.
    """
    if file.suffix == ".safetensors":
        _clean_header(file)
        return
    if file.suffix not in (".json", ".yaml"):
        return
    text = file.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from None
    if _is_vocabulary(file) or (clean := without_paths(content)) == content:
        return
    if file.suffix == ".json":
        text = json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
    else:
        text = yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)
    file.write_text(text, encoding="utf-8")


def find_private(folder: Path, private: Iterable[str] = ()) -> list[str]:
    """What must not be published, as "file: text": paths into somebody's folders, the user's home, `private` words.

    Args:
        folder: Of the files.
        private: Further texts, such as the folder of the run.
    """
    words = {str(Path.home()), f"/{_user()}/", *private} - {"", "/", "//"}
    found = []
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        text = _readable(file)
        hits = [word for word in sorted(words) if word in text]
        if not _is_vocabulary(file):
            hits += [match[0] for match in _PLACES.finditer(text)][:1]
        if hits:
            found.append(f"{file.relative_to(folder)}: {hits[0]}")
    return found


def _readable(file: Path) -> str:
    """The text that a reader finds in a file: all of it, the header of weights, or the notes in an image."""
    if file.suffix == ".png":
        with Image.open(file) as image:
            return "\n".join(map(str, image.info.values()))
    content = file.read_bytes() if file.suffix in TEXT else _header(file)[0]
    return content.decode("utf-8", errors="replace")


def _is_vocabulary(file: Path) -> bool:
    """A tokenizer's words may look like paths; they are learned, not written by anybody."""
    return file.parent.name.startswith("tokenizer") and not file.name.endswith("config.json")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user, as in some containers
        return ""


def _cut(text: str) -> str:
    if re.match(r"(~[\w.-]*)?/\S|\.\.?/|[A-Za-z]:[\\/]", text) and "\n" not in text:  # a path, perhaps with spaces
        return _last_part(text)
    return _PATH.sub(lambda match: _last_part(match[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _header(file: Path) -> tuple[bytes, int]:
    """The JSON header of a safetensors file and where the weights begin; of another file, nothing."""
    if file.suffix != ".safetensors":
        return b"", 0
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(size), 8 + size


def _clean_header(file: Path) -> None:
    text, start = _header(file)
    header = json.loads(text)
    metadata = header.get("__metadata__") or {}
    clean = {}
    for key, value in metadata.items():
        try:  # peft's options are JSON inside of the JSON
            clean[key] = json.dumps(without_paths(json.loads(value)))
        except ValueError:
            clean[key] = _cut(value)
        else:
            clean[key] = value if json.loads(clean[key]) == json.loads(value) else clean[key]
    if clean == metadata:
        return
    text = json.dumps(header | {"__metadata__": clean}, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors are aligned to eight bytes
    partial = file.with_name(f".{file.name}.partial")
    with file.open("rb") as source, partial.open("wb") as target:
        source.seek(start)
        target.write(len(text).to_bytes(8, "little") + text)
        while block := source.read(1 << 24):
            target.write(block)
    partial.replace(file)
