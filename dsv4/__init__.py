"""DeepSeek-V4 on one GPU, from NVFP4 safetensors."""

from dsv4.engine import Engine, Generation, load
from dsv4.sampling import Sampling
from dsv4.tokenizer import Tokenizer

__all__ = ["Engine", "Generation", "Sampling", "Tokenizer", "load"]
