"""The package as an installed thing: light to import, complete, and declaring what it imports.

python -m pytest tests/test_package.py
"""

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import medisyn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(medisyn.__file__).parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LARGEST_FILE = 17_000_000  # bytes
PAGES_OF_EXTRAS = ("demo_page.py",)  # of no use without the extra, and imported by nothing else at once
LARGEST_DEFAULT = 32_000_000  # bytes of safetensors in the embedded default


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter at the repository root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_fast_and_loads_no_torch():
    code = (
        "import time; start = time.perf_counter(); import medisyn; took = time.perf_counter() - start\n"
        "import sys; print(took, 'torch' in sys.modules)"
    )
    took, torch_loaded = run_python(code).split()
    assert torch_loaded == "False"
    assert float(took) < 1.5


@pytest.mark.parametrize("module", ["medisyn.cli", "medisyn.config", "medisyn.prompts"])
def test_light_modules_load_no_torch(module):
    assert run_python(f"import sys, {module}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", medisyn.__all__)
def test_public_name_resolves(name):
    assert getattr(medisyn, name) is not None
    assert name in dir(medisyn)


def test_unknown_name_is_an_attribute_error_that_lists_the_public_ones():
    with pytest.raises(AttributeError, match="load_pipelin.*load_pipeline"):
        _ = medisyn.load_pipelin


def test_every_module_imports():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if "pretrained" not in parts and path.name not in PAGES_OF_EXTRAS:
            import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def test_version_is_the_one_of_pyproject():
    assert re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE).group(1) == medisyn.__version__


def test_wheel_contains_what_is_read_at_run_time():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    packed = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("conditions/schemas", "pipelines", "pretrained")
        for path in (PACKAGE / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"medisyn/pipelines/medisyn_pipeline.py", "medisyn/conditions/schemas/synfundus.json"} <= expected
    expected.add("medisyn/card_template.md")
    assert expected <= packed


def test_embedded_default_is_small():
    weights = list((PACKAGE / "pretrained").rglob("*.safetensors"))
    if not weights:
        pytest.skip("medisyn/pretrained holds no weights")
    assert sum(path.stat().st_size for path in weights) <= LARGEST_DEFAULT


def declared_dependencies() -> tuple[set[str], set[str]]:
    """Distribution names in pyproject.toml: those always installed, and those of the extras."""
    core, extras = re.search(
        r"^dependencies = \[(.*?)^\].*?^\[project\.optional-dependencies\](.*?)^\[",
        PYPROJECT,
        re.DOTALL | re.MULTILINE,
    ).groups()
    names = [set(re.findall(r'"([A-Za-z0-9_.-]+)', part)) for part in (core, extras)]
    return names[0], names[1] - {"medisyn"}


def imported_modules(path: Path) -> tuple[set[str], set[str]]:
    """Top-level names of the modules that a source file imports: on its own import, and anywhere in it."""

    def names(nodes) -> set[str]:
        found = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
        return {name for name in found if name not in sys.stdlib_module_names and name != "medisyn"}

    tree = ast.parse(path.read_text(encoding="utf-8"))
    return names(tree.body), names(ast.walk(tree))


def test_imports_are_declared_and_those_of_extras_are_lazy():
    core, extras = ({re.sub(r"[-_.]+", "-", name).lower() for name in names} for names in declared_dependencies())
    distributions = packages_distributions()
    problems = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        at_import, anywhere = imported_modules(path)
        at_once = core | extras if path.name in PAGES_OF_EXTRAS else core
        for module, allowed in [(name, at_once) for name in at_import] + [(name, core | extras) for name in anywhere]:
            owners = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions.get(module, [module])}
            if not owners & allowed:
                problems.add(f"{path.relative_to(ROOT)} imports {module}")
    assert not problems


def test_no_file_of_the_repository_is_large():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"git cannot list the files: {listing.stderr.strip()}")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert paths
    assert not [str(path) for path in paths if path.is_file() and path.stat().st_size > LARGEST_FILE]


def test_the_embedded_default_carries_the_pipeline_of_this_version():
    package = Path(medisyn.__file__).parent
    embedded = package / "pretrained" / "medisyn_pipeline.py"
    if not embedded.exists():
        pytest.skip("medisyn/pretrained holds no model")
    assert embedded.read_text() == (package / "pipelines" / "medisyn_pipeline.py").read_text()
