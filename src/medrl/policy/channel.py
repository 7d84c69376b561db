"""What travels to an encoding process and back: a JSON object, and tensors as their plain bytes behind it."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct(">Q")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int64, torch.float32, torch.float64)}


class ClosedError(Exception):
    """Nobody is at the other end any more."""


def send(channel: socket.socket, content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Send one message. Raises ``ClosedError``."""
    tensors = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
    shapes = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]
    header = json.dumps({"content": content, "tensors": shapes}).encode()
    try:
        channel.sendall(_LENGTH.pack(len(header)) + header)
        for tensor in tensors.values():
            channel.sendall(_bytes_of(tensor))
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ClosedError from error


def receive(channel: socket.socket) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Wait for one message. Raises ``ClosedError``."""
    size = bytearray(_LENGTH.size)
    _fill(channel, memoryview(size))
    header = bytearray(_LENGTH.unpack(size)[0])
    _fill(channel, memoryview(header))
    message = json.loads(header)
    tensors = {name: torch.empty(shape, dtype=_DTYPES[dtype]) for name, dtype, shape in message["tensors"]}
    for tensor in tensors.values():
        _fill(channel, _bytes_of(tensor))
    return message["content"], tensors


def _bytes_of(tensor: Tensor) -> memoryview:
    plain: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(plain)


def _fill(channel: socket.socket, place: memoryview) -> None:
    """Wait in the kernel until all is there: whoever comes back for every piece asks for Python's lock every time."""
    try:
        while place:
            count = channel.recv_into(place, len(place), socket.MSG_WAITALL)
            if count == 0:
                raise ClosedError
            place = place[count:]
    except ConnectionResetError as error:
        raise ClosedError from error
