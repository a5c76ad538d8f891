//! HF's `config.json` out of a GGUF file's metadata.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::Llm;
use crate::file::shortest;
use crate::llm::{Architecture, ROPE_FREQS};

/// Metadata of rotary scaling that has no counterpart in HF's configs.
const NOT_READ: [&str; 4] = [
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_attn_factor",
];

impl<B: AsRef<[u8]>> Llm<B> {
    /// The keys of HF's `config.json` that the metadata and the tensors tell; what they do not tell is left out.
    ///
    /// Llama 3's scaled frequencies lie in the file as factors and not as the four numbers that they came from: they
    /// become `longrope` with these factors at every length, the same frequencies.
    ///
    /// # Errors
    /// Names the metadata that is missing, of another type, or has no counterpart in HF's config.
    pub fn config(&self) -> Result<Map<String, Value>> {
        let (file, architecture) = (self.file(), self.architecture());
        let unsigned = |key: &str| file.unsigned(&self.key(key));
        let optional = |key: &str| if file.has(key) { file.unsigned(key).map(Some) } else { Ok(None) };
        let embedding = self.info("model.embed_tokens.weight").context("there is no tensor `token_embd.weight`")?;
        let (hidden, heads, kv_heads) = (unsigned("embedding_length")?, self.heads()?, self.kv_heads()?);
        let max_position_embeddings = unsigned("context_length")?;
        ensure!(
            heads > 0 && kv_heads > 0 && hidden > 0 && heads % kv_heads == 0,
            "hidden size {hidden} does not split into {heads} heads and {kv_heads} key-value heads"
        );
        let head_dim = optional(&self.key("attention.key_length"))?.unwrap_or(hidden / heads);
        for key in ["attention.value_length", "rope.dimension_count"] {
            let found = optional(&self.key(key))?.unwrap_or(head_dim);
            ensure!(found == head_dim, "metadata `{}` is {found}, expected the heads' {head_dim}", self.key(key));
        }
        let experts = optional(&self.key("expert_count"))?.unwrap_or(0);
        ensure!(experts == 0, "the model is a mixture of {experts} experts, which is not read here");

        let mut config = Map::new();
        let mut put = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
        let window = optional(&self.key("attention.sliding_window"))?.filter(|&window| window > 0);
        match (architecture, window) {
            // llama.cpp has one architecture for both.
            (Architecture::Llama, Some(window)) => {
                put("model_type", "mistral".into());
                put("sliding_window", window.into());
            }
            _ => put("model_type", architecture.name().into()),
        }
        put("vocab_size", embedding.shape().first().copied().unwrap_or(0).into());
        put("hidden_size", hidden.into());
        put("intermediate_size", unsigned("feed_forward_length")?.into());
        put("num_hidden_layers", unsigned("block_count")?.into());
        put("num_attention_heads", heads.into());
        put("num_key_value_heads", kv_heads.into());
        put("head_dim", head_dim.into());
        put("max_position_embeddings", max_position_embeddings.into());
        put("rms_norm_eps", file.float(&self.key("attention.layer_norm_rms_epsilon"))?.into());
        put("hidden_act", "silu".into());
        put("tie_word_embeddings", self.info("lm_head.weight").is_none().into());
        let is_mistral = architecture == Architecture::Llama && window.is_some();
        if architecture != Architecture::Qwen2 && !is_mistral {
            put("attention_bias", self.info("model.layers.0.self_attn.q_proj.bias").is_some().into());
        }
        if matches!(architecture, Architecture::Llama | Architecture::SmolLm3) && !is_mistral {
            put("mlp_bias", self.info("model.layers.0.mlp.gate_proj.bias").is_some().into());
        }
        let rope_theta = self.key("rope.freq_base");
        put("rope_theta", if file.has(&rope_theta) { file.float(&rope_theta)? } else { 10_000.0 }.into());
        put("rope_scaling", self.rope_scaling(head_dim, max_position_embeddings)?);
        for (key, name) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
            if let Some(id) = optional(&format!("tokenizer.ggml.{name}_token_id"))? {
                put(key, id.into());
            }
        }
        // A chat model's turns may end with another token than a text.
        let ends = ["eos", "eot"].map(|name| optional(&format!("tokenizer.ggml.{name}_token_id")));
        let [eos, eot] = ends;
        match (eos?, eot?) {
            (Some(eos), Some(eot)) if eos != eot => put("eos_token_id", json!([eos, eot])),
            (Some(id), _) | (None, Some(id)) => put("eos_token_id", id.into()),
            (None, None) => {}
        }
        Ok(config)
    }

    /// HF's `rope_scaling`, null where the frequencies are not scaled.
    fn rope_scaling(&self, head_dim: u64, max_position_embeddings: u64) -> Result<Value> {
        let file = self.file();
        for key in NOT_READ.map(|key| self.key(key)) {
            ensure!(!file.has(&key), "metadata `{key}` has no counterpart in HF's config");
        }
        let float = |key: &str| file.float(&self.key(key));
        let kind = self.key("rope.scaling.type");
        let kind = if file.has(&kind) { file.text(&kind)? } else { "none" };
        if let Some(info) = file.info(ROPE_FREQS) {
            ensure!(kind == "none", "both tensor `{ROPE_FREQS}` and rope scaling `{kind}` scale the frequencies");
            let expected = [usize::try_from(head_dim)? / 2];
            ensure!(info.shape() == expected, "tensor `{ROPE_FREQS}` is {:?}, expected {expected:?}", info.shape());
            let factors = file.tensor(ROPE_FREQS)?.into_iter().map(shortest).collect::<Result<Vec<f64>>>()?;
            return Ok(json!({
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": max_position_embeddings,
            }));
        }
        Ok(match kind {
            "none" => Value::Null,
            "linear" => json!({ "rope_type": "linear", "factor": float("rope.scaling.factor")? }),
            "yarn" => {
                let mut scaling = json!({ "rope_type": "yarn", "factor": float("rope.scaling.factor")? });
                let original = file.unsigned(&self.key("rope.scaling.original_context_length"))?;
                scaling["original_max_position_embeddings"] = original.into();
                for beta in ["beta_fast", "beta_slow"] {
                    let key = format!("rope.scaling.yarn_{beta}");
                    if file.has(&self.key(&key)) {
                        scaling[beta] = float(&key)?.into();
                    }
                }
                scaling
            }
            _ => anyhow::bail!("rope scaling is `{kind}`, known are none, linear, yarn"),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::llm::tests::MODELS;
    use crate::{Gguf, Llm};

    #[test]
    fn the_metadata_is_hfs_config() {
        let of = |idx: usize| Llm::new(Gguf::parse(MODELS[idx].1).unwrap()).unwrap().config().unwrap();
        let common = |model_type: &str| {
            json!({
                "model_type": model_type, "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
                "rope_theta": 500000.0, "rope_scaling": null, "bos_token_id": 1,
            })
        };
        let mut llama = common("llama");
        // What HF computes for llama3's factor 8, low 1, high 4, original 64, by which it divides the frequencies.
        let factors = of(0)["rope_scaling"]["long_factor"].clone();
        llama["rope_scaling"] = json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
            "original_max_position_embeddings": 4096,
        });
        llama["tie_word_embeddings"] = false.into();
        llama["attention_bias"] = true.into();
        llama["mlp_bias"] = false.into();
        llama["eos_token_id"] = json!([2, 3]);
        assert_eq!(json!(of(0)), llama);
        let factors: Vec<f64> = serde_json::from_value(factors).unwrap();
        assert!(factors[0] == 1.0 && factors[3] == 8.0 && factors.len() == 4, "{factors:?}");

        let mut qwen2 = common("qwen2");
        qwen2["tie_word_embeddings"] = true.into();
        qwen2["eos_token_id"] = 2.into();
        qwen2["rope_scaling"] = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
        });
        assert_eq!(json!(of(1)), qwen2);

        let mut qwen3 = common("qwen3");
        qwen3["tie_word_embeddings"] = true.into();
        qwen3["attention_bias"] = false.into();
        qwen3["head_dim"] = 16.into();
        qwen3["eos_token_id"] = 2.into();
        assert_eq!(json!(of(2)), qwen3);
    }
}
