//! How many logits exist at once.

use vora_llm::CausalLm;

/// Logits that exist at once while the loss is computed: 256 MiB of f32.
pub(crate) const MAX_LOGITS: i64 = 64 << 20;

/// How many rows of logits are made at once; the gradient of a head that is trained comes from all rows at once.
pub(super) fn logits_chunk(llm: &CausalLm) -> i64 {
    if llm.trains_head() { i64::MAX } else { (MAX_LOGITS / llm.config().vocab_size).max(1) }
}
