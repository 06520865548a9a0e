"""A minimal Mistral and Mixtral on the ops of mixtral_ext: load a checkpoint directory, generate, score."""
from .config import ModelConfig, ModelError, read_config
from .generate import Completion, generate
from .model import Cache, Model
from .tokenizer import TextStream, Tokenizer

__all__ = ["Cache", "Completion", "Model", "ModelConfig", "ModelError", "TextStream", "Tokenizer", "generate", "read_config"]
