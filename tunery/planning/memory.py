"""How much memory a run needs at the least, from the base's config alone: no weights, no torch.

"At the least" is one example at a time, of `rows` sequences of `max_seq_length` tokens, with activations recomputed on
a GPU, which is where the trainer goes when memory is short. It then measures and takes larger micro-batches where there
is room, so an estimate decides only whether a run may start. Sizes are of one device; several GPUs hold a copy each.

Units are bytes; `GiB` in messages is 2**30 of them, as on a card's box.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tunery.failures import DoesNotFit
from tunery.planning.precision import BYTES, Precision, decide
from tunery.spec import Full, Lora, Qlora, Resources, Sharding, Technique

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16_384
"""Bytes a weight: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 scales (arXiv:2305.14314, section 3)."""
NF4_PLAIN_BYTES = 0.5 + 4 / 64
"""Without double quantisation: a 32-bit scale for 64 weights."""
CHUNK_BYTES = 256 * 2**20
"""Of the fp32 logits of one chunk of the loss. Larger chunks are no faster: the products are long enough by then."""
CPU_MICRO_BATCH = 1024
"""Tokens of a CPU micro-batch. Larger ones are no faster: the products fill the cores, and padding grows."""
GPU_COUNTS: tuple[int, ...] = get_args(Resources.model_fields["gpus"].annotation)
"""How many GPUs a job may ask for."""
_SLACK = 0.03


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes in elements. Families that name their parts otherwise are taken for the nearest Llama.

    Counted on the model itself, 0 for bases of older releases: `rank_1`, the weights of adapters of rank 1 on all
    linear weights; `four_bit`, those that QLoRA packs; `experts`, those of all experts. `ffn` is what a token passes.
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

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Shape":
        """From a model's `facts`. Raises KeyError without hidden_size, num_hidden_layers or vocab_size."""
        hidden = facts["hidden_size"]
        heads = facts.get("num_attention_heads") or max(1, hidden // 64)
        head_width = facts.get("head_dim") or hidden // heads
        shape = cls(
            params=facts.get("params") or 0,
            hidden=hidden,
            ffn=max(facts.get("intermediate_size") or 4 * hidden, facts.get("active_experts_size") or 0),
            layers=facts["num_hidden_layers"],
            heads_width=heads * head_width,
            kv_width=(facts.get("num_key_value_heads") or heads) * head_width,
            vocab=facts["vocab_size"],
            tied=bool(facts.get("tie_word_embeddings")),
            **(facts.get("counts") or {}),
        )
        return shape if shape.params else cls(**{**shape.__dict__, "params": shape.vocabulary + shape.linears})

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """A layer's linear modules: inputs and outputs."""
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
    def vocabulary(self) -> int:
        """Weights of embedding and head, which are never quantised."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def linears(self) -> int:
        """Weights of all layers' linear modules."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.modules.values())


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for: base, gradients, optimizer, adapter, gathered, activations, head, fixed."""

    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def trainable_params(facts: Mapping[str, Any], technique: Technique) -> int:
    """Weights that learn. A module name that the shape does not know counts as hidden x hidden."""
    shape = Shape.of(facts)
    if isinstance(technique, Full):
        return shape.params
    whole = _whole_params(shape, technique)
    if technique.target_modules == "all-linear" and shape.rank_1 and not technique.use_dora:
        return technique.r * shape.rank_1 + whole
    names = shape.modules if technique.target_modules == "all-linear" else technique.target_modules
    square = (shape.hidden, shape.hidden)
    sizes = [shape.modules.get(name.rpartition(".")[2], square) for name in names]
    lengths = sum(outputs for _, outputs in sizes) if technique.use_dora else 0
    return whole + shape.layers * (technique.r * sum(inputs + outputs for inputs, outputs in sizes) + lengths)


def _whole_params(shape: Shape, technique: Lora) -> int:
    """Weights beside the adapters that learn themselves. A module whose size is not known counts as a head."""
    matrices = shape.vocab * shape.hidden * len(technique.modules_to_save or ())
    rows = len(technique.trainable_token_indices or ()) * shape.hidden
    return (matrices + rows) * (1 if shape.tied else 2) if rows else matrices


def estimate(
    facts: Mapping[str, Any],
    technique: Technique,
    *,
    max_seq_length: int,
    device: str = "cuda",
    rows: int = 1,
    optimizer: str = "adamw",
    ranks: int = 1,
) -> Estimate:
    """The least that a run needs on one `device` ("cuda" or "cpu"). `rows`: of an example.

    `ranks`: over how many devices the model is cut, of which this is one. Paged moments count as others do: they come
    back to the GPU in every step.
    """
    shape, precision, tokens = Shape.of(facts), decide(technique, device, optimizer), max_seq_length * rows
    width, learns = BYTES[precision.dense], trainable_params(facts, technique)
    parts = {"base": _base_bytes(shape, precision)}
    if precision.fp8 and not precision.quantised and device == "cuda":
        parts["base"] += 2 * shape.linears  # in eight bits twice: by rows and by columns
    parts["optimizer"] = learns * precision.moment_bytes
    if isinstance(technique, Full) and (precision.moments, precision.rounding) == ("int8", "nearest"):
        parts["optimizer"] += 2 * (BYTES["float32"] - BYTES["int8"]) * shape.vocabulary  # embeddings keep 32 bits
    parts["gradients"] = learns * precision.trained_bytes
    if not isinstance(technique, Full):
        parts["adapter"] = learns * precision.trained_bytes
        parts["dora"] = _dora_bytes(shape, tokens) if technique.use_dora else 0
    if ranks > 1:
        parts = _cut(parts, technique, ranks) | {"gathered": _gathered_bytes(shape, technique, precision)}
    parts["activations"] = _activation_bytes(shape, precision, tokens, device)
    if not isinstance(technique, Full):
        parts["experts"] = _experts_bytes(shape, precision, device)
    parts["head"] = CHUNK_BYTES + tokens * shape.hidden * width
    parts["fixed"] = int((0.9 if device == "cuda" else 0.5) * 1e9 + _SLACK * sum(parts.values()))
    return Estimate(parts)


def _cut(parts: dict[str, int], technique: Technique, ranks: int) -> dict[str, int]:
    """The parts of a device that has a piece of the model: adapters, with their moments and gradients, stay whole."""
    whole = () if isinstance(technique, Full) else ("optimizer", "gradients", "adapter", "dora")
    return {name: size if name in whole else -(-size // ranks) for name, size in parts.items()}


def _gathered_bytes(shape: Shape, technique: Technique, precision: Precision) -> int:
    """What is whole beside the pieces: embedding and head, and two layers; with their gradients where they learn."""
    passes = 2 if isinstance(technique, Full) else 1
    layers = _base_bytes(shape, precision) - shape.vocabulary * BYTES[precision.dense]
    return passes * (shape.vocabulary * BYTES[precision.dense] + 2 * layers // max(1, shape.layers))


def choose_sharding(
    facts: Mapping[str, Any], technique: Technique, *, gpus: int, capacity: int, asked: Sharding, **of_run: Any
) -> Literal["replicate", "full_shard"]:
    """How a run uses several devices of `capacity` bytes: as asked, or in pieces where a whole copy does not fit.

    `of_run`: as of `estimate`.
    """
    if asked != "auto":
        return asked
    if gpus == 1 or of_run.get("device") == "cpu":
        return "replicate"
    return "replicate" if fits(facts, technique, capacity=capacity, **of_run) else "full_shard"


def moment_bytes(technique: Technique, device: str = "cuda") -> int:
    """Bytes of the optimizer's two moments of a weight that learns."""
    return decide(technique, device).moment_bytes


def _base_bytes(shape: Shape, precision: Precision) -> int:
    width = BYTES[precision.dense]
    if not precision.quantised:
        return shape.params * width
    packed = NF4_BYTES if precision.double_quant else NF4_PLAIN_BYTES
    four_bit = shape.four_bit or shape.params - shape.vocabulary
    return int(four_bit * packed) + (shape.params - four_bit) * width


def _activation_bytes(shape: Shape, precision: Precision, length: int, device: str) -> int:
    width = BYTES[precision.dense]  # autocast keeps the residual stream in the type of the weights
    attention = 2 * shape.heads_width + 2 * shape.kv_width
    at_work = 6 * shape.hidden + attention + 3 * shape.ffn  # one layer's recomputation and its gradients
    scratch = max(i * o for i, o in shape.modules.values()) * width if precision.quantised else 0
    if device == "cuda":  # each layer keeps its input only
        return length * width * (shape.layers * shape.hidden + at_work) + scratch
    kept = 2 * shape.hidden + attention + 2 * shape.ffn
    return max(length, CPU_MICRO_BATCH) * width * (shape.layers * kept + at_work) + scratch


def _experts_bytes(shape: Shape, precision: Precision, device: str) -> int:
    """What adapters make of the experts' weights: their sum with the update, and its gradient, one layer's at a time.

    Without recomputation, as on a CPU, the sums of all layers are kept for the backward pass.
    """
    layer = shape.experts // max(1, shape.layers)
    return BYTES[precision.dense] * (2 * layer if device == "cuda" else shape.experts + layer)


def _dora_bytes(shape: Shape, length: int) -> int:
    """What DoRA makes of one layer in fp32, to measure its weights: them, B A, their sum, the identity behind B A, and
    the layer's inputs and outputs of all positions, which the backward pass reads."""
    matrices = max(3 * inputs * outputs + inputs * inputs for inputs, outputs in shape.modules.values())
    return 4 * (matrices + 2 * length * sum(inputs + outputs for inputs, outputs in shape.modules.values()))


def fits(facts: Mapping[str, Any], technique: Technique, *, capacity: int, **asked: Any) -> bool:
    """Whether the least that the run needs is there. `capacity`: bytes of one device; `asked`: as of `estimate`."""
    return estimate(facts, technique, **asked).bytes <= capacity


def bf16_fits(facts: Mapping[str, Any], *, capacity: int, **asked: Any) -> bool:
    """Whether a plain LoRA fits, so that nobody who asks for no technique pays for 4 bits with quality."""
    return fits(facts, Lora(), capacity=capacity, **asked)


def check(
    facts: Mapping[str, Any],
    technique: Technique,
    *,
    max_seq_length: int,
    capacity: int,
    device: str = "cuda",
    rows: int = 1,
    optimizer: str = "adamw",
    ranks: int = 1,
    model: str = "the model",
    gpus: int = 1,
) -> Estimate:
    """The estimate, if `capacity` bytes are enough for it. Raises DoesNotFit, which says what to change.

    `gpus`: how many of that capacity one host has, over which the model might be cut.
    """
    asked: dict[str, Any] = {"max_seq_length": max_seq_length, "device": device, "rows": rows, "optimizer": optimizer}
    asked["ranks"] = ranks
    need = estimate(facts, technique, **asked)
    if need.bytes > capacity:
        raise DoesNotFit(
            param="technique",
            what=f"A {technique.type} fine-tune of {model} ({gib(need.parts['base'])} of weights"
            f"{f' on each of {ranks} GPUs' if ranks > 1 else ''}), "
            f"{'rows' if rows == 1 else 'pairs of rows'} of {max_seq_length} tokens,",
            needed=gib(need.bytes),
            device="GPU" if device == "cuda" else "host",
            capacity=gib(capacity),
            instead=_instead(facts, technique, capacity, gpus=gpus, **asked),
        )
    return need


def _instead(facts: Mapping[str, Any], technique: Technique, capacity: int, *, gpus: int, **asked: Any) -> str:
    """What to change: more GPUs, a lighter technique, shorter rows, another base or worker."""
    for ranks in (count for count in GPU_COUNTS if asked["ranks"] < count <= gpus and asked["device"] == "cuda"):
        need = estimate(facts, technique, **asked | {"ranks": ranks}).bytes
        if need <= capacity:
            lighter = _lighter_one(facts, technique, capacity, asked)
            more = f"Set resources.gpus to {ranks} and resources.sharding to 'auto'"
            return f"{more}, which needs about {gib(need)} on each.{f' Or use {lighter}.' if lighter else ''}"
    if lighter := _lighter_one(facts, technique, capacity, asked):
        return f"Use {lighter}."
    shorter = asked["max_seq_length"] // 2
    while shorter >= 256:
        if fits(facts, technique, capacity=capacity, **asked | {"max_seq_length": shorter}):
            return f"Lower max_seq_length to {shorter}."
        shorter //= 2
    return f"Use a smaller base model, or a worker with a larger {'GPU' if asked['device'] == 'cuda' else 'memory'}."


def _lighter_one(facts: Mapping[str, Any], technique: Technique, capacity: int, asked: Mapping[str, Any]) -> str | None:
    """The technique most alike that fits, and what it needs, in words."""
    refused = {name for name, reason in (facts.get("techniques") or {}).items() if reason}
    for other, change in _lighter(technique, asked["device"]):
        need = estimate(facts, other, **asked).bytes
        if other.type not in refused and need <= capacity:
            return f"{change}, which needs about {gib(need)}"
    return None


def _lighter(technique: Technique, device: str) -> list[tuple[Technique, str]]:
    """Techniques that need less memory, most alike first, in words."""
    found: list[tuple[Technique, str]] = []
    if decide(technique, device) != decide(Full(), device) and isinstance(technique, Full):
        found.append((Full(), "technique.weights_dtype 'bfloat16'"))
    if isinstance(technique, Full):
        found.append((Lora(), "the technique 'lora'"))
    if not isinstance(technique, Qlora):
        found.append((Qlora(), "the technique 'qlora'"))
    return found


def gib(size: int) -> str:
    """A size for people: `24.0 GiB`."""
    return f"{size / GIB:.1f} GiB"
