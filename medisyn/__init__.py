"""medisyn: conditioned latent diffusion for synthetic medical images, made of stock diffusers components.

The public names load on first use (PEP 562), so that ``import medisyn`` imports no torch and takes milliseconds:

* :func:`load_pipeline`: a trained model; without a name, the one embedded in the package.
* :func:`create_pipeline`: a new model from a preset and a list of conditions, to be trained.
* :class:`MediSynPipeline`: the model itself, a ``diffusers.DiffusionPipeline``.
* :class:`LabelSchema`, :func:`get_schema`, :func:`list_schemas`: structured labels as conditions.
* :class:`Trainer`, :class:`TrainConfig`, :func:`load_config` and the module ``tasks``: training.

    import medisyn
    image = medisyn.load_pipeline()("brain MRI slice showing a glioma", num_inference_steps=20).images[0]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import tasks
    from .backbone import create_pipeline
    from .conditions.labels import LabelSchema, get_schema, list_schemas
    from .config import TrainConfig, load_config
    from .loading import load_pipeline
    from .pipelines.medisyn_pipeline import MediSynPipeline
    from .trainer import Trainer

_MODULE_OF = {
    "LabelSchema": ".conditions.labels",
    "MediSynPipeline": ".pipelines.medisyn_pipeline",
    "TrainConfig": ".config",
    "Trainer": ".trainer",
    "create_pipeline": ".backbone",
    "get_schema": ".conditions.labels",
    "list_schemas": ".conditions.labels",
    "load_config": ".config",
    "load_pipeline": ".loading",
}

__all__ = [
    "LabelSchema",
    "MediSynPipeline",
    "TrainConfig",
    "Trainer",
    "__version__",
    "create_pipeline",
    "get_schema",
    "list_schemas",
    "load_config",
    "load_pipeline",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return import_module(".tasks", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
