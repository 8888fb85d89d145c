"""The number types of a run, decided once from technique and kind of device. Types are names: torch is not needed."""

from dataclasses import dataclass, replace
from typing import Literal

from tunery.spec import Full, Qlora, Technique

Dtype = Literal["bfloat16", "float32"]
BYTES = {"bfloat16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True)
class Precision:
    """The types in which a run stores and multiplies numbers, by torch's names.

    `base`: the linear layers of the base; `dense`: its embeddings, norms and head. `trained`: the trained weights, and
    `rounding`: how an update is rounded into them. `moments`: the optimizer's two; int8 has an fp32 scale per 256 of
    them. `compute`: the matrix products. `fp8`: whether products with the frozen base are requested in e4m3.
    """

    base: Literal["bfloat16", "float32", "nf4", "fp4"]
    dense: Dtype
    trained: Dtype
    rounding: Literal["nearest", "stochastic"]
    moments: Literal["int8", "float32"]
    compute: Dtype
    double_quant: bool = False
    fp8: bool = False

    @property
    def quantised(self) -> bool:
        return self.base in ("nf4", "fp4")

    @property
    def autocast(self) -> bool:
        """Whether products are computed in a narrower type than the weights are stored in."""
        return not self.quantised and self.base != self.compute

    @property
    def trained_bytes(self) -> int:
        return BYTES[self.trained]

    @property
    def moment_bytes(self) -> int:
        """Bytes of both moments per weight."""
        return 2 * BYTES[self.moments]


def decide(technique: Technique, device: str, optimizer: str = "adamw") -> Precision:
    """Returns the precision of a run. `device`: "cuda", or "cpu", where bf16 is slow and memory is plentiful."""
    precision = _of_technique(technique, device)
    return precision if optimizer == "adamw" else replace(precision, moments="int8")


def _of_technique(technique: Technique, device: str) -> Precision:
    dense = dense_dtype(device)
    if isinstance(technique, Full):
        return _of_full(technique, dense)
    fp8 = technique.precision == "fp8"
    if isinstance(technique, Qlora):
        base, compute, double_quant = technique.quant_type, technique.compute_dtype, technique.double_quant
        return Precision(base, dense, "float32", "nearest", "float32", compute, double_quant, fp8)
    return Precision(dense, dense, "float32", "nearest", "float32", dense, fp8=fp8)


def dense_dtype(device: str) -> Dtype:
    """Returns the type of frozen weights, and of all weights in inference."""
    return "bfloat16" if device == "cuda" else "float32"


def _of_full(technique: Full, dense: Dtype) -> Precision:
    if dense == "bfloat16" and technique.weights_dtype == "bfloat16":
        return Precision(dense, dense, dense, "stochastic", "int8", dense)
    return Precision("float32", "float32", "float32", "nearest", "float32", dense)
