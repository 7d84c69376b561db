"""The process that encodes prompts for another: ``python -m medrl.policy.encoding_worker FOLDER IMAGE_TOKEN MERGE``.

It talks over the socket that is its standard input and ends when that does, so it never outlives whom it works for.
What libraries print goes to a file. Signals to end are for the other process alone: it may want to finish a step first.
"""

import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from PIL import Image, ImageFile
from transformers import AutoProcessor

from medrl.errors import ImageError, MedrlError
from medrl.policy.channel import ClosedError, receive, send
from medrl.policy.encoding import EncodedPrompt, Encoder
from medrl.stopping import SIGNALS
from medrl.types import Prompt


def main(folder: str, image_token_id: str, merge_size: str) -> None:
    """Encode until nobody asks any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a library that reads what is typed does not get what was asked
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder)
    encoder = Encoder(processor=processor, image_token_id=int(image_token_id), merge_size=int(merge_size))
    try:
        send(channel, {"image_processor": type(processor.image_processor).__name__})
        while True:
            _answer(channel, encoder)
    except ClosedError:
        shutil.rmtree(folder, ignore_errors=True)  # whoever made it may have been killed


def _answer(channel: socket.socket, encoder: Encoder) -> None:
    asked, _ = receive(channel)
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = asked["torn"], asked["most_pixels"]
    prompt = Prompt(
        id=asked["id"], text=asked["text"], images=tuple(Path(path) for path in asked["images"]), mode=asked["mode"]
    )
    with _Told(channel):
        send(channel, {}, tensors_of(encoder.encode(prompt)))


class _Told:
    """Tells the process that asked what went wrong within, to be raised there, and goes on."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    def __enter__(self) -> None:
        """There is nothing to tell yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ClosedError) or not isinstance(error, Exception):  # nobody listens, or an end
            return False
        if isinstance(error, MedrlError):
            send(self.channel, {"error": describe(error)})
        else:
            told = "".join(traceback.format_exception(error))
            send(self.channel, {"mistake": f"{type(error).__name__}: {error}", "trace": told})
        return True


def describe(error: MedrlError) -> dict[str, object]:
    """What an error is made again from, in the process that asked."""
    image = [str(error.path), error.reason, error.fix] if isinstance(error, ImageError) else None
    return {"kind": type(error).__name__, "message": str(error), "image": image}


def tensors_of(encoded: EncodedPrompt) -> dict[str, torch.Tensor]:
    """All of an encoded prompt but its name."""
    found = {"token_ids": encoded.token_ids, "positions": encoded.positions, "grids": encoded.grids}
    return found if encoded.pixels is None else found | {"pixels": encoded.pixels}


if __name__ == "__main__":
    main(*sys.argv[1:])
