"""What the documentation shows works: Python blocks run, commands parse, and the cheap commands run.

python -m pytest tests/test_readme.py
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import medisyn
from medisyn.cli import app
from medisyn.config import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EMBEDDED_DEFAULT = Path(medisyn.__file__).parent / "pretrained" / "model_index.json"

needs_embedded_default = pytest.mark.skipif(
    not EMBEDDED_DEFAULT.exists(), reason="medisyn/pretrained holds no model to run the README with"
)


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The commands of all bash blocks as argument lists, without comments; continued lines are joined."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


PYTHON_BLOCKS = code_blocks(README, "python")
MEDISYN_COMMANDS = [words[1:] for words in commands(README) if words[0] == "medisyn"]


def runs_here(arguments: list[str]) -> bool:
    """Whether a command needs what the repository holds only, and no file that a reader is to bring."""
    brings_files = {"--model", "--like"} & set(arguments) or arguments[-1].startswith("runs/")
    return arguments[0] in ("info", "doctor", "generate") and not brings_files


@needs_embedded_default
@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.splitlines()[0][:60])
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("arguments", MEDISYN_COMMANDS, ids=" ".join)
def test_command_parses(arguments):
    group = typer.main.get_command(app)
    with group.make_context("medisyn", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, rest, parent=context).close()


@needs_embedded_default
@pytest.mark.parametrize("arguments", list(filter(runs_here, MEDISYN_COMMANDS)), ids=" ".join)
def test_command_runs(arguments, tmp_path):
    """With two steps instead of twenty: what is tested is that the command does what it says, not how it looks."""
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    if arguments[0] == "generate":
        arguments = [*arguments, "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-c", "from medisyn.cli import main; main()", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if "--out" in arguments:
        out = tmp_path / arguments[arguments.index("--out") + 1]
        assert (out / "metadata.jsonl").read_text(encoding="utf-8")
        assert list(out.glob("**/*.png"))


def test_train_commands_name_a_valid_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [arguments for arguments in MEDISYN_COMMANDS if arguments[0] == "train"]
    assert shown
    for _, path, *overrides in shown:
        load_config(path, overrides)


def test_the_way_to_images_of_a_class_can_be_followed(monkeypatch):
    """Whatever a command of that section reads under runs/ or outputs/, one before it has written."""
    monkeypatch.chdir(ROOT)
    section = README.partition("## From images without labels")[2].partition("\n## ")[0]
    made: set[str] = set()
    for words in commands(section):
        if words[:2] == ["medisyn", "train"]:
            config = load_config(words[2], words[3:])
            written, read = {config.output_dir}, [config.task.base, getattr(config.task, "classifier", None)]
        else:
            written = {words[words.index(option) + 1] for option in ("--out", ">") if option in words}
            written |= {words[3]} if words[0] == "python" else set()  # labelled_subset.py SOURCE FOLDER
            read = [word.partition("=")[2] or word for word in words[1:] if word not in written]
        needed = [name for name in read if name and name.startswith(("runs/", "outputs/"))]
        assert [name for name in needed if not name.startswith(tuple(made) or "-")] == [], words
        made |= written
    assert {"runs/guided", "outputs/drawn", "outputs/selected"} <= made
    assert "centroid" not in section  # a rule that left a class empty


@pytest.mark.parametrize("block", code_blocks(README, "yaml"))
def test_yaml_block_is_a_valid_configuration(block, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(block, encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(text):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {word for words in commands(text) if words[0] == "make" for word in words[1:] if "=" not in word}
    assert targets
    assert targets <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "model_cards/README.md", "adapters/README.md"])
def test_linked_files_exist(page):
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []
