"""Fast forward passes for the layers of Llama-like models: fused norms, rotary positions, grouped adapters.

`install` replaces `forward` of the decoder layers, feed-forward blocks and norms that transformers writes in exactly
this way, by class: Gemma's norm looks the same but adds 1 to its weight. Everything else (other classes, dropout,
PEFT's options) uses transformers' and PEFT's own code.
"""

import sys
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from worker.trainer.kernels import adapters, attention, elementwise, projections, recomputation

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
"""Families whose decoder layer is: norm, attention, sum, norm, gated feed-forward block or mixture of them, sum."""
BLOCKS = {f"{family}MLP" for family in (*FAMILIES, "SmolLM3")}
_MIXTURE = "SparseMoeBlock"
NORMS = {f"{family}RMSNorm" for family in (*FAMILIES, "SmolLM3")}


def install(model: nn.Module) -> int:
    """Replaces the forward of every layer, block and norm of a known class; returns how many layers there are."""
    layers = 0
    for module in model.modules():
        name = type(module).__name__
        if _is_known(module):
            module.forward = MethodType(_layer, module)
            layers += 1
        elif name in BLOCKS and _is_silu(module):
            module.forward = MethodType(_feed_forward, module)
        elif name in NORMS:
            module.forward = MethodType(_norm, module)
    return layers


def _is_silu(block: Any) -> bool:
    return type(block.act_fn).__name__ in {"SiLU", "SiLUActivation"}


def _norm(self: Any, x: Tensor) -> Tensor:
    return elementwise.add_rms_norm(x, None, self.weight, self.variance_epsilon)[0]


def _is_known(module: nn.Module) -> bool:
    """Whether a module is a decoder layer whose parts are all supported by `_layer`."""
    name = type(module).__name__
    family = name.removesuffix("DecoderLayer")
    if family == name or family not in FAMILIES:
        return False
    layer = cast(Any, module)
    parts = [(layer.self_attn, "Attention"), (layer.mlp, _MIXTURE if _is_mixture(layer.mlp) else "MLP")]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(layer.self_attn, each) for each in ("q_norm", "k_norm") if hasattr(layer.self_attn, each)]
    parts += [(norm, "RMSNorm") for norm in norms]  # one that PEFT trains whole is wrapped, and casts at its borders
    known = all(type(part).__name__ == family + kind for part, kind in parts)
    return known and (_is_mixture(layer.mlp) or _is_silu(layer.mlp))


def _is_mixture(block: nn.Module) -> bool:
    return type(block).__name__.endswith(_MIXTURE)


def borders_known(causal: Any) -> bool:
    """Whether every decoder layer of a model has the fast forward, and its attention accepts the rows' borders.

    Only on a CUDA device: elsewhere borders save no time, as there is no such kernel.
    """
    layers = getattr(causal.base_model, "layers", None)
    if not layers or not all(getattr(layer.forward, "__func__", None) is _layer for layer in layers):
        return False
    modules = [layer.self_attn for layer in layers]
    return bool(modules[0].q_proj.weight.is_cuda) and all(
        not module.attention_dropout and attention.available(module.head_dim, _window(module).get("sliding_window"))
        for module in modules
    )


def _layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The new forward, bound to a decoder layer."""
    if position_embeddings is None:
        return cast(Tensor, type(self).forward(
            self, hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
        ))  # fmt: skip
    norm = self.input_layernorm
    normed, residual = elementwise.add_rms_norm(hidden_states, None, norm.weight, norm.variance_epsilon)
    kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
    attended = _attention(self.self_attn, normed, position_embeddings, past_key_values, kwargs)
    norm = self.post_attention_layernorm
    normed, residual = elementwise.add_rms_norm(attended, residual, norm.weight, norm.variance_epsilon)
    if _is_mixture(self.mlp):
        return cast(Tensor, residual + self.mlp(normed))
    return residual + _feed_forward(self.mlp, normed, is_wanted=not recomputation.is_running())


def _attention(module: Any, x: Tensor, angles: tuple[Tensor, Tensor], cache: Any, kwargs: dict[str, Any]) -> Tensor:
    query, key, value = (part.view(*x.shape[:-1], -1, module.head_dim) for part in _together(
        x, module.q_proj, module.k_proj, module.v_proj
    ))  # fmt: skip
    if hasattr(module, "q_norm"):
        query, key = (_norm(norm, part) for norm, part in ((module.q_norm, query), (module.k_norm, key)))
    query, key = elementwise.rotate(query, *angles), elementwise.rotate(key, *angles)
    if cache is None:
        out = _attend(module, query, key, value, **kwargs)
    else:  # which decides what is attended to, and how: borders are passed on
        key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2), module.layer_idx)
        out = _attend_by_name(module, query.transpose(1, 2), key, value, **kwargs)
    [projected] = _together(out.reshape(*x.shape[:-1], -1).contiguous(), module.o_proj)
    return projected


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *, attention_mask: Tensor | None,
    borders: attention.Borders | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Computes attention over [batch, positions, heads, width]. `borders` replace a mask."""
    window = _window(module)
    if borders is not None:
        batch, width = query.shape[:2]
        borders = borders.of_windows(window.get("sliding_window"), batch, width, query.device)
    if borders is not None and borders.ends is not None:
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        return attention.rows_apart(query, key, value, borders, module.scaling, window.get("sliding_window"))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return _attend_by_name(module, query, key, value, attention_mask if borders is None else None, **kwargs)


def _attend_by_name(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Computes attention over [batch, heads, positions, width] by the function that the model's config names."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, _eager(module))
    out, _ = attend(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **_window(module),
        **kwargs,
    )
    return cast(Tensor, out)


def _eager(module: Any) -> Any:
    """Returns the family's own attention without a library, for models that request it."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _window(module: Any) -> dict[str, Any]:
    """Returns the sliding window as the family passes it on: Llama none, Mistral its config's, Qwen the layer's."""
    if type(module).__name__ == "LlamaAttention":
        return {}
    if hasattr(module, "sliding_window"):
        return {"sliding_window": module.sliding_window}
    return {"sliding_window": getattr(module.config, "sliding_window", None)}


def _together(x: Tensor, *modules: Any) -> tuple[Tensor, ...]:
    """Returns the modules' products with one input, computed in one function if all are plain adapters."""
    layers = [adapters.layer_of(module) for module in modules]
    if all(layers):
        return projections.project(x, cast(list[projections.Layer], layers))
    return tuple(module(x) for module in modules)


def _feed_forward(mlp: Any, x: Tensor, *, is_wanted: bool = True) -> Tensor:
    layers = [adapters.layer_of(module) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    if all(layers):
        return projections.gated(x, *cast(list[projections.Layer], layers), is_wanted=is_wanted)
    return cast(Tensor, mlp.down_proj(elementwise.swiglu(mlp.gate_proj(x), mlp.up_proj(x))))
