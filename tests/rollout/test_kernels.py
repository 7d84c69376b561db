"""A decode step's kernels against plain computations: interpreted where there is no GPU, compiled for one always."""

import os

import pytest
import torch
import torch.nn.functional as F

from medrl.data.prompts import make_prompt
from medrl.errors import PolicyError
from medrl.policy.lora import Lora
from medrl.policy.policy import Policy
from medrl.rollout import fused, scheduler
from medrl.rollout.decoder import RowAttention
from medrl.rollout.engine import generate
from medrl.rollout.fused import FusedDecoder, Together, decodes_fused
from medrl.rollout.rows import Part, Prompts, Shape, begin, regroup
from medrl.rollout.sampling import Sampling

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("medrl.rollout.kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Compiled where there is a GPU, so ``-m gpu`` runs them; interpreted where there is none.
runs_kernels = (
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="runs interpreted, in another process")
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_interpreted(run_interpreted):
    run_interpreted(__file__)


@pytest.fixture
def draw():
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    return normal


@runs_kernels
@pytest.mark.parametrize("width", [48, 64, 1536])
def test_norm_of_a_sum_is_rms_norm(draw, width):
    hidden, delta, weight = draw(5, width), draw(5, width), draw(width)
    total = hidden + delta
    expected = F.rms_norm(total.double(), (width,), weight.double(), 1e-6)
    found = kernels.add_norm(hidden, delta, weight, 1e-6)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hidden, total)  # the residual stream goes on from there
    assert torch.equal(kernels.add_norm(hidden, None, weight, 1e-6), found)
    assert torch.equal(hidden, total)


@pytest.mark.gpu
def test_norm_rounds_a_half_precision_sum_as_the_layers_do(draw):
    # Triton's interpreter cuts bfloat16 off instead of rounding.
    hidden, delta = draw(3, 64, dtype=torch.bfloat16), draw(3, 64, dtype=torch.bfloat16)
    total = hidden + delta
    kernels.add_norm(hidden, delta, torch.ones(64, dtype=torch.bfloat16, device=DEVICE), 1e-6)
    assert torch.equal(hidden, total)


@runs_kernels
@pytest.mark.parametrize("width", [5, 1024, 1500])
def test_gated_activation_is_silu_times_up(draw, width):
    both = draw(3, 2 * width)  # rows that are apart, as the halves of one product are
    gate, up = both[:, :width], both[:, width:]
    expected = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(kernels.gated(gate, up).double(), expected, atol=2e-6, rtol=2e-6)


@runs_kernels
def test_rotation_turns_pairs_and_keeps_keys_in_their_slots(draw):
    rows, heads, kv_heads, limit, width = 4, 6, 2, 7, 16
    angle = draw(rows, width // 2)
    query, both = draw(rows, heads * width), draw(rows, 2 * kv_heads * width)
    key, value = both[:, : kv_heads * width], both[:, kv_heads * width :]
    keys, values = draw(rows, kv_heads, limit, width), draw(rows, kv_heads, limit, width)
    before = keys.clone(), values.clone()
    t = torch.tensor([1, 7, 3, 2], device=DEVICE)
    rotated = kernels.rotate(query, key, value, (angle.cos(), angle.sin()), t, keys, values)

    def turn(x):  # as a complex number: x_i + i x_{i + D/2} times e^{i angle}
        x = x.view(rows, -1, 2, width // 2).double()
        turned = torch.complex(x[:, :, 0], x[:, :, 1]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    torch.testing.assert_close(rotated.double(), turn(query), atol=1e-5, rtol=1e-5)
    for row, slot in enumerate((t - 1).tolist()):
        torch.testing.assert_close(keys[row, :, slot].double(), turn(key)[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(values[row, :, slot], value[row].view(kv_heads, width))
        others = torch.arange(limit) != slot
        assert torch.equal(keys[row][:, others], before[0][row][:, others])
        assert torch.equal(values[row][:, others], before[1][row][:, others])


def some_rows(draw, *, groups, lengths, own, kv_heads=2, width=16, limit=70, padded=None):
    """Rows with random keys: how many ask each prompt, tokens of each prompt, tokens of each row."""
    longest = padded or max(lengths)
    there = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    keys, values = (draw(1, len(lengths), kv_heads, longest, width) for _ in range(2))
    prompts = Prompts(keys=keys, values=values, padding=~there[:, None, None])
    rows = begin(prompts, [0] * len(lengths), torch.zeros(len(lengths) * max(groups), limit, device=DEVICE))
    kept = [n * max(groups) + g for n, size in enumerate(groups) for g in range(size)]
    asked = [n for n, size in enumerate(groups) for _ in range(size)]
    shape = Shape(rows=len(kept) + 2, prompts=len(lengths) + 1, prompt_tokens=longest, group_size=max(groups))
    rows = regroup([Part(rows, kept, list(range(len(lengths))))], asked, shape)
    rows.keys.copy_(draw(*rows.keys.shape))
    rows.values.copy_(draw(*rows.values.shape))
    rows.t.copy_(torch.tensor([own[i % len(own)] for i in range(len(rows.t))]))
    return rows


CASES = {
    "one prompt, one row": {"groups": [1], "lengths": [9], "own": [1]},
    "groups of several sizes": {"groups": [3, 1, 2], "lengths": [5, 130, 17], "own": [1, 70, 13]},
    "a prompt of three chunks beside a short one": {"groups": [2, 2], "lengths": [300, 3], "own": [64, 65]},
    "chunks behind every prompt's end": {"groups": [2, 2], "lengths": [60, 3], "own": [2, 3], "padded": 384},
    "more queries than one program answers": {"groups": [33, 4], "lengths": [20, 140], "own": [5, 1, 9]},
}


@runs_kernels
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("shared", [1, 3, 6])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_the_layers(draw, case, shared, width):
    rows = some_rows(draw, **CASES[case], width=width)
    kv_heads = rows.keys.shape[2]
    query = draw(len(rows.t), kv_heads * shared, 1, width)
    key, value = draw(len(rows.t), kv_heads, 1, width), draw(len(rows.t), kv_heads, 1, width)
    expected = RowAttention(rows, static=True).begin().attend(query, key, value, 0.3)
    lengths = (~rows.prompts.padding).sum((1, 2, 3))
    found = kernels.attend(query.squeeze(2), rows, 0, lengths, 0.3)
    torch.testing.assert_close(found, expected.squeeze(2), atol=2e-5, rtol=2e-5)


@runs_kernels
def test_completions_are_those_of_the_layers(make_policy, make_examples, tmp_path, monkeypatch):
    prompts = [make_prompt(example, template="plain") for example in make_examples(tmp_path, 3)]
    policy = make_policy(torch.float32, heads=2, kv_heads=1)  # of 16: less than that only the interpreter multiplies
    policy.model.to(DEVICE)
    policy = Policy(policy.model, policy.processor)
    sampling = Sampling(max_new_tokens=12)
    monkeypatch.setattr(scheduler, "_static", lambda _: False)
    monkeypatch.setattr(scheduler, "_open", lambda p, s, rows: scheduler.Decoder(p, s, rows))
    expected = generate(policy, prompts, sampling, group_size=3)
    monkeypatch.setattr(scheduler, "_open", FusedDecoder)
    found = generate(policy, prompts, sampling, group_size=3)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_ids == b.token_ids
            assert a.sampling_logprobs == pytest.approx(b.sampling_logprobs, abs=1e-4)


# Triton's interpreter multiplies no bfloat16.
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (12, 2), (7, 1)])
def test_rounding_is_no_difference_to_the_plain_computation(dtype, heads, kv_heads):
    fused.differs.cache_clear()
    assert fused.differs(torch.device(DEVICE), dtype, heads, kv_heads, 16) is None


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("place", ["add_norm", "rotate", "gated", "attend"])
def test_every_kernel_is_compared_with_the_plain_computation_before_it_is_used(monkeypatch, place, dtype):
    fused.differs.cache_clear()
    kernel = getattr(kernels, place)
    monkeypatch.setattr(kernels, place, lambda *given: kernel(*given) * 1.02)
    assert "other numbers" in (fused.differs(torch.device(DEVICE), dtype, 12, 2, 16) or "")
    fused.differs.cache_clear()


@runs_kernels
def test_attention_is_compared_for_every_number_of_queries_that_it_is_compiled_for(monkeypatch):
    fused.differs.cache_clear()
    asked, launch = [], kernels._ask_prompt

    class Spy:
        def __getitem__(self, grid):
            return lambda *given, **constants: asked.append(constants["QUERIES"]) or launch[grid](*given, **constants)

    monkeypatch.setattr(kernels, "_ask_prompt", Spy())
    assert fused.differs(torch.device(DEVICE), torch.float32, 12, 2, 16) is None
    assert asked == [16, 32, 64]
    fused.differs.cache_clear()


def test_kernels_that_cannot_be_built_are_not_used_and_it_is_said_why(monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "attend", fail)
    for other in ("add_norm", "rotate", "gated"):
        monkeypatch.setattr(kernels, other, lambda x, *_: x)
    fused.differs.cache_clear()
    found = fused.differs(torch.device(DEVICE), torch.float32, 4, 2, 16) or ""
    fused.differs.cache_clear()
    assert "cannot be built here (RuntimeError: Failed to find C compiler)" in found


def test_weights_that_lie_together_stay_the_parameters_they_were(make_policy, tmp_path):
    policy, untouched = make_policy(torch.float32), make_policy(torch.float32)
    before = policy.fingerprint()
    layers = [layer.self_attn for layer in policy.family.layers]
    joined = [Together([layer.q_proj, layer.k_proj, layer.v_proj]) for layer in layers]
    again = [Together([layer.q_proj, layer.k_proj, layer.v_proj]) for layer in layers]
    for layer, one, other in zip(layers, joined, again, strict=True):
        assert one.weight.data_ptr() == other.weight.data_ptr() == layer.q_proj.weight.data_ptr()
        x = torch.randn(3, one.weight.shape[1])
        for found, module in zip(one(x), (layer.q_proj, layer.k_proj, layer.v_proj), strict=True):
            torch.testing.assert_close(found, module(x))
    assert policy.fingerprint() == before
    policy.save(tmp_path / "saved")
    assert Policy.load(tmp_path / "saved").fingerprint() == before
    # An update in place is an update of both.
    with torch.no_grad():
        layers[0].k_proj.weight.mul_(2)
        untouched.family.layers[0].self_attn.k_proj.weight.mul_(2)
    part = joined[0].weight[layers[0].q_proj.out_features :][: layers[0].k_proj.out_features]
    assert torch.equal(part, untouched.family.layers[0].self_attn.k_proj.weight)
    assert policy.fingerprint() == untouched.fingerprint() != before


def test_modules_with_adapters_are_called_one_by_one(make_policy):
    policy = make_policy(torch.float32)
    policy.add_lora(Lora(rank=2))
    attention = policy.family.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.lora_B["default"].weight.normal_()
    together = Together([attention.q_proj, attention.k_proj, attention.v_proj])
    x = torch.randn(3, attention.q_proj.in_features)
    assert together.weight is None
    assert torch.equal(together(x)[1], attention.k_proj(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_on_a_cpu_auto_keeps_the_layers_and_insisting_says_why(make_policy):
    policy = make_policy()
    assert not decodes_fused(policy)
    policy = make_policy()
    policy.kernels = True
    with pytest.raises(
        PolicyError, match=r"for decoding the kernels are for a CUDA GPU, not for a cpu: set policy\.kernels"
    ):
        decodes_fused(policy)


@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
def test_kernels_compile_for_an_h100(element):
    """Down to machine code, with the constants of Qwen2-VL-2B; no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget

    pointer, whole, real = f"*{element}", "i32", "fp32"
    wide = {"table": "*i64", "t": "*i64", "place": "*i64", "lengths": "*i64", "part_out": "*fp32", "part_sum": "*fp32"}
    constants = {
        "_add_norm": {"ADD": True, "BLOCK": 2048},
        "_rotate": {"HEADS": 12, "KV_HEADS": 2, "HALF": 64},
        "_ask_prompt": {
            "KV_HEADS": 2,
            "WIDTH": 128,
            "QUERIES": 64,
            "CHUNK": kernels.CHUNK[2 if element == "bf16" else 4],
        },
        "_ask_own": {"KV_HEADS": 2, "SHARED": 6, "WIDTH": 128, "QUERIES": 16, "OWN": kernels.OWN},
        "_gate": {"BLOCK": kernels.GATED},
    }
    numbers = {"width", "query_step", "key_step", "value_step", "limit", "prompt_tokens", "group_size", "shared",
               "chunks", "heads", "gate_step", "up_step"}  # fmt: skip
    for name, values in constants.items():
        kernel = getattr(kernels, name)
        signature = {
            arg: "constexpr" if arg in values
            else wide.get(arg) or (whole if arg in numbers else real if arg in ("eps", "scale") else pointer)
            for arg in kernel.arg_names
        }  # fmt: skip
        source = triton.compiler.ASTSource(kernel, signature, values)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= 227 * 1024
