"""Set-up for every test: offline, one thread, quiet progress bars.

Run the suite: `make test`, or `python -m pytest -q tests`.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import diffusers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.components import tiny_pipeline as build_tiny_pipeline  # noqa: E402

diffusers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture
def tiny_pipeline():
    """The factory of `tests.components`: `tiny_pipeline(kinds=("text",), prediction_type=..., vae="dc", seed=0)`."""
    return build_tiny_pipeline


@pytest.fixture
def shared_folder():
    """The folder named by MEDISYN_SHARED (corpus and reference weights); tests that need it skip without it."""
    folder = os.environ.get("MEDISYN_SHARED")
    if not folder or not os.path.isdir(folder):
        pytest.skip("MEDISYN_SHARED does not name a folder")
    return folder
