//! What a folder says of an LLM whose weights are in few bits: HF's `quantization_config`. Where they were so while adapters
//! were trained, with the keys of its `BitsAndBytesConfig`; where they are stored so, with those of `compressed-tensors`.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;
use vora_files::tell_once;
use vora_torch::weights::Quantization;

use crate::adapted::AdaptedLlm;
use crate::files::dtype;

/// The key of `config.json`.
pub(crate) const QUANTIZATION_CONFIG: &str = "quantization_config";

/// Says in `config` how the LLM is kept, where that is in few bits, and nothing else.
pub(crate) fn describe(llm: &AdaptedLlm, config: &mut Value) {
    let Value::Object(config) = config else { return };
    match llm.quantization() {
        Some(quantization) => {
            config.insert(QUANTIZATION_CONFIG.to_owned(), to_json(quantization, llm.llm().kind()));
        }
        None => {
            config.remove(QUANTIZATION_CONFIG); // that of the folder that it came from
        }
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
        Quantization::Int8Groups => groups(8),
        Quantization::Int4Groups => groups(4),
    }
}

/// The linear layers that are none of the decoder's, by the names that they have in all models here.
const WHOLE: [&str; 4] = ["re:.*lm_head", "re:.*vision.*", "re:.*multi_modal_projector.*", "re:.*vqmodel.*"];

/// In groups of 32, as `vora-torch` keeps them.
fn groups(num_bits: u8) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": num_bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32,
                },
                "input_activations": null,
                "output_activations": null,
            },
        },
        "ignore": WHOLE,
    })
}

/// Tells that what was trained in `folder` over few bits is opened over an LLM as it is stored.
pub(crate) fn tell_of_whole_weights(folder: &Path, config: &Map<String, Value>) {
    let Some(trained_over) = config.get(QUANTIZATION_CONFIG) else { return };
    if trained_over["quant_method"] != "bitsandbytes" {
        return; // the LLM's own folder is in few bits
    }
    let bits = if trained_over["load_in_8bit"] == true { "eight" } else { "four" };
    tell_once(format!(
        "{}: trained over an LLM in {bits} bits; it is opened, and merged, over the LLM's weights as they are stored",
        folder.display()
    ));
}
