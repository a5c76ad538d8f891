//! A language model as one GGUF file: what its config, its tokenizer and its tensors are there.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use tch::Kind;
use vora_gguf::folder::read_json;
use vora_gguf::write::{FileKind, LlmMetadata, LlmWriter, ModelWriter, RopeScaling as Scaling};
use vora_llm::{LlmConfig, RopeScaling, Rotation};
use vora_text::{ChatTemplate, TextError, Tokenizer};
use vora_torch::checkpoint::TensorInfo;

use super::source::Source;
use super::step::Step;
use crate::beside::{TOKENIZER, TOKENIZER_CONFIG};

/// The only file in the folder that is written.
pub(super) const FILE: &str = "model.gguf";

/// The kind of a file whose matrices stay as most of them are.
pub(super) fn kind_of(most: Option<Kind>) -> FileKind {
    match most {
        Some(Kind::Half) => FileKind::F16,
        Some(Kind::BFloat16) => FileKind::BF16,
        _ => FileKind::F32,
    }
}

/// The file of a language model of this config, whose tensors the steps make.
pub(super) fn plan(source: &Source, config: Map<String, Value>, steps: &[Step], kind: FileKind) -> Result<ModelWriter> {
    let config: LlmConfig = serde_json::from_value(Value::Object(config))?;
    config.validate()?;
    let mut tensors = infos(steps);
    tensors.retain(|(name, _)| !(config.tie_word_embeddings && name == "lm_head.weight"));
    ensure!(
        config.tie_word_embeddings || tensors.iter().any(|(name, _)| name == "lm_head.weight"),
        "there is no lm_head.weight, and config.json does not tie it to the embeddings (tie_word_embeddings)"
    );
    let mut writer = LlmWriter::new(&metadata(&config, name(&source.path))?, kind, &tensors)?;
    let mut folders = [Some(source.path.as_path()), source.side_folder()].into_iter().flatten();
    let folder = folders.find(|folder| read_json::<Value>(folder, TOKENIZER).is_ok_and(|json| !json.is_null()));
    let folder =
        folder.with_context(|| format!("{} has no {TOKENIZER}, which a GGUF file holds too", source.path.display()))?;
    put_tokenizer(&mut writer, folder).with_context(|| format!("the tokenizer of {}", folder.display()))?;
    Ok(writer.finish())
}

/// The tensors to write, by HF's names and shapes.
pub(super) fn infos(steps: &[Step]) -> Vec<(String, Vec<usize>)> {
    let info = |info: TensorInfo| (info.name, info.shape.iter().map(|&dim| dim as usize).collect());
    steps.iter().filter_map(Step::info).map(info).collect()
}

fn put_tokenizer(writer: &mut LlmWriter, folder: &Path) -> Result<()> {
    let (tokenizer, config): (Value, Map<String, Value>) =
        (read_json(folder, TOKENIZER)?, read_json(folder, TOKENIZER_CONFIG)?);
    let template = match ChatTemplate::open(folder) {
        Ok(template) => Some(template),
        Err(error) if matches!(error.downcast_ref(), Some(TextError::NoChatTemplate(_))) => None,
        Err(error) => return Err(error),
    };
    let eos_ids = Tokenizer::open(folder)?.eos_ids().to_vec();
    writer.put_tokenizer(&tokenizer, &config, &eos_ids, template.as_ref().map(ChatTemplate::source))
}

/// A model's name by its folder's, or by the hub's in whose cache it lies.
pub(super) fn name(path: &Path) -> String {
    let mut names = path.components().rev().filter_map(|part| part.as_os_str().to_str());
    let hub = names.clone().find_map(|name| name.strip_prefix("models--")).and_then(|name| name.split("--").last());
    hub.or_else(|| names.next()).unwrap_or("model").trim_end_matches(".gguf").to_owned()
}

/// The config in llama.cpp's words.
///
/// # Errors
/// Names the key that it has no word for.
fn metadata(config: &LlmConfig, name: String) -> Result<LlmMetadata> {
    let (model_type, layers) = (config.model_type.as_str(), config.num_hidden_layers);
    let size = |key: &str, size: i64| u32::try_from(size).with_context(|| format!("{key} is {size}"));
    let window = config.window(0);
    ensure!(
        (0..layers).all(|layer_idx| config.window(layer_idx) == window)
            && (window.is_none() || model_type == "mistral"),
        "some layers of this {model_type} have a sliding window, which is written into GGUF files of mistral alone"
    );
    // `n_no_rope_layer_step` of llama.cpp's SmolLM3.
    let skips = |layer_idx: usize| model_type == "smollm3" && (layer_idx + 1).is_multiple_of(4);
    ensure!(
        (0..layers).all(|layer_idx| config.has_rope(layer_idx) != skips(layer_idx)),
        "no_rope_layers: llama.cpp skips the rotary embedding in every fourth layer of a SmolLM3, and in no other"
    );
    let rotation = config.rotation(false)?;
    Ok(LlmMetadata {
        model_type: model_type.to_owned(),
        name,
        vocab_size: size("vocab_size", config.vocab_size)?,
        hidden_size: size("hidden_size", config.hidden_size)?,
        intermediate_size: size("intermediate_size", config.intermediate_size)?,
        num_hidden_layers: u32::try_from(layers)?,
        num_attention_heads: size("num_attention_heads", config.num_attention_heads)?,
        num_key_value_heads: size("num_key_value_heads", config.kv_heads())?,
        head_dim: size("head_dim", config.head_width())?,
        max_position_embeddings: size("max_position_embeddings", config.max_position_embeddings)?,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: rotation.theta,
        rope_scaling: scaling(&rotation)?,
        sliding_window: window.map(|window| size("sliding_window", window)).transpose()?,
    })
}

/// Llama 3's scaling, and LongRoPE's where it has one list of factors, is what each frequency is divided by.
fn scaling(rotation: &Rotation) -> Result<Scaling> {
    let factors = || {
        let plain = RopeScaling::Default.inv_freq(rotation.head_dim, rotation.theta, 1);
        let scaled = rotation.inv_freq(1);
        Scaling::Factors(plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect())
    };
    Ok(match &rotation.scaling {
        RopeScaling::Default => Scaling::Default,
        RopeScaling::Linear { factor } => Scaling::Linear(*factor),
        RopeScaling::Llama3 { .. } => factors(),
        RopeScaling::LongRope { short_factor, long_factor, attention_factor, .. } => {
            ensure!(
                short_factor == long_factor && *attention_factor == 1.0,
                "rope type longrope: llama.cpp has one list of factors for this model and no attention_factor"
            );
            factors()
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => {
            let usual = 0.1 * factor.ln() + 1.0;
            ensure!(
                *truncate && (attention_factor - usual).abs() < 1e-6,
                "rope type yarn: llama.cpp has an attention_factor of {usual} and a ramp that ends at whole dimensions, \
                 this model {attention_factor} and truncate {truncate}"
            );
            Scaling::Yarn {
                factor: *factor,
                original_max_position_embeddings: u32::try_from(*original_max_position_embeddings)?,
                beta_fast: *beta_fast,
                beta_slow: *beta_slow,
            }
        }
        other => bail!("rope scaling {other:?} has no word in GGUF"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_is_said_in_llama_cpps_words_or_refused() {
        let said = |change: &dyn Fn(&mut LlmConfig)| {
            let mut config = LlmConfig::tiny(64);
            change(&mut config);
            metadata(&config, "tiny".into()).map_err(|error| format!("{error:#}"))
        };
        let plain = said(&|_| {}).unwrap();
        assert_eq!((plain.head_dim, plain.num_key_value_heads, plain.rope_scaling), (8, 2, Scaling::Default));
        let mistral =
            said(&|config| (config.model_type, config.sliding_window) = ("mistral".into(), Some(16))).unwrap();
        assert_eq!(mistral.sliding_window, Some(16));
        let with_rope =
            |json: Value| said(&|config| config.rope_scaling = serde_json::from_value(json.clone()).unwrap());
        let llama3 = serde_json::json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        let Scaling::Factors(factors) = with_rope(llama3).unwrap().rope_scaling else { panic!("no factors") };
        assert!(factors[0] == 1.0 && factors[3] == 8.0, "{factors:?}");
        let yarn = serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
        assert!(matches!(with_rope(yarn.clone()).unwrap().rope_scaling, Scaling::Yarn { .. }));
        let mut warmer = yarn;
        warmer["attention_factor"] = 2.0.into();
        assert!(with_rope(warmer).unwrap_err().contains("this model 2 and truncate true"));
        let dynamic = serde_json::json!({"rope_type": "dynamic", "factor": 4.0});
        assert!(with_rope(dynamic).unwrap_err().ends_with("has no word in GGUF"));
        let windowed = |config: &mut LlmConfig| {
            config.model_type = "qwen2".into();
            (config.use_sliding_window, config.sliding_window, config.max_window_layers) =
                (Some(true), Some(8), Some(1));
        };
        assert!(said(&windowed).unwrap_err().starts_with("some layers of this qwen2 have a sliding window"));
        let skipping = |config: &mut LlmConfig| {
            (config.model_type, config.no_rope_layer_interval) = ("smollm3".into(), Some(2));
        };
        assert!(said(&skipping).unwrap_err().starts_with("no_rope_layers: llama.cpp"));
        let names = ["/a/models--org--Some-1B/snapshots/abc", "runs/mine/llm", "x/model.gguf"]
            .map(|path| name(Path::new(path)));
        assert_eq!(names, ["Some-1B", "llm", "model"]);
    }
}
