"""Items as programs and data sets hand them over, turned into the few kinds that the readers of each medium take.

Nothing here imports the libraries that items come from: objects are told by what they offer.

Every medium takes

- a path, or the content of a file as ``bytes``, ``bytearray`` or ``memoryview``;
- a file object opened for reading in binary, such as ``io.BytesIO``: it is read from where it stands to its end and, if it
  can seek, put back where it stood;
- a mapping with ``"bytes"`` and ``"path"``, as rows of Hugging Face data sets are before they are decoded: the bytes count
  where there are any;
- arrays, also those of pandas, PyArrow and whatever else offers ``__array__``, of any byte order and any strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import InputError
from zoo.media.files import FILE_TYPES

# More rows than this are no channels.
_MOST_CHANNELS = 16
# Beyond this no overshoot is meant, but integers that were converted without being scaled.
_LARGEST_SAMPLE = 8.0


def item_list(items: Any, batch_rank: int) -> list[Any]:
    """The items of a batch: a list as it is, what holds a list taken apart, and anything else as the only item.

    Args:
        items: a list (one of plain numbers is an item); an array or tensor of ``batch_rank`` dimensions; a NumPy array of
            objects, a pandas Series of objects, or PyArrow's arrays of anything but numbers; a data set's column.
        batch_rank: dimensions of an array that holds a batch of items.

    Raises:
        InputError: there are none.
    """
    listed = _listed(items, batch_rank)
    if not listed:
        raise InputError("there is nothing to encode")
    return listed


def _listed(items: Any, batch_rank: int) -> list[Any]:
    if isinstance(items, list):
        numbers = bool(items) and isinstance(items[0], int | float | np.number)
        return [items] if numbers else items
    if isinstance(items, Tensor | np.ndarray):
        objects = isinstance(items, np.ndarray) and items.dtype == object and items.ndim == 1
        return list(items) if objects or items.ndim == batch_rank else [items]
    if _is_arrow_array(items) or hasattr(items, "to_numpy"):
        array = as_array(items)
        return list(array) if array.dtype == object else [items]
    # Among sequences only those stay whole that are items by themselves: texts and bytes, and pairs such as array and rate.
    if isinstance(items, Sequence) and not isinstance(items, str | bytes | bytearray | memoryview | tuple | range):
        return list(items)
    return [items]


# --------------------------------------------------------------------------------------------------------- one item per medium


def audio_item(item: Any, default_sample_rate: int | None = None) -> Any:
    """A path, the bytes of an audio file, or ``(waveform, sample_rate)`` with a waveform float32 ``[channels, samples]``.

    Besides what every medium takes, an item may be ``(array, sample_rate)``, a mapping with ``"array"`` and
    ``"sampling_rate"``, samples or a decoder of torchcodec, or an array of ``default_sample_rate``.

    Arrays are ``[samples]`` or ``[channels, samples]``. Floating point is taken as it is and must stay within ±8. Integers of
    8, 16 and 32 bits are divided by half their range, unsigned ones after they were centred. Integers of 64 bits are refused,
    because nothing tells which range they have.

    Raises:
        InputError: it is none of these, is empty or out of range, or its sample rate is missing or no positive whole number.
    """
    wanted = "audio: a path, bytes, an open file, an array, a tensor or (array, sample_rate)"
    item = _opened(item, wanted, ("array",))
    if isinstance(item, FILE_TYPES):
        return item
    rate: Any = default_sample_rate
    if callable(getattr(item, "get_all_samples", None)):
        item = item.get_all_samples()
    if hasattr(item, "data") and hasattr(item, "sample_rate"):
        item, rate = item.data, item.sample_rate
    elif isinstance(item, Mapping):
        given = next((item[key] for key in ("sampling_rate", "sample_rate") if item.get(key) is not None), rate)
        item, rate = item["array"], given
    elif isinstance(item, tuple):
        if len(item) != 2:
            raise InputError(f"a tuple must be (array, sample_rate), not {len(item)} values")
        item, rate = item
    waveform = _waveform(item, wanted)
    if rate is None:
        raise InputError("an array needs its sample rate: pass (array, sample_rate)")
    return waveform, _sample_rate(rate)


def image_item(item: Any) -> Any:
    """A path, the bytes of an image file, a PIL image, or an array or tensor in the machine's byte order.

    Raises:
        InputError: it is none of these.
    """
    wanted = "an image: a path, bytes, an open file, a PIL image, an array or a tensor"
    item = _opened(item, wanted)
    return item if isinstance(item, FILE_TYPES) or _is_pil(item) else _array_or_tensor(item, wanted)


def video_item(item: Any) -> tuple[Any, Any]:
    """A clip and, where an array comes with one, its frames per second.

    The clip is a path, the bytes of a film or an image, an array or tensor in the machine's byte order, or a list of images of
    PIL. Besides what every medium takes, an item may be ``(array, fps)``.

    Raises:
        InputError: it is none of these.
    """
    wanted = "a video: a path, bytes, an open file, an array, a tensor, images of PIL, or (array, fps)"
    item, rate = _opened(item, wanted), None
    if isinstance(item, FILE_TYPES):
        return item, None
    if isinstance(item, tuple) and not (item and all(map(_is_pil, item))):
        if len(item) != 2:
            raise InputError(f"a tuple must be (array, fps), not {len(item)} values")
        item, rate = item
        if rate is None:
            raise InputError("a pair must be (array, fps), and the rate is None")
    if _is_pil(item):
        return [item], rate
    if isinstance(item, list | tuple) and item and all(map(_is_pil, item)):
        return list(item), rate
    return _array_or_tensor(item, wanted, lists=True), rate


def shape_item(item: Any) -> Any:
    """A path, the bytes of a shape file, an object of trimesh, an array or tensor, or a pair of those, points and normals.

    Besides what every medium takes, an item may be a mapping with ``"points"`` and, if there are any, ``"normals"``.

    Raises:
        InputError: it is none of these.
    """
    wanted = "a shape: a path, bytes, an open file, a mesh, scene or cloud of trimesh, or points"
    item = _opened(item, wanted, ("points",))
    if isinstance(item, FILE_TYPES) or type(item).__module__.partition(".")[0] == "trimesh":
        return item
    if isinstance(item, Mapping):
        normals = item.get("normals")
        item = item["points"] if normals is None else (item["points"], normals)
    if isinstance(item, tuple):
        if len(item) != 2:
            raise InputError(f"a tuple must be (points, normals), not {len(item)} things")
        return tuple(_array_or_tensor(part, wanted) for part in item)
    return _array_or_tensor(item, wanted)


def file_item(item: Any) -> Any:
    """A path, bytes, or an array of numbers, for tokenizers of files as they are.

    Raises:
        InputError: it is none of these.
    """
    wanted = "a file: a path, bytes, an open file or an array of bytes"
    item = _opened(item, wanted)
    return item if isinstance(item, FILE_TYPES) else _array_or_tensor(item, wanted, lists=True)


# ---------------------------------------------------------------------------------------------------------- what they share


def _opened(item: Any, wanted: str, others: tuple[str, ...] = ()) -> Any:
    """The item itself, or the path or bytes that a mapping or a file object stands for.

    Args:
        item: any item.
        wanted: what is expected, for messages.
        others: keys of mappings that are left to the caller.
    """
    if isinstance(item, str | bytes):
        return item
    if item is None:
        raise InputError(f"expected {wanted}, not NoneType")
    if type(item).__module__.partition(".")[0] == "pyarrow" and hasattr(item, "as_py"):
        # A scalar of PyArrow: text, bytes and structs become Python's own, lists stay arrays.
        if not item.is_valid:
            raise InputError(f"expected {wanted}, not a null")
        values = getattr(item, "values", None)
        item = item.as_py() if values is None or callable(values) else values
    if isinstance(item, Mapping) and not any(item.get(key) is not None for key in others):
        content, path = item.get("bytes"), item.get("path")
        if content is None and path is None:
            raise InputError(f"expected {wanted}; a mapping needs {_keys(others)}, this one has {_shown(item)}")
        if content is not None and not isinstance(content, bytes | bytearray | memoryview):
            raise InputError(f'"bytes" must be bytes, not {type(content).__name__}')
        return path if content is None else content
    if callable(getattr(item, "read", None)) and not isinstance(item, FILE_TYPES):
        return _content(item)
    return item


def _keys(others: tuple[str, ...]) -> str:
    return " or ".join(f'"{key}"' for key in (*others, "bytes", "path"))


def _shown(item: Mapping[Any, Any]) -> str:
    filled = [str(key) for key, value in item.items() if value is not None]
    return ", ".join(filled) if filled else "nothing"


def _content(file: Any) -> bytes:
    """What is left of an open file, which stays where it stands if it can seek."""
    seekable = callable(getattr(file, "seekable", None)) and _tried(file.seekable)
    start = _tried(file.tell) if seekable else None
    content = _tried(file.read)
    if seekable:
        _tried(lambda: file.seek(start))
    if isinstance(content, str):
        raise InputError('the file is opened as text: open it as binary, with mode "rb"')
    if not isinstance(content, bytes | bytearray | memoryview):
        raise InputError(f"the file object gives {type(content).__name__}, not bytes")
    if not len(content) and start:
        raise InputError(f"the open file stands at its end, at byte {start}: call seek(0) before it is read")
    return bytes(content)


def _tried(action: Any) -> Any:
    """What an operation on a file object gives."""
    try:
        return action()
    except (OSError, ValueError) as error:
        raise InputError(f"the open file cannot be read: {error}") from error


def _is_pil(item: Any) -> bool:
    from PIL import Image

    return isinstance(item, Image.Image)


def _is_arrow_array(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pyarrow" and hasattr(value, "to_pylist")


def _array_or_tensor(item: Any, wanted: str, *, lists: bool = False) -> NDArray[Any] | Tensor:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, Mapping | tuple | str | bytes) or (isinstance(item, list) and not lists):
        raise InputError(f"expected {wanted}, not {type(item).__name__}")
    if not _holds_array(item):
        raise InputError(f"expected {wanted}, not {type(item).__name__}")
    return as_array(item)


def as_array(value: Any) -> NDArray[Any]:
    """An array of NumPy, in the machine's byte order and with no negative strides, of whatever holds one.

    Raises:
        InputError: it holds none, or a list is not rectangular.
    """
    try:
        array = _as_numpy(value)
    except InputError:
        raise
    except Exception as error:  # whatever another library's conversion raises
        raise InputError(f"cannot read the {type(value).__name__} as an array: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(array) if any(stride < 0 for stride in array.strides) else array


def _as_numpy(value: Any) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if _is_arrow_array(value):
        return np.asarray(value.to_numpy(zero_copy_only=False))
    if type(value).__module__.partition(".")[0] == "pyarrow" and getattr(value, "values", None) is not None:
        return _as_numpy(value.values)
    if callable(getattr(value, "to_numpy", None)):
        return np.asarray(value.to_numpy())
    if not _holds_array(value):
        raise InputError(f"{type(value).__name__} is no array")
    return np.asarray(value)


def _holds_array(value: Any) -> bool:
    if isinstance(value, str | bytes | bytearray | Mapping):
        return False
    return _is_arrow_array(value) or hasattr(value, "__array__") or isinstance(value, Sequence | memoryview)


def _sample_rate(rate: Any) -> int:
    """A positive whole number of any type."""
    complaint = InputError(f"the sample rate must be a positive whole number, not {rate!r}")
    if isinstance(rate, Tensor | np.ndarray):
        if rate.ndim:
            raise InputError("the sample rate must be one number: a pair is (array, sample_rate), in this order")
        rate = rate.item()
    if isinstance(rate, bool | np.bool_ | str | bytes) or rate is None:
        raise complaint
    try:
        whole = int(rate)
    except (TypeError, ValueError, OverflowError):
        raise complaint from None
    if whole != rate or whole < 1:
        raise complaint
    return whole


def _waveform(item: Any, wanted: str) -> Float[Tensor, "channels samples"]:
    """An array as float32 samples."""
    array = _array_or_tensor(item, wanted, lists=True)
    tensor = array.detach().cpu() if isinstance(array, Tensor) else _as_tensor(array, wanted)
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2:
        raise InputError(
            f"audio must be [samples] or [channels, samples], not of shape {tuple(tensor.shape)}; a batch is a list, or "
            "[batch, channels, samples]"
        )
    if not tensor.numel():
        raise InputError("the audio is empty")
    if len(tensor) > _MOST_CHANNELS:
        raise InputError(
            f"{len(tensor)} channels of {tensor.shape[1]} samples: expected [channels, samples]. Pass a transposed array as "
            "x.T, and a batch of recordings as a list or as [batch, 1, samples], which x[:, None] is"
        )
    return _scaled(tensor)


def _as_tensor(array: NDArray[Any], wanted: str) -> Tensor:
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"expected {wanted}, not an array of objects: {error}") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"audio samples must be floating point or integers, not {array.dtype}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # Torch warns of arrays that it must not write to.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _scaled(samples: Shaped[Tensor, "channels samples"]) -> Float[Tensor, "channels samples"]:
    if samples.is_floating_point():
        waveform = samples.float()
        low, high = waveform.detach().aminmax()
        largest = max(-float(low), float(high))
        if _LARGEST_SAMPLE < largest < float("inf"):
            raise InputError(
                f"floating-point samples must lie in [-1, 1] (up to {_LARGEST_SAMPLE:g} is let through), these reach "
                f"{largest:g}: divide those of 16-bit audio by 32768, or pass them as int16"
            )
        return waveform
    half = _HALF_RANGES.get(samples.dtype)
    if half is None:
        raise InputError(
            f"audio samples must be floating point or integers of 8, 16 or 32 bits, whose range is known, not {samples.dtype}: "
            "convert them to the width that they were recorded with, such as x.astype(np.int16)"
        )
    centre = 0.0 if samples.dtype.is_signed else half
    return ((samples.double() - centre) / half).float()


_HALF_RANGES = {
    torch.int8: 2.0**7,
    torch.uint8: 2.0**7,
    torch.int16: 2.0**15,
    torch.uint16: 2.0**15,
    torch.int32: 2.0**31,
    torch.uint32: 2.0**31,
}
