"""The device that a run computes on, and its precision."""

import torch

from unipelt_cli.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """Return the device; raise ConfigError for one that this machine does not have."""
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, is_there in has.items() if is_there))
    if not has[wanted]:
        available = ", ".join(name for name, is_there in has.items() if is_there)
        raise ConfigError(
            f"train.device = {wanted!r}: this machine has none", f"choose one of auto, {available}"
        )
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return fp32 or bf16; `auto` takes bf16 where the hardware multiplies it fast."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if is_fast else "fp32"
    return "fp32"
