//! What a folder says of an LLM whose weights were kept in few bits while its adapters were trained: HF's
//! `quantization_config`, with the keys of its `BitsAndBytesConfig`.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;
use vora_files::tell_once;
use vora_torch::weights::Quantization;

use crate::adapted::AdaptedLlm;
use crate::files::dtype;

/// The key of `config.json`.
pub(crate) const QUANTIZATION_CONFIG: &str = "quantization_config";

/// Says in `config` how the LLM is kept, where that is in few bits.
pub(crate) fn describe(llm: &AdaptedLlm, config: &mut Value) {
    if let (Some(quantization), Value::Object(config)) = (llm.quantization(), config) {
        config.insert(QUANTIZATION_CONFIG.to_owned(), to_json(quantization, llm.llm().kind()));
    }
}

fn to_json(quantization: Quantization, kind: Kind) -> Value {
    match quantization {
        Quantization::Nf4 => json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": true,
            "bnb_4bit_compute_dtype": dtype(kind),
        }),
        // No threshold: no column of activations is taken apart.
        Quantization::Int8 => json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": false,
            "load_in_8bit": true,
            "llm_int8_threshold": 0.0,
        }),
    }
}

/// Tells that what was trained in `folder` over few bits is opened over an LLM as it is stored.
pub(crate) fn tell_of_whole_weights(folder: &Path, config: &Map<String, Value>) {
    let Some(trained_over) = config.get(QUANTIZATION_CONFIG) else { return };
    let bits = if trained_over["load_in_8bit"] == true { "eight" } else { "four" };
    tell_once(format!(
        "{}: trained over an LLM in {bits} bits; it is opened, and merged, over the LLM's weights as they are stored",
        folder.display()
    ));
}
