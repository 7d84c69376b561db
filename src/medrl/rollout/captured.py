"""Decode steps as CUDA graphs: a step of a 2B model launches over a thousand kernels, a graph launches once.

A graph holds the addresses it was captured with, so rows live in buffers, and a batch has one of a few numbers of rows
(buckets): one whose rows finish moves from bucket to bucket. Graphs are kept with the policy: weights change in place,
so they stay valid.
"""

from dataclasses import replace
from typing import Any

import torch

from medrl.policy.policy import Policy
from medrl.rollout.decoder import Decoder
from medrl.rollout.fused import FusedDecoder, decodes_fused
from medrl.rollout.rows import Rows, Shape
from medrl.rollout.sampling import Sampling

BUCKETS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class CapturedDecoder:
    """A decoder whose steps are replayed."""

    def __init__(self, policy: Policy, sampling: Sampling, rows: Rows, *, fused: bool, pool: Any, stream: Any) -> None:
        """A step writes to these very ``rows``.

        Args:
            pool: where a step's temporaries lie, the same for all whose steps are replayed one after another.
            stream: where it is captured, the same for all: cuBLAS keeps 32 MiB for every one it has seen.
        """
        self.rows, self.pool, self.stream = rows, pool, stream
        self.decoder = FusedDecoder(policy, sampling, rows) if fused else Decoder(policy, sampling, rows, static=True)
        self.graph: Any = None

    def load(self, rows: Rows) -> None:
        """Go on with these rows, which have the shape of the first ones."""
        self.rows.copy_(rows)
        if self.graph is None:
            self.graph = self._capture()
            self.rows.copy_(rows)

    def step(self) -> None:
        self.graph.replay()

    def _capture(self) -> Any:
        # Memory that a kernel needs at its first run is not to belong to the graph: two steps are run before, of the
        # second token, which every row has room for. ``load`` undoes what they write.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self.rows.t.fill_(1)
                self.decoder.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which prepare images, may ask CUDA for memory meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self.decoder.step()
        return graph  # whole: what is interrupted above is captured anew


class Graphs:
    """The captured decoders of a policy, for one kind of batch at a time."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._fused = policy, decodes_fused(policy)
        self._kind: tuple[Any, ...] = ()
        self._shape = Shape(rows=0, prompts=0, prompt_tokens=0, group_size=0)
        self._rows: Rows | None = None
        """The buffers; a decoder of fewer rows has the first ones of them."""
        self._decoders: dict[int, CapturedDecoder] = {}
        self._pool: Any = None
        self._stream: Any = None

    def room(self, sampling: Sampling, shape: Shape) -> Shape:
        """What to make place for where ``shape`` is needed, at most: as much as there is, if that is enough.

        What is captured then serves for the next batch, of fewer prompts or shorter ones: rows and prompts are filled
        up, and padding is not read. Where prompts would be padded to more than twice what they need, and where more of
        anything is needed, buffers are made anew, and what was captured is given up.
        """
        there = self._shape
        enough = shape.rows <= there.rows and shape.prompts <= there.prompts
        near = shape.prompt_tokens <= there.prompt_tokens <= 2 * shape.prompt_tokens
        if not (enough and near) or self._kind != self._kind_of(sampling, shape):
            self._renew(sampling, shape)
        return self._shape

    def open(self, sampling: Sampling, rows: Rows) -> CapturedDecoder:
        """A decoder for rows of the shape that ``room`` said, or a smaller number of rows (``bucket``)."""
        tokens = rows.prompts.padding.shape[-1]
        shape = Shape(rows=len(rows.t), prompts=len(rows.table), prompt_tokens=tokens, group_size=rows.table.shape[1])
        if self.room(sampling, shape) != replace(shape, rows=self._shape.rows):
            self._renew(sampling, shape)  # the policy was used for something else since
        if self._rows is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), self._stream or torch.cuda.Stream()
            self._rows = rows.buffers(self._shape.rows)
        size = len(rows.t)
        if size not in self._decoders:
            self._decoders[size] = CapturedDecoder(
                self._policy, sampling, self._rows.narrow(size), fused=self._fused, pool=self._pool, stream=self._stream
            )
        decoder = self._decoders[size]
        decoder.load(rows)  # a copy of what is in the buffers, never part of them (``rows.regroup``)
        return decoder

    def _kind_of(self, sampling: Sampling, shape: Shape) -> tuple[Any, ...]:
        """What is the same for all that is captured."""
        return sampling, self._policy.stop_token_ids, shape.group_size

    def _renew(self, sampling: Sampling, shape: Shape) -> None:
        self._decoders.clear()
        self._rows = None
        self._kind, self._shape = self._kind_of(sampling, shape), shape


def bucket(rows: int, largest: int) -> int:
    """The buffer that ``rows`` rows move to; ``largest`` where no smaller one holds them."""
    return next((size for size in BUCKETS if rows <= size < largest), largest)
