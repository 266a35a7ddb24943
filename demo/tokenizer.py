"""The demo model's tokenizer: one token per byte, and one per word that its phrasings use.

Facts and operands stay bytes, so that answers have many tokens (a chain can be broken in the middle of one) and any
UTF-8 text survives a round trip; the words around them are short, so that training is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo.world import function_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

# System messages are dropped: the model was never trained on any. Content may be a string or a list of text parts.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set content = message['content'] | trim -%}
  {%- else -%}
    {%- set parts = message['content'] | selectattr('type', 'equalto', 'text') -%}
    {%- set content = parts | map(attribute='text') | join | trim -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '<|user|>' + content + '<|end|>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|assistant|>' + content + '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, from the phrasings of `demo.world`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD, USER, ASSISTANT, END]
    words = function_words()
    forms = [f"Ġ{w}" for w in words] + [w for w in words if len(w) > 1] + [w.capitalize() for w in words if len(w) > 1]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *forms]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # No merges: a piece is looked up whole (`ignore_merges`), and what is not a known word falls apart into bytes.
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[A-Za-z0-9]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
