import pytest

from medrl.rewards import bleu, embedding_similarity, rouge_l, token_f1
from medrl.rewards.open_text import bleu as bleu_of
from medrl.rewards.open_text import rouge_l as rouge_of
from medrl.rewards.open_text import text_encoder
from medrl.rewards.open_text import token_f1 as f1_of
from medrl.types import Completion, Example

EXAMPLE = Example(
    id="q", source="s", images=(), question="?", options=(), target="small left pleural effusion", kind="short",
    references=("effusion on the left",),
)  # fmt: skip


def said(text: str) -> Completion:
    return Completion(text=f"<answer>{text}</answer>", token_ids=(), finish_reason="stop", mode="no_think")


def test_token_f1_by_hand():
    # 2 words in common of 3 and 4: precision 2/3, recall 2/4.
    assert f1_of("left effusion seen", ["small left pleural effusion"]) == pytest.approx(
        2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)
    )
    assert f1_of("no no no", ["no mass"]) == pytest.approx(
        2 / 5
    )  # a repeated word counts as often as the reference has it
    assert f1_of("...", ["..."]) == 0.0


def test_rouge_l_by_hand_counts_order():
    # "effusion left" against "left effusion": the same words, one of them in order.
    assert rouge_of("effusion left", ["left effusion"]) == pytest.approx(0.5)
    assert f1_of("effusion left", ["left effusion"]) == 1.0
    assert rouge_of("a b c d e", ["a x c y e"]) == pytest.approx(3 / 5)


def test_bleu_is_sacrebleu_s_and_1_for_the_same_text():
    sacrebleu = pytest.importorskip("sacrebleu")
    assert bleu_of("The small effusion.", ["small effusion"]) == pytest.approx(1.0)
    theirs = sacrebleu.sentence_bleu("small pleural effusion left", ["small left pleural effusion"]).score / 100
    assert bleu_of("Small pleural effusion, left", ["small left pleural effusion"]) == pytest.approx(theirs)
    assert bleu_of("heart", ["lung"]) == 0.0


@pytest.mark.parametrize("part", [token_f1, rouge_l, bleu])
def test_the_nearest_reference_counts_and_an_unreadable_answer_is_worth_nothing(part):
    assert part(EXAMPLE, said("Effusion on the left.")) == pytest.approx(1.0)
    assert part(EXAMPLE, said("small left pleural effusion")) == pytest.approx(1.0)
    assert 0.0 < part(EXAMPLE, said("effusion on the right")) < 1.0
    assert part(EXAMPLE, said("")) == part(EXAMPLE, said("heart")) == 0.0


def test_embedding_similarity_is_the_cosine_with_the_nearest_reference():
    vectors = {"a": (1.0, 0.0), EXAMPLE.target: (0.6, 0.8), EXAMPLE.references[0]: (-1.0, 0.0), "zero": (0.0, 0.0)}
    part = embedding_similarity(lambda texts: [vectors[text] for text in texts])
    assert part.__name__ == "embedding_similarity"
    assert part(EXAMPLE, said("a")) == pytest.approx(0.6)
    assert part(EXAMPLE, said("zero")) == 0.0


def test_an_encoder_folder_gives_one_vector_a_text_and_padding_changes_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "left": 2, "lung": 3, "right": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    embed = text_encoder(str(tmp_path))
    alone, padded = embed(["left"])[0], embed(["left", "right lung left lung"])[0]
    assert padded == pytest.approx(alone, abs=1e-5)
    part = embedding_similarity(str(tmp_path))
    target = Example(id="q", source="s", images=(), question="?", options=(), target="left lung", kind="short")
    assert part(target, said("left lung")) == pytest.approx(1.0)
