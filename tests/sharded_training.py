"""Training runs one after the other in each of several processes, sharded by FSDP2 or in ordinary data parallelism.

- accelerate turns to FSDP only where the processes have accelerators (`AcceleratorState`, accelerate 1.15), so these
  pretend to: what shards, gathers and trains is torch's `fully_shard`, over gloo on a CPU.

    torchrun --nproc-per-node 2 tests/sharded_training.py sharded=run.yaml ordinary=another.yaml
"""

import os
import sys

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed import init_process_group

from medisyn.config import load_config
from medisyn.trainer import Trainer

if __name__ == "__main__":
    for run in sys.argv[1:]:
        way, config = run.split("=")
        # a trainer ends the group of processes; the next one meets in a file of its own
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        init_process_group("gloo", init_method=f"file://{config}.store", rank=rank, world_size=processes)
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=True)
        if way == "sharded":
            state.distributed_type = DistributedType.MULTI_GPU
        trainer = Trainer(load_config(config))
        assert trainer.accelerator.is_fsdp2 == (way == "sharded")
        trainer.fit()
