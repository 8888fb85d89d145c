"""A model whose weights are cut over the ranks, by torch's `fully_shard` (FSDP2): each rank keeps its rows of every
weight, with their gradients and moments, and a decoder layer is whole only while it computes.

Adapters stay whole on every rank: they are small. Every rank has to run every pass, as each pass gathers the layers:
training runs idle ones of weight 0 (`Stepper`), and whatever only reads the model uses `Shards.lockstep`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from worker.trainer import pieces
from worker.trainer.kernels import decoder
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks

PASSES = ("sums", "row_losses", "row_logits", "verify_chunked_loss")
"""Methods of an objective that run its model, besides `forward`."""

PACKED = torch.float8_e4m3fn
"""The type as which the bytes of 4-bit weights are sharded and gathered; nothing is computed in it."""


class Shards:
    """A sharded model, seen from one rank. `parameters`: the trained ones by name; this rank's pieces, or whole."""

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        """Shards the model, which is on the device of `loads_on`: rank 0 sends the others one layer at a time."""
        self._objective, self._ranks = objective, ranks
        _fully_shard(objective, ranks)
        self._sharded = {name: p for name, p in objective.named_parameters() if isinstance(p, DTensor)}
        learning = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.parameters = {name: self._piece(p) if name in self._sharded else p for name, p in learning}

    def take_gradients(self) -> None:
        """Moves the gradients, summed over the ranks by the backward passes, to the pieces."""
        for name, parameter in self.parameters.items():
            if (sharded := self._sharded.get(name)) is not None:
                parameter.grad = None if sharded.grad is None else _local(sharded.grad)
                sharded.grad = None

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Lets the ranks run different numbers of passes inside the block, without gradients.

        Each pass is announced, and a rank that is done takes part in the others' passes. After an error inside there is
        no waiting: the others cannot continue.
        """
        root = cast(FSDPModule, self._objective)
        root.unshard()  # embedding and head, which some code uses outside the objective's own passes
        backbone: Any = self._objective.causal.base_model
        hook = backbone.register_forward_pre_hook(lambda *_: self._announce_pass())
        with _kept_whole(root):
            try:
                yield
            finally:
                hook.remove()
            training = self._objective.training
            self._objective.eval()
            while self._ranks.any(flag=False):
                with torch.no_grad(), self._objective.computing():
                    backbone(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._ranks.device), use_cache=False)
            self._objective.train(training)
        root.reshard()

    def whole_weights(self) -> dict[str, Tensor]:
        """Returns the weights by their `state_dict` names, in the main rank's host memory; nothing on the others.

        Call it on every rank. Weights under several names are one tensor.
        """
        cast(FSDPModule, self._objective).reshard()
        model = self._objective.model
        found: dict[int, Tensor] = {}
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and parameter.dim():
                found[id(parameter)] = self._ranks.gather_rows(_local(parameter))
            else:
                found[id(parameter)] = parameter.detach()
        if not self._ranks.is_main:
            return {}
        named = {name: found[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        return {name: named.get(name, tensor) for name, tensor in model.state_dict().items()}

    def release(self) -> None:
        """Frees the pieces' memory. The model cannot be used afterwards."""
        cast(FSDPModule, self._objective).reshard()
        for parameter in self._sharded.values():
            _local(parameter).untyped_storage().resize_(0)

    def _announce_pass(self) -> None:
        self._ranks.any(flag=True)

    def _piece(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the parameter for the optimizer: plain memory, as its kernels take no distributed tensor."""
        piece = pieces.cut(parameter.shape, self._ranks.index, self._ranks.count)
        return pieces.mark(nn.Parameter(_local(parameter)), piece)


def loads_on(ranks: Ranks) -> torch.device:
    """Returns the device on which a rank loads the base before sharding: rank 0 in host memory, the others on none.

    Otherwise a host with 8 GPUs would hold 8 copies of a model that fits into none of them.
    """
    return torch.device("cpu" if ranks.is_main else "meta")


@contextmanager
def _kept_whole(root: FSDPModule) -> Iterator[None]:
    """Keeps what a module has gathered inside the block.

    torch frees it at the end of a pass that another one has contained, as `sums` contains `forward`, although it keeps
    the root's weights otherwise. The next pass of one rank would gather them again, while the others have no more.
    """
    state = cast(Any, root)._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # older releases of torch have one
        groups = [state._fsdp_param_group]
    for group in groups:
        group.reshard = lambda: None
    try:
        yield
    finally:
        for group in groups:
            del group.reshard


def parameters_of(objective: Objective, shards: Shards | None) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by name: whole, or this rank's pieces."""
    if shards is not None:
        return shards.parameters
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def gathered_bytes(causal: nn.Module) -> int:
    """Returns the bytes of whole weights beside the pieces: embedding, norm and head, and two layers, with the
    gradients of the trained ones.
    """
    sizes = [_bytes(layer.parameters()) for layer in layers(causal)]
    return _bytes(causal.parameters()) - sum(sizes) + 2 * max(sizes, default=0)


def _bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() * (2 if p.requires_grad else 1) for p in parameters)


def _fully_shard(objective: Objective, ranks: Ranks) -> None:
    device = ranks.device
    kept = _replicated(objective)
    states = _keep_quant_states(objective, ranks)
    mesh = init_device_mesh(device.type, (ranks.count,))
    stack = layers(objective.causal)
    of_layers = {id(each) for layer in stack for each in _tensors(layer)}
    others = [each for each in _tensors(objective) if id(each) not in of_layers]
    for layer in stack:
        _receive(_tensors(layer), ranks)
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    _receive(others, ranks)
    fully_shard(objective, mesh=mesh, ignored_params=kept)
    for module in objective.modules():
        if isinstance(module, FSDPModule):  # sums, as the loss is divided by the weight of all ranks' examples
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports nothing else
    _prefetch_backwards(objective)
    for name in PASSES:
        register_fsdp_forward_method(objective, name)
    for layer, state in states:
        cast(Any, layer.weight).quant_state = state  # for counts: a gathered weight has none
    objective.is_sharded = True
    objective.knows_borders = decoder.borders_known(objective.causal)  # not known while the model is in host memory


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@torch.no_grad()
def _receive(tensors: list[Tensor], ranks: Ranks) -> None:
    """Copies weights and buffers from rank 0's host memory to every rank's device."""
    for tensor, (shape, dtype) in zip(
        tensors, ranks.broadcast([(each.shape, each.dtype) for each in tensors]), strict=True
    ):
        if ranks.is_main:
            tensor.data = tensor.data.to(ranks.device)
        else:
            _materialise(tensor, torch.empty(shape, dtype=dtype, device=ranks.device))
    ranks.share_weights(tensors)


def _materialise(tensor: Tensor, memory: Tensor) -> None:
    """Allocates a tensor that is on no device. It stays the same object, as tied weights are one."""
    made = nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory
    torch.utils.swap_tensors(tensor, made)


def _prefetch_backwards(objective: Objective) -> None:
    """Makes each layer's backward pass prefetch the layer before it.

    Why not `fully_shard`'s own way, by the order of earlier forward passes: that includes passes without a gradient,
    which differ between ranks, and the ranks would gather different layers.
    """
    stack = cast(list[FSDPModule], layers(objective.causal))
    for before, layer in zip([stack[0], *stack], stack, strict=False):
        alike = type(before) is type(layer)
        layer.set_modules_to_backward_prefetch([before if alike else layer])
    cast(FSDPModule, objective).set_modules_to_backward_prefetch([stack[-1]])


def _replicated(objective: Objective) -> set[nn.Parameter]:
    """Returns what stays whole: the adapters, and scalars, which have no rows."""
    adapted = isinstance(objective.model, PeftModel)
    return {p for p in objective.parameters() if p.dim() == 0 or (adapted and p.requires_grad)}


def layers(causal: Any) -> list[nn.Module]:
    """Returns the modules that transformers keeps on one device: the decoder's layers."""
    names = set(causal._no_split_modules or ())
    return [module for module in causal.modules() if type(module).__name__.removeprefix("FSDP") in names]


def _keep_quant_states(objective: Objective, ranks: Ranks) -> list[tuple[Any, Any]]:
    """Returns the quantisation states of 4-bit weights, by layer: a gathered weight is plain memory.

    Its bytes are given a floating-point type: `fully_shard` of torch 2.11 first makes each piece a trainable parameter,
    which integers cannot be.
    """
    found: list[tuple[Any, Any]] = []
    for layer in objective.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            packed = layer.weight.data
            state_dict = ranks.broadcast(_on_the_host(cast(Any, layer.weight).quant_state) if ranks.is_main else None)
            state = QuantState.from_dict(state_dict, ranks.device)
            layer.quant_state = state
            layer.weight = nn.Parameter(
                packed.view(PACKED) if ranks.is_main else torch.empty_like(packed, dtype=PACKED), requires_grad=False
            )
            found.append((layer, state))
    return found


def _on_the_host(state: Any) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.as_dict(packed=True).items()
    }


@torch.no_grad()
def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local()
    return local.detach()


def bytes_here(parameter: Tensor) -> int:
    """Returns the bytes of a parameter on this rank."""
    return (_local(parameter) if isinstance(parameter, DTensor) else parameter).nbytes
