"""One round of an expert without a network around it: honest updates, real judge, real merge.

`Lab` trains honest updates of one round once; attacks are made of them, judged by the coordinator's
verify job (L0 to L3), weighted and clipped as the coordinator does, merged by the published
arithmetic, and measured on clips that neither training nor judging has seen::

    lab = Lab(folder)
    lab.judge(lie)                    # ("L2", "statistics.noise")
    lab.loss(lab.merge([*lab.updates[:3], lie]))
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from adversary.arena import files
from adversary.players import Tensors
from paris_coordinator.judging import decide
from paris_coordinator.merging import Part, merge_shares
from paris_coordinator.worker import perform
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.config import UnitConfig
from paris_models.evaluate import held_out_losses
from paris_models.merge import merge
from paris_models.shards import ClipTable, read_shards
from paris_models.updates import make_update
from paris_protocol.records import Layer
from paris_protocol.streams import unit_key
from tinynet import TinyNet, Unit, hexed, render

HONEST = 4
DISJOINT = b"disjoint clips 1"


class Lab:
    """Expert 0 of the arenas' network in its first round."""

    def __init__(self, folder: Path) -> None:
        self.net: TinyNet = files()
        self.folder = folder
        self.parent = load_tensors(self.net.head_file)
        self.fresh = self.net.table(render(256, 777, 0))
        """Clips that nobody else has."""
        self.roots: list[str] = []
        self.updates = [self.train(unit) for unit in range(HONEST)]

    def clips(self, unit: int) -> ClipTable:
        """The data of a unit."""
        return read_shards([self.net.shard(0, unit % 2)])

    def unit_config(self, unit: int) -> UnitConfig:
        """The numbers of a unit."""
        seed = hexed(f"lab {unit}")
        return UnitConfig.from_record(self.net.assignment(0, 0, seed=seed), unit_key(seed))

    def train(self, unit: int, clips: ClipTable | None = None) -> Tensors:
        """The update of a unit, on its own clips or on others."""
        table = self.clips(unit) if clips is None else clips
        result, self.roots = self.net.trained(self.parent, table, self.unit_config(unit))
        return make_update(self.parent, result, "dense-f32")

    def hand_in(self, update: Tensors, node: int = 0, unit: int = 0) -> Unit:
        """An update with consistent statements."""
        assignment = self.net.assignment(0, node, seed=hexed(f"lab {unit}"))
        return self.net.hand_in(assignment, update, self.roots)

    def layers(self, update: Tensors, **job: Any) -> list[Layer]:
        """What the verify job measures of an update."""
        answer = perform(self.net.verify_job(self.hand_in(update), **job))
        assert "result" in answer, answer
        return [Layer.model_validate_json(json.dumps(each)) for each in answer["result"]["layers"]]

    def judge(self, update: Tensors, **job: Any) -> tuple[str, str]:
        """Layer and code of the refusal, ("", "accepted") if there is none."""
        layers = self.layers(update, **job)
        accepted, code = decide(layers, self.net.policy.record, 0)
        return ("" if accepted else layers[-1].layer, code)

    def rival(self, update: Tensors, name: str, node: str) -> dict[str, str]:
        """An earlier update of another node, as the judge is told of it."""
        path = self.folder / f"{name}.safetensors"
        save_tensors(update, path)
        return {"id": name, "node": node, "path": str(path)}

    # ------------------------------------------------------------ merging and measuring

    def merge(self, updates: list[Tensors], *, clip: bool = True) -> Tensors:
        """The next head: weights and clip scales as the coordinator computes them."""
        parts = [
            Part(str(n), 12, math.sqrt(sum(float(t.double().square().sum()) for t in u.values())))
            for n, u in enumerate(updates)
        ]
        shares = merge_shares(parts)
        arrays = [{name: t.numpy() for name, t in u.items()} for u in updates]
        master = {name: t.numpy() for name, t in self.parent.items()}
        made = merge(
            master, arrays, [s.weight for s in shares],
            [s.scale if clip else 1.0 for s in shares],
        )  # fmt: skip
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def loss(self, head: Tensors) -> float:
        """Mean loss on clips that nobody has seen."""
        return float(self.losses(head).mean())

    def losses(self, head: Tensors, clips: ClipTable | None = None) -> torch.Tensor:
        """Loss of every clip, with the same noise for every head."""
        table = self.fresh if clips is None else clips
        return held_out_losses(head, self.net.config, self.net.recipe, table, DISJOINT)
