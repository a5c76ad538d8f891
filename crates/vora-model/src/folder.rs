//! Model folders: `config.json`, which says what a model is, and `model.safetensors`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};
use vora_files::checksums;
use vora_files::write_bytes;
use vora_torch::safetensors::save;

use crate::trained::{self, Resolve};
use crate::{Chameleon, Llava, VisionLanguageModel, Vora};

/// Opens the folder of a model of any kind known here, by the `model_type` in its `config.json`: a whole one, merged or
/// published, or what a run trained (its `final/`, or a checkpoint), whose adapters then stay apart from the weights.
/// `resolve` finds the folders of LLM and encoder by the names that such a run knew them by. Checksums that a folder has
/// are compared.
///
/// # Errors
/// Names the file, and what in it does not fit.
pub fn open(folder: &Path, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Box<dyn VisionLanguageModel>> {
    let json = read_config(folder)?;
    checksums::verify(folder)?;
    if trained::is_part(folder) {
        return trained::open(folder, &json, device, kind, resolve);
    }
    Ok(match json.get("model_type").and_then(Value::as_str) {
        Some("vora") => Box::new(Vora::open(folder, device, kind)?),
        Some("llava") => Box::new(Llava::open(folder, device, kind)?),
        Some("chameleon") => Box::new(Chameleon::open(folder, device, kind)?),
        other => bail!(
            "model_type of {} is {}, known are vora, llava, chameleon",
            folder.join("config.json").display(),
            other.map_or_else(|| "missing".to_owned(), |name| format!("`{name}`"))
        ),
    })
}

/// Whether a folder is that of a model known here, not that of a language model alone.
///
/// # Errors
/// Where it has no readable `config.json`.
pub fn is_vision_language_model(folder: &Path) -> Result<bool> {
    let json = read_config(folder)?;
    let model_type = json.get("model_type").and_then(Value::as_str);
    Ok(model_type.is_some_and(|name| ["vora", "llava", "chameleon"].contains(&name)))
}

/// The object in `config.json`.
pub(crate) fn read_config(folder: &Path) -> Result<Map<String, Value>> {
    let path = folder.join("config.json");
    let text = std::fs::read(&path)
        .with_context(|| format!("cannot read {}; a model is a folder with config.json in it", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a JSON object", path.display()))
}

/// A config's keys.
pub(crate) fn to_object(value: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(value)? {
        Value::Object(map) => Ok(map),
        other => bail!("{other} is no JSON object"),
    }
}

/// `config.json` and `model.safetensors`, each written beside its place and renamed.
pub(crate) fn save_folder(folder: &Path, config: &Value, tensors: &[(String, Tensor)]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    save(&folder.join("model.safetensors"), tensors, &[])?;
    write_bytes(&folder.join("config.json"), &serde_json::to_vec_pretty(config)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use vora_llm::LlmConfig;
    use vora_torch::weights::Weights;

    use crate::VoraConfig;

    #[test]
    fn a_folder_is_opened_by_its_model_type() {
        let root = tempfile::tempdir().unwrap();
        let nowhere = |name: &str| bail!("{name} is nowhere");
        let open = |name: &str| open(&root.path().join(name), Device::Cpu, Kind::Float, &nowhere);
        let config = VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8);
        let vora = Vora::load(config, &Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        vora.save(&root.path().join("vora")).unwrap();
        let golden = fixtures::open("chameleon");
        let configs = std::fs::read(fixtures::root().join("golden/chameleon.json")).unwrap();
        let configs: Value = serde_json::from_slice(&configs).unwrap();
        save_folder(&root.path().join("chameleon"), &configs["pre"], &golden.under("weights.")).unwrap();
        let golden = fixtures::open("llava");
        let configs = std::fs::read(fixtures::root().join("golden/llava.json")).unwrap();
        let configs: Value = serde_json::from_slice(&configs).unwrap();
        save_folder(&root.path().join("llava"), &configs["clip"], &golden.under("clip.weights.")).unwrap();
        for (name, llm_prefix) in [("vora", "llm."), ("chameleon", ""), ("llava", "language_model.")] {
            let model = open(name).unwrap();
            assert_eq!(model.config_json().unwrap()["model_type"], name);
            assert!(is_vision_language_model(&root.path().join(name)).unwrap());
            assert_eq!(model.llm_prefix(), llm_prefix);
            let first = format!("{llm_prefix}model.layers.0.self_attn.q_proj.weight");
            assert!(model.tensors().unwrap().iter().any(|(name, _)| *name == first), "{first}");
        }

        for (name, config, expected) in [
            ("other", json!({"model_type": "paligemma"}), "is `paligemma`, known are vora, llava, chameleon"),
            ("none", json!({}), "config.json is missing, known are vora, llava, chameleon"),
        ] {
            save_folder(&root.path().join(name), &config, &[]).unwrap();
            assert!(!is_vision_language_model(&root.path().join(name)).unwrap());
            let error = open(name).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = open("nowhere").unwrap_err().to_string();
        assert!(error.ends_with("config.json; a model is a folder with config.json in it"), "{error}");
    }
}
