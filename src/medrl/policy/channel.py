"""What travels to an encoding process and back: a JSON object, and tensors as their plain bytes behind it.

Whoever waits in the kernel has let go of Python's lock, and may wait 5 ms to have it back. So a message is taken in few
pieces, and by numpy, which does not let go of the lock in between.
"""

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LENGTH = struct.Struct(">Q")


class ClosedError(Exception):
    """Nobody is at the other end any more."""


def send(channel: socket.socket, content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Send one message. Raises ``ClosedError``."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in (tensors or {}).items()}
    shapes = [(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    header = json.dumps({"content": content, "tensors": shapes}).encode()
    try:
        channel.sendall(_LENGTH.pack(len(header)) + header)
        for array in arrays.values():
            channel.sendall(_bytes_of(array))
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ClosedError from error


def receive(channel: socket.socket) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Wait for one message. Raises ``ClosedError``."""
    length = bytearray(_LENGTH.size)
    _fill(channel, [memoryview(length)])
    header = bytearray(_LENGTH.unpack(length)[0])
    _fill(channel, [memoryview(header)])
    message = json.loads(header)
    arrays = {name: np.empty(shape, dtype) for name, dtype, shape in message["tensors"]}
    _fill(channel, [_bytes_of(array) for array in arrays.values() if array.size])
    return message["content"], {name: torch.from_numpy(array) for name, array in arrays.items()}


def _bytes_of(array: Any) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _fill(channel: socket.socket, places: Sequence[memoryview]) -> None:
    """Wait until all that belongs there has come."""
    rest = list(places)
    while rest:
        try:
            count = channel.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0]
        except ConnectionResetError as error:
            raise ClosedError from error
        if count == 0:
            raise ClosedError
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:  # a signal came in between
            rest[0] = rest[0][count:]
