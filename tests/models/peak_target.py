"""A process that trains under a plan and prints its peak of resident memory, in bytes.

`python peak_target.py SIZE PLAN TOKENS TEXT BATCH`; tests start it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from paris_models import lean
from paris_models.config import LADDER, RecipeConfig, UnitConfig
from paris_models.expert import build_expert
from paris_models.plans import PLANS
from paris_models.shards import ClipTable

KEY = bytes(16)


def main(size: str, name: str, tokens: int, text: int, batch: int) -> None:
    torch.set_num_threads(1)
    config, plan = LADDER[size], PLANS[name]
    unit = UnitConfig(KEY, steps=2, batch=batch, dtype=plan.compute)
    latent = (config.latent_channels, 1, tokens // 16 * config.patch, 16 * config.patch)
    clips = ClipTable(
        torch.zeros(2, *latent), torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, text, config.text_dim), torch.zeros(1, config.pooled_dim),
        torch.zeros(text, config.text_dim), torch.zeros(config.pooled_dim),
    )  # fmt: skip
    weights = dict(build_expert(config, seed=0).state_dict())
    state = lean.new_state(plan, config, RecipeConfig(batch=batch), weights, key=KEY)
    del weights
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        lean.train_step(state, clips, unit)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(word) for word in sys.argv[3:6]))
