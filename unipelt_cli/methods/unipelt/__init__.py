"""Gated unions of adapter, prefix, LoRA and biases (UniPELT), by hooks and by fused layers."""
