"""Export: a student as one folder that others load, checked by loading it before it appears.

    safetensors   config, weights, tokenizer, card and licence, as `AutoModelForCausalLM.from_pretrained` wants them
    gguf          one file for llama.cpp and what is built on it, beside card and licence

What was written is read back with transformers; logits and token ids are compared with the source's. Where they differ
by more than the precision explains, nothing is left.
"""

from limbeck.export.writing import Exported, export_model

__all__ = ["Exported", "export_model"]
