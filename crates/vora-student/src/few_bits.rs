//! The source of a frozen LLM, whose linear layers keep the bits that the run file gives them.

use anyhow::{Context, Result};
use tch::Device;
use vora_files::tell_once;
use vora_recipe::ModelConfig;
use vora_torch::weights::{Quantization, Weights};

/// The same source, in few bits where the run file says so.
///
/// # Errors
/// Where it has few bits already; names the key.
pub(crate) fn in_few_bits(weights: &Weights, section: &ModelConfig) -> Result<Weights> {
    let Some(key) = section.few_bits_key() else { return Ok(weights.clone()) };
    let quantization = if section.load_in_4bit { Quantization::Nf4 } else { Quantization::Int8 };
    if weights.device() == Device::Cpu {
        tell_once(format!(
            "{key}: there is no kernel for few bits on the CPU: weights are made whole again for each product, which saves \
             memory and makes steps slower"
        ));
    }
    weights.quantized(quantization).context(key)
}
