"""AdamW with 8-bit moments from bitsandbytes (Dettmers et al. 2021, arXiv:2110.02861), for fp32 weights."""

from typing import Any

from bitsandbytes.optim import AdamW
from torch import Tensor

from worker.trainer import pieces


# bitsandbytes has no types, hence the ignored calls.
class AdamW8bit(AdamW):
    """bitsandbytes' AdamW in 8 bits; groups with `wide_moments` and tensors of less than 4,096 weights keep 32.

    `paged`: the moments may move to host memory while the GPU is short of its own.
    """

    def __init__(self, groups: Any, lr: float, *, paged: bool) -> None:
        super().__init__(groups, lr=lr, weight_decay=0.0, optim_bits=8, is_paged=paged)  # type: ignore[no-untyped-call]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Returns bitsandbytes' settings for a parameter."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[no-untyped-call]
        whole = pieces.whole_size(group["params"][pindex])  # a piece has the kind of moments of its whole weight
        least = config["min_8bit_size"]
        return config | {"optim_bits": 32 if group["wide_moments"] or whole < least else 8, "min_8bit_size": 0}

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Updates one parameter. A piece is empty if there are more ranks than rows, which no kernel accepts."""
        if p.numel():
            super().update_step(group, p, gindex, pindex)  # type: ignore[no-untyped-call]

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
