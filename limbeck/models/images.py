"""Images on disk: opened with care, kept under the hash of their bytes.

A file is looked at by its header first, since pixels may be a billion where bytes are a few: format, size and number
of frames are refused before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.runtime.files import whole_file
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from PIL import Image

# Formats of pixels alone, by Pillow's names: of the others one (EPS) is a program that another program would run.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Pillow's own limit: what is larger it takes for a decompression bomb.
MOST_PIXELS = 89_478_485
_LARGEST_FILE = 256 * 2**20
_ID_DIGITS = 32


def require_pillow() -> None:
    """See that images can be read at all.

    Raises:
        LimbeckError: Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise LimbeckError(
            "prompts with images need Pillow, which is not installed; pip install 'limbeck[vision]'"
        ) from None


def image_id(data: bytes) -> str:
    """The id of an image: 32 hex digits of the sha256 of its file's bytes."""
    return hashlib.sha256(data).hexdigest()[:_ID_DIGITS]


def decode_image(data: bytes, where: str) -> Image.Image:
    """The pixels of an image as models read them: upright and in three colours.

    Args:
        where: names the image and its place in messages.

    Raises:
        LimbeckError: no image, too many pixels, several frames, or a file that is cut off.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings():
        # Pillow warns above its limit and raises above twice of it; the limit here is the same, and an error.
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=_formats())
            (width, height), frames = picture.size, getattr(picture, "n_frames", 1)
        except UnidentifiedImageError:
            raise LimbeckError(
                f"{where} is no image of a format that is read here ({_beginning(data)}), expected one of "
                f"{', '.join(_formats())}; save it as one of these"
            ) from None
        except Image.DecompressionBombError as error:
            raise _too_large(where, str(error).partition(" pixels")[0].rpartition("(")[2]) from None
        except Exception as error:  # whatever a damaged header makes a format's reader raise
            raise _unreadable(where, error) from None
        if width * height > MOST_PIXELS:
            raise _too_large(where, f"{width} x {height}")
        if frames > 1:
            raise LimbeckError(
                f"{where} has {frames} frames (an animation or several pages), expected one; give the frame that is "
                "meant as a file of its own"
            )
        try:
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
        except Exception as error:  # as above, of the pixels
            raise _unreadable(where, error) from None


def _formats() -> list[str]:
    """The formats that are read, without those that this Pillow does not know."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _too_large(where: str, size: str) -> LimbeckError:
    return LimbeckError(
        f"{where} has {size} pixels, expected at most {MOST_PIXELS:,} in all; scale it down: models read far fewer"
    )


def _unreadable(where: str, error: Exception) -> LimbeckError:
    said = " ".join(str(error).split())[:120] or type(error).__name__
    return LimbeckError(f"{where} cannot be decoded ({said}): the file is cut off or damaged; write it again")


def _beginning(data: bytes) -> str:
    return f"it begins with {data[:12]!r}" if data else "it is empty"


def read_image_file(path: Path, where: str) -> bytes:
    """The bytes of an image file.

    Raises:
        LimbeckError: it is not there, no regular file, or larger than any image here.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise LimbeckError(f"{where} is a folder, pipe or device, expected an image file; correct the path")
        if status.st_size > _LARGEST_FILE:
            raise LimbeckError(f"{where} has {status.st_size >> 20} MiB, expected an image file; scale it down")
        return path.read_bytes()
    except LimbeckError:
        raise
    except FileNotFoundError:
        raise LimbeckError(
            f"{where} does not exist; paths are relative to the file of prompts: correct the path, or put it there"
        ) from None
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise LimbeckError(f"{where} cannot be read ({said}); correct the path or its permissions") from None


@dataclass(frozen=True)
class ImageFolder:
    """Images by their ids, a file each with its bytes as they came."""

    path: Path

    def add(self, data: bytes) -> str:
        """Keep an image; one that is there is not written again."""
        name = image_id(data)
        if not (self.path / name).exists():
            with whole_file(self.path / name) as partial:
                partial.write_bytes(data)
        return name

    def open(self, name: str) -> Any:
        """The pixels of an image.

        Raises:
            LimbeckError: it is gone or damaged.
        """
        where = f"image {name} in {self.path}"
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise LimbeckError(f"{where} cannot be read ({error.strerror}); run the same command again") from None
        if image_id(data) != name:
            raise LimbeckError(f"{where} is damaged; delete it and run the same command again")
        return decode_image(data, where)
