"""Modules of the base that are trained whole beside its adapters, and single trained rows of its embedding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from tunery.failures import CannotAdapt
from tunery.spec import Lora


def learns_whole(name: str) -> bool:
    """Whether a weight of this name is trained whole beside the adapters."""
    return "modules_to_save" in name or "trainable_tokens" in name


def options(model: Any, technique: Lora) -> dict[str, Any]:
    """Returns the arguments of PEFT's LoraConfig. Raises CannotAdapt for modules that cannot be trained whole.

    A tied head stays the embedding's; one that is not tied trains its own rows of the tokens, or a new token would be
    read but never generated. Neither trains rows of its own if it is trained whole.
    """
    names, tokens = technique.modules_to_save, technique.trainable_token_indices
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    named = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    whole: set[int] = set()
    found: dict[str, Any] = {}
    if names:
        whole = {id(module) for module in _modules(model, names)}
        found["modules_to_save"] = names
        if tied and {id(head), id(embedding)} & whole:
            found["modules_to_save"] = sorted({*names, named[id(embedding)]} - {named[id(head)]})
            found["ensure_weight_tying"] = True
            whole |= {id(head), id(embedding)}
    if tokens:
        rows = {named[id(module)]: tokens for module in (embedding, head) if id(module) not in whole}
        if not rows:
            raise CannotAdapt(
                reason="modules_to_save trains the embedding and the head whole, with the rows of all tokens.",
                instead="Leave trainable_token_indices out, or take both out of modules_to_save.",
            )
        if getattr(head, "bias", None) is not None and id(head) not in whole:
            raise CannotAdapt(
                reason="its head has a bias, which PEFT leaves out of a head whose rows are trained.",
                instead="Use modules_to_save with the head, or leave trainable_token_indices out.",
            )
        found["trainable_token_indices"] = tokens if tied else rows
    return found


def _modules(model: nn.Module, names: list[str]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for wanted in names:
        matching = [m for name, m in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        instead = f"Name modules such as {' or '.join(_examples(model))}."
        if not matching:
            reason = f"The base has no module '{wanted}', which modules_to_save names."
            raise CannotAdapt(reason=reason, instead=instead)
        if any(getattr(m, "weight", None) is None or isinstance(m, bitsandbytes.nn.Linear4bit) for m in matching):
            reason = f"'{wanted}', which modules_to_save names, has no weight of its own or is quantised."
            raise CannotAdapt(reason=reason, instead=instead)
        found += matching
    return found


def _examples(model: Any) -> list[str]:
    """Returns the names of the embedding, the head and the last norm."""
    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    return [f"'{name.rpartition('.')[2]}'" for name in names + norms[-1:]]


def cast_at_borders(adapted: nn.Module) -> None:
    """Casts inputs and outputs of modules trained in fp32 between fp32 and the type of the base around them."""
    for wrapper in _wrappers(adapted):
        for module in wrapper.modules_to_save.values():
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_Narrow(wrapper))


def _widen(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        arg.to(module.weight.dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args
    )


class _Narrow:
    """A hook that casts a module's outputs to the type of the module that it replaces. Routers have several, one of
    which are indices.
    """

    def __init__(self, wrapper: Any) -> None:
        self._original = wrapper.original_module

    def __call__(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        return tuple(map(self._cast, out)) if isinstance(out, tuple) else self._cast(out)

    def _cast(self, out: Any) -> Any:
        is_number = isinstance(out, Tensor) and out.is_floating_point()
        return out.to(self._original.weight.dtype) if is_number else out


@contextmanager
def as_the_base(adapted: nn.Module) -> Iterator[None]:
    """Rounds these weights to the base's type inside the block, as those who load them have them."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for parameter, original in _weights(adapted):
        kept.append((parameter, parameter.data))
        parameter.data = parameter.data.to(original.dtype)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _weights(adapted: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields each weight that is trained whole, once, and the base's weight that it replaces."""
    seen: set[int] = set()
    for module in adapted.modules():
        weights: list[tuple[Any, Any]] = []
        if isinstance(module, ModulesToSaveWrapper):
            original: Any = module.original_module
            weights = [(p, original.weight) for m in module.modules_to_save.values() for p in m.parameters()]
        elif isinstance(module, TrainableTokensWrapper):
            layer: Any = module.token_adapter
            weights = [(p, layer.base_layer.weight) for p in layer.trainable_tokens_delta.values()]
        for parameter, weight in weights:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, weight


def _wrappers(adapted: nn.Module) -> list[Any]:
    return [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
