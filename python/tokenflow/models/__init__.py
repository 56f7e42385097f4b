"""Models."""

from tokenflow.models.image_processor import ImageProcessor
from tokenflow.models.tokenflow import TokenFlow
from tokenflow.models.tokenizer import Tokenizer
from tokenflow.models.unitok import UniTok
from tokenflow.models.var import VAR
from tokenflow.models.vqvae import VQVAE

__all__ = ["VAR", "VQVAE", "ImageProcessor", "TokenFlow", "Tokenizer", "UniTok"]
