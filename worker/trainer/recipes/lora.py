"""LoRA: low-rank adapters in fp32 on a frozen base."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tunery.failures import CannotAdapt
from tunery.spec import Lora, Technique
from worker.trainer.kernels import adapters, decoder, experts
from worker.trainer.recipes import saved, targets
from worker.trainer.recipes.recipe import Recipe, Weights, load_dense, make_adamw


def prepare(model: PreTrainedModel, technique: Technique, adapter: Path | None) -> torch.nn.Module:
    """Adds trainable adapters to the base: new ones (B = 0, so the model is still the base), or those in `adapter`."""
    model.requires_grad_(False)
    if adapter is not None:
        config = _continued(adapter, cast(Lora, technique))
        with warnings.catch_warnings():  # a rank that gets its weights from rank 0 has no memory for them yet
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)
            adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=True, config=config)
    else:
        adapted = with_new_adapters(model, configuration(model, cast(Lora, technique)))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # Steps of 1e-4 vanish in bf16 weights of size 0.1; adapters are small, so fp32 costs little.
            parameter.data = parameter.data.float()
    saved.cast_at_borders(adapted)
    adapters.install(adapted)
    experts.install(adapted)
    decoder.install(adapted)
    return adapted


def with_new_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Adds new adapters. Raises CannotAdapt if PEFT refuses a layer or a name."""
    try:
        with warnings.catch_warnings():
            # PEFT searches the modules for ranks that it has set for experts' parameters itself, and warns of what it
            # does with Conv1D, which is right.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            return cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        instead = "Choose other target_modules or another technique."
        raise CannotAdapt(reason=str(error).splitlines()[0], instead=instead) from error
    except TypeError as error:  # PEFT adapts routers of mixtures as parameters, where it does not leave these out
        if not config.modules_to_save:
            raise
        reason = "modules_to_save names a module that also has an adapter, such as a mixture's router."
        instead = "Leave it out of modules_to_save, or list target_modules without it."
        raise CannotAdapt(reason=reason, instead=instead) from error


def configuration(model: PreTrainedModel, technique: Lora) -> LoraConfig:
    everything = technique.target_modules == "all-linear"
    excluded = [*targets.idle(model), *(targets.routers(model) if everything else ())]
    config = LoraConfig(
        r=technique.r,
        # PEFT and servers declare an int; a fraction works in both.
        lora_alpha=int(technique.alpha) if technique.alpha.is_integer() else technique.alpha,  # type: ignore[arg-type]
        lora_dropout=technique.dropout,
        target_modules=technique.target_modules,
        use_rslora=technique.use_rslora,
        use_dora=technique.use_dora,
        exclude_modules=excluded or None,
        task_type="CAUSAL_LM",
        **saved.options(model, technique),
    )
    if everything:
        config.target_parameters = targets.parameters(model, config) or None
    return config


def _continued(adapter: Path, technique: Lora) -> LoraConfig:
    """Returns the adapter's configuration with the job's dropout. Raises ValueError if the job's weights differ."""
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(adapter)))
    own = {"r": config.r, "alpha": config.lora_alpha, "use_rslora": config.use_rslora, "use_dora": config.use_dora}
    for name, value in own.items():
        if value != (asked := getattr(technique, name)):
            raise ValueError(
                f"the adapter to continue from has {name} {value!r}, but the job has {asked!r}: use the adapter's value"
            )
    config.lora_dropout = technique.dropout
    return config


def export(model: torch.nn.Module, folder: Path, base_model: str, _weights: Weights | None = None) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` in PEFT's format, with the base's own name."""
    adapted = cast(PeftModel, model)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = base_model
        for names in ("target_modules", "target_parameters"):
            setattr(config, names, _in_order(getattr(config, names)))
    with saved.as_the_base(adapted):
        adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _in_order(names: Any) -> Any:
    """Sorts names: PEFT keeps them as a set, whose order, and so the file's checksum, changes from run to run."""
    return sorted(names) if isinstance(names, set) else names


LORA = Recipe(load_base=load_dense, prepare=prepare, make_optimizer=make_adamw, export=export)
