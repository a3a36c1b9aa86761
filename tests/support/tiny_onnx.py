"""ONNX files of one operation, written without the package onnx: the few protobuf fields that onnxruntime reads."""

from collections.abc import Sequence
from pathlib import Path


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto of a float tensor; a dimension given by a name is free."""
    dims = b"".join(_field(1, _field(1, d) if isinstance(d, int) else _field(2, d)) for d in shape)
    tensor = _field(1, 1) + _field(2, dims)
    return _field(1, name) + _field(2, _field(1, tensor))


def write_mean(path: Path, shape: Sequence[int | str], axes: Sequence[int], output: Sequence[int | str]) -> Path:
    """A network that averages its input x over `axes`: ReduceMean of opset 13, without keeping them."""
    of_axes = _field(1, "axes") + b"".join(_field(8, axis) for axis in axes) + _field(20, 7)
    keep = _field(1, "keepdims") + _field(3, 0) + _field(20, 2)
    node = _field(1, "x") + _field(2, "y") + _field(4, "ReduceMean") + _field(5, of_axes) + _field(5, keep)
    graph = _field(1, node) + _field(2, "g") + _field(11, _value("x", shape)) + _field(12, _value("y", output))
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(2, 13)))
    return path
