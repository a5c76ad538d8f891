//! Opening a model's folder, whichever model lies in it and whether it lies there whole or in part.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use tch::{Device, Kind};
use vora_files::checksums;
use vora_llm::{LlmConfig, MODEL_TYPES};
use vora_lora::{ADAPTER_TENSORS, LoraConfig};
use vora_torch::checkpoint::Checkpoint;
use vora_torch::weights::Weights;
use vora_vision::Encoder;

use crate::chameleon::{Chameleon, VQMODEL};
use crate::few_bits::tell_of_whole_weights;
use crate::files::{FolderError, Resolve, read_config};
use crate::gemma4::{Gemma4Unified, Gemma4UnifiedConfig};
use crate::llava::{Llava, LlavaConfig};
use crate::model::VisionLanguageModel;
use crate::named;
use crate::plain::PlainLlm;
use crate::trained::{self, LLM, Parts, VISION};
use crate::vora::{Vora, VoraConfig};

/// The models known here, by the `model_type` of their `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModelType {
    Vora,
    Llava,
    Chameleon,
    Gemma4Unified,
    PlainLlm,
}

impl ModelType {
    fn of(config: &Map<String, Value>) -> Option<Self> {
        match config.get("model_type")?.as_str()? {
            "vora" => Some(Self::Vora),
            "llava" => Some(Self::Llava),
            "chameleon" => Some(Self::Chameleon),
            "gemma4_unified" => Some(Self::Gemma4Unified),
            plain if MODEL_TYPES.contains(&plain) => Some(Self::PlainLlm),
            _ => None,
        }
    }
}

/// Opens the folder of any model known here, by the `model_type` in its `config.json`: a whole one, merged or
/// published, a language model alone, or what a run trained (its `final/`, or a checkpoint), whose adapters then stay apart
/// from the weights.
/// `resolve` finds the folders of LLM and encoder by the names that such a run knew them by. Checksums that a folder has
/// are compared. Adapters act on the tokens that the folder says ([`LoraConfig::answers_on`]).
///
/// # Errors
/// Names the file, and what in it does not fit; [`FolderError`] where the folder is no model's.
pub fn open(folder: &Path, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Box<dyn VisionLanguageModel>> {
    let config = read_config(folder)?;
    checksums::verify(folder)?;
    let model_type = ModelType::of(&config).ok_or_else(|| FolderError::UnknownModelType {
        path: folder.join("config.json"),
        model_type: config.get("model_type").and_then(Value::as_str).map(str::to_owned),
    })?;
    let mut model: Box<dyn VisionLanguageModel> = match model_type {
        _ if is_part(folder, model_type) => open_part(folder, model_type, &config, device, kind, resolve)?,
        ModelType::Vora => Box::new(Vora::open(folder, device, kind)?),
        ModelType::Llava => Box::new(Llava::open(folder, device, kind)?),
        ModelType::Chameleon => Box::new(Chameleon::open(folder, device, kind)?),
        ModelType::Gemma4Unified => Box::new(Gemma4Unified::open(folder, device, kind)?),
        ModelType::PlainLlm => Box::new(PlainLlm::open(folder, device, kind)?),
    };
    if let Some(answers_on) = model.lora().map(LoraConfig::answers_on) {
        model.set_acts_on(answers_on)?;
    }
    Ok(model)
}

/// Whether a folder has a part of a model, and not all of it. Of a Gemma 4 that may be adapters alone.
fn is_part(folder: &Path, model_type: ModelType) -> bool {
    trained::is_part(folder) || model_type == ModelType::Gemma4Unified && folder.join(ADAPTER_TENSORS).exists()
}

/// Opens what a run trained: frozen weights from where `resolve` finds them, trained ones from the folder.
fn open_part(
    folder: &Path,
    model_type: ModelType,
    config: &Map<String, Value>,
    device: Device,
    kind: Kind,
    resolve: &Resolve<'_>,
) -> Result<Box<dyn VisionLanguageModel>> {
    let new = Weights::random(0, device, kind);
    let llm = || Weights::open(&llm_path(folder, resolve)?, device, kind);
    let finished = |llm: &Weights| llm.finish().with_context(|| format!("loading the LLM of {}", folder.display()));
    let model: Box<dyn VisionLanguageModel> = match model_type {
        ModelType::Vora => {
            let llm = llm()?;
            let model = Vora::assemble(VoraConfig::open(folder)?, &llm, &new)?;
            finished(&llm)?;
            Box::new(model)
        }
        ModelType::Llava => {
            let llm = llm()?;
            let config = LlavaConfig::open(folder)?;
            let encoder = named::find(folder, "mm_vision_tower", resolve)
                .and_then(|tower| Encoder::open_with(&tower, trained::vision_tower(folder)?, device, kind))
                .with_context(|| format!("the encoder of {}", folder.display()))?;
            let model = Llava::assemble(config, &llm, encoder, &new)?;
            finished(&llm)?;
            Box::new(model)
        }
        ModelType::Chameleon => {
            let (llm, vision) = (folder.join(LLM), folder.join(VISION));
            let (llm, vision) = (Weights::open(&llm, device, kind)?, Weights::open(&vision, device, kind)?);
            let model = Chameleon::assemble(&LlmConfig::open(folder)?, &llm, &vision.pp(VQMODEL))?;
            llm.finish()?;
            vision.finish()?;
            return Ok(Box::new(model));
        }
        ModelType::Gemma4Unified => {
            let (config, vision) = (Gemma4UnifiedConfig::open(folder)?, folder.join(VISION));
            // The file may hold a teacher's heads alone.
            let trains_embedder =
                vision.exists() && Checkpoint::open(&vision)?.names().any(|name| name.starts_with("model."));
            let (base, in_base) = (llm()?, || format!("loading the base of {}", folder.display()));
            Box::new(Gemma4Unified::open_part(config, &base, trains_embedder, &new).with_context(in_base)?)
        }
        ModelType::PlainLlm => return Ok(Box::new(PlainLlm::open(folder, device, kind)?)),
    };
    trained::expect(folder, model.peft_config()?.as_ref())?;
    tell_of_whole_weights(folder, config);
    Parts::of(new.parameters(), &*model).fill_from(folder)?;
    Ok(model)
}

/// Whether a folder is that of a model known here, not that of a language model alone.
///
/// # Errors
/// Where it has no readable `config.json`.
pub fn is_vision_language_model(folder: &Path) -> Result<bool> {
    Ok(ModelType::of(&read_config(folder)?).is_some_and(|model_type| model_type != ModelType::PlainLlm))
}

/// The config of the language model that a run takes from a folder: one alone, or that of a Gemma 4 Unified.
///
/// # Errors
/// Names the file, and the key in it.
pub fn llm_config(folder: &Path) -> Result<LlmConfig> {
    let is_gemma = |config: &Map<String, Value>| ModelType::of(config) == Some(ModelType::Gemma4Unified);
    match read_config(folder) {
        Ok(config) if is_gemma(&config) => Ok(Gemma4UnifiedConfig::open(folder)?.llm),
        _ => LlmConfig::open(folder),
    }
}

/// What the norm behind the LLM's layers is called in folders of every kind: of an LLM, a VoRA, a LLaVA under its published
/// names and under those of transformers 5 (a Gemma 4 has these too), and of an LLM without its head.
const NORMS: [&str; 5] = [
    "model.norm.weight",
    "llm.model.norm.weight",
    "language_model.model.norm.weight",
    "model.language_model.norm.weight",
    "norm.weight",
];

/// The dtype that the LLM of a model's folder is stored in: its own folder's, or f32 where it was trained.
///
/// # Errors
/// Where the config names no LLM, `resolve` does not find it, or it has no norm to tell the dtype by.
pub fn stored_kind(folder: &Path, resolve: &Resolve<'_>) -> Result<Kind> {
    let is_whole = trained::is_whole(folder) || vora_gguf::folder::find(folder)?.is_some();
    let path = if is_whole { folder.to_owned() } else { llm_path(folder, resolve)? };
    let checkpoint = Checkpoint::open(&path)?;
    let norm = NORMS.into_iter().find_map(|name| checkpoint.info(name));
    let kind = norm.map(|(kind, _)| kind);
    kind.with_context(|| format!("{} has no model.norm.weight", path.display()))
}

/// Where the LLM's weights lie: those that were trained, else the folder that the run took it from.
fn llm_path(folder: &Path, resolve: &Resolve<'_>) -> Result<PathBuf> {
    let trained = folder.join(LLM);
    if trained.exists() {
        return Ok(trained);
    }
    named::find(folder, "llm", resolve).with_context(|| format!("the LLM of {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use serde_json::json;
    use vora_llm::CausalLm;

    use vora_torch::weights::Quantization;

    use crate::files::save_folder;

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

        let tiny = |name: &str| fixtures::root().join("tiny").join(name);
        let gemma = super::open(&tiny("gemma4"), Device::Cpu, Kind::Float, &nowhere).unwrap();
        assert!(is_vision_language_model(&tiny("gemma4")).unwrap() && gemma.sees());
        assert_eq!(stored_kind(&tiny("gemma4"), &nowhere).unwrap(), Kind::Float);

        let llm = CausalLm::load(&LlmConfig::tiny(64), &Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        PlainLlm::new(llm).save(&root.path().join("llama")).unwrap();
        let model = open("llama").unwrap();
        assert!(!is_vision_language_model(&root.path().join("llama")).unwrap() && !model.sees());
        let error = model.image_grid(28, 28).unwrap_err().to_string();
        assert_eq!(error, "a llama is a language model alone, which takes no picture");

        let gemma = super::open(&fixtures::root().join("tiny/gemma4"), Device::Cpu, Kind::Float, &nowhere).unwrap();
        gemma.save(&root.path().join("gemma4")).unwrap();

        // Each in few bits, written and opened again.
        for (name, quantization) in [
            ("vora", Quantization::Int8Groups),
            ("vora", Quantization::Int4Groups),
            ("llava", Quantization::Int8Groups),
            ("chameleon", Quantization::Int4Groups),
            ("llama", Quantization::Int4Groups),
            ("gemma4", Quantization::Int8Groups),
        ] {
            let mut model = open(name).unwrap();
            model.adapted_mut().quantize(quantization).unwrap();
            let out = format!("{name}-{quantization:?}");
            model.save(&root.path().join(&out)).unwrap();
            let again = open(&out).unwrap();
            assert_eq!(again.adapted().quantization(), Some(quantization), "{out}");
            let (found, expected) = (again.llm().tensors(), model.llm().tensors());
            assert!(found.iter().zip(&expected).all(|(a, b)| a.0 == b.0 && a.1.equal(&b.1)), "{out}");
            let config = again.config_json().unwrap();
            assert_eq!(config["quantization_config"]["format"], "pack-quantized", "{out}");
        }

        for (name, config, expected) in [
            ("other", json!({"model_type": "paligemma"}), "is `paligemma`, known are vora, llava, chameleon, "),
            ("none", json!({}), "config.json is missing, known are vora, llava, chameleon, "),
        ] {
            save_folder(&root.path().join(name), &config, &[]).unwrap();
            assert!(!is_vision_language_model(&root.path().join(name)).unwrap());
            let error = open(name).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(FolderError::UnknownModelType { .. })), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = open("nowhere").unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(FolderError::NoConfig { .. })), "{error:?}");
        let error = error.to_string();
        assert!(error.ends_with("config.json; a model is a folder with config.json in it, or a GGUF file"), "{error}");
    }
}
