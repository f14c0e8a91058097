"""The published special tokens, which of them frame a prompt, and the token of each condition.

Tokenizers made here hold them in this order, ids from 0. Tokenizers of others bring their own; what
then plays which role stands in `tokenizer_info`.
"""

from types import MappingProxyType

SPECIAL_TOKENS = (
    "<|PAD|>",
    "<|direct|>",
    "<|cot|>",
    "<|noisy|>",
    "<|synth|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

BOQ = "<|im_start|>"  # begin of question
EOQ = "<|im_end|>"  # end of question
EOA = "<|box_end|>"  # end of answer

CONDITION_TOKENS = MappingProxyType(
    {
        "direct": "<|object_ref_start|>",
        "cot": "<|object_ref_end|>",
        "noisy": "<|quad_start|>",
        "synth": "<|quad_end|>",
    }
)
