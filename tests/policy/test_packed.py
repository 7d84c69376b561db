"""The packed pass against transformers' own forward of each completion alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import modeling_qwen2_vl

from medrl.policy import families
from medrl.policy.naive import naive_logprobs
from medrl.policy.policy import Policy

FLOOR = 1e-3
"""Of the norm of the whole gradient, times the tolerance. Some parameters have a true gradient of 0 or nearly so (a key
bias moves all of a query's scores alike, up to rotation): there rounding errors are compared with rounding errors."""


@pytest.fixture(scope="module")
def plain(make_model):
    """The same weights in a model that no policy has touched: transformers' own attention everywhere."""
    model = make_model()
    # Not "eager", whose softmax is in float32 whatever the weights are.
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
    return model


def plain_logprobs(model, encoded, completions, temperature=1.0):
    """(R tensors) each completion alone, through the untouched model."""
    out = []
    for prompt, group in zip(encoded, completions, strict=True):
        for token_ids in group:
            ids = torch.cat([prompt.token_ids, torch.tensor(token_ids)])[None]
            images = {} if prompt.pixels is None else {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grids}
            is_image = (ids == model.config.image_token_id).int()
            logits = model(input_ids=ids, mm_token_type_ids=is_image, **images).logits[0, -len(token_ids) - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            out.append(logprobs.gather(1, torch.tensor(token_ids)[:, None]).squeeze(1))
    return out


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    floor = FLOOR * float(torch.stack([gradient.norm() for gradient in theirs.values()]).norm())
    off = {name: float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + floor)) for name in theirs}
    assert {name: distance for name, distance in off.items() if distance > tolerance} == {}


def picture_sizes():
    side = st.sampled_from([28, 56, 84])
    return st.lists(st.tuples(side, side), max_size=2)


def tokens(vocabulary: int):
    # All but the special tokens, which are the last 12: transformers takes an image placeholder for an image.
    return st.lists(st.integers(0, vocabulary - 13), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def any_size(make_policy) -> Policy:
    """A policy whose processor keeps images as large as they come."""
    policy = make_policy()
    policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    return policy


def check_packed_against_naive(any_size, plain, noise, data, tolerance: float) -> None:
    vocabulary = len(any_size.processor.tokenizer)
    encoded, completions = [], []
    for n in range(data.draw(st.integers(1, 3), label="groups")):
        sizes = data.draw(picture_sizes(), label="images")
        images = [noise(10 * n + i, *size) for i, size in enumerate(sizes)]
        words = data.draw(st.text(alphabet="abc ?", max_size=20), label="text")
        encoded.append(any_size.encode_turn(f"p{n}", words, images))
        completions.append(data.draw(st.lists(tokens(vocabulary), min_size=1, max_size=4), label="completions"))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 1.7]), label="temperature")

    scored = any_size.logprobs(encoded, completions, temperature=temperature)
    rows = plain_logprobs(plain, encoded, completions, temperature)
    naive = naive_logprobs(any_size, encoded, completions, temperature=temperature)
    for row, (expected, same) in enumerate(zip(rows, naive, strict=True)):
        torch.testing.assert_close(scored.logprobs[row, : len(expected)], expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(same, expected, rtol=tolerance, atol=0)
        assert not scored.logprobs[row, len(expected) :].any()
    assert scored.completion_mask.sum(1).tolist() == [len(row) for row in rows]

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(scored.logprobs.shape, generator=generator, dtype=torch.float64)
    ours = gradients(any_size.model, (scored.logprobs * weights).sum())
    oracle = sum((row * weights[i, : len(row)]).sum() for i, row in enumerate(rows))
    assert_same_gradients(ours, gradients(plain, oracle), tolerance)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_packed_equals_naive_in_every_logprob_and_every_gradient(any_size, plain, noise, data):
    # transformers rounds norms and vision rotations to float32: two ways of computing the same agree to 1e-7 at best.
    check_packed_against_naive(any_size, plain, noise, data, tolerance=1e-6)


@pytest.fixture(scope="module")
def nothing_rounded(plain):
    """transformers' norms and vision rotations in the precision of their input, for the policy and for the oracle."""

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
        return tuple(x * cos + modeling_qwen2_vl.rotate_half(x) * sin for x in (query, key))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plain.model.language_model.norm), "forward", norm)
        for module in (modeling_qwen2_vl, families.qwen2_vl):
            patch.setattr(module, "apply_rotary_pos_emb_vision", rotate)
        yield


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_but_for_transformers_own_rounding_they_agree_to_ten_digits(any_size, plain, noise, nothing_rounded, data):
    check_packed_against_naive(any_size, plain, noise, data, tolerance=1e-10)


def test_the_vision_tower_has_a_gradient_that_is_compared(policy, noise):
    encoded = [policy.encode_turn("p", "a", [noise(1)])]
    found = gradients(policy.model, policy.logprobs(encoded, [[[20, 21, 22]]]).logprobs.sum())
    largest = max(float(gradient.norm()) for gradient in found.values())
    vision = {name: gradient for name, gradient in found.items() if "visual" in name}
    assert len(vision) > 20
    assert sum(float(gradient.norm()) > 1e-4 * largest for gradient in vision.values()) > 20


def test_entropy_is_that_of_the_full_distribution(policy, plain, noise):
    encoded = [policy.encode_turn("p", "abc", [noise(1)])]
    ids = torch.cat([encoded[0].token_ids, torch.tensor([20, 21])])[None]
    logits = plain(
        input_ids=ids,
        mm_token_type_ids=(ids == plain.config.image_token_id).int(),
        pixel_values=encoded[0].pixels,
        image_grid_thw=encoded[0].grids,
    ).logits[0, -3:-1]
    scored = policy.logprobs(encoded, [[[20, 21]]], temperature=0.7)
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    torch.testing.assert_close(scored.entropy[0], expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_permuting_prompts_and_completions_permutes_results_and_nothing_else(policy, noise):
    encoded = [policy.encode_turn(f"p{n}", "abc " * n, [noise(n)] * (n % 3)) for n in range(4)]
    completions = [[[20 + n, 30, 40 + i][: 1 + (n + i) % 3] for i in range(3)] for n in range(4)]
    straight = policy.logprobs(encoded, completions).logprobs.view(4, 3, -1)
    prompt_order, order = [2, 0, 3, 1], [1, 2, 0]
    shuffled = policy.logprobs(
        [encoded[n] for n in prompt_order], [[completions[n][i] for i in order] for n in prompt_order]
    ).logprobs.view(4, 3, -1)
    torch.testing.assert_close(shuffled, straight[prompt_order][:, order], rtol=1e-9, atol=0)


@torch.no_grad()
def test_a_prompt_sees_its_own_image_and_no_other(policy, noise):
    """Two prompts of three completions, images of equal size: where images are repeated in the wrong order, the
    second completion of the first prompt sees the second prompt's image."""
    completions = [[[20, 21], [22, 23], [24, 25]], [[20, 21], [22, 23], [24, 25]]]

    def logprobs(first: int, second: int) -> torch.Tensor:
        encoded = [policy.encode_turn("a", "ab", [noise(first)]), policy.encode_turn("b", "ab", [noise(second)])]
        return policy.logprobs(encoded, completions).logprobs.view(2, 3, 2)

    before, after, swapped = logprobs(1, 2), logprobs(1, 3), logprobs(2, 1)
    assert torch.equal(before[0], after[0])
    assert float((before[1] - after[1]).abs().min()) > 1e-4
    torch.testing.assert_close(swapped, before.flip(0), rtol=1e-9, atol=0)
    alone = policy.logprobs([policy.encode_turn("b", "ab", [noise(2)])], [completions[1]]).logprobs
    torch.testing.assert_close(before[1], alone, rtol=1e-9, atol=0)


@torch.no_grad()
def test_a_prompt_with_two_images_sees_them_in_order(policy, noise):
    def logprobs(*seeds: int) -> torch.Tensor:
        encoded = [policy.encode_turn("a", "ab", [noise(seed) for seed in seeds])]
        return policy.logprobs(encoded, [[[20, 21]]]).logprobs

    assert float((logprobs(1, 2) - logprobs(2, 1)).abs().min()) > 1e-4


@torch.no_grad()
def test_images_of_mixed_sizes_have_the_features_they_have_alone(any_size, noise):
    # Equal sizes go through the tower in one call, mixed sizes in one call each.
    sizes = [(56, 56), (84, 28), (56, 56), (28, 84)]
    turns = [any_size.encode_turn("p", "", [noise(n, *size)]) for n, size in enumerate(sizes)]

    def features(chosen: list[int]) -> torch.Tensor:
        return any_size.family.image_features(
            torch.cat([turns[n].pixels for n in chosen]).double(), torch.cat([turns[n].grids for n in chosen])
        )

    alone = [features([n]) for n in range(4)]
    torch.testing.assert_close(features([0, 1, 2, 3]), torch.cat(alone), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features([0, 2]), torch.cat([alone[0], alone[2]]), rtol=1e-9, atol=1e-12)
    # As many patches in each, but not the same shape: position embeddings must not be those of the first.
    torch.testing.assert_close(features([1, 3]), torch.cat([alone[1], alone[3]]), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_our_vision_attention_is_that_of_transformers(any_size, plain, noise):
    turns = [any_size.encode_turn("p", "", [noise(n, *size)]) for n, size in enumerate([(56, 56), (84, 28)])]
    pixels, grids = torch.cat([t.pixels for t in turns]).double(), torch.cat([t.grids for t in turns])
    theirs = plain.model.visual(pixels, grid_thw=grids).pooler_output
    torch.testing.assert_close(any_size.family.image_features(pixels, grids), theirs, rtol=1e-6, atol=1e-7)
