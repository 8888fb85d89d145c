"""Compares attention without repeated keys with transformers' own, in passes over one token and over several."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from worker.trainer import grouped_attention


class Layer(nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def both(heads: int, key_heads: int, tokens: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    query = torch.randn(3, heads, tokens, 16)
    key, value = torch.randn(3, key_heads, 12, 16), torch.randn(3, key_heads, 12, 16)
    layer = Layer(heads // key_heads)
    given = (layer, query, key, value, mask)
    return grouped_attention.attend(*given, scaling=0.3)[0], sdpa_attention_forward(*given, scaling=0.3)[0]


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (4, 1), (4, 4), (9, 3)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_is_sdpa(heads: int, key_heads: int, tokens: int) -> None:
    torch.manual_seed(0)
    visible = torch.arange(12) <= torch.tensor([3, 11, 7])[:, None, None, None]
    for mask in (visible.expand(-1, -1, tokens, -1), None):
        found, wanted = both(heads, key_heads, tokens, mask)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_keys_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        grouped_attention, "sdpa_attention_forward", lambda *_, **__: pytest.fail("keys would be repeated")
    )
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        grouped_attention.functional,
        "scaled_dot_product_attention",
        lambda q, k, *rest, **options: seen.append((q.shape, k.shape)) or attention(q, k, *rest, **options),
    )
    mask = torch.ones(3, 1, 1, 12, dtype=torch.bool)
    query, key = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 12, 16)
    grouped_attention.attend(Layer(4), query, key, key, mask, scaling=0.3)
    assert seen == [((3, 2, 4, 16), (3, 2, 12, 16))]


def test_a_model_that_uses_it_answers_the_same() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(0, 99, (3, 7))
    given = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [1] * 7])
    wanted = model.generate(prompt, attention_mask=mask, **given)
    grouped_attention.use(model)
    assert model.config._attn_implementation == grouped_attention.NAME
    assert torch.equal(model.generate(prompt, attention_mask=mask, **given), wanted)


def test_other_kinds_of_attention_stay() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=9)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    grouped_attention.use(model)
    assert model.config._attn_implementation == "eager"
