"""Gradients of adapters that are added together are those that autograd adds, with fewer operations."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from adapted import AT_ONCE, Counted, batch, objective
from torch import Tensor

from worker.trainer.cuda_graphs import forward_backward
from worker.trainer.kernels import accumulation
from worker.trainer.objective import Objective

ADDED, TOGETHER = "aten.add_.Tensor", "aten._foreach_add_.List"


def plainly(of: Objective, length: int) -> None:
    """Lets autograd add each gradient."""
    of.sums(batch(length), 0.1)["loss"].backward()


def together(of: Objective, length: int) -> None:
    forward_backward(of, batch(length), 0.1)


def gradients(of: Objective) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    of.zero_grad()
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("bytes_together", [1, 20_000, accumulation.TOGETHER])
@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.2}, {"target_modules": ["q_proj", "down_proj", "lm_head"]}],
    ids=["all", "dropout", "some"],
)  # fmt: skip
def test_sums_of_passes_are_those_of_autograd(
    options: dict[str, Any], dtype: torch.dtype, recompute: int, bytes_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulation, "TOGETHER", bytes_together)
    made = objective(dtype=dtype, **options)
    if recompute:
        made.recompute(recompute)
    found = []
    for passes in (plainly, together):
        torch.manual_seed(4)  # of dropout
        for length in (12, 30, 9):
            passes(made, length)
        found.append(gradients(made))
    assert equal(found[1], found[0])


def counts(passes: Any, of: Objective) -> Counter[str]:
    passes(of, 12)
    with Counted() as counted:
        passes(of, 12)
    return counted.of


def test_later_passes_add_at_once() -> None:
    made = objective()
    usual = counts(plainly, made)
    made.zero_grad()
    found = counts(together, made)
    assert usual[ADDED] - found[ADDED] == 3 * 7 * 2
    assert (usual[TOGETHER], found[TOGETHER]) == (0, 1)
    assert found[AT_ONCE] == 1


def test_few_gradients_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in memory beside the sums."""
    made = objective()
    largest = sum(parameter.nbytes for parameter in made.parameters() if parameter.requires_grad)
    monkeypatch.setattr(accumulation, "TOGETHER", largest // 4)
    assert counts(together, made)[TOGETHER] == 4


def test_hooks_see_every_gradient_in_its_sum() -> None:
    """Several ranks send a sum when its hook runs."""
    made, seen = objective(), dict[str, Tensor]()

    def see(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen[name] = parameter.grad.clone()

    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(see, name))
    for _ in range(2):
        together(made, 12)
    assert len(seen) == 3 * 7 * 2
    assert equal(gradients(made), seen)


def test_hooks_of_a_gradient_see_it_and_change_it() -> None:
    made = objective()
    parameter = next(p for p in made.parameters() if p.requires_grad)
    for _ in range(2):
        together(made, 12)
    whole = parameter.grad.clone() if parameter.grad is not None else None
    parameter.register_hook(lambda gradient: gradient * 2)
    made.zero_grad(set_to_none=False)
    for _ in range(2):
        together(made, 12)
    assert whole is not None
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, 2 * whole)


def test_gradients_that_are_asked_for_are_not_added() -> None:
    made = objective()
    together(made, 12)
    before = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    parameters = [p for p in made.parameters() if p.requires_grad]
    asked = torch.autograd.grad(made.sums(batch(12), 0.1)["loss"], parameters)
    assert len(asked) == len(parameters)
    assert equal(gradients(made), before)


def test_a_failed_pass_leaves_nothing_to_the_next() -> None:
    made = objective()
    together(made, 12)

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError

    handle = made.causal.get_input_embeddings().register_forward_hook(
        lambda _module, _args, out: out.requires_grad_().register_hook(fail) and None
    )
    with pytest.raises(torch.OutOfMemoryError):
        together(made, 30)
    handle.remove()
    gradients(made)
    for _ in range(2):
        plainly(made, 12)
    found = gradients(made)
    for _ in range(2):
        together(made, 12)
    assert equal(found, gradients(made))


def test_an_adapter_that_a_pass_uses_twice() -> None:
    made = objective()
    found = []
    for adds in (False, True):
        for _ in range(2):
            one, two = (made.sums(batch(length), 0.1)["loss"] for length in (9, 14))
            if adds:
                with accumulation.together():
                    (one * two).backward()
            else:
                (one * two).backward()
        found.append(gradients(made))
    assert equal(found[1], found[0])
