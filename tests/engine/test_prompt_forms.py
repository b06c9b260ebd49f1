"""Prompts as token ids: what transformers makes of the whole text, image tokens and all, for tokenizers of either family."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from engine.generate import FORMS, formed  # noqa: E402
from engine.models import ModelError  # noqa: E402

QUESTIONS = ("What is it?", " What?", "", "a\nb", "{} and {0}", "user")
WHOLE = {
    "llava": ("USER: ", "<image>\n", "{} ASSISTANT:"),
    "qwen2_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|vision_start|><|image_pad|><|vision_end|>", "{}<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip


def fast(tokenizer, special, **named):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def llama(prepend):
    """The form of Llama-2's tokenizer.json, prepending to each piece or (as transformers 5 reads it) to the first alone."""
    special = ("<unk>", "<s>", "</s>")
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:?.{}"
    vocabulary = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters, "Wh", "at", "What", "▁What", "us", "▁us"]
    merges = [("W", "h"), ("a", "t"), ("Wh", "at"), ("▁", "What"), ("u", "s"), ("▁", "us")]
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, unk_token="<unk>", byte_fallback=True,
        fuse_unk=True,
    )  # fmt: skip
    made = tokenizers.Tokenizer(model)
    if prepend == "each":
        parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        made.normalizer = tokenizers.normalizers.Sequence(parts)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", False)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(made, (*special, "<image>"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def qwen():
    """The form of Qwen2's: byte-level, no mark of a beginning."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, "Wh", "at", "What"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("W", "h"), ("a", "t"), ("Wh", "at")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    return fast(made, special, eos_token="<|im_end|>")


MADE = [
    pytest.param("llava", "<image>", lambda: llama("each"), id="llava"),
    pytest.param("llava", "<image>", lambda: llama("first"), id="llava, transformers 5"),
    pytest.param("qwen2_vl", "<|image_pad|>", qwen, id="qwen2-vl"),
]


@pytest.mark.parametrize(("family", "mark", "make"), MADE)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_prompt_is_tokenised_as_one_text(family, mark, make, images):
    tokenizer = make()
    token = tokenizer.convert_tokens_to_ids(mark)
    before, image, around = WHOLE[family]
    for question in QUESTIONS:
        expected = tokenizer(before + image * images + around.replace("{}", question))["input_ids"]
        assert formed(question, images, family, token, tokenizer) == expected
        assert expected.count(token) == images
    assert set(FORMS) == set(WHOLE)


@pytest.mark.parametrize(("family", "mark", "make"), MADE)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_training_reads_the_prompts_that_are_served(family, mark, make, frames):
    pytest.importorskip("scipy")
    from engine.fusion.wording import Wording

    tokenizer = make()
    token = tokenizer.convert_tokens_to_ids(mark)
    wording = Wording(family, tokenizer, token)
    for question in QUESTIONS:
        whole = [*wording.lead, token, *[*wording.between, token] * (frames - 1), *wording.tail(question)]
        assert whole == formed(question, frames, family, token, tokenizer)
    assert wording.tail("What", queries=True) == wording.tail("What") + wording.query_ids


@pytest.mark.parametrize(("family", "mark", "make"), MADE)
def test_a_question_cannot_add_images(family, mark, make):
    tokenizer = make()
    token = tokenizer.convert_tokens_to_ids(mark)
    for images in (0, 1):
        assert formed(f"What {mark} is {mark}", images, family, token, tokenizer).count(token) == images


@pytest.mark.parametrize("token", [5, 10_000])
def test_a_tokenizer_without_the_image_token_is_refused(token):
    with pytest.raises(ModelError, match=f"does not know the image token {token}"):
        formed("What", 1, "llava", token, llama("each"))
