"""Reads GGUF files: unpacks their weights to bf16 and repairs their tokenizers.

transformers reads both, with three traps. Its loader keeps the weights packed unless asked to unpack them; the
converted byte-pair tokenizers lose the file's own rule for cutting text into words (`tokenizer.ggml.pre`), so digits
and punctuation tokenise otherwise than in training; and a pad token that is also the stop token is common, which is
why nothing here masks by the pad id.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunery.errors import UnusableModel
from worker.trainer import inspection

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def word_rule(pre: str) -> pre_tokenizers.PreTokenizer | None:
    """Returns the pre-tokenizer that `tokenizer.ggml.pre` names; None for an unknown name."""
    if pre in {"smollm", "starcoder", "refact", "codeshell", "command-r"}:
        return _digits_then_bytes()
    if pre in {"gpt-2", "gpt2"}:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in {"llama-bpe", "llama3", "llama-v3"}:
        return _by_pattern(_LLAMA3)
    return _by_pattern(_QWEN2) if pre == "qwen2" else None


def find(source: str) -> Path | None:
    """Returns the GGUF file that `source` is, or that a folder without safetensors holds. Raises UnusableModel."""
    if source.endswith(".gguf"):
        return Path(source)
    names = sorted(path.name for path in Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    if not names or any(Path(source).glob("*.safetensors")):
        return None
    if len(names) > 1:
        listed = f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        raise UnusableModel(source=source, reason=f"it has several GGUF files ({listed}). Name one of them.")
    return Path(source) / names[0]


def unpack(path: Path, out: Path) -> None:
    """Writes the GGUF file's model (bf16 safetensors) and tokenizer to `out`. Raises UnusableModel."""
    kind, pre, control = _tokenizer_info(path)
    # Only byte-pair tokenizers have such a rule; a SentencePiece one, "llama", needs none.
    rule = word_rule(pre) if kind == "gpt2" else None
    if kind == "gpt2" and rule is None:
        raise UnusableModel(
            source=path,
            reason=f"its tokenizer splits words by the unsupported rule '{pre}'. Add the model from its safetensors "
            "instead.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, missing = _load(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UnusableModel(
            source=path, reason=f"transformers cannot read it ({reason}). Add the model from its safetensors instead."
        ) from error
    inspection.refuse_missing_weights(path, missing)
    _refuse_other_tokens(path, tokenizer, kind, control)
    if rule is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = rule
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def _refuse_other_tokens(path: Path, tokenizer: Any, kind: str, control: set[int]) -> None:
    """Raises UnusableModel if transformers' tokenizer is not the same as the file's.

    From a SentencePiece one, release 5.17 makes a unigram model that splits words differently and reads special tokens
    as plain text: a model would train on ids that it never gets when it is served.
    """
    other_model = kind == "llama" and not isinstance(tokenizer.backend_tokenizer.model, models.BPE)
    if other_model or not control <= tokenizer.added_tokens_decoder.keys():
        raise UnusableModel(
            source=path,
            reason=f"transformers {transformers.__version__} reads its tokenizer differently from the file. Upgrade "
            "transformers on the I/O worker, or add the model from its safetensors.",
        )


def _tokenizer_info(path: Path) -> tuple[str, str, set[int]]:
    """Returns the tokenizer's kind, its word-splitting rule and the ids of its control tokens. Raises UnusableModel."""
    from gguf import GGUFReader, TokenType  # imported here: a host that only trains does not need it

    try:
        fields = GGUFReader(path).fields
    except Exception as error:
        raise UnusableModel(source=path, reason=f"it is not a readable GGUF file ({error}). Copy it again.") from error
    kind, pre, types = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "token_type"))
    control = {i for i, found in enumerate(types.contents() if types else ()) if found == TokenType.CONTROL}
    return str(kind.contents()) if kind else "", str(pre.contents()) if pre else "gpt-2", control


def _load(path: Path) -> tuple[Any, Iterable[str]]:
    """Loads the model with all weights unpacked, as packed ones can be neither saved nor trained; also returns what the
    file lacks.
    """
    config = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": config(dequantize=True)} if config else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, output_loading_info=True, **extra
    )
    model, report = loaded
    return model, report["missing_keys"]
