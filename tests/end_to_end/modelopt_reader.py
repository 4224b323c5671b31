"""Reads a quantised export back into modelopt's own modules, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def read_with_modelopt(original_dir: Path, quantized_dir: Path, quantization: str) -> torch.nn.Module:
    """The quantised model, float32, in transformers with modelopt's quantisers; `original_dir` gives its class only."""
    import modelopt.torch.quantization as modelopt
    from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor
    from transformers import AutoConfig, AutoModelForCausalLM

    kind: Any
    kind, largest, config = {
        "fp8": (FP8QTensor, 448.0, "FP8_DEFAULT_CFG"),
        "int8": (INT8QTensor, 127.0, "INT8_WEIGHT_ONLY_CFG"),
        "int8_activations": (INT8QTensor, 127.0, "INT8_DEFAULT_CFG"),
    }[quantization]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(original_dir), dtype=torch.float32).eval()
    model = modelopt.quantize(model, getattr(modelopt, config))
    tensors = load_file(quantized_dir / "model.safetensors")
    for name, module in model.named_modules():
        scale = tensors.pop(f"{name}.weight_scale", None)
        if scale is None:
            continue
        scale = scale.unsqueeze(1) if scale.dim() else scale
        stored = tensors.pop(f"{name}.weight")
        values = kind(stored.shape, torch.float32, stored).dequantize(dtype=torch.float32, scale=scale)
        # What modelopt rounds again to the same scale stays as it is.
        module.weight.data.copy_(values)
        module.weight_quantizer.amax = scale * largest
        if module.input_quantizer.is_enabled:
            module.input_quantizer.amax = tensors.pop(f"{name}.input_scale") * largest
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return model
