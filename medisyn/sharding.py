"""Training with weights that FSDP2 (`fully_shard`) shards over the processes: what none of them holds whole.

- A checkpoint has the files of an ordinary one, with whole tensors in them: the run goes on under FSDP2, under
  ordinary data parallelism or in one process. (accelerate's own have another form, and the frozen base every time.)
- Moments and averages stay in shards. What gathers them is called by all processes; then the main one writes.
- Previews and validation are computed by all processes together, and block by block the weights are whole.
- Number formats are those of every other run, autocast over float32 weights, and so are the losses.

    accelerate launch --config_file scripts/lora_tiers/multi_gpu_fsdp2.accelerate.yaml -m medisyn train CONFIG.yaml
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import recursively_apply, save
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from medisyn.tasks.base import TrainingTask

TASKS = ("diffusion",)  # the others run their model in `export` or outside `forward`
OPTIMIZER, OTHERS = "optimizer.bin", "custom_checkpoint_{}.pkl"  # as `Accelerator.save_state` names them


class Sharding:
    """Prepares, saves and loads in place of an accelerator that shards.

    Methods of the same names take the same arguments as the accelerator's and do the same. All processes call them.

    Args:
        accelerator: Of the run.
        task_type: `task.type` of the configuration.

    Raises:
        ValueError: A task that cannot be sharded, or the first version of FSDP.
    """

    def __init__(self, accelerator: Accelerator, task_type: str) -> None:
        if task_type not in TASKS:
            raise ValueError(f"task.type={task_type} cannot be sharded by FSDP2; valid types: {', '.join(TASKS)}")
        if not accelerator.is_fsdp2:
            raise ValueError("fsdp_version 1 is not supported; valid versions: 2")
        self.accelerator = accelerator
        self._others: list[Any] = []
        self._before_save: Callable[[list, list, str], None]
        self._before_load: Callable[[list, str], None]

    def prepare(self, task: TrainingTask, optimizer: Optimizer) -> tuple[TrainingTask, Optimizer]:
        """The sharded task; all processes are to call its `preview`, `validate` and `export` as well."""
        # accelerate's policy casts the weights of all modules and the inputs of some: the others would fail
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.task.forward = self.accelerator.autocast()(self.task.forward)
        for name in ("preview", "validate"):
            register_fsdp_forward_method(self.task, name)
            setattr(self.task, name, self._freeing(getattr(self.task, name)))
        self.task.export = self._gathering(self.task.export)
        return self.task, self.optimizer

    def register_save_state_pre_hook(self, hook: Callable[[list, list, str], None]) -> None:
        """Called with the weights before they are gathered."""
        self._before_save = hook

    def register_load_state_pre_hook(self, hook: Callable[[list, str], None]) -> None:
        """What loads the weights; `load_state_dict` of the task takes whole ones."""
        self._before_load = hook
        self.task.register_load_state_dict_pre_hook(self._scatter_weights)

    def register_for_checkpointing(self, *others: Any) -> None:
        """More objects with a `state_dict`, such as a schedule or an average."""
        self._others += others

    def save_state(self, output_dir: str) -> None:
        """Gather and write everything."""
        folder, accelerator = Path(output_dir), self.accelerator
        folder.mkdir(parents=True, exist_ok=True)
        weights = [dict(self.task.state_dict())]
        self._before_save([self.task], weights, output_dir)
        process, step, scaler = accelerator.process_index, accelerator.step, accelerator.scaler
        save_accelerator_state(output_dir, self._gathered(weights), [], [], [], process, step, scaler)
        save(self._gathered(self.optimizer.state_dict()), folder / OPTIMIZER)
        for index, other in enumerate(self._others):
            save(self._gathered(other.state_dict()), folder / OTHERS.format(index))

    def load_state(self, input_dir: str) -> None:
        """Read everything, of a sharded run or of any other."""
        folder = Path(input_dir)
        self._before_load([self.task], input_dir)
        load_accelerator_state(input_dir, [], [], [], [], self.accelerator.process_index, self.accelerator.scaler)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for place, moments in state["state"].items():
            shaped_as = {name: parameters[place] for name, value in moments.items() if value.ndim}  # not the step
            state["state"][place] = _scattered(moments, shaped_as)
        self.optimizer.load_state_dict(state)
        for index, other in enumerate(self._others):
            state = torch.load(folder / OTHERS.format(index), map_location="cpu", weights_only=True)
            other.load_state_dict(_scattered(state, other.state_dict()))

    def _gathered(self, state: Any) -> Any:
        """The nested state with whole tensors, on the CPU, for its shards; None for them but on the main process."""

        def whole(shard: DTensor) -> Tensor | None:
            tensor = shard.full_tensor()
            return tensor.cpu() if self.accelerator.is_main_process else None

        return recursively_apply(whole, state, test_type=lambda value: isinstance(value, DTensor))

    def _scatter_weights(self, module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
        state.update(_scattered(state, module.state_dict()))

    def _freeing(self, method: Callable) -> Callable:
        """A forward pass that no backward pass follows leaves some weights whole; they would be used when outdated."""

        @wraps(method)
        def freeing(*arguments: Any) -> Any:
            result = method(*arguments)
            for module in self.task.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            return result

        return freeing

    def _gathering(self, export: Callable[[Path], None]) -> Callable[[Path], None]:
        """Export by the main process, with whole weights on its CPU in the task; which is not trained any more."""

        @wraps(export)
        def gathering(folder: Path) -> None:
            whole = self._gathered({parameter: parameter.detach() for parameter in self.task.parameters()})
            if not self.accelerator.is_main_process:
                return
            for module in self.task.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(whole[parameter], parameter.requires_grad))
            export(folder)

        return gathering


def _scattered(state: Any, like: Any) -> Any:
    """A nested state that every process has read, with this process's shards where `like` has some."""
    if isinstance(like, DTensor):
        return distribute_tensor(state, like.device_mesh, like.placements, src_data_rank=None)
    if isinstance(state, Mapping) and isinstance(like, Mapping):
        return {name: _scattered(value, like.get(name)) for name, value in state.items()}
    if isinstance(state, Sequence) and isinstance(like, Sequence) and not isinstance(state, str):
        return [_scattered(value, other) for value, other in zip(state, like, strict=True)]
    return state
