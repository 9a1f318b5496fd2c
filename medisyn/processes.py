"""Several processes of one launch, on accelerators or on the cores of a CPU.

- accelerate sees those on accelerators by itself; what it does not see is joined here.

torchrun --standalone --nproc-per-node 2 -m medisyn train CONFIG.yaml      # two cores
"""

import os
from datetime import timedelta

from accelerate import PartialState
from accelerate.state import AcceleratorState


def join_processes(timeout: timedelta) -> PartialState:
    """Make the processes that torchrun or `accelerate launch` started know each other.

    On a machine without accelerators accelerate takes each of them for a run of its own, and they would write into
    one folder; unless it is told that a CPU is meant. What an earlier run of this process settled, its precision above
    all, is forgotten: a notebook may train in bf16 after fp32.

    Args:
        timeout: How long a process waits for the others.
    """
    AcceleratorState._reset_state()
    state = PartialState(timeout=timeout)
    if state.num_processes < int(os.environ.get("WORLD_SIZE", "1")):
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=timeout)
    return state
