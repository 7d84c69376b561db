import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from medrl.data.prompts import make_prompt
from medrl.errors import ImageError, PolicyError, PromptTooLongError
from medrl.policy.attention import NAME
from medrl.policy.loading import PolicySettings
from medrl.policy.policy import Policy, load_policy
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt


@pytest.fixture(scope="module")
def saved(make_policy, tmp_path_factory):
    """A folder with a float32 policy."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_policy(torch.float32).save(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the folder, to take things out of."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def move_weights(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def has_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- save and load


@torch.no_grad()
def test_a_saved_policy_opened_with_plain_transformers_gives_the_same_logits(saved, make_policy, noise):
    model = AutoModelForImageTextToText.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "CT or MRI?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[noise(1)], return_tensors="pt")
    expected = model(**inputs).logits[0, -1].log_softmax(-1)

    policy = make_policy(torch.float32)
    encoded = [policy.encode_turn("p", "CT or MRI?", [noise(1)])]
    assert encoded[0].token_ids.tolist() == inputs["input_ids"][0].tolist()
    vocabulary = list(range(len(expected)))
    scored = policy.logprobs(encoded, [[[token] for token in vocabulary]])
    torch.testing.assert_close(scored.logprobs[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_saved_config_names_no_attention_of_ours(saved):
    assert f'"{NAME}"' not in (saved / "config.json").read_text()
    assert AutoModelForImageTextToText.from_pretrained(saved).config.text_config._attn_implementation != NAME


def test_saving_leaves_the_policy_on_its_own_attention(make_policy, tmp_path):
    policy = make_policy()
    policy.save(tmp_path / "model")
    assert policy.model.config.text_config._attn_implementation == NAME


def test_what_was_saved_is_loaded_to_the_bit(saved, make_policy):
    policy = make_policy(torch.float32)
    assert has_same_bits(weights_of(Policy.load(saved)), weights_of(policy))
    assert Policy.load(saved, dtype="bfloat16").family.head.dtype == torch.bfloat16


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers_generate(saved, noise, tmp_path):
    for n in range(4):
        noise(n, 56 + 28 * (n % 2), 56).save(tmp_path / f"{n}.png")
    prompts = [
        Prompt(id=str(n), text="CT or MRI? " * (n + 1), images=(tmp_path / f"{n}.png",) * (1 + n % 2), mode="think")
        for n in range(4)
    ] + [Prompt(id="no image", text="Say it.", images=(), mode="think")]
    policy = Policy.load(saved)
    policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    encoded = policy.encode(prompts)
    ours = generate(policy, prompts, Sampling(temperature=0, max_new_tokens=24))

    model = AutoModelForImageTextToText.from_pretrained(saved)
    for prompt, ((completion,), turn) in zip(prompts, zip(ours, encoded, strict=True), strict=True):
        ids = turn.token_ids[None]
        images = {} if turn.pixels is None else {"pixel_values": turn.pixels, "image_grid_thw": turn.grids}
        is_image = (ids == model.config.image_token_id).int()
        theirs = model.generate(input_ids=ids, mm_token_type_ids=is_image, max_new_tokens=24, do_sample=False, **images)
        assert list(completion.token_ids) == theirs[0, ids.shape[1] :].tolist(), prompt.id
    assert len({completion.token_ids for (completion,) in ours}) > 1


def test_pixel_bounds_decide_how_many_tokens_an_image_takes(saved, noise):
    def image_tokens(**bounds: int) -> int:
        policy = Policy.load(saved, **bounds)
        ids = policy.encode_turn("p", "", [noise(0, 112, 112)]).token_ids
        return int((ids == policy.family.image_token_id).sum())

    assert image_tokens() == 4  # 56 pixels squared, patches of 14, merged 2 x 2
    assert image_tokens(max_pixels=112 * 112) == 16
    assert image_tokens(min_pixels=28 * 28, max_pixels=28 * 28) == 1


# ---------------------------------------------------------------- reference and restore


def test_the_reference_stays_as_it_was_while_the_policy_moves(saved, make_policy, noise):
    in_memory = make_policy(torch.float32)
    in_memory.freeze_reference()
    for policy in (in_memory, Policy.load(saved)):
        encoded = [policy.encode_turn("p", "ab", [noise(1)])]
        before = policy.logprobs(encoded, [[[20, 21]]]).logprobs.detach()
        start = weights_of(policy)
        move_weights(policy)
        assert has_same_bits(weights_of(policy.reference), start)
        assert not any(parameter.requires_grad for parameter in policy.reference.model.parameters())
        assert torch.equal(policy.reference.logprobs(encoded, [[[20, 21]]]).logprobs, before)
        assert not torch.equal(policy.logprobs(encoded, [[[20, 21]]]).logprobs, before)


def test_a_policy_built_in_memory_has_no_reference_until_it_is_told(make_policy):
    with pytest.raises(PolicyError, match="freeze_reference"):
        _ = make_policy().reference


def test_a_recipe_s_reference_is_its_model_though_weights_come_from_a_checkpoint(saved, tmp_path):
    trained = Policy.load(saved)
    move_weights(trained)
    trained.save(tmp_path / "checkpoint")
    settings = PolicySettings(model=str(saved), dtype="float32", freeze_vision=True)
    policy = load_policy(settings)
    policy.restore(tmp_path / "checkpoint")
    assert has_same_bits(weights_of(policy), weights_of(trained))
    assert has_same_bits(weights_of(policy.reference), weights_of(Policy.load(saved)))
    assert not any(parameter.requires_grad for parameter in policy.family.vision.parameters())
    assert policy.family.head.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_restoring_from_a_checkpoint_is_exact(make_policy, tmp_path, dtype):
    policy = make_policy(dtype)
    saved = weights_of(policy)
    policy.save(tmp_path / "checkpoint")
    move_weights(policy)
    parameters = [id(parameter) for parameter in policy.model.parameters()]
    policy.restore(tmp_path / "checkpoint")
    assert has_same_bits(weights_of(policy), saved)
    # In place: the optimizer holds these very tensors.
    assert [id(parameter) for parameter in policy.model.parameters()] == parameters


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("processor_config.json", "has no processor"),
        ("tokenizer_config.json", "has no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_by_the_name_of_the_part(damaged, missing, words):
    (damaged / missing).unlink()
    with pytest.raises(PolicyError, match=words) as caught:
        Policy.load(damaged)
    assert str(damaged) in str(caught.value)


def test_a_config_that_is_no_json_is_named(damaged):
    (damaged / "config.json").write_text("{half")
    with pytest.raises(PolicyError, match="is not JSON"):
        Policy.load(damaged)


def test_weights_that_are_cut_off_are_named(damaged):
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(PolicyError, match=str(damaged)):
        Policy.load(damaged)


def test_another_kind_of_model_is_refused_by_its_type(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(PolicyError, match=r"'gpt2'.*supported: qwen2_vl"):
        Policy.load(damaged)


@pytest.mark.parametrize("change", [{"model_type": "no-such-model"}, {"model_type": None}])
def test_a_config_of_no_known_type_is_refused(damaged, change):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({k: v for k, v in {**config, **change}.items() if v}))
    with pytest.raises(PolicyError, match=str(damaged)):
        Policy.load(damaged)


def test_a_folder_that_is_not_there_is_not_looked_up_on_a_hub(tmp_path):
    with pytest.raises(PolicyError, match="there is no model folder"):
        Policy.load(tmp_path / "nowhere")


def test_sliding_windows_are_refused(make_model, processor):
    model = make_model()
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(PolicyError, match="use_sliding_window"):
        Policy(model, processor)


# ---------------------------------------------------------------- prompts


def test_a_prompt_that_is_too_long_is_named_with_the_cure_and_nothing_is_cut(policy, make_examples, tmp_path):
    prompt = make_prompt(make_examples(tmp_path, 1)[0])
    (encoded,) = policy.encode([prompt])
    room = policy.family.context_tokens - len(encoded.token_ids)
    (same,) = policy.encode([prompt], room_tokens=room)  # exactly full
    assert int((same.token_ids == policy.family.image_token_id).sum()) == 4
    with pytest.raises(PromptTooLongError) as caught:
        policy.encode([prompt], room_tokens=room + 1)
    for word in ("example-0", "max_pixels", "max_new_tokens", str(len(encoded.token_ids)), "take 4 tokens"):
        assert word in str(caught.value)


def test_the_error_names_the_prompt_that_was_asked_though_another_had_the_same_words(policy, make_examples, tmp_path):
    first = make_prompt(make_examples(tmp_path, 1)[0])
    second = Prompt(id="another", text=first.text, images=first.images, mode=first.mode)
    policy.encode([first])
    with pytest.raises(PromptTooLongError, match="another"):
        policy.encode([second], room_tokens=10_000)


def test_an_image_that_is_missing_is_named(policy, tmp_path):
    prompt = Prompt(id="p", text="", images=(tmp_path / "gone.png",), mode="think")
    with pytest.raises(ImageError, match=r"gone\.png"):
        policy.encode([prompt])


def test_images_come_before_the_words_in_the_order_they_are_named(policy, noise):
    both = policy.encode_turn("p", "ab", [noise(1), noise(2)])
    assert torch.equal(both.pixels[:16], policy.encode_turn("p", "", [noise(1)]).pixels)
    text = policy.processor.tokenizer.decode(both.token_ids)
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert text == f"<|im_start|>user\n{image}{image}ab<|im_end|>\n<|im_start|>assistant\n"


def test_a_completion_text_and_its_tokens_are_each_other_s_inverse(policy):
    for text in ("<think>CT</think><answer>A</answer>", "  two\n\nlines ", "größer ≥ 5 µm", ""):
        token_ids = policy.tokenize(text)
        assert token_ids[-1] == policy.eos_token_id and token_ids.count(policy.eos_token_id) == 1
        assert policy.decode(token_ids) == text


def test_special_tokens_in_a_completion_are_shown_except_the_end_of_turn(policy):
    token_id = policy.processor.tokenizer.convert_tokens_to_ids
    written = [token_id("<|image_pad|>"), token_id("<|endoftext|>"), policy.eos_token_id]
    assert policy.decode(written) == "<|image_pad|><|endoftext|>"


def test_a_copy_of_a_policy_s_model_attends_to_patches_with_its_own_weights(make_policy, noise):
    policy = make_policy()
    copied = Policy(copy.deepcopy(policy.model), policy.processor)
    turn = policy.encode_turn("p", "", [noise(1)])
    with torch.no_grad():
        before = copied.family.image_features(turn.pixels.double(), turn.grids)
        for parameter in policy.family.vision.parameters():
            parameter.zero_()
        assert torch.equal(copied.family.image_features(turn.pixels.double(), turn.grids), before)
