"""Which rows a training step sees, and each one's seed: functions of (run seed, step, place in the global batch).

- Nothing has to be saved to resume, and neither accumulation nor the number of processes changes what an item is.
- `training_batches` is an ordinary `DataLoader` over such (row, seed) pairs, with worker processes where wanted.

    row = training_row(step * batch_size + place, rows=len(task), seed=0)
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medisyn.config import LoopConfig
from medisyn.tasks.base import TrainingTask, item_seed


def training_batches(
    task: TrainingTask, loop: LoopConfig, start: int, process: int = 0, processes: int = 1, num_workers: int = 0
) -> DataLoader:
    """Micro-batches of one of the processes, collated by the task, from step `start` to the end of the run."""
    return DataLoader(
        _TaskRows(task),
        batch_sampler=_MicroBatches(task, loop, start, process, processes),
        collate_fn=_Collate(task),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def training_row(position: int, rows: int, seed: int, cumulative: np.ndarray | None = None) -> int:
    """The data row that the run's item number `position` (step x batch size + place in the batch) sees.

    Every epoch is a permutation of all rows that depends on (seed, epoch); or, with the cumulative sum of the rows'
    weights, rows are drawn independently in proportion to them.
    """
    if cumulative is not None:
        uniform = np.random.default_rng((seed, position)).random()
        return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right").clip(max=rows - 1))
    epoch, place = divmod(position, rows)
    return int(_permutation(rows, seed, epoch)[place])


class _MicroBatches:
    """Batch sampler: the micro-batches of one process as lists of (row, item seed), from step `start` to the end."""

    def __init__(self, task: TrainingTask, loop: LoopConfig, start: int, process: int, processes: int) -> None:
        self.loop, self.start = loop, start
        self.rows = len(task)
        self.cumulative = None if task.row_weights is None else np.cumsum(task.row_weights, dtype=np.float64)
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return (self.loop.steps - self.start) * self.loop.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        loop = self.loop
        size = loop.batch_size // loop.accumulation // self.processes
        for step in range(self.start, loop.steps):
            for micro in range(loop.accumulation):
                first = (micro * self.processes + self.process) * size
                yield [
                    (
                        training_row(step * loop.batch_size + place, self.rows, loop.seed, self.cumulative),
                        item_seed(loop.seed, step, place),
                    )
                    for place in range(first, first + size)
                ]


class _TaskRows(Dataset):
    def __init__(self, task: TrainingTask) -> None:
        self.task = task

    def __getitem__(self, key: tuple[int, int]) -> dict:
        row, seed = key
        return self.task.sample(row, np.random.default_rng(seed)) | {"seed": seed}


class _Collate:
    def __init__(self, task: TrainingTask) -> None:
        self.task = task

    def __call__(self, samples: list[dict]) -> dict:
        seeds = torch.tensor([sample.pop("seed") for sample in samples], dtype=torch.int64)
        return self.task.collate(samples) | {"seed": seeds}


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((rows, seed, epoch)).permutation(rows)
