"""AdamW with 8-bit moments from bitsandbytes (Dettmers et al. 2021, arXiv:2110.02861), for fp32 weights."""

from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
from typing import Any

import torch
from bitsandbytes import functional as bitsandbytes
from bitsandbytes.optim import AdamW
from bitsandbytes.utils import sync_gpu
from torch import Tensor

from worker.trainer import pieces

BUCKET = 2**22
"""The most elements of tensors that one kernel updates: copies of weights and gradients take 16 MiB each."""
SMALL = 2**20
"""The most elements of a tensor that is updated together with others. For a larger one a launch costs little."""
_MOMENTS = ("state1", "state2", "absmax1", "absmax2")


# bitsandbytes has no types, hence the ignored calls.
class AdamW8bit(AdamW):
    """bitsandbytes' AdamW in 8 bits; groups with `wide_moments` and tensors of less than 4,096 weights keep 32.

    Adapters are hundreds of small tensors, for each of which bitsandbytes launches a kernel and waits for the GPU. Here
    one kernel updates a bucket of them, whose moments are parts of one tensor. A bucket has tensors of whole blocks
    only, so its blocks are theirs, and the numbers are those of bitsandbytes.

    `paged`: the moments may move to host memory while the GPU is short of its own.
    """

    def __init__(self, groups: Any, lr: float, *, paged: bool) -> None:
        super().__init__(groups, lr=lr, weight_decay=0.0, optim_bits=8, is_paged=paged)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure
        """Does one step. A closure is not supported: the loop has computed the gradients already.

        Memory is allocated before the first moment changes, as a step that fails half-way cannot be repeated.
        """
        assert closure is None
        self._create_states()
        runs = [(number, run) for number, group in enumerate(self.param_groups) for run in self._runs(group["params"])]
        copies = self._room_for_copies([run for _, run in runs if len(run) > 1])
        for number, run in runs:
            if len(run) > 1:
                self._update_together(self.param_groups[number], list(run.values()), copies)
            else:
                self._update_alone(number, *run.popitem())
        if self.is_paged:  # the host may read the moments from now on
            sync_gpu(self.param_groups[0]["params"][0])

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Returns bitsandbytes' settings for a parameter."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[no-untyped-call]
        whole = pieces.whole_size(group["params"][pindex])  # a piece has the kind of moments of its whole weight
        least = config["min_8bit_size"]
        return config | {"optim_bits": 32 if group["wide_moments"] or whole < least else 8, "min_8bit_size": 0}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Loads a state. bitsandbytes' own method leaves paged moments on the GPU, where they may not fit."""
        super().load_state_dict(state_dict, move_to_device)  # type: ignore[no-untyped-call]
        if not self.is_paged:
            return
        for parameter, state in self.state.items():
            for name in ("state1", "state2"):
                buffer = self.get_state_buffer(parameter, dtype=state[name].dtype)  # type: ignore[no-untyped-call]
                buffer.copy_(state[name])
                state[name] = buffer

    def _create_states(self) -> None:
        """Creates missing states, in the order of the parameters, in which ranks gather those of a sharded model."""
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                if not self.state[parameter]:
                    self.init_state(group, parameter, gindex, pindex)  # type: ignore[no-untyped-call]

    def _runs(self, parameters: list[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Yields the parameters, by their place in the group, of each update: neighbours in a bucket that have taken
        the same number of steps. Those without a gradient are left out.
        """
        for bucket in self._buckets(parameters):
            _join([self.state[parameters[place]] for place in bucket])
            for (has_gradient, _), run in groupby(bucket, lambda place: self._due(parameters[place])):
                if has_gradient:
                    yield {place: parameters[place] for place in run}

    def _buckets(self, parameters: list[Tensor]) -> list[list[int]]:
        """Returns the places of a group's parameters by bucket; others have one of their own. Gradients make no
        difference, so that a parameter's moments stay where they are.
        """
        buckets: list[list[int]] = []
        alone: list[list[int]] = []
        filled = BUCKET
        for place, parameter in enumerate(parameters):
            if not _is_small(parameter, self.state[parameter]["state1"]):
                alone.append([place])
                continue
            if filled + parameter.numel() > BUCKET:
                buckets.append([])
                filled = 0
            buckets[-1].append(place)
            filled += parameter.numel()
        return buckets + alone

    def _due(self, parameter: Tensor) -> tuple[bool, int]:
        return parameter.grad is not None, self.state[parameter]["step"]

    def _room_for_copies(self, runs: list[dict[int, Tensor]]) -> Tensor:
        """Returns memory for the largest run's weights and gradients. It is not kept: passes need it."""
        sizes = [sum(parameter.numel() for parameter in run.values()) for run in runs]
        device = next(iter(runs[0].values())).device if runs else None
        return torch.empty(2, max(sizes, default=0), device=device)

    def _update_alone(self, gindex: int, pindex: int, parameter: Tensor) -> None:
        """Updates one parameter. A piece is empty if there are more ranks than rows, which no kernel accepts."""
        if parameter.numel():
            self.prefetch_state(parameter)  # type: ignore[no-untyped-call]
            self.update_step(self.param_groups[gindex], parameter, gindex, pindex)  # type: ignore[no-untyped-call]

    def _update_together(self, group: dict[str, Any], parameters: list[Tensor], copies: Tensor) -> None:
        """Updates neighbours in a bucket."""
        states, sizes = [self.state[parameter] for parameter in parameters], [p.numel() for p in parameters]
        weights, grads = copies[:, : sum(sizes)]
        torch.cat([parameter.view(-1) for parameter in parameters], out=weights)
        torch.cat([parameter.grad.reshape(-1) for parameter in parameters if parameter.grad is not None], out=grads)
        state1, state2, absmax1, absmax2 = (_joined([state[name] for state in states]) for name in _MOMENTS)
        for state in states:  # before the update: one that failed half-way counts as begun
            state["step"] += 1
        first, (beta1, beta2) = states[0], group["betas"]
        bitsandbytes.optimizer_update_8bit_blockwise(
            self.optimizer_name, grads, weights, state1, state2, beta1, beta2, 0.0, 0.0, group["eps"], first["step"],
            group["lr"], first["qmap1"], first["qmap2"], absmax1, absmax2, group["weight_decay"],
        )  # fmt: skip
        updated = zip(weights.split(sizes), parameters, strict=True)
        torch._foreach_copy_(parameters, [part.view_as(parameter) for part, parameter in updated])


def _is_small(parameter: Tensor, moment: Tensor) -> bool:
    """Whether a parameter is updated together with others: its blocks must be the same among theirs."""
    size, is_paged = parameter.numel(), getattr(moment, "is_paged", False)
    narrow = moment.dtype == torch.uint8 and parameter.dtype == torch.float32
    return narrow and not is_paged and 0 < size <= SMALL and size % pieces.BLOCK == 0 and parameter.is_contiguous()


def _join(states: list[dict[str, Any]]) -> None:
    """Moves a bucket's moments into one tensor per kind, of which each state has its part, unless they are there."""
    if len(states) == 1 or _are_joined([state["state1"] for state in states]):
        return
    moments = {name: [state[name] for state in states] for name in _MOMENTS}
    wholes = {name: torch.cat([part.view(-1) for part in parts]) for name, parts in moments.items()}
    for name, whole in wholes.items():
        parts = whole.split([part.numel() for part in moments[name]])
        for state, part in zip(states, parts, strict=True):
            state[name] = part.view_as(state[name])


def _are_joined(parts: list[Tensor]) -> bool:
    """Whether tensors follow each other in one storage, from its beginning."""
    starts = accumulate((part.numel() for part in parts[:-1]), initial=0)
    one_storage = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return one_storage and all(part.storage_offset() == start for part, start in zip(parts, starts, strict=True))


def _joined(parts: list[Tensor]) -> Tensor:
    """Returns tensors that follow each other in one storage as one, flat. Why not keep that: it would stay allocated
    when the states are dropped.
    """
    return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
