//! How many logits exist at once.

use tch::Device;
use vora_llm::CausalLm;

/// Rows of logits that are made at once: 256 MiB of f32, on a CPU 28 MiB, since glibc keeps no freed block above 32 MiB.
pub fn logits_rows(llm: &CausalLm) -> i64 {
    let logits = if llm.device() == Device::Cpu { 7 << 20 } else { 64 << 20 };
    (logits / llm.config().vocab_size).max(1)
}

/// The same for a loss that reaches the head: the gradient of one that is trained comes from all rows at once.
pub(crate) fn logits_chunk(llm: &CausalLm) -> i64 {
    if llm.trains_head() { i64::MAX } else { logits_rows(llm) }
}
