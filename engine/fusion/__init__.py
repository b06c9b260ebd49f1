"""Accuracy-aware adapter generation: the fewest LoRA adapters that keep every domain above its accuracy floor."""
