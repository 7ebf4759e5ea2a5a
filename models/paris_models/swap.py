"""Block swap: blocks of a model that wait in host memory while others compute, for training.

At most two swapped blocks are on the device: the one that computes and the next one, which arrives
on a stream of its own meanwhile. What backward has updated goes back when the block is left. Needs
checkpointed blocks, whose backward begins by running the block again: the same hook then fetches
it. On the CPU the same copies go between two tensors::

    swap = BlockSwap(blocks, [1, 4, 7], device)      # from here on, the model computes as before
    swap.backward = True; loss.backward(); swap.backward = False
    swap.flush()                                     # all of it is in host memory, up to date
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BlockSwap:
    """Moves the tensors of some blocks; `blocks` is all of them, in the order they compute.

    A block's frozen tensors are never copied back. With `only_frozen`, trained tensors stay on the
    device for good.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        swapped: Sequence[int],
        device: torch.device,
        *,
        only_frozen: bool = False,
    ) -> None:
        self.device, self.swapped, self.backward = device, list(swapped), False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._home: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._arrived: dict[int, Any] = {}
        self._changed: set[int] = set()
        for index in self.swapped:
            block = blocks[index]
            tensors = [*block.parameters(), *block.buffers()]
            moved = [t for t in tensors if not (only_frozen and t.requires_grad)]
            self._home[index] = [(t, self._at_home(t)) for t in moved]
            for tensor, _ in self._home[index]:
                self._empty(tensor)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._hook(index))

    @property
    def resident(self) -> list[int]:
        """The swapped blocks that are on the device now."""
        return sorted(self._arrived)

    def home_of(self) -> dict[Tensor, Tensor]:
        """For each moved tensor the one in host memory, which is right after `flush`."""
        return {tensor: home for pairs in self._home.values() for tensor, home in pairs}

    def flush(self) -> None:
        """Leave every block, and wait until host memory holds what was computed."""
        for index in self.resident:
            self._leave(index)
        if self._stream is not None:
            self._stream.synchronize()

    def forget(self) -> None:
        """Drop what is on the device without copying it back: host memory is the truth."""
        self._changed.clear()
        self.backward = False
        self.flush()

    def _hook(self, index: int) -> Any:
        def arrive(_block: nn.Module, _inputs: Any) -> None:
            for other in self.resident:
                if other != index and (other > index) == self.backward:
                    self._leave(other)
            if index in self._home:
                self._fetch(index)
                self._wait(index)
            following = self._next(index)
            if following is not None:
                self._fetch(following)

        return arrive

    def _next(self, index: int) -> int | None:
        if self.backward:
            return max((i for i in self.swapped if i < index), default=None)
        return min((i for i in self.swapped if i > index), default=None)

    def _at_home(self, tensor: Tensor) -> Tensor:
        home = tensor.detach().to("cpu", copy=True)
        return home.pin_memory() if self._stream is not None else home

    def _empty(self, tensor: Tensor) -> None:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)

    def _fetch(self, index: int) -> None:
        if index in self._arrived:
            return
        with torch.cuda.stream(self._stream):  # without a stream this does nothing
            for tensor, home in self._home[index]:
                tensor.data = home.to(self.device, copy=True, non_blocking=True)
        self._arrived[index] = None if self._stream is None else self._stream.record_event()

    def _wait(self, index: int) -> None:
        event = self._arrived[index]
        if event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)
            for tensor, _ in self._home[index]:
                tensor.data.record_stream(here)
        if self.backward:
            self._changed.add(index)

    def _leave(self, index: int) -> None:
        changed = index in self._changed
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for tensor, home in self._home[index]:
                if changed and tensor.requires_grad:
                    if self._stream is not None:
                        tensor.data.record_stream(self._stream)
                    home.copy_(tensor.data, non_blocking=True)
                self._empty(tensor)
        self._changed.discard(index)
        del self._arrived[index]
