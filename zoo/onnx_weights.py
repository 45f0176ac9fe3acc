"""The weights of an ONNX file, read as data: the graph says what each tensor is for and is never run.

An ONNX file is a protocol buffer. Only the few fields are read that lead to the tensors (ModelProto, GraphProto, NodeProto,
AttributeProto and TensorProto of onnx.proto), so that neither the onnx package nor its runtime is needed.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.errors import CorruptWeightsError

# Numbers of fields in onnx.proto.
_GRAPH = 7
_NODES, _INITIALIZERS = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_ATTRIBUTE = 1, 2, 3, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR, _ATTRIBUTE_INTS = 1, 2, 3, 5, 8
_DIMS, _DATA_TYPE, _FLOAT_DATA, _TENSOR_NAME, _RAW_DATA, _DATA_LOCATION = 1, 2, 4, 8, 9, 14
# Kinds of field in a protocol buffer.
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_TYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
_LARGEST_RANK = 16

_Value = int | memoryview


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The tensors of an ONNX file by what they are called and by what they are used for.

    Exporters give many tensors names without meaning, such as ``onnx::MatMul_1526``, but nodes are named after the modules
    that they come from. So a tensor has an entry for its own name, if it is an initializer, and one for each node that takes
    it: ``"/blocks.0/mlp/mlp.0/MatMul#1"`` is the second input of that node, be it an initializer or a constant.
    ``"/conv1/Conv@strides"`` is an attribute of a node, as a tensor of whole numbers or floats. Entries share memory.

    Raises:
        CorruptWeightsError: the file is damaged, or keeps its tensors in other files.
    """
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise CorruptWeightsError(f"{path} is empty") from error
    try:
        graph = next((value for number, value in _fields(memoryview(content)) if number == _GRAPH), None)
        if not isinstance(graph, memoryview):
            raise ValueError("it has no graph")
        return _named_tensors(graph)
    except (ValueError, IndexError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise CorruptWeightsError(f"{path} is damaged or not an ONNX file: {error}") from error


def _named_tensors(graph: memoryview) -> dict[str, Tensor]:
    nodes, tensors = [], {}
    for number, value in _fields(graph):
        if number == _INITIALIZERS:
            name, tensor = _tensor(_message(value))
            tensors[name] = tensor
        elif number == _NODES:
            nodes.append(_message(value))
    found = dict(tensors)
    parsed = [_node(node) for node in nodes]
    for _, _, outputs, attributes in parsed:
        if "value" in attributes and len(outputs) == 1:
            tensors.setdefault(outputs[0], attributes["value"])
    for name, inputs, _, attributes in parsed:
        found |= {f"{name}#{place}": tensors[value] for place, value in enumerate(inputs) if value in tensors}
        found |= {f"{name}@{attribute}": value for attribute, value in attributes.items()}
    return found


def _node(node: memoryview) -> tuple[str, list[str], list[str], dict[str, Tensor]]:
    """Name, inputs, outputs and attributes of a node; of attributes those that are numbers or tensors."""
    name, inputs, outputs, attributes = "", [], [], {}
    for number, value in _fields(node):
        if number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OUTPUT:
            outputs.append(_text(value))
        elif number == _NODE_ATTRIBUTE:
            key, content = _attribute(_message(value))
            if content is not None:
                attributes[key] = content
    return name, inputs, outputs, attributes


def _attribute(attribute: memoryview) -> tuple[str, Tensor | None]:
    name, found = "", None
    integers: list[int] = []
    for number, value in _fields(attribute):
        if number == _ATTRIBUTE_NAME:
            name = _text(value)
        elif number == _ATTRIBUTE_FLOAT:
            found = torch.tensor(struct.unpack("<f", _message(value))[0], dtype=torch.float32)
        elif number == _ATTRIBUTE_TENSOR:
            found = _tensor(_message(value))[1]
        elif number == _ATTRIBUTE_INT:
            found = torch.tensor(_signed(value), dtype=torch.int64)
        elif number == _ATTRIBUTE_INTS:
            integers += _integers(value)
    return name, torch.tensor(integers, dtype=torch.int64) if integers else found


def _tensor(tensor: memoryview) -> tuple[str, Tensor]:
    name, dims, kind, raw, floats = "", [], 0, None, b""
    for number, value in _fields(tensor):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _DIMS:
            dims += _integers(value)
        elif number == _DATA_TYPE:
            kind = _signed(value)
        elif number == _RAW_DATA:
            raw = _message(value)
        elif number == _FLOAT_DATA:
            floats += bytes(_message(value))
        elif number == _DATA_LOCATION and value:
            raise ValueError(f"{name or 'a tensor'} lies in another file; save the model as one")
    if len(dims) > _LARGEST_RANK or any(dim < 0 for dim in dims):
        raise ValueError(f"the tensor {name} has the shape {dims[:_LARGEST_RANK]}")
    if kind not in _TYPES:
        # Strings and the like, which are no weights.
        return name, torch.empty(0)
    dtype = _TYPES[kind]
    data = raw if raw is not None else memoryview(floats) if dtype == torch.float32 else memoryview(b"")
    if len(data) != math.prod(dims) * dtype.itemsize:
        raise ValueError(f"the tensor {name} has the shape {dims} and {len(data)} bytes")
    if not len(data):
        return name, torch.empty(dims, dtype=dtype)
    numbers = np.frombuffer(data, np.uint8)
    if numbers.ctypes.data % dtype.itemsize or not numbers.flags.writeable:
        numbers = numbers.copy()
    return name, torch.from_numpy(numbers).view(dtype).reshape(dims)


# ------------------------------------------------------------------------------------------------------------ protocol buffer


def _fields(message: memoryview) -> Iterator[tuple[int, _Value]]:
    """Numbers and contents of the fields of a message; fixed-size ones as their bytes."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FOUR_BYTES, _EIGHT_BYTES):
            length = 4 if kind == _FOUR_BYTES else 8
        else:
            raise ValueError(f"a field of kind {kind} at byte {position}")
        if position + length > end:
            raise ValueError("it is truncated")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, and the position behind it."""
    value = shift = 0
    while shift < 70:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a number has no end")


def _message(value: _Value) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number stands in the place of a message")
    return value


def _text(value: _Value) -> str:
    return bytes(_message(value)).decode()


def _signed(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message stands in the place of a number")
    return value - (1 << 64) if value >> 63 else value


def _integers(value: _Value) -> list[int]:
    """A whole number, or several that are packed into one field."""
    if isinstance(value, int):
        return [_signed(value)]
    numbers, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(_signed(number))
    return numbers
