"""Create the process groups.

This is the only module that reads Megatron's global parallel state. Other code receives a
``ProcessGroupCollection``.
"""

from __future__ import annotations

import math

from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from ..config import ParallelConfig


def start_model_parallel(parallel: ParallelConfig, seed: int, timeout_s: float) -> ProcessGroupCollection:
    """Make Megatron's groups and seed its random-number tracker. Needs the default process group.

    Args:
        timeout_s: limit for one collective, rounded up to whole minutes.

    Returns:
        The groups ``tp``, ``pp``, ``cp``, ``dp``, ``dp_cp``, ``ep``, ``expt_tp`` and more
        (process_groups_config.py).
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def stop_model_parallel() -> None:
    """Discard the groups, so that another layout can be set up in the same processes."""
    parallel_state.destroy_model_parallel()
