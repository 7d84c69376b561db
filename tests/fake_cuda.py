"""A GPU that is not there: CPU tensors compute, CUDA tensors have shape, type and device and nothing in them.

    with FakeCuda() as gpu:
        policy.model.to("cuda")
        gpu.backward(policy.logprobs(...).logprobs.sum())
    gpu.syncs, gpu.peak

What a real device would refuse is refused: tensors of two devices in one operation, unknown arguments, shapes and types
that do not fit. What would make Python wait for the device is written down (``syncs``), and refused while a CUDA graph
is captured. Whoever reads a value gets what ``answer`` says, 1 if it says nothing.
"""

import importlib.util
import math
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from medrl.policy import fused

aten: Any = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
"""Operations whose result depends on values: Python waits for them."""
ROWS_APART = ("_rotate", "_gate")
"""Kernels that are told how far the rows of what they read are apart."""
CAPABILITY = (9, 0)
CARD_BYTES = 80 * 10**9


class FakeCuda(TorchDispatchMode):
    """Within, ``torch.cuda`` says that there is one card."""

    def __init__(self, answer: Callable[[Tensor], Tensor | None] = lambda _: None) -> None:
        super().__init__()
        self.answer = answer
        self.syncs: list[str] = []
        """Where Python waited for the device, with the operation."""
        self.launched: list[str] = []
        """Kernels of our own, in order."""
        self.capturing = False
        self.operations = 0
        self.live = self.peak = 0
        """Bytes of CUDA tensors."""
        self._known: set[int] = set()
        self._brought: Any = WeakIdKeyDictionary()
        """Values of what was copied to the device, until it is written to."""
        self._pinned: Any = WeakIdKeyDictionary()
        """What lies in pinned memory: Python does not wait until it is copied."""
        self._fake = FakeTensorMode()
        self._patches = ExitStack()
        self._saved: list[_Saved] = []

    def __enter__(self) -> "FakeCuda":
        for patch in _patches(self):
            self._patches.enter_context(patch)
        self._patches.enter_context(self._fake)
        self._patches.enter_context(torch.autograd.graph.saved_tensors_hooks(_Saved, self._unpack))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        to_device = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        fake = [x for x in leaves if isinstance(x, FakeTensor)]
        if not to_device and not fake:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.operations += 1
        kind = func.overloadpacket
        if kind in READS or (kind is aten.index and any(_is_mask(x) for x in tree_leaves(args[1]))):
            return self._read(func, args)
        if kind is aten._to_copy and fake and (target := kwargs.get("device")) and target.type == "cpu":
            self._sync(func)
            return self._value(args[0], kwargs.get("dtype"))
        real = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]
        if kind in (aten._to_copy, aten.copy_) and any(x not in self._pinned for x in real):
            self._sync(func)
        if kind is aten.copy_ and args[0] in real:  # to the CPU, in place
            self._sync(func)
            return args[0]
        args, kwargs = tree_map(self._faked, (args, kwargs))
        with self._fake:
            made = _add_product(*args, **kwargs) if func in ADDMM else func(*args, **kwargs)
        if kind is aten._to_copy and real:
            self._brought[made] = real[0]
        elif func._schema.is_mutable:
            for changed in tree_leaves(args[0]):
                self._brought.pop(changed, None)
        for tensor in tree_leaves(made):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                self._count(tensor)
        return made

    def launch(self, kernel: Any, given: tuple[Any, ...]) -> None:
        """A kernel of our own is handed over: all it reads is on the device, packed as it expects."""
        name = kernel.fn.__name__
        for tensor in given:
            if isinstance(tensor, Tensor):
                assert tensor.device.type == "cuda", f"{name} was given a tensor on {tensor.device}"
                packed = tensor.stride(-1) == 1 if name in ROWS_APART else tensor.is_contiguous()
                assert packed, f"{name} was given strides of {tensor.stride()} for {tuple(tensor.shape)}"
        self.launched.append(name)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``: torch's engine asks for streams, which need a driver, so the graph is walked here."""
        _walk_back(loss, self._release)

    def _faked(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        with self._fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def _read(self, func: Any, args: Any) -> Any:
        self._sync(func)
        if func.overloadpacket is aten._local_scalar_dense:
            value = self._value(args[0])
            with unset_fake_temporarily():
                return value.item()
        if func.overloadpacket in (aten.equal, aten.is_nonzero):
            return True
        raise NotImplementedError(f"{func} has a shape that depends on values")

    def _value(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with unset_fake_temporarily():
            said = self._brought.get(tensor)
            said = self.answer(tensor) if said is None else said
            said = torch.ones(tensor.shape, dtype=tensor.dtype) if said is None else said
            return said.to(dtype or tensor.dtype)

    def _sync(self, func: Any) -> None:
        where = _where()
        assert not self.capturing, f"{func} in a captured step, at {where}"
        self.syncs.append(f"{where} {func}")

    def _count(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // 512) * 512  # as the allocator rounds
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _unpack(self, saved: "_Saved") -> Tensor:
        self._saved.append(saved)
        assert saved.tensor is not None, "a saved tensor is asked for twice"
        return saved.tensor

    def _release(self) -> None:
        """What a node has read is dropped once it is done, as the engine does."""
        for saved in self._saved:
            saved.tensor = None
        self._saved.clear()


class _Saved:
    """A tensor that waits for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()


ADDMM = (aten.addmm.dtype, aten.addmm.dtype_out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """torch 2.11 cannot say what shape this has, so what its kernel asks for is asked for here."""
    assert a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16) and out_dtype == torch.float32
    assert total.dtype == out_dtype and total.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
    assert len({x.device for x in (total, a, b)}) == 1
    return torch.empty_like(total) if out is None else out


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _where() -> str:
    """The innermost line of medrl's."""
    ours = [frame for frame in traceback.extract_stack() if "/medrl/" in frame.filename]
    return f"{ours[-1].filename.rpartition('/medrl/')[2]}:{ours[-1].lineno}" if ours else "elsewhere"


def _walk_back(loss: Tensor, release: Callable[[], None]) -> None:
    """What was made last comes first, weights before all: the order decides what is held at a time."""
    waiting = _dependencies(loss.grad_fn)
    with torch.no_grad():
        grads: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
        ready = [loss.grad_fn]
        while ready:
            node = max(ready, key=_priority)
            ready.remove(node)
            found = _step_back(node, grads.pop(node, {}))
            release()
            for (following, place), grad in zip(node.next_functions, found, strict=False):
                if following is None:
                    continue
                if grad is not None:
                    grad = _fitted(following, place, grad)
                    sums = grads.setdefault(following, {})
                    sums[place] = sums[place] + grad if place in sums else grad
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
            grad = None
            del found


def _dependencies(root: Any) -> dict[Any, int]:
    """How many gradients every node waits for."""
    waiting: dict[Any, int] = {}
    order = [root]
    while order:
        for following, _ in order.pop().next_functions:
            if following is not None:
                if following not in waiting:
                    order.append(following)
                waiting[following] = waiting.get(following, 0) + 1
    return waiting


def _priority(node: Any) -> float:
    return math.inf if hasattr(node, "variable") else node._sequence_nr()


def _step_back(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's inputs."""
    inputs = [given.get(place) for place in range(len(node._input_metadata))]
    if all(grad is None for grad in inputs):
        return (None,) * len(node.next_functions)
    if hasattr(node, "variable"):
        node.variable.grad = inputs[0] if node.variable.grad is None else node.variable.grad.add_(inputs[0])
        for hook in (node.variable._post_accumulate_grad_hooks or {}).values():
            hook(node.variable)
        return ()
    found = node.apply(*inputs) if hasattr(node, "apply") else node(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _fitted(node: Any, place: int, grad: Tensor) -> Tensor:
    """As the engine does: summed over what was broadcast, in the type of what it belongs to, refused elsewhere."""
    metadata = node._input_metadata[place]
    assert grad.device == metadata.device, f"{node} is on {metadata.device}, its gradient on {grad.device}"
    return grad.sum_to_size(tuple(metadata.shape)).to(metadata.dtype)


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def _patches(gpu: FakeCuda) -> Iterator[Any]:
    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    @contextmanager
    def graph(_: Any, *__: Any, **___: Any) -> Iterator[None]:
        gpu.capturing = True
        try:
            yield
        finally:
            gpu.capturing = False

    def tolist(tensor: Tensor) -> Any:
        return tensor.cpu().tolist()

    def pin(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only what lies in main memory can be pinned"
        gpu._pinned[tensor] = True
        return tensor

    def swap(old: Tensor, new: Tensor) -> None:
        assert (old.device, old.dtype) == (new.device, new.dtype), "a fake weight cannot move"

    says: dict[str, Any] = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: gpu.capturing,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: "a card that is not there",
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: setattr(gpu, "peak", gpu.live),
        "memory_allocated": lambda *_: gpu.live,
        "max_memory_allocated": lambda *_: gpu.peak,
        "memory_reserved": lambda *_: gpu.live,
        "mem_get_info": lambda *_: (CARD_BYTES - gpu.live, CARD_BYTES),
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": stream,
        "CUDAGraph": _Graph,
        "graph": graph,
        "graph_pool_handle": lambda: None,
    }
    for name, value in says.items():
        yield mock.patch.object(torch.cuda, name, value)
    yield mock.patch.object(fake_tensor, "init_gpu_context", lambda _: None)
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", True)
    yield mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True)
    yield mock.patch.object(FakeTensor, "tolist", tolist)
    yield mock.patch.object(torch.utils, "swap_tensors", swap)
    yield mock.patch.object(torch.Tensor, "pin_memory", pin)
    yield mock.patch.object(torch.Tensor, "backward", lambda loss, *_, **__: gpu.backward(loss))
    yield mock.patch.object(torch._C, "_current_graph_task_id", lambda: 0)
    yield mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _sdpa)
    # Kernels of our own compute nothing here, so they cannot be compared first; what they are given is looked at.
    yield mock.patch.object(fused, "has_triton", lambda: importlib.util.find_spec("triton") is not None)
    yield mock.patch.object(fused, "head_differs", lambda *_: None)
    yield mock.patch("medrl.rollout.fused.differs", lambda *_: None)
    if importlib.util.find_spec("triton"):
        yield mock.patch("triton.runtime.jit.JITFunction.run", lambda kernel, *given, **_: gpu.launch(kernel, given))


_plain_sdpa = torch.nn.functional.scaled_dot_product_attention


def _sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
          scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """torch asks the card which kernel to take; the flash kernel is what an H100 would say without a mask."""
    if not isinstance(q, FakeTensor):
        return _plain_sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    scores = q @ k.transpose(-1, -2) * scale
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v
