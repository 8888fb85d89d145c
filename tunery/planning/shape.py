"""A decoder's sizes, from its config alone, and its trainable parameters. Units are elements, not bytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunery.spec import Full, Lora, Technique


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes in elements. Families with other names for their parts are treated like the nearest Llama.

    Counted on the model itself, 0 for bases of older releases: `rank_1`, the weights of rank-1 adapters on all linear
    layers; `four_bit`, those that QLoRA quantises; `experts`, those of all experts; `unmerged`, those of experts to
    which adapters are not added, as rows pass through the adapters themselves. `ffn` is the width that a token
    passes through; `family` is the config's model_type, None if unknown.
    """

    params: int
    hidden: int
    ffn: int
    layers: int
    heads_width: int
    kv_width: int
    vocab: int
    tied: bool
    rank_1: int = 0
    four_bit: int = 0
    experts: int = 0
    unmerged: int = 0
    heads: int = 0
    family: str | None = None

    @classmethod
    def of(cls, model_info: Mapping[str, Any]) -> "Shape":
        """From `model_info`. Raises KeyError without hidden_size, num_hidden_layers or vocab_size."""
        hidden = model_info["hidden_size"]
        heads = model_info.get("num_attention_heads") or max(1, hidden // 64)
        head_width = model_info.get("head_dim") or hidden // heads
        shape = cls(
            params=model_info.get("params") or 0,
            hidden=hidden,
            ffn=max(model_info.get("intermediate_size") or 4 * hidden, model_info.get("active_experts_size") or 0),
            layers=model_info["num_hidden_layers"],
            heads_width=heads * head_width,
            kv_width=(model_info.get("num_key_value_heads") or heads) * head_width,
            vocab=model_info["vocab_size"],
            tied=bool(model_info.get("tie_word_embeddings")),
            heads=heads,
            family=model_info.get("model_type"),
            **(model_info.get("counts") or {}),
        )
        if shape.experts and shape.four_bit <= shape.attention:  # no layer has an MLP beside its experts
            shape = replace(shape, ffn=model_info["active_experts_size"])
        return shape if shape.params else replace(shape, params=shape.vocabulary + shape.linears)

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The inputs and outputs of a layer's linear modules, by name."""
        return {
            "q_proj": (self.hidden, self.heads_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.heads_width, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    @property
    def attention(self) -> int:
        """Weights of all layers' attention."""
        return 2 * self.layers * self.hidden * (self.heads_width + self.kv_width)

    @property
    def vocabulary(self) -> int:
        """Weights of embedding and head, which are never quantised."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Weights that a token passes through: of a mixture without the experts that it is not routed to."""
        return self.linears + self.vocabulary if self.experts else self.params

    @property
    def linears(self) -> int:
        """Weights of all layers' linear modules."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.modules.values())


_NORM = re.compile(r"norm|^ln_")


def trainable_params(model_info: Mapping[str, Any], technique: Technique) -> int:
    """Returns the number of trained weights. A module of unknown size counts as hidden x hidden."""
    shape = Shape.of(model_info)
    if isinstance(technique, Full):
        return shape.params
    whole = _whole_params(shape, technique)
    if technique.target_modules == "all-linear" and shape.rank_1 and not technique.use_dora:
        return technique.r * shape.rank_1 + whole
    sizes = _adapted(shape, technique)
    lengths = sum(outputs for _, outputs in sizes) if technique.use_dora else 0
    return whole + shape.layers * (technique.r * sum(inputs + outputs for inputs, outputs in sizes) + lengths)


def linear_adapter_params(shape: Shape, technique: Lora) -> int:
    """Returns the weights of the adapters on linear modules, without those on experts, which are no modules."""
    found = technique.r * shape.layers * sum(inputs + outputs for inputs, outputs in _adapted(shape, technique))
    if not shape.experts:
        every = technique.target_modules == "all-linear" and shape.rank_1
        return technique.r * shape.rank_1 if every else found
    attention = 2 * shape.layers * (2 * shape.hidden + shape.heads_width + shape.kv_width)
    return min(found, technique.r * attention)


def _adapted(shape: Shape, technique: Lora) -> list[tuple[int, int]]:
    """Returns the inputs and outputs of a layer's adapted modules."""
    names = shape.modules if technique.target_modules == "all-linear" else technique.target_modules
    square = (shape.hidden, shape.hidden)
    return [shape.modules.get(name.rpartition(".")[2], square) for name in names]


def _whole_params(shape: Shape, technique: Lora) -> int:
    """Returns the weights of modules, and of the vocabulary's rows, that are trained whole.

    The name of a linear module or a norm means all layers', as PEFT matches the ends of names: `norm` also those of the
    layers. A module of unknown size counts as a head.
    """
    names = [name.rpartition(".")[2] for name in technique.modules_to_save or ()]
    linears = [shape.modules[name] for name in names if name in shape.modules]
    norms = [name for name in names if _NORM.search(name)]
    matrices = len(names) - len(linears) - len(norms)
    layers = sum(inputs * outputs for inputs, outputs in linears) + 2 * shape.hidden * len(norms)
    found = shape.layers * layers + shape.hidden * len(norms)
    if shape.tied:
        matrices = min(1, matrices)
    tokens = len(technique.trainable_token_indices or ())
    rows = tokens * max(0, (1 if shape.tied else 2) - matrices)
    return found + shape.hidden * (shape.vocab * matrices + rows)
