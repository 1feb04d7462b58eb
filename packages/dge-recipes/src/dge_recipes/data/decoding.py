"""Pictures from bytes, and whose fault it is when there is none: the bytes', the machine's or a transform's.

Whoever has the bytes in memory before the decoder starts can tell the two apart. A decoder that reads the file itself
mixes them up: Pillow's takes an I/O error inside of libtiff for a broken picture, a seek to nowhere in a damaged
JPEG 2000 for an error of the system, and a file that shrinks under its memory map ends the process.
"""

import io
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from dge_recipes.errors import UserError

__all__ = ["PictureError", "TransformError", "decode", "in_one_line", "is_machine_error", "naming"]

# What Pillow's decoders take, at most: JPEG 2000 19 bytes per pixel, WebP 14, AVIF 7, the others less.
_PER_PIXEL = 24
_AT_LEAST = 1 << 27  # where the number of pixels could not be read


class PictureError(ValueError):
    """What a decoder says of bytes that are no whole picture."""


class TransformError(Exception):
    """A step failed on a picture. The message names the step; of an operation of a policy, its level too."""


def decode(content: bytes) -> Image.Image:
    """Decode a picture; of several frames or pages, the first.

    Args:
        content: a whole file.

    Returns:
        The picture in its own mode, loaded, with its meta data.

    Raises:
        PictureError: the bytes are no whole picture in a format that Pillow knows.
        MemoryError, OSError: the machine failed; the latter with an ``errno``.
    """
    if not content:
        raise PictureError("the file is empty")
    pixels = 0
    try:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = picture.width * picture.height
            picture.load()
            return picture
    except Exception as error:  # some decoders raise RuntimeError, AttributeError or KeyError over damaged bytes
        if is_machine_error(error):
            raise
        _check_memory(pixels)
        if isinstance(error, UnidentifiedImageError):  # its text is the address of an object
            raise PictureError("cannot identify its format") from error
        raise PictureError(in_one_line(error)) from error


def _check_memory(pixels: int) -> None:
    """Raise MemoryError if a decoder may have failed for lack of memory.

    Several say the same then as of a damaged picture: progressive JPEG, JPEG 2000, WebP, AVIF.
    """
    need = max(_AT_LEAST, _PER_PIXEL * pixels)
    try:  # address space alone: no page of it is touched
        mmap.mmap(-1, need, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryError(f"({need >> 20} MiB could not be had)") from error


def is_machine_error(error: BaseException) -> bool:
    """Whether the system failed, not the picture: decoders set no ``errno`` over bytes that are in memory."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def in_one_line(error: BaseException) -> str:
    """What an error says, else what it is."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside ``with``, errors of the machine and of transforms become the user's, with the image's name.

    Args:
        name: of the image that is read or transformed.

    Raises:
        UserError: such an error; all others pass.
    """
    try:
        yield
    except TransformError as error:
        raise UserError(f"{name} cannot be transformed: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name} cannot be read: {' '.join(f'out of memory {error}'.split())}") from error
    except OSError as error:
        if not is_machine_error(error):
            raise
        raise UserError(f"{name} cannot be read: {in_one_line(error)}") from error
