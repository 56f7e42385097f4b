"""Models."""

from tokenflow.models.tokenflow import TokenFlow

__all__ = ["TokenFlow"]
