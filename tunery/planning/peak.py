"""The peak memory of a run on one device, from the base's config and how a step is run.

The peak is in one of four phases: at the start of a backward pass, with all activations; at its end, with all
gradients; while the loss is measured without gradients; or after training, when a small model's files are loaded
beside it to compare their answers. Units are bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.planning import activations
from tunery.planning.precision import BYTES, Precision, decide
from tunery.planning.shape import Shape, linear_adapter_params, trainable_params
from tunery.spec import Full, Technique

NF4_BYTES = 0.5 + 1 / 64 + 4 / 16_384
"""Bytes per weight: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 scales (arXiv:2305.14314, sec. 3)."""
NF4_PLAIN_BYTES = 0.5 + 4 / 64
"""Bytes per weight without double quantisation: a 32-bit scale per 64 weights."""
MOST_CHECKED = 2_000_000_000
"""Parameters of the largest model whose files are loaded again at the end, to compare their answers. For larger ones
this takes minutes and tens of GB, more than the check is worth after every run."""
CHECKED_BYTES = 6
"""Bytes per weight that the comparison needs: fp32 weights, and the bf16 file that they are read from."""
WORKSPACE = 32 * 2**20
"""Bytes of a cuBLAS workspace; there is one per calling thread and stream."""
MOST_PROMPT = 512
"""Tokens of the longest prompt of that comparison."""
VERIFIED = 128
"""The most learned tokens of which the trainer compares the chunked loss's logits with the model's own."""
_MOMENT_BLOCK = 256
"""Number of 8-bit moments that share an fp32 scale."""

Parts = dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose: base, gradients, optimizer, adapter, activations, head, fixed and others."""

    parts: Parts

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Step:
    """How a step is run. `tokens` and `labels`: of the largest micro-batch, including padding.

    `recompute`: how many layers' activations the backward pass recomputes. `offload`: the inputs of these are in the
    host's memory. `graphs`: passes are recorded as CUDA graphs, which keep gradients between steps. `accumulates`: a
    step has several micro-batches. `prompt`: tokens of the longest prompt with which the files are compared at the end;
    0 without a comparison. `host_embedding`: the input embedding is in the host's memory, if it can be.
    """

    tokens: int
    labels: int
    recompute: int = 0
    offload: bool = False
    graphs: bool = False
    accumulates: bool = False
    prompt: int = 0
    shortest: int = 0
    host_embedding: bool = False


@dataclass(frozen=True)
class Setting:
    """A base, how it is trained, and where. `ranks`: over how many devices the model is sharded."""

    shape: Shape
    technique: Technique
    precision: Precision
    learns: int
    device: str = "cuda"
    ranks: int = 1

    @classmethod
    def of(
        cls, model_info: Mapping[str, Any], technique: Technique, device: str, optimizer: str, ranks: int
    ) -> "Setting":
        """Returns the setting for a base and the options of a plan."""
        precision = decide(technique, device, optimizer)
        return cls(Shape.of(model_info), technique, precision, trainable_params(model_info, technique), device, ranks)

    @property
    def is_full(self) -> bool:
        return isinstance(self.technique, Full)

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of embedding and head."""
        return self.shape.vocabulary * BYTES[self.precision.dense]

    @property
    def movable_bytes(self) -> int:
        """Bytes of the input embedding if it can be in the host's memory: frozen, whole, and not the head, too."""
        technique = self.technique
        if isinstance(technique, Full) or "embed_tokens" in (technique.modules_to_save or ()):
            return 0
        if technique.trainable_token_indices:
            return 0
        if self.shape.tied or self.device != "cuda" or self.ranks > 1:
            return 0
        return self.shape.vocab * self.shape.hidden * BYTES[self.precision.dense]

    @property
    def gradient_bytes(self) -> int:
        return self.learns * self.precision.trained_bytes

    def cut(self, size: int) -> int:
        """Returns one rank's share of a sharded size."""
        return -(-size // self.ranks)


def at_rest(s: Setting) -> Parts:
    """Returns what is allocated between steps. Paged moments count too: they return to the GPU in every step."""
    base = base_bytes(s.shape, s.precision)
    if s.precision.fp8 and not s.precision.quantised and s.device == "cuda":
        base += 2 * s.shape.linears  # two 8-bit copies: by rows and by columns
    moments = _moment_bytes(s)
    parts = {"base": s.cut(base), "optimizer": s.cut(moments) if s.is_full else moments}
    if not s.is_full:
        parts |= {"adapter": s.learns * s.precision.trained_bytes, "casts": _cast_bytes(s)}
    return parts


def loaded(s: Setting) -> Estimate:
    """Returns what is allocated once the model has been loaded, with its input embedding."""
    return Estimate({name: size for name, size in at_rest(s).items() if name in {"base", "adapter"}})


def _cast_bytes(s: Setting) -> int:
    """Returns the bytes of the adapters in the type of their products, which a pass keeps for all layers."""
    technique, width = s.technique, BYTES[s.precision.compute]
    if isinstance(technique, Full) or technique.use_dora or technique.dropout or width == s.precision.trained_bytes:
        return 0
    return width * linear_adapter_params(s.shape, technique) if s.ranks == 1 else 0  # of a sharded model, layers cast


def _moment_bytes(s: Setting) -> int:
    moments = s.learns * s.precision.moment_bytes
    if s.precision.moments != "int8":
        return moments
    moments += 2 * BYTES["float32"] * s.learns // _MOMENT_BLOCK
    if s.is_full and s.precision.rounding == "nearest":  # embeddings have 32-bit moments
        moments += 2 * (BYTES["float32"] - BYTES["int8"]) * s.shape.vocabulary
    return moments


def base_bytes(shape: Shape, precision: Precision) -> int:
    """Returns the bytes of the base's weights as a run stores them."""
    width = BYTES[precision.dense]
    if not precision.quantised:
        return shape.params * width
    packed = NF4_BYTES if precision.double_quant else NF4_PLAIN_BYTES
    return int(_four_bit(shape) * packed) + (shape.params - _four_bit(shape)) * width


def _four_bit(shape: Shape) -> int:
    return shape.four_bit or shape.params - shape.vocabulary


def phases(s: Setting, step: Step) -> Iterator[Parts]:
    """Yields what is allocated in each phase where a run can be at its peak."""
    rest = at_rest(s)
    if s.device == "cuda":
        rest["workspaces"] = WORKSPACE * (4 if step.graphs else 2)
    gradients = s.cut(s.gradient_bytes) if s.is_full else s.gradient_bytes
    if step.host_embedding:
        rest["base"] -= s.movable_bytes
    keeps = step.accumulates or step.graphs or not s.is_full
    layer = _layer_bytes(s)
    whole = s.vocabulary_bytes + 2 * layer if s.ranks > 1 else 0
    yield rest | {
        "gradients": gradients if keeps else 0,
        "gathered": whole,
        "activations": _kept(s, step),
        "experts": _expert_bytes(s, step),
        "head": max(_loss_bytes(s, step.labels), _work(s, step)),
    }
    if s.is_full:
        yield rest | _at_the_end(s, step, gradients, layer)
    if step.shortest:
        yield {name: rest[name] for name in rest if name != "optimizer"} | {
            "trial": _trial_bytes(s, min(step.shortest, VERIFIED))
        }
    if step.prompt:
        yield rest | {"gradients": gradients if keeps else 0, "copy": _copy_bytes(s, step.prompt)}


def _at_the_end(s: Setting, step: Step, gradients: int, layer: int) -> Parts:
    """Returns what is allocated at the end of a backward pass: the embedding's gradient comes last, and is whole even
    if the model is sharded."""
    work = {"activations": step.tokens * s.shape.hidden * BYTES[s.precision.dense], "head": _work(s, step)}
    if s.ranks == 1:
        return {"gradients": gradients, **work}
    return {
        "gradients": gradients - s.cut(s.vocabulary_bytes) + s.vocabulary_bytes,
        "gathered": s.vocabulary_bytes + layer,
        **work,
    }


def _kept(s: Setting, step: Step) -> int:
    """Returns the bytes of activations after the forward pass: all of every layer, or of those that are recomputed the
    inputs and all of one layer."""
    layers = max(1, s.shape.layers)
    kept = activations.kept(s.shape, s.technique, s.precision)
    states = 2 * int(step.tokens * inputs_bytes(s, 1))  # input of the first layer and output of the last
    whole = _whole(s, step)
    inputs = int(step.tokens * inputs_bytes(s, min(2, step.recompute) if step.offload else step.recompute))
    casts = BYTES[s.precision.compute] * s.shape.linears * whole // layers if s.precision.autocast else 0
    return states + inputs + step.tokens * kept * whole + casts + _dora_bytes(s, step.tokens, whole)


def inputs_bytes(s: Setting, layers: int) -> float:
    """Returns the bytes per token of so many layers' inputs."""
    return s.shape.hidden * BYTES[s.precision.dense] * layers


def _whole(s: Setting, step: Step) -> int:
    """Returns of how many layers all activations are there at once."""
    return max(1, s.shape.layers - step.recompute)


def _work(s: Setting, step: Step) -> int:
    """Returns what a layer's backward pass uses beside the kept activations, and the weight that it dequantises."""
    scratch = max(i * o for i, o in s.shape.modules.values()) * BYTES[s.precision.compute]
    work = step.tokens * activations.at_work(s.shape, s.technique, s.precision)
    return work + (scratch if s.precision.quantised else 0)


def _loss_bytes(s: Setting, labels: int) -> int:
    return activations.of_loss(s.shape, s.technique, s.precision, labels, s.device)


def _layer_bytes(s: Setting) -> int:
    return (base_bytes(s.shape, s.precision) - s.vocabulary_bytes) // max(1, s.shape.layers)


def _expert_bytes(s: Setting, step: Step) -> int:
    """Returns the bytes of the experts' weights with the adapters' updates added, and their gradient, for one layer:
    of experts whose rows do not pass through the adapters.

    The sums of layers that are not recomputed are kept for the backward pass.
    """
    if s.is_full:
        return 0
    layer = (s.shape.experts - s.shape.unmerged) // max(1, s.shape.layers)
    return BYTES[s.precision.dense] * layer * (_whole(s, step) + 1)


def _dora_bytes(s: Setting, tokens: int, layers: int) -> int:
    """Returns the bytes that DoRA needs to compute weight norms of one layer in fp32: the weights, B A, their sum, and
    the identity from which PEFT makes B A; and for each of `layers` the inputs and outputs of all positions, which the
    backward pass reads. On a CPU runs were measured with twice as many."""
    if isinstance(s.technique, Full) or not s.technique.use_dora:
        return 0
    sizes = s.shape.modules.values()
    matrices = max(3 * inputs * outputs + inputs * inputs for inputs, outputs in sizes)
    copies = 1 if s.device == "cuda" else 2
    return BYTES["float32"] * (matrices + copies * layers * tokens * sum(inputs + outputs for inputs, outputs in sizes))


def _trial_bytes(s: Setting, labels: int) -> int:
    """Returns the bytes of whole logits in fp32, three times: from the head's product, from the model, their
    difference."""
    return 3 * BYTES["float32"] * labels * s.shape.vocab


def _copy_bytes(s: Setting, prompt: int) -> int:
    """Returns the bytes of the files loaded as a user would, in fp32, and of the logits of a prompt."""
    wide = BYTES["float32"]
    logits = prompt * s.shape.vocab * wide
    if s.device == "cpu":  # the file that is read is in the process's memory too
        logits += BYTES["bfloat16"] * s.shape.params
    if s.is_full:
        return wide * s.shape.params + logits
    adapter = s.learns * s.precision.trained_bytes
    unpacked = s.shape.params - _four_bit(s.shape) if s.precision.quantised else s.shape.params
    return base_bytes(s.shape, s.precision) + adapter + wide * unpacked + logits


def peak(s: Setting, step: Step) -> Estimate:
    """Returns the phase with the largest allocation."""
    return Estimate(max(phases(s, step), key=lambda parts: sum(parts.values())))
