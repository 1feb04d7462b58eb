"""What a data set of photographs is to the rest of the package."""

from typing import Protocol

from PIL import Image

__all__ = ["ImageSource"]


class ImageSource(Protocol):
    """Images with labels, in an order that depends on nothing but the files.

    Reading must not depend on what was read before, and must work in several processes forked from one.
    """

    num_classes: int

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """Which file an image is in."""

    def label(self, index: int) -> int:
        """Class of an image, from 0."""

    def read(self, index: int) -> Image.Image:
        """Decode an image, in any mode. What is not a whole image raises what Pillow raises."""
