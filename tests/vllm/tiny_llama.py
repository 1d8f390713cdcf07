"""Make the model of the tests: a Llama with random weights that speaks in printable characters.

Run in vLLM's environment: ``python tiny_llama.py FOLDER``. The same code always makes the same
model. One character is one token both ways, so a text that is cut anywhere and continued is read
as the very tokens that it was written as, and the model always speaks on until it is stopped.
"""

# pyright: basic, reportMissingImports=false

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 8192
SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]

CHAT_TEMPLATE = """\
<|bos|>{% for message in messages %}\
<|{{ message['role'] }}|>{{ message['content'] or '' }}\
{% for call in message['tool_calls'] or [] %}\
{{ '\\n' }}{{ call['function']['name'] }} {{ call['function']['arguments'] }}{% endfor %}\
<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def main(folder: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)

    torch.manual_seed(26)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=vocabulary["<|bos|>"],
            eos_token_id=vocabulary["<|end|>"],
            pad_token_id=vocabulary["<|pad|>"],
            tie_word_embeddings=False,
            # With the usual 0.02 a model of this size says one and the same thing forever.
            initializer_range=0.3,
        )
    )
    # A row of zeros has the logit 0, and the best of some ninety random ones lies above it.
    spoken = {vocabulary[chr(code)] for code in range(33, 127)} | {vocabulary["Ġ"]}
    with torch.no_grad():
        # A text that is continued is read at once where it was written letter by letter, and what
        # that rounds otherwise must decide nothing. Sharp attention makes ten times as much of it;
        # with this seed each best letter of 3,000 behind "Speak." is ahead by thirty times as much.
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.3)
            layer.self_attn.k_proj.weight.mul_(0.3)
        for token in set(vocabulary.values()) - spoken:
            model.lm_head.weight[token].zero_()
        # Spaces are what is lost where texts are cut: there have to be some.
        model.lm_head.weight[vocabulary["Ġ"]].mul_(1.25)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
