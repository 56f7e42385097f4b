"""Pictures with captions: Fluent Emoji 3D from npm packages, or any folder of images."""

from tokenflow.data.emoji import fluent_emoji
from tokenflow.data.folder import image_folder
from tokenflow.data.pictures import Pictures

__all__ = ["Pictures", "fluent_emoji", "image_folder"]
