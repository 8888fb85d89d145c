"""Adapters that a pass casts once train exactly as adapters that each layer casts, with fewer operations."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapted import AT_ONCE, CAST, JOINED, Counted, batch, objective
from torch import Tensor

from worker.trainer.data import Batch
from worker.trainer.kernels import adapters, casts
from worker.trainer.objective import Objective


def change_weights(of: Objective) -> None:
    """Moves the adapters as an optimizer does, by the last gradient."""
    with torch.no_grad():
        for parameter in of.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def step(of: Objective, rows: Batch | None = None) -> dict[str, Tensor]:
    """Returns a pass's loss and gradients."""
    of.zero_grad()
    torch.manual_seed(4)  # of dropout
    loss = of.sums(rows or batch(), 1 / 50)["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@contextmanager
def cast_by_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets each layer cast its own adapter inside the block."""
    with monkeypatch.context() as patched:
        patched.setattr(Objective, "_adapters_cast", lambda _: None)
        yield


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def counts(of: Objective) -> tuple[Counter[str], Counter[str]]:
    """Returns how often each operation runs in a forward and in a backward pass."""
    rows = batch()
    with Counted() as forward:
        loss = of.sums(rows, 1.0)["loss"]
    with Counted() as backward:
        loss.backward()
    return forward.of, backward.of


SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
RANKS = {"rank_pattern": {"k_proj": 3, "up_proj": 5, "v_proj": 16, "o_proj": 1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases, rslora": ("qwen2", {"use_rslora": True, "r": 5}),
    "ranks": ("qwen3", RANKS),
    "alphas": ("llama", {"alpha_pattern": {"k_proj": 3}}),
    "some modules": ("llama", SOME),
    "dropout": ("llama", {"lora_dropout": 0.3}),
    "experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "transformers' layers": ("gemma3", {}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj", "k_proj"]}),
}


@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_adapters_that_each_layer_casts(
    case: str, bits: int, recompute: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = CASES[case]
    made = objective(family, tmp_path if bits == 4 else None, **options)
    if recompute:
        made.recompute(recompute)
    for _ in range(2):  # of other weights, which the second pass casts again
        with cast_by_layers(monkeypatch):
            wanted = step(made)
        assert equal(step(made), wanted)
        change_weights(made)


@pytest.mark.parametrize("options", [{}, RANKS], ids=["one rank", "ranks"])
@pytest.mark.parametrize("recompute", [0, 3])
def test_a_pass_casts_all_adapters_at_once(
    recompute: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of recomputed layers, which run outside of the pass that has cast them."""
    made = objective(**options)
    if recompute:
        made.recompute(recompute)
    made.sums(batch(), 1.0)  # allocates

    with cast_by_layers(monkeypatch):
        before, before_backward = counts(made)
    forward, backward = counts(made)

    assert (forward[AT_ONCE], backward[AT_ONCE]) == (1, 0)
    # In each of three layers 7 Bs, 2 As, and the As of two inputs in one. Nothing reads the gradient of the first
    # layer's input, and a recomputed layer leaves out its last product.
    assert before[CAST] - forward[CAST] == 3 * 11
    assert before[JOINED] - forward[JOINED] == 3 * 2
    assert before_backward[CAST] - backward[CAST] == 3 * 11 - 1 + 10 * recompute
    assert before_backward[JOINED] - backward[JOINED] == 3 * 2 - 1 + 2 * recompute


def test_each_pass_reads_the_weights_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has changed them: the optimizer, or a snapshot that replaces their memory."""
    made = objective()
    made.eval()

    def score(expected: bool = False) -> float:
        with torch.no_grad():
            return float(made.sums(batch(), 1.0)["loss"])

    first = score()
    for change in ("in place", "replaced"):
        for parameter in made.parameters():
            if parameter.requires_grad and change == "in place":
                parameter.data.mul_(-2)
            elif parameter.requires_grad:
                parameter.data = parameter.data * -0.3
        with cast_by_layers(monkeypatch):
            wanted = score()
        assert score() == wanted != first


def test_two_passes_before_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective()

    def both() -> dict[str, Tensor]:
        made.zero_grad()
        one, two = (made.sums(batch(length), 1.0)["loss"] for length in (9, 14))
        (one * two).backward()
        return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}

    with cast_by_layers(monkeypatch):
        wanted = both()
    assert equal(both(), wanted)


def test_layers_outside_of_a_pass_cast_for_themselves() -> None:
    """Weights may have changed since the last pass."""
    made = objective()
    made.eval()
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        with made.computing():
            before = made.causal(input_ids=ids, use_cache=False).logits
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(-2)
        after = made.causal(input_ids=ids, use_cache=False).logits
        with made.computing():
            assert torch.equal(made.causal(input_ids=ids, use_cache=False).logits, after)
    assert casts.current() is None
    assert not torch.equal(before, after)


def test_a_pass_that_fails_ends_its_casts() -> None:
    made = objective()
    found = []

    def fail(*_: Any) -> None:
        found.append(casts.current())
        raise torch.OutOfMemoryError

    made.causal.register_forward_pre_hook(fail)
    made.chunked = False
    with pytest.raises(torch.OutOfMemoryError):
        made.sums(batch(), 1.0)
    assert found[0] is not None
    assert casts.current() is None


def test_first_pass_may_be_without_adapters() -> None:
    """As when the base is scored before it is trained."""
    made = objective()
    model: Any = made.model
    with model.disable_adapter(), torch.no_grad():
        made.sums(batch(), 1.0)
    usual = objective()
    usual.sums(batch(), 1.0)
    assert counts(made) == counts(usual)


def test_only_what_is_cast_takes_memory() -> None:
    """Not adapters in the type of the products; those with dropout, which PEFT's product casts; experts', which have
    another form; nor those of a sharded model.
    """
    per_rank = 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    whole = adapters.casts_of(objective())
    assert whole.nbytes == 2 * 8 * per_rank
    assert adapters.casts_of(objective(dtype=torch.float32)).nbytes == 0
    assert adapters.casts_of(objective(lora_dropout=0.1)).nbytes == 0
    family, options = CASES["experts"]
    assert adapters.casts_of(objective(family, **options)).nbytes == 2 * 8 * 3 * (2 * (64 + 64) + 2 * (64 + 32))
    sharded = objective()
    sharded.is_sharded = True
    forward, _ = counts(sharded)
    assert forward[AT_ONCE] == 0


def test_every_factor_begins_at_a_multiple_of_256_bytes() -> None:
    """Otherwise a GPU multiplies by slower kernels; As of one input lie one behind the other."""
    made, layers = objective(**RANKS), 0
    found = adapters.casts_of(made)
    for name, module in cast(Any, made).named_modules():
        if adapters.is_plain(module):
            both = found.of(module.lora_A.default.weight, module.lora_B.default.weight)
            assert both is not None
            is_first = name.endswith(("q_proj", "gate_proj", "down_proj"))
            starts = [each.data_ptr() - both.a.untyped_storage().data_ptr() for each in (both.a, both.b)]
            assert [start % 256 for start in starts[0 if is_first else 1 :]] == [0] * (1 + is_first)
            layers += 1
    assert layers == 21


def test_matrices_apart_have_no_view_of_both() -> None:
    flat = torch.arange(60.0)
    first, second = flat[:12].view(3, 4), flat[12:32].view(5, 4)
    assert torch.equal(casts.joined([first, second]), torch.cat([first, second]))  # type: ignore[arg-type]
    assert casts.joined([second, first]) is None
    assert casts.joined([first, flat[16:36].view(5, 4)]) is None
    assert casts.joined([first, flat.clone()[12:32].view(5, 4)]) is None
