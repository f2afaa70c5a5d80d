"""Make tokenizers that are small enough for tiny models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import InputError

PAD, EOS, END = "<pad>", "<eos>", "<|end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}"
    f"{{{{ '{VISION_START}{IMAGE}{VISION_END}' }}}}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
CHATML_WITH_IMAGES = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    f"{{{{ '<|im_start|>' + message['role'] + '\n' }}}}{_CONTENT}{{{{ '<|im_end|>\n' }}}}",
)
"""ChatML of messages whose content is a text or a list of parts, texts and images, as in Qwen's VLMs."""
DIALOGUE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    f"{{% else %}}{_CONTENT}{{% endif %}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer for sums, with 16 tokens: pad, eos, the ten digits and ``+-= ``."""
    return character_tokenizer("0123456789+-= ")


def countdown_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer for Countdown, with 21 tokens: pad, eos, the ten digits and ``+-*/(),=:``."""
    return character_tokenizer("0123456789+-*/(),=:")


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character.

    Encoding a character that is not in ``characters`` raises an error.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def text_tokenizer(
    corpus: Path | None = None, column: str = "problem", vocab_size: int = 1024
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with Qwen's special tokens and the ChatML template.

    It encodes any text without loss.

    Args:
        corpus: .parquet or .jsonl file; the merges are learned from its ``column``. With None each token is
            one of the 256 bytes.
        vocab_size: number of tokens with a corpus, including the 3 special tokens.

    Raises:
        InputError: the corpus does not exist, has another suffix or lacks the column.
    """
    texts = _column(corpus, column) if corpus else []
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level_bpe(
        texts, vocab_size if corpus else None, specials, eos="<|im_end|>", chat_template=CHATML
    )


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """Return ``text_tokenizer()`` with the special tokens of Qwen's VLMs and a template for images."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE, VIDEO]
    return _byte_level_bpe([], None, specials, eos="<|im_end|>", chat_template=CHATML_WITH_IMAGES)


def dialogue_tokenizer(texts: Iterable[str], *, images: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE in which every word of ``texts`` is one token.

    Its chat template is short: a message starts with one token for its role, and only the assistant's
    messages have an end. The template marks the assistant's tokens, so ``return_assistant_tokens_mask`` of
    ``apply_chat_template`` works. The tokenizer encodes any text without loss. With ``images`` it has the
    special tokens of Qwen's VLMs.
    """
    specials = [PAD, END, *(f"<|{role}|>" for role in ("system", "user", "assistant", "tool"))]
    if images:
        specials += [VISION_START, VISION_END, IMAGE, VIDEO]
    return _byte_level_bpe(texts, 2**16, specials, eos=END, chat_template=DIALOGUE)


def _byte_level_bpe(
    texts: Iterable[str], vocab_size: int | None, specials: list[str], *, eos: str, chat_template: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with merges learned on ``texts``; the first special token is the padding.

    Args:
        vocab_size: largest number of tokens, including the special tokens; None learns no merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or len(specials) + len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=specials,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        eos_token=eos,
        extra_special_tokens=[token for token in specials[1:] if token != eos],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def _column(path: Path, column: str) -> list[str]:
    from datasets import load_dataset

    readers = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    if path.suffix not in readers:
        raise InputError(f"tokenizer_corpus = {path}: give a .parquet or .jsonl file")
    if not path.exists():
        raise InputError(f"tokenizer_corpus = {path} does not exist: give a .parquet or .jsonl file")
    table = load_dataset(readers[path.suffix], data_files=str(path), split="train")
    if column not in table.column_names:
        raise InputError(
            f"tokenizer_corpus_column = {column!r} is not in {path}: choose from "
            f"{', '.join(table.column_names)}"
        )
    return table[column][:]
