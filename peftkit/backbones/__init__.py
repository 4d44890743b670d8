"""Reference -> files -> model, tokenizer and dimensions."""

from peftkit.backbones.packaged import local_path

__all__ = ["local_path"]
