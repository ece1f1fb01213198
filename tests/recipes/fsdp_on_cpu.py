"""Run a recipe script with FSDP on CPUs, where accelerate does not enable it by itself.

accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/recipes/fsdp_on_cpu.py recipes/sft.py ...
"""

import runpy
import sys

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

initialise = AcceleratorState.__init__


def with_fsdp(state, *args, fsdp_plugin=None, **kwargs):
    initialise(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        state.fsdp_plugin = fsdp_plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = with_fsdp
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
