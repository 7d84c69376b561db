"""The CUDA paths, walked on CUDA tensors that hold nothing: every operation's device, type and shape, and every place
where Python waits for the device. No number is checked here; ``pytest -m gpu`` does, where there is a GPU."""

import dataclasses
import importlib.util

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

from medrl.bench.limits import Work
from medrl.bench.models import SIZES, ask, build_policy, make_examples, question
from medrl.bench.step import StepBench, make_step
from medrl.grpo import GRPO
from medrl.policy.layout import pack
from medrl.policy.lora import Lora
from medrl.policy.packed_attention import BACK_ENDS
from medrl.rollout.captured import Graphs
from medrl.rollout.decoder import Decoder, Stepper
from medrl.rollout.fused import FusedDecoder, decodes_fused
from medrl.rollout.prefill import prefill
from medrl.rollout.rows import begin
from medrl.rollout.sampling import Sampling
from medrl.training import optim
from medrl.training.batches import TrainingGroup, cut
from medrl.training.budget import Budget
from medrl.training.optim import AdamW, Optim
from medrl.training.update import update_policy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing has to be imagined")

# Heads of 64, as the flash kernels want a multiple of 8; two of them share a key.
SIZE = dataclasses.replace(SIZES["tiny"], heads=2, kv_heads=1, vision_heads=1)
PX, TEXT_TOKENS, GROUP, TOKENS = 56, 60, 3, 6
PROMPT = TEXT_TOKENS + 4
COMPLETIONS = [[[5] * TOKENS, [6] * 2, [7]], [[8] * 3] * GROUP]


def policy_on(gpu: FakeCuda, folder, layers: int = 2):
    size = dataclasses.replace(SIZE, layers=layers, vision_layers=layers)
    policy = build_policy(size, PX, "cuda", torch.bfloat16)
    examples = make_examples(folder, 2, PX, question(policy.processor, TEXT_TOKENS))
    encoded = policy.encode([ask(example) for example in examples])
    gpu.syncs.clear()
    return policy, examples, encoded


def on_gpu(tensor: Tensor, *shape: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    return (tensor.device.type, tuple(tensor.shape), tensor.dtype) == ("cuda", shape, dtype)


def test_what_a_device_refuses_is_refused():
    with FakeCuda() as gpu:
        here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        with pytest.raises(RuntimeError, match="devices"):
            _ = here + there
        with pytest.raises(RuntimeError):
            torch.mm(there, torch.ones(3, 2, device="cuda"))
        gpu.syncs.clear()
        assert float(there.sum()) == 1.0 and there.tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert torch.tensor([3, 4], device="cuda").tolist() == [3, 4]
        assert len(gpu.syncs) == 4  # the last is there and back
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(AssertionError, match="in a captured step"):
            int(there.sum())


def test_gradients_are_those_of_torch_s_engine(tmp_path):
    """The walk back over the graph stands in for the engine, so it is compared with it on a CPU."""
    policy = build_policy(SIZE, PX, "cpu", torch.float32)
    examples = make_examples(tmp_path, 2, PX, question(policy.processor, TEXT_TOKENS))
    encoded = policy.encode([ask(example) for example in examples])
    policy.logprobs(encoded, COMPLETIONS).logprobs.sum().backward()
    expected = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    policy.model.zero_grad()
    with FakeCuda() as gpu:
        gpu.backward(policy.logprobs(encoded, COMPLETIONS).logprobs.sum())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saving", ["none", "recomputed", "frozen tower", "adapters"])
def test_a_training_pass_stays_on_the_device_and_no_layer_waits(saving, tmp_path):
    for layers in (1, 3):
        with FakeCuda() as gpu:
            policy, _, encoded = policy_on(gpu, tmp_path, layers)
            if saving == "recomputed":
                policy.checkpoint_activations()
            elif saving == "frozen tower":
                policy.family.vision.requires_grad_(False)
            elif saving == "adapters":
                policy.add_lora(Lora(rank=4))
            gpu.syncs.clear()
            before = gpu.live
            scored = policy.logprobs(encoded, COMPLETIONS)
            assert policy.attention == "varlen"
            for found in (scored.logprobs, scored.entropy, scored.completion_mask):
                assert on_gpu(found, 2 * GROUP, TOKENS, dtype=torch.float32)
            kept = gpu.live - before
            scored.logprobs.sum().backward()
            learning = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
            assert learning and all(on_gpu(p.grad, *p.shape, dtype=p.dtype) for p in learning)
            assert all(p.grad is None for p in policy.model.parameters() if not p.requires_grad)
            assert gpu.syncs == []  # not for lengths, places, tokens and pixels either
            # What was kept for the backward pass is gone.
            del scored, found
            grads = sum(parameter.grad.nbytes for parameter in learning)
            assert kept > 0 and gpu.live - before < grads + 512 * (len(learning) + 50)


def test_the_dense_back_end_waits_for_nothing_once_it_is_planned():
    layout = pack([torch.arange(5).expand(3, -1), torch.arange(3).expand(3, -1)], [[3, 4], [2]])
    with FakeCuda() as gpu:
        inputs = [torch.ones(1, heads, len(layout.group), 64, device="cuda") for heads in (2, 1, 1)]
        dense = BACK_ENDS["dense"](layout.to("cuda"))
        gpu.syncs.clear()
        assert on_gpu(dense.attend(*inputs, 0.1), 1, 2, len(layout.group), 64, dtype=torch.float32)
        assert gpu.syncs == []


def test_a_reference_without_adapters_has_no_graph(tmp_path):
    with FakeCuda() as gpu, torch.no_grad():
        policy, _, encoded = policy_on(gpu, tmp_path)
        policy.freeze_reference()
        scored = policy.reference.logprobs(encoded, COMPLETIONS)
        assert on_gpu(scored.logprobs, 2 * GROUP, TOKENS, dtype=torch.float32) and scored.logprobs.grad_fn is None


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=TOKENS),
                                      Sampling(max_new_tokens=TOKENS, temperature=0.7, top_p=0.9, top_k=5),
                                      Sampling(max_new_tokens=TOKENS, temperature=0)])  # fmt: skip
@torch.no_grad()
def test_a_step_that_is_captured_never_waits(sampling, tmp_path):
    with FakeCuda() as gpu:
        policy, _, encoded = policy_on(gpu, tmp_path)
        logits, prompts = prefill(policy, encoded)
        assert on_gpu(logits, 2, SIZE.vocabulary, dtype=torch.float32)
        assert on_gpu(prompts.keys, 2, 2, 1, 128, 64) and on_gpu(prompts.padding, 2, 1, 1, 128, dtype=torch.bool)
        rows = begin(prompts, [p.next_position for p in encoded], torch.rand(2 * GROUP, TOKENS).double().to("cuda"))
        first, decoder = Decoder(policy, sampling, rows), Decoder(policy, sampling, rows, static=True)
        first.draw(logits.repeat_interleave(GROUP, dim=0))
        gpu.syncs.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            decoder.step()
        assert gpu.syncs == []
        assert on_gpu(rows.tokens, 2 * GROUP, dtype=torch.int64) and on_gpu(rows.keys, 2, 2 * GROUP, 1, TOKENS, 64)
        # A step whose shapes follow the tokens asks how many there are, so this test can fail.
        first.step()
        assert gpu.syncs


def test_a_whole_step_waits_once_per_look_and_moves_float32_masters(tmp_path):
    looks = iter([False, True])

    def answer(tensor: Tensor) -> Tensor | None:
        """All rows write on after their first token, and have ended at the first look."""
        if tensor.dtype == torch.bool:
            return torch.full(tensor.shape, next(looks))
        if tensor.dtype == torch.int64:
            return torch.full(tensor.shape, TOKENS if tensor.ndim else 2 * GROUP)
        return None

    with FakeCuda(answer) as gpu:
        policy, examples, _ = policy_on(gpu, tmp_path)
        policy.freeze_reference()
        work = Work(prompts=2, group=GROUP, image_px=PX, prompt_tokens=TEXT_TOKENS, completion_tokens=TOKENS)
        step = make_step(policy, StepBench(model="tiny", work=work))
        gpu.syncs.clear()
        update = step(examples, 0)
        assert update.grad_norm == 1.0  # what was read of it
        # Eight tokens were written and looked at once.
        assert sum("rollout/" in sync and "_local_scalar_dense" in sync for sync in gpu.syncs) == 1
        assert sum("training/optim.py" in sync for sync in gpu.syncs) == 1


@pytest.mark.parametrize("kernels", [False, "auto"])
@torch.no_grad()
def test_a_capture_that_was_interrupted_is_made_anew(tmp_path, monkeypatch, kernels):
    captures, draw = [], Stepper.draw

    def once_interrupted(decoder, logits):
        if torch.cuda.is_current_stream_capturing():
            captures.append(len(logits))
            if len(captures) == 1:
                raise KeyboardInterrupt
        draw(decoder, logits)

    with FakeCuda() as gpu:
        policy, _, encoded = policy_on(gpu, tmp_path)
        policy.kernels = kernels
        _, prompts = prefill(policy, encoded)
        rows = begin(prompts, [p.next_position for p in encoded], torch.rand(2 * GROUP, TOKENS).double().to("cuda"))
        monkeypatch.setattr(Stepper, "draw", once_interrupted)
        graphs, sampling = Graphs(policy), Sampling(max_new_tokens=TOKENS)
        with pytest.raises(KeyboardInterrupt):
            graphs.open(sampling, rows)
        graphs.open(sampling, rows).step()
        graphs.open(sampling, rows).step()
        assert captures == [2 * GROUP] * 2


@torch.no_grad()
def test_all_captures_are_made_on_one_stream(tmp_path, monkeypatch):
    with FakeCuda() as gpu:
        policy, _, encoded = policy_on(gpu, tmp_path)
        _, prompts = prefill(policy, encoded)
        rows = begin(prompts, [p.next_position for p in encoded], torch.rand(2 * GROUP, TOKENS).double().to("cuda"))
        streams, graphs, make = [], Graphs(policy), torch.cuda.Stream
        monkeypatch.setattr(torch.cuda, "Stream", lambda: streams.append(make()) or streams[-1])
        for tokens in (TOKENS, TOKENS - 1):  # all anew for the second
            some = begin(prompts, [1, 1], rows.uniform[:, :tokens])
            for count in (2 * GROUP, 3):
                graphs.open(Sampling(max_new_tokens=tokens), some.narrow(count))
        assert len(streams) == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here")
@pytest.mark.parametrize("adapters", [False, True])
@torch.no_grad()
def test_a_step_of_fused_kernels_never_waits_and_launches_ten_a_layer(tmp_path, adapters):
    with FakeCuda() as gpu:
        policy, _, encoded = policy_on(gpu, tmp_path)
        if adapters:
            policy.add_lora(Lora(rank=4))
        logits, prompts = prefill(policy, encoded)
        rows = begin(prompts, [p.next_position for p in encoded], torch.rand(2 * GROUP, TOKENS).double().to("cuda"))
        Decoder(policy, Sampling(), rows).draw(logits.repeat_interleave(GROUP, dim=0))
        assert decodes_fused(policy)
        decoder = FusedDecoder(policy, Sampling(max_new_tokens=TOKENS), rows)
        gpu.syncs.clear(), gpu.launched.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert on_gpu(decoder.hidden(), 2 * GROUP, SIZE.hidden)
            layer = ["_add_norm", "_rotate", "_ask_prompt", "_ask_own", "_add_norm", "_gate"]
            assert gpu.launched == 2 * layer + ["_add_norm"]
            decoder.step()
        assert gpu.syncs == []
        weights = [layer.self_attn.v_proj.weight for layer in policy.family.layers]
        together = [weight._base is not None or weight.untyped_storage().nbytes() > weight.nbytes for weight in weights]
        assert together == [not adapters] * 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here")
def test_the_head_goes_over_logits_once_in_either_direction(tmp_path):
    with FakeCuda() as gpu:
        policy, _, encoded = policy_on(gpu, tmp_path)
        gpu.launched.clear()
        scored = policy.logprobs(encoded, COMPLETIONS)
        assert gpu.launched == ["_statistics"]
        scored.logprobs.sum().backward()
        assert gpu.launched == ["_statistics", "_slopes"]


@pytest.mark.parametrize(("card_bytes", "pieces"), [(10**9, 1), (10**7, 4)])
def test_a_step_is_cut_only_where_the_card_is_too_small_for_all_of_it(tmp_path, monkeypatch, card_bytes, pieces):
    monkeypatch.setattr(fake_cuda, "CARD_BYTES", card_bytes)
    with FakeCuda() as gpu:
        policy, examples, _ = policy_on(gpu, tmp_path)
        optimizer, budget = AdamW(policy.model.named_parameters(), Optim()), Budget(policy)
        groups = tuple(
            TrainingGroup(
                prompt=ask(example), completions=((5,) * 40,) * GROUP, advantages=(1.0, -1.0, 0.0),
                sampling_logprobs=((),) * GROUP,
            )
            for example in examples * 2
        )  # fmt: skip
        update_policy(
            policy, groups, optimizer, GRPO(group_size=GROUP, kl_coef=0), lr=1e-3, tokens_per_micro_batch=budget
        )
        assert len(cut(policy, groups, GRPO(group_size=GROUP, kl_coef=0), budget)) == pieces


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizer_reads_one_number_a_step(dtype):
    with FakeCuda() as gpu:
        weights = [torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype, device="cuda")) for _ in range(3)]
        optimizer = AdamW([(str(n), weight) for n, weight in enumerate(weights)], Optim())
        for _ in range(2):  # two micro-batches
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            for weight in optimizer.weights:
                weight.add_gradient(weight.parameter)
        gpu.syncs.clear()
        optimizer.step(1e-3)
        assert len(gpu.syncs) == 1 and "training/optim.py" in gpu.syncs[0]
        tensors, _ = optimizer.state_dict()
        assert all(on_gpu(tensor, 4, 4, dtype=torch.float32) for tensor in tensors.values())
        assert len(tensors) == 3 * (3 if dtype == torch.bfloat16 else 2)


def test_gradients_of_one_micro_batch_are_never_all_in_float32(monkeypatch):
    monkeypatch.setattr(optim, "WIDENED", 2**18)
    with FakeCuda() as gpu:
        weights = [torch.nn.Parameter(torch.zeros(512, 512, dtype=torch.bfloat16, device="cuda")) for _ in range(8)]
        optimizer = AdamW([(str(n), weight) for n, weight in enumerate(weights)], Optim())
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            before = gpu.peak = gpu.live
            optimizer.step(1e-3)
        assert len(gpu.syncs) == 2
        assert 0 < gpu.peak - before < 3 * 2**20  # a portion's gradients, and what clipping them takes
