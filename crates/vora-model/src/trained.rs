//! What a run trained, on disk, without what stayed frozen: the adapter as PEFT has it, an LLM trained whole, what sees,
//! and a config that says what they belong to. A run's `final/` and its checkpoints are such folders; a whole model is
//! one as well where all its weights were trained.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_lora::{AdapterFolder, LoraConfig};
use vora_torch::safetensors::Checkpoint;
use vora_torch::weights::{Init, Weights};
use vora_vision::Encoder;

use crate::chameleon::VQMODEL;
use crate::{Chameleon, Llava, LlavaConfig, VisionLanguageModel, Vora, VoraConfig};

/// What sees, by its names in the model's folder: patch embedding and heads, projection, or image tokenizer.
pub const VISION: &str = "vision.safetensors";

/// The LLM, by its own names, where its weights were trained.
pub const LLM: &str = "llm.safetensors";

/// A model all of whose weights were trained: then the folder is a plain one, which runs by itself.
pub const MODEL: &str = "model.safetensors";

/// Finds the folder of a model by the name that a config knows it by.
pub type Resolve<'a> = dyn Fn(&str) -> Result<PathBuf> + 'a;

/// Named tensors, parted by the file that they go into.
#[derive(Debug, Default)]
pub struct Parts {
    /// The adapter, by its names in the LLM.
    pub adapter: Vec<(String, Tensor)>,
    /// Weights of the LLM itself, by its own names.
    pub llm: Vec<(String, Tensor)>,
    /// What sees.
    pub vision: Vec<(String, Tensor)>,
    /// A whole model.
    pub whole: Vec<(String, Tensor)>,
}

impl Parts {
    /// Parts what stands in a model's folder, its LLM behind `llm_prefix`; the LLM's names lose it.
    pub fn of(parameters: Vec<(String, Tensor)>, llm_prefix: &str) -> Self {
        let mut parts = Self::default();
        for (name, tensor) in parameters {
            match name.strip_prefix(llm_prefix).map(str::to_owned) {
                Some(name) if name.contains(".lora_") => parts.adapter.push((name, tensor)),
                Some(name) => parts.llm.push((name, tensor)),
                None => parts.vision.push((name, tensor)),
            }
        }
        // An LLM that is trained has weights among what is trained. Biases alone are those of a published model's adapted
        // layers, for which neither PEFT nor the LLM's own layout has a place: they go with what sees.
        if parts.llm.iter().all(|(name, _)| name.ends_with(".bias")) {
            let biases = parts.llm.drain(..).map(|(name, tensor)| (format!("{llm_prefix}{name}"), tensor));
            parts.vision.extend(biases);
        }
        parts
    }

    /// Copies the values in `folder` into these tensors, in place.
    ///
    /// # Errors
    /// Where one is missing or has another shape, and where there is one of no use but the teacher's heads.
    pub fn fill_from(&self, folder: &Path) -> Result<()> {
        if !self.adapter.is_empty() {
            let saved = AdapterFolder::open(folder)?.weights(Device::Cpu, Kind::Float)?;
            copy(&self.adapter, &saved)?;
            saved.finish()?;
        }
        for (tensors, file) in [(&self.llm, LLM), (&self.vision, VISION), (&self.whole, MODEL)] {
            if !tensors.is_empty() {
                let saved = Weights::open(&folder.join(file), Device::Cpu, Kind::Float)?;
                copy(tensors, &saved)?;
                // A model that is not in training has no heads.
                saved.finish_allowing(|name| name.starts_with("aux_vision."))?;
            }
        }
        Ok(())
    }
}

/// Copies saved values in place; what is missing or misshapen is told by the source's `finish`.
fn copy(tensors: &[(String, Tensor)], saved: &Weights) -> Result<()> {
    for (name, tensor) in tensors {
        let value = saved.get(name, &tensor.size(), Init::Required)?;
        tch::no_grad(|| tensor.shallow_clone().copy_(&value));
    }
    Ok(())
}

/// Whether a folder has a part of a model, and not all of it.
pub fn is_part(folder: &Path) -> bool {
    folder.join(VISION).exists()
}

/// Whether a folder has all of a model's weights, in one file or in several.
pub fn is_whole(folder: &Path) -> bool {
    [MODEL, "model.safetensors.index.json"].iter().any(|file| folder.join(file).exists())
}

/// The kind that the LLM of a such a folder is stored in: its own folder's, or f32 where it was trained.
pub fn stored_kind(folder: &Path, resolve: &Resolve<'_>) -> Result<Kind> {
    let path = if is_whole(folder) {
        folder.to_owned()
    } else {
        llm_path(folder, &crate::folder::read_config(folder)?, resolve)?
    };
    let checkpoint = Checkpoint::open(&path)?;
    let norm = ["model.norm.weight", "llm.model.norm.weight", "norm.weight"]
        .into_iter()
        .find_map(|name| checkpoint.info(name));
    let kind = norm.map(|(kind, _)| kind);
    kind.with_context(|| format!("{} has no model.norm.weight", path.display()))
}

/// Opens such a folder, whose config is `config`, its adapters still apart from the weights.
pub(crate) fn open(
    folder: &Path,
    config: &Map<String, Value>,
    device: Device,
    kind: Kind,
    resolve: &Resolve<'_>,
) -> Result<Box<dyn VisionLanguageModel>> {
    let new = Weights::random(0, device, kind);
    let llm = || Weights::open(&llm_path(folder, config, resolve)?, device, kind);
    let finished = |llm: &Weights| llm.finish().with_context(|| format!("loading the LLM of {}", folder.display()));
    let model: Box<dyn VisionLanguageModel> = match config.get("model_type").and_then(Value::as_str) {
        Some("vora") => {
            let llm = llm()?;
            let model = Vora::assemble(VoraConfig::open(folder)?, &llm, &new)?;
            finished(&llm)?;
            Box::new(model)
        }
        Some("llava") => {
            let llm = llm()?;
            let config = LlavaConfig::open(folder)?;
            let encoder = resolve(&config.mm_vision_tower)
                .and_then(|tower| Encoder::open(&tower, device, kind))
                .with_context(|| format!("the encoder of {}", folder.display()))?;
            let model = Llava::assemble(config, &llm, encoder, &new)?;
            finished(&llm)?;
            Box::new(model)
        }
        Some("chameleon") => {
            let (llm, vision) = (folder.join(LLM), folder.join(VISION));
            let (llm, vision) = (Weights::open(&llm, device, kind)?, Weights::open(&vision, device, kind)?);
            let model = Chameleon::assemble(&LlmConfig::open(folder)?, &llm, &vision.pp(VQMODEL))?;
            llm.finish()?;
            vision.finish()?;
            return Ok(Box::new(model));
        }
        other => bail!(
            "{}: model_type is {other:?}, what is trained here is `vora`, `llava` or `chameleon`",
            folder.join("config.json").display()
        ),
    };
    expect(folder, model.lora())?;
    Parts::of(new.parameters(), model.llm_prefix()).fill_from(folder)?;
    Ok(model)
}

/// Where the LLM's weights lie: those that were trained, else the folder that the run took it from.
///
/// # Errors
/// Where the config names no LLM, or `resolve` does not find it.
pub fn llm_path(folder: &Path, config: &Map<String, Value>, resolve: &Resolve<'_>) -> Result<PathBuf> {
    let trained = folder.join(LLM);
    if trained.exists() {
        return Ok(trained);
    }
    let name = config.get("llm").and_then(Value::as_str);
    let name = name.with_context(|| format!("config.json of {} has no `llm`", folder.display()))?;
    resolve(name).with_context(|| format!("the LLM of {}", folder.display()))
}

/// An error where a folder's adapter, of which there must be one, is of another configuration.
pub fn expect(folder: &Path, lora: Option<&LoraConfig>) -> Result<()> {
    lora.map_or(Ok(()), |lora| AdapterFolder::open(folder)?.expect(lora))
}
