import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.data.prompts import make_prompt
from medrl.errors import PolicyError
from medrl.evaluation import answer
from medrl.evaluation import evaluate as module
from medrl.evaluation.evaluate import evaluate
from medrl.evaluation.option_probs import answer_place, option_probs, split_before
from medrl.policy.naive import naive_logprobs
from medrl.rewards.parse import parse_answer
from medrl.rollout.scheduler import Finished
from medrl.types import Completion, Mode

TEXTS: tuple[tuple[str, Mode], ...] = (
    ("<think>The bones are dark.</think><answer>B</answer>", "think"),
    ("<think><answer>A</answer>? No.</think>\n<answer> C: ultrasound</answer>", "think"),
    ("<answer>MRI</answer>", "no_think"),
    ("<answer>a</answer><think>Bright fluid, so <answer>B</answer>.</think>", "think_after"),
    ("I do not know", "no_think"),
    ("<think>größer als früher</think><answer>A</answer> and more", "think"),
    ("B", "think"),
    ("<think>Bright <b>fluid</b>.</think> B", "think"),
    ("\n b. <think>Bright fluid.</think>", "think_after"),
)


def completion(policy, text: str, mode: Mode, stop: bool = True) -> Completion:
    token_ids = policy.tokenize(text)
    token_ids = token_ids if stop else token_ids[:-1]
    return Completion(text=text, token_ids=tuple(token_ids), finish_reason="stop" if stop else "length", mode=mode)


@pytest.fixture(scope="module")
def asked(policy, make_examples, tmp_path_factory):
    """Examples with two to four options, their prompts, and a completion of each."""
    examples = [row for row in make_examples(tmp_path_factory.mktemp("images"), 18) if len(row.options) > 2]
    examples = examples[: len(TEXTS)]
    prompts = [make_prompt(row, mode) for row, (_, mode) in zip(examples, TEXTS, strict=True)]
    written = [completion(policy, text, mode, stop=i % 2 == 0) for i, (text, mode) in enumerate(TEXTS)]
    return examples, prompts, written


@pytest.fixture(scope="module")
def found(policy, asked):
    examples, prompts, written = asked
    return option_probs(policy, examples, policy.encode(prompts), written)


def test_they_are_what_scoring_each_letter_in_a_pass_of_its_own_gives(policy, asked, found):
    split = {
        0: ("<think>The bones are dark.</think>", "<answer>"),
        1: ("<think><answer>A</answer>? No.</think>\n", "<answer> "),
        2: ("", "<answer>"),
        3: ("", "<answer>"),
        6: ("", ""),
        7: ("<think>Bright <b>fluid</b>.", "</think> "),
        8: ("", "\n "),
    }
    tokenizer = policy.processor.tokenizer
    for row, (kept, opened) in split.items():
        example, prompt = asked[0][row], asked[1][row]
        scores = []
        for letter in "ABCD"[: len(example.options)]:
            first, last = (tokenizer(text)["input_ids"] for text in (kept, opened + letter))
            (logprobs,) = naive_logprobs(policy, policy.encode([prompt]), [[[*first, *last]]])
            scores.append(math.exp(float(logprobs[len(first) :].sum().detach())))
        assert found[row] == pytest.approx([score / sum(scores) for score in scores], rel=1e-6)


def test_there_is_one_for_each_option_and_none_for_an_unreadable_answer(asked, found):
    assert [probs is None for probs in found] == [False, False, False, False, True, False, False, False, False]
    for example, probs in zip(asked[0], found, strict=True):
        assert probs is None or (len(probs) == len(example.options) and sum(probs) == pytest.approx(1))
        assert probs is None or len({round(p, 9) for p in probs}) == len(probs)


def test_company_and_order_change_nothing(policy, asked, found):
    backwards = [list(reversed(part)) for part in asked]
    turned = option_probs(policy, backwards[0], policy.encode(backwards[1]), backwards[2])
    for ours, theirs in zip(found, reversed(turned), strict=True):
        assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-9))
    alone = option_probs(policy, asked[0][4:5], policy.encode(asked[1][4:5]), asked[2][4:5])
    assert alone == [None]


def test_where_memory_runs_out_they_are_scored_in_halves(policy, asked, found, monkeypatch, caplog):
    sizes, logprobs = [], policy.logprobs

    def scarce(stems, branches):
        sizes.append(len(stems))
        if len(stems) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(stems, branches)

    monkeypatch.setattr(policy, "logprobs", scarce)
    halved = option_probs(policy, asked[0], policy.encode(asked[1]), asked[2])
    assert sizes == [8, 4, 2, 2, 4, 2, 2] and "half of them at a time" in caplog.text
    for ours, theirs in zip(halved, found, strict=True):
        assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-9))


def test_one_answer_that_does_not_fit_alone_says_what_to_do(policy, asked, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy, "logprobs", never)
    with pytest.raises(PolicyError, match=f"options of example {asked[0][0].id} alone.*--no-option-probs"):
        option_probs(policy, asked[0], policy.encode(asked[1]), asked[2])


def test_another_failure_is_not_taken_for_a_lack_of_memory(policy, asked, monkeypatch):
    def broken(*_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(policy, "logprobs", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        option_probs(policy, asked[0], policy.encode(asked[1]), asked[2])


@pytest.mark.parametrize(
    ("row", "before"),
    [
        (0, "dark.</think><answer>"),
        (1, "\n<answer> "),
        (2, "<answer>"),
        (3, "<answer>"),
        (4, None),
        (5, "</think><answer>"),
        (6, ""),
        (7, "</think> "),
        (8, "\n "),
    ],
)
def test_the_answer_is_placed_where_it_counts(asked, row, before):
    examples, _, written = asked
    text, place = written[row].text, answer_place(examples[row], written[row])
    assert place is None if before is None else text[:place].endswith(before) and not text[place].isspace()


@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "B", " ", "\n", "so b.", "<", "CT"]),
        max_size=8,
    ),
    mode=st.sampled_from(["think", "no_think", "think_after"]),
)
@settings(max_examples=400, deadline=None)
def test_every_readable_answer_has_a_place_and_no_other_has(asked, parts, mode):
    text, example = "".join(parts), asked[0][0]
    place = answer_place(example, Completion(text=text, token_ids=(1,), finish_reason="stop", mode=mode))
    read = parse_answer(text, example.options, mode)
    assert (place is None) == (read.value is None)
    assert place is None or text[place:].startswith(read.raw.strip())


@given(reasoning=st.text(max_size=12), blank=st.sampled_from(["", " ", "\n", "  "]), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_kept_tokens_and_opening_are_the_text_before_the_answer(policy, reasoning, blank, cut):
    text = f"<think>{reasoning}</think>{blank}<answer>{blank}B</answer>"
    tokens = policy.tokenize(text)
    text = policy.decode(tokens)  # the tokenizer may normalize
    written = Completion(text=text, token_ids=tuple(tokens[:-1] if cut else tokens), finish_reason="stop")
    place = text.rindex("B")
    kept, opening = split_before(policy, written, place)
    assert policy.decode(kept) + opening == text[:place]
    assert opening.endswith(f"<answer>{blank}") and len(opening) < len(blank) * 2 + 12
    assert kept == tokens[: len(kept)]


def test_records_keep_them_unless_they_are_not_asked_for(policy, asked, found, tmp_path, monkeypatch):
    examples, prompts, written = asked
    by_id = {example.id: answer for example, answer in zip(examples, written, strict=True)}

    def complete(policy, prompts, *_, encode, **__):
        ready = zip(prompts, encode(range(len(prompts))), strict=True)
        yield [
            Finished(number=number, encoded=one, completions=[by_id[prompt.id]])
            for number, (prompt, one) in enumerate(ready)
        ]

    monkeypatch.setattr(answer, "complete", complete)
    monkeypatch.setattr(module, "make_prompt", lambda example, *_: prompts[examples.index(example)])
    options = {"max_new_tokens": 8, "quiet": True}
    evaluation = evaluate(policy, examples, out=tmp_path / "with", batch_size=4, **options)
    for record, probs in zip(evaluation.records, found, strict=True):
        assert record.option_probs == (None if probs is None else pytest.approx(probs, rel=1e-9))
    without = evaluate(policy, examples, out=tmp_path / "without", option_probs=False, **options)
    assert {record.option_probs for record in without.records} == {None}
    assert torch.is_grad_enabled()
