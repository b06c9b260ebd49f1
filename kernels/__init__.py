"""Triton operators for multi-LoRA serving. Empty on purpose: transformers probes any package of this name at import."""
