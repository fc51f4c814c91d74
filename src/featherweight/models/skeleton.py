"""The modules of a model without its weights, as transformers makes them of config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.experts import take_apart

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CAUSAL = "causal language model"


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of config.json without its weights (meta device), in eval mode, never with remote code;
    its experts are taken apart (`models.experts`).

    `dtype` is that of the parameters, but for modules the family keeps in float32. Any quantization_config is left
    out. Raises RequestError naming the model type and the transformers version for an unknown architecture.
    """
    import transformers

    kind = checkpoint.config.get("model_type")
    try:
        config = _config(checkpoint)
        with torch.device("meta"):
            model = auto_class(checkpoint).from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a family's own code reads the configuration here: anything may come out of it
        what, use = (
            ("model from text to text", "one") if is_encoder_decoder(checkpoint) else (CAUSAL, "a decoder-only model")
        )
        raise RequestError(
            f"{checkpoint.path} has model type {kind!r}, of which transformers {transformers.__version__} makes no "
            f"{what} ({_first_line(error)}): use {use}, or another transformers."
        ) from error
    take_apart(model)
    _keep_in_fp32(model, dtype)
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def is_encoder_decoder(checkpoint: Checkpoint) -> bool:
    """Whether config.json describes an encoder and a decoder."""
    return bool(checkpoint.config.get("is_encoder_decoder"))


def auto_class(checkpoint: Checkpoint) -> Any:
    """The class of transformers' that makes the model."""
    import transformers

    return transformers.AutoModelForSeq2SeqLM if is_encoder_decoder(checkpoint) else transformers.AutoModelForCausalLM


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As from_pretrained does: some parameters stay float32 in a float16 model, `strict` ones in a bfloat16 one too."""
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if keep:
        for name, parameter in model.named_parameters():
            if keep.intersection(name.split(".")):
                parameter.data = parameter.data.float()
