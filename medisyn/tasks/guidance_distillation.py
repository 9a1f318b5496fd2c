"""Guidance distillation: a LoRA learns what its base predicts with classifier-free guidance.

One pass a step then draws what took one with and one without the conditions (Meng et al. 2023, arXiv 2210.03142,
section 3.1).

- The teacher is the base as it is. It shares the weights under the LoRA, and costs no memory.
- Guidance is that of the sampler: the null prediction + scale x (the conditional one - the null one) within the
  interval of timesteps, and the conditional one outside. Items whose conditions are all dropped teach the null.
- The manifest of the adapter says what guidance it has built in; loading it says so, too.

    medisyn train scripts/few_step/lora.yaml
    medisyn generate "chest X-ray" --adapter runs/few-step --guidance 1 --steps 8
"""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from medisyn.adapter_training import sharing_copy
from medisyn.config import GuidanceDistillationTaskConfig, TrainConfig
from medisyn.data.loading import ImageDataset
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.tasks.base import within
from medisyn.tasks.diffusion import DiffusionTask


class GuidanceDistillationTask(DiffusionTask):
    """Batch of cached latents -> distance to the guided teacher. See `GuidanceDistillationTaskConfig`."""

    options: GuidanceDistillationTaskConfig
    _teacher: tuple[UNet2DConditionModel]  # a tuple: not registered, hence neither trained nor saved

    def __init__(self, config: TrainConfig) -> None:
        if not isinstance(config.task, GuidanceDistillationTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the guidance distillation task")
        super().__init__(config)
        if not self.conditions:
            raise ValueError(f"task.base {self.options.base!r} takes no condition, so there is nothing to guide to")
        self.built_in_guidance = self.options.guidance_scale

    def _put_adapter(self, base: MediSynPipeline, images: ImageDataset) -> None:
        self._teacher = (sharing_copy(base.unet),)
        super()._put_adapter(base, images)

    @torch.no_grad()
    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The teacher's guided prediction, float32 (B, C, h, w)."""
        (teacher,) = self._teacher
        noised = self.noising.add_noise(latents, noise, timesteps)
        nulls = {c.kind: self._null(c) for c in self.conditions}
        nulls = {kind: null.expand(len(noised), *null.shape[1:]) for kind, null in nulls.items()}
        conditional = teacher(noised, timesteps, **conditions).sample.float()
        null = teacher(noised, timesteps, **self._unet_conditions(nulls, batch_size=len(noised))).sample.float()
        guided = within(timesteps, self.options.guidance_interval, self.noising.config.num_train_timesteps)
        scale = torch.where(guided, self.options.guidance_scale, 1.0).view(-1, 1, 1, 1)
        return null + scale * (conditional - null)
