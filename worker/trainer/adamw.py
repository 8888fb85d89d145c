"""AdamW for weights that are kept in bf16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from bitsandbytes import functional as bitsandbytes
from torch import Tensor

from worker.trainer import pieces
from worker.trainer.kernels import adamw, stochastic

QUANTISED = pieces.BLOCK
SMALL = 4096
"""Smaller tensors (norms, biases) have moments and a master copy in fp32, which costs little memory."""
CHUNK = 2**24
"""Elements updated at once, so that the updates, in bf16, stay in a GPU's cache between the two kernels."""


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with 8-bit moments (Dettmers et al. 2021, arXiv:2110.02861) and stochastic rounding of bf16 weights.

    On a GPU one kernel updates moments and weight, if it agrees there with its definition. Elsewhere bitsandbytes'
    kernel adds a step to a zeroed tensor instead of the weight, so that no digits are lost, and `stochastic.add` adds
    it to the weight. Why not bitsandbytes' own AdamW8bit: it rounds to nearest, which leaves most weights of a large
    model unchanged, and waits for the GPU after each tensor.

    The rounding is a function of `seed`, the step and the tensor's name. Groups hold named parameters.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, seed: int, chunk: int = CHUNK) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self._seed, self._chunk = seed, chunk

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Does one step. A closure is not supported: the loop has computed the gradients already."""
        assert closure is None
        updates = self._room_for_updates()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    state = self._state(parameter)
                    state["step"] += 1
                    if not parameter.numel():
                        continue  # an empty piece: more ranks than rows
                    if _is_large(parameter):
                        self._update_large(parameter, state, group, name, updates)
                    else:
                        self._update_small(parameter, state, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state unchanged: torch's own method would cast the moments to the weights' type."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for index, values in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                key: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})

    def _room_for_updates(self) -> Tensor:
        """Returns zeros for the largest chunk. Not kept: a step that fails half-way must leave nothing for the next."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        large = [p for p in parameters if _is_large(p) and not _in_one_kernel(p)]
        size = min(self._chunk, max((p.numel() for p in large), default=0))
        return torch.zeros(size, dtype=torch.bfloat16, device=large[0].device if large else None)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """Returns a parameter's state, created before its first step."""
        state: dict[str, Any] = self.state[parameter]
        if state:
            return state
        count, device = parameter.numel(), parameter.device
        state["step"] = 0
        if _is_large(parameter):
            for number in "12":
                state[f"state{number}"] = torch.zeros(count, dtype=torch.uint8, device=device)
                state[f"absmax{number}"] = torch.zeros(-(-count // QUANTISED), device=device)
        else:
            state["master"] = parameter.detach().reshape(-1).float()
            state["state1"], state["state2"] = (torch.zeros(count, device=device) for _ in range(2))
        return state

    def _update_small(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Updates the fp32 master and copies it to the weight."""
        assert parameter.grad is not None
        master, grad = state["master"], parameter.grad.reshape(-1).float()
        if decay := group["lr"] * group["weight_decay"]:
            master.mul_(1 - decay)
        beta1, beta2 = group["betas"]
        bitsandbytes.optimizer_update_32bit(
            "adam", grad, master, state["state1"], beta1, group["eps"], state["step"], group["lr"],
            state["state2"], beta2,
        )  # fmt: skip
        parameter.copy_(master.view_as(parameter))

    def _update_large(
        self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], name: str, updates: Tensor
    ) -> None:
        assert parameter.grad is not None
        place, before = _place(parameter, name)
        seed = stochastic.seed_of(self._seed, state["step"], place)
        keep = 1 - group["lr"] * group["weight_decay"]
        weight, grad = parameter.view(-1), parameter.grad.reshape(-1)
        if _in_one_kernel(weight):
            from worker.trainer.kernels import adamw_triton  # without a GPU there is no Triton

            moments = _part(state, slice(0, weight.numel()))
            adamw_triton.step(weight, grad, moments, state["step"], group, seed, before)
            return
        for start in range(0, weight.numel(), self._chunk):
            part = slice(start, min(start + self._chunk, weight.numel()))
            update = updates[: part.stop - part.start]
            self._add_step(update, grad[part], _part(state, part), state["step"], group)
            stochastic.add(weight[part], update, keep, seed, before + start)

    def _add_step(self, update: Tensor, grad: Tensor, moments: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Adds an Adam step to `update` and updates the moments, with bitsandbytes' kernel."""
        state1, state2, absmax1, absmax2 = moments
        beta1, beta2 = group["betas"]
        signed, unsigned = adamw.tables(update.device)
        bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", grad, update, state1, state2, beta1, beta2, 0.0, 0.0, group["eps"], step, group["lr"],
            signed, unsigned, absmax1, absmax2,
        )  # fmt: skip


def _is_large(parameter: Tensor) -> bool:
    """Whether a parameter is rounded stochastically. Layers that some models keep in fp32 need no rounding."""
    return parameter.dtype == torch.bfloat16 and pieces.whole_size(parameter) >= SMALL


def _in_one_kernel(weight: Tensor) -> bool:
    """Whether one kernel updates a large weight and its moments."""
    return weight.is_cuda and adamw.agrees(weight.device)


def _place(parameter: Tensor, name: str) -> tuple[str, int]:
    """Returns what determines a parameter's random bits: a name, and the offset of its first element.

    A piece is rounded as within the whole weight if it begins at a block of random bits.
    """
    piece = pieces.of(parameter)
    first = 0 if piece is None else piece.offset
    return (f"{name}@{first}", 0) if first % stochastic.BLOCK else (name, first)


def _part(state: dict[str, Any], part: slice) -> list[Tensor]:
    """Returns the moments and scales of some elements."""
    scales = slice(part.start // QUANTISED, -(-part.stop // QUANTISED))
    return [state["state1"][part], state["state2"][part], state["absmax1"][scales], state["absmax2"][scales]]
