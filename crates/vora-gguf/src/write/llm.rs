//! The model's metadata and tensors, under llama.cpp's names and in its order of rows.

use anyhow::{Context, Result, bail, ensure};

use super::file::{MetadataValue, Writer};
use super::model::ModelWriter;
use super::quantise::FileKind;
use crate::llm::{Architecture, ROPE_FREQS, gguf_name};

/// What a file says of the model itself.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "HF's names for them")]
pub struct LlmMetadata {
    /// HF's: `llama`, `mistral`, `qwen2`, `qwen3` or `smollm3`.
    pub model_type: String,
    /// What the model is called.
    pub name: String,
    pub vocab_size: u32,
    pub hidden_size: u32,
    pub intermediate_size: u32,
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub num_key_value_heads: u32,
    pub head_dim: u32,
    pub max_position_embeddings: u32,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// The window of every layer: a Mistral's.
    pub sliding_window: Option<u32>,
}

/// How rotary frequencies are scaled, as far as GGUF has words for it.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by this.
    Linear(f64),
    /// YaRN.
    Yarn {
        /// How many times longer.
        factor: f64,
        /// Length of the first training.
        original_max_position_embeddings: u32,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is scaled whole.
        beta_slow: f64,
    },
    /// What each frequency is divided by: a tensor of the file, and no metadata.
    Factors(Vec<f32>),
}

/// A language model to write: its metadata, tensors, and tokenizer.
#[derive(Debug)]
pub struct LlmWriter {
    pub(super) model: ModelWriter,
    pub(super) vocab_size: usize,
    architecture: Architecture,
}

impl LlmWriter {
    /// A model of this metadata, whose matrices are stored as `kind`, with these tensors by HF's names and shapes.
    ///
    /// # Errors
    /// Where the model type is none that llama.cpp runs, or a tensor is no part of it.
    pub fn new(metadata: &LlmMetadata, kind: FileKind, tensors: &[(String, Vec<usize>)]) -> Result<Self> {
        let LlmMetadata { model_type, head_dim, .. } = metadata;
        let architecture = Architecture::of_model_type(model_type).with_context(|| {
            format!("model_type is `{model_type}`, GGUF files are written of llama, mistral, qwen2, qwen3, smollm3")
        })?;
        let vocab_size = metadata.vocab_size as usize;
        let mut writer = Self { model: ModelWriter::new(kind), vocab_size, architecture };
        writer.put_metadata(metadata);
        if let RopeScaling::Factors(factors) = &metadata.rope_scaling {
            ensure!(factors.len() as u32 * 2 == *head_dim, "{} factors for heads of {head_dim}", factors.len());
            writer.model.add_values(ROPE_FREQS, factors)?;
        }
        for (hf_name, shape) in tensors {
            writer.add(hf_name, shape, metadata)?;
        }
        Ok(writer)
    }

    fn put_metadata(&mut self, metadata: &LlmMetadata) {
        use MetadataValue::{F32, Text, U32};
        let architecture = self.architecture.name();
        let put = |writer: &mut Writer, key: &str, value| writer.put(format!("{architecture}.{key}"), value);
        let kind = self.model.kind;
        let writer = &mut self.model.writer;
        writer.put("general.architecture", Text(architecture.into()));
        writer.put("general.type", Text("model".into()));
        writer.put("general.name", Text(metadata.name.clone()));
        writer.put("general.file_type", U32(kind.file_type()));
        writer.put("general.quantization_version", U32(2));
        for (key, value) in [
            ("block_count", metadata.num_hidden_layers),
            ("context_length", metadata.max_position_embeddings),
            ("embedding_length", metadata.hidden_size),
            ("feed_forward_length", metadata.intermediate_size),
            ("attention.head_count", metadata.num_attention_heads),
            ("attention.head_count_kv", metadata.num_key_value_heads),
            ("attention.key_length", metadata.head_dim),
            ("attention.value_length", metadata.head_dim),
            ("rope.dimension_count", metadata.head_dim),
            ("vocab_size", metadata.vocab_size),
        ] {
            put(writer, key, U32(value));
        }
        put(writer, "attention.layer_norm_rms_epsilon", F32(metadata.rms_norm_eps as f32));
        put(writer, "rope.freq_base", F32(metadata.rope_theta as f32));
        if let Some(window) = metadata.sliding_window {
            put(writer, "attention.sliding_window", U32(window));
        }
        match &metadata.rope_scaling {
            RopeScaling::Default | RopeScaling::Factors(_) => {}
            RopeScaling::Linear(factor) => {
                put(writer, "rope.scaling.type", Text("linear".into()));
                put(writer, "rope.scaling.factor", F32(*factor as f32));
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow } => {
                put(writer, "rope.scaling.type", Text("yarn".into()));
                put(writer, "rope.scaling.factor", F32(*factor as f32));
                put(writer, "rope.scaling.original_context_length", U32(*original_max_position_embeddings));
                put(writer, "rope.scaling.yarn_beta_fast", F32(*beta_fast as f32));
                put(writer, "rope.scaling.yarn_beta_slow", F32(*beta_slow as f32));
            }
        }
    }

    fn add(&mut self, hf_name: &str, shape: &[usize], metadata: &LlmMetadata) -> Result<()> {
        let name =
            gguf_name(hf_name).with_context(|| format!("`{hf_name}` is no part of a {}", metadata.model_type))?;
        let heads = match name.split('.').nth(2) {
            Some("attn_q") => Some(metadata.num_attention_heads),
            Some("attn_k") => Some(metadata.num_key_value_heads),
            _ => None,
        };
        let heads = heads.filter(|_| self.architecture.permutes()).map(|heads| heads as usize);
        let rows = match shape {
            [rows] | [rows, _] => *rows,
            _ => bail!("`{hf_name}` is {shape:?}, expected a vector or a matrix"),
        };
        if let Some(heads) = heads {
            ensure!(
                heads > 0 && rows % heads == 0 && rows / heads % 2 == 0,
                "`{hf_name}` has {rows} rows, which do not split into {heads} heads with two halves each"
            );
        }
        let kind = self.model.kind.of(&name, shape);
        self.model.add(name, hf_name, shape, kind, heads)
    }

    /// The file, with all that it is to hold.
    pub fn finish(self) -> ModelWriter {
        self.model
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::tests::MODELS;
    use crate::{Gguf, Llm};

    fn metadata(model_type: &str, rope_scaling: RopeScaling) -> LlmMetadata {
        LlmMetadata {
            model_type: model_type.into(),
            name: "tiny".into(),
            vocab_size: 24,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: if model_type == "qwen3" { 16 } else { 8 },
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling,
            sliding_window: (model_type == "mistral").then_some(1024),
        }
    }

    /// A file of these tensors, read again.
    fn written(metadata: &LlmMetadata, kind: FileKind, from: &Llm<&[u8]>) -> Llm<Vec<u8>> {
        let tensors: Vec<_> =
            from.names().map(|name| (name.to_owned(), from.info(name).unwrap().shape().to_vec())).collect();
        let writer = LlmWriter::new(metadata, kind, &tensors).unwrap().finish();
        let mut bytes = Vec::new();
        writer.write(&mut bytes, |name| from.tensor(name)).unwrap();
        assert!(writer.size().0 < bytes.len() && writer.size().1 >= tensors.len());
        Llm::new(Gguf::parse(bytes).unwrap()).unwrap()
    }

    #[test]
    fn a_model_of_every_architecture_is_written_and_read() {
        for (idx, rope_scaling) in [
            RopeScaling::Factors(vec![1.0, 2.0, 4.5, 8.0]),
            RopeScaling::Yarn { factor: 4.0, original_max_position_embeddings: 1024, beta_fast: 32.0, beta_slow: 1.0 },
            RopeScaling::Default,
        ]
        .into_iter()
        .enumerate()
        {
            let (model_type, bytes, _) = MODELS[idx];
            let from = Llm::new(Gguf::parse(bytes).unwrap()).unwrap();
            for kind in FileKind::ALL {
                let model = written(&metadata(model_type, rope_scaling.clone()), kind, &from);
                assert!(model.names().eq(from.names()), "{model_type}");
                let mut config = model.config().unwrap();
                let (read, expected) = (config.remove("rope_scaling"), from.config().unwrap());
                assert_eq!(config["tie_word_embeddings"], expected["tie_word_embeddings"]);
                match idx {
                    0 => assert_eq!(read.unwrap()["short_factor"], serde_json::json!([1.0, 2.0, 4.5, 8.0])),
                    1 => assert_eq!(read.unwrap()["factor"], 4.0),
                    _ => assert_eq!(read.unwrap(), serde_json::Value::Null),
                }
                for key in
                    ["hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "model_type"]
                {
                    assert_eq!(config[key], expected[key], "{model_type}: {key}");
                }
                for name in model.names() {
                    let [found, expected] = [model.tensor(name).unwrap(), from.tensor(name).unwrap()];
                    let most = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                    let bound = match kind {
                        FileKind::F32 => 0.0,
                        FileKind::F16 => most / 1000.0,
                        FileKind::BF16 | FileKind::Q8_0 => most / 120.0,
                        FileKind::Q4_0 => most / 7.0,
                    };
                    let largest = found.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
                    assert!(largest <= bound, "{model_type}, {kind:?}: {name} {largest}");
                    let is_matrix = model.info(name).unwrap().shape().len() == 2;
                    assert!(is_matrix || largest == 0.0, "{name} is no matrix, and stays in f32");
                }
            }
        }
    }

    #[test]
    fn a_mistral_is_a_llama_with_a_window() {
        let from = Llm::new(Gguf::parse(MODELS[0].1).unwrap()).unwrap();
        for model_type in ["mistral", "smollm3"] {
            let model = written(&metadata(model_type, RopeScaling::Default), FileKind::F32, &from);
            let architecture = if model_type == "mistral" { "llama" } else { "smollm3" };
            assert_eq!(model.file().text("general.architecture").unwrap(), architecture);
            let config = model.config().unwrap();
            assert_eq!(config["model_type"], model_type);
            assert_eq!(
                config.get("sliding_window").and_then(serde_json::Value::as_u64),
                metadata(model_type, RopeScaling::Default).sliding_window.map(u64::from)
            );
            for name in model.names() {
                assert_eq!(model.tensor(name).unwrap(), from.tensor(name).unwrap(), "{name}");
            }
        }
    }

    #[test]
    fn what_is_no_part_of_it_is_refused() {
        let new = |model_type: &str, name: &str, shape: &[usize]| {
            let tensors = [(name.to_owned(), shape.to_vec())];
            format!(
                "{:#}",
                LlmWriter::new(&metadata(model_type, RopeScaling::Default), FileKind::Q8_0, &tensors).unwrap_err()
            )
        };
        assert!(new("gemma", "x", &[1]).starts_with("model_type is `gemma`, GGUF files are written of llama"));
        assert_eq!(new("llama", "model.layers.0.x.weight", &[1]), "`model.layers.0.x.weight` is no part of a llama");
        let q = "model.layers.0.self_attn.q_proj.weight";
        assert!(new("llama", q, &[12, 32]).contains("12 rows, which do not split into 4 heads"));
        assert!(new("llama", q, &[2, 2, 2]).contains("expected a vector or a matrix"));
    }
}
