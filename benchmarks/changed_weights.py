"""Measure how many bf16 weights a step of training changes: the bytes that a sync of changes would send.

Run: python -m benchmarks.changed_weights CONFIG.toml --section.key value ...

Trains as the config says, which must set ``model.dtype = "bf16"``, and prints a line after each step. A
weight counts as changed when its bf16 value differs from that of the step before. The delta holds, for each
changed weight, its new value and the distance from the changed weight before it, in as many bytes as the
number needs (7 bits a byte).
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from megatron_gmpo import train
from megatron_gmpo.distributed import rank
from megatron_gmpo.metrics.progress import Progress
from megatron_gmpo.run import start_command


def delta_bytes(before: Tensor, after: Tensor) -> tuple[int, int, int]:
    """Return the number of changed weights, of changed bytes, and the bytes of the delta."""
    changed = (before.view(torch.int16) != after.view(torch.int16)).view(-1).nonzero()[:, 0]
    differing = int((before.view(torch.uint8) != after.view(torch.uint8)).sum())
    gaps = changed.diff(prepend=changed.new_zeros(1))
    digits = sum(int((gaps >= 2 ** (7 * more)).sum()) for more in range(1, 5))
    return len(changed), differing, 3 * len(changed) + digits


class MeasuredLoop(train.Loop):
    """The training loop, with a line after each step."""

    def run_steps(self) -> None:
        self.before = self.weights()
        super().run_steps()

    def step(self, progress: Progress) -> None:
        super().step(progress)
        after = self.weights()
        counts = [delta_bytes(self.before[name], tensor) for name, tensor in after.items()]
        changed, differing, delta = map(sum, zip(*counts, strict=True))
        total = sum(tensor.numel() for tensor in after.values())
        self.before = after
        if rank() == 0:
            line = {
                "benchmark": "changed_weights",
                "step": self.state.step,
                "weights": total,
                "changed_weights": changed / total,
                "changed_bytes": differing / (2 * total),
                "delta_bytes": delta / (2 * total),
            }
            print(json.dumps(line), flush=True)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.bfloat16().clone() for name, tensor in self.state.policy.export_hf()}


if __name__ == "__main__":
    train.Loop = MeasuredLoop
    start_command(train.main)
