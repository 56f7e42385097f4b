"""Models."""

from tokenflow.models.tokenflow import TokenFlow
from tokenflow.models.unitok import UniTok

__all__ = ["TokenFlow", "UniTok"]
