//! Llama-family decoders over libtorch: spans-aware attention, KV cache, tokenizer, chat template.
