//! The trained part of a model on disk, without what stayed frozen: PEFT adapter, an LLM trained whole, vision weights,
//! and a config that says what they belong to. A run's `final/` and its checkpoints are such folders; a whole model is
//! one as well where all its weights were trained.

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use vora_lora::{AdapterFolder, LoraConfig, adapted_module};
use vora_torch::weights::{Init, Weights};

use crate::model::VisionLanguageModel;

/// The vision weights, by their names in the model's folder: patch embedding and heads, projection, or image tokenizer.
pub const VISION: &str = "vision.safetensors";

/// The LLM, by its own names, where its weights were trained.
pub const LLM: &str = "llm.safetensors";

/// A model all of whose weights were trained: then the folder is a plain one, which runs by itself.
pub const MODEL: &str = "model.safetensors";

/// Named tensors, parted by the file that they go into.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Parts {
    /// The adapter, by its names in the LLM.
    pub adapter: Vec<(String, Tensor)>,
    /// Weights of the LLM itself, by its own names.
    pub llm: Vec<(String, Tensor)>,
    /// Vision weights.
    pub vision: Vec<(String, Tensor)>,
    /// A whole model.
    pub whole: Vec<(String, Tensor)>,
}

impl Parts {
    /// A whole model alone.
    pub fn of_whole(whole: Vec<(String, Tensor)>) -> Self {
        Self { whole, ..Self::default() }
    }

    /// Vision weights alone.
    pub fn of_vision(vision: Vec<(String, Tensor)>) -> Self {
        Self { vision, ..Self::default() }
    }

    /// Parts what is trained of `model`, by its names in the model's folder: the LLM's lose what stands before them there,
    /// those of adapters are what PEFT calls them ([`VisionLanguageModel::peft_name`]).
    pub fn of(parameters: Vec<(String, Tensor)>, model: &dyn VisionLanguageModel) -> Self {
        let mut parts = Self::default();
        let llm_prefix = model.llm_prefix();
        for (name, tensor) in parameters {
            let of_adapter = adapted_module(&name).and_then(|_| model.peft_name(&name));
            match (of_adapter, name.strip_prefix(llm_prefix).map(str::to_owned)) {
                (Some(name), _) => parts.adapter.push((name, tensor)),
                (None, Some(name)) => parts.llm.push((name, tensor)),
                (None, None) => parts.vision.push((name, tensor)),
            }
        }
        // An LLM that is trained has weights among what is trained. Biases alone are those of a published model's adapted
        // layers, for which neither PEFT nor the LLM's own layout has a place: they go with the vision weights.
        if parts.llm.iter().all(|(name, _)| name.ends_with(".bias")) {
            let biases = parts.llm.drain(..).map(|(name, tensor)| (format!("{llm_prefix}{name}"), tensor));
            parts.vision.extend(biases);
        }
        parts
    }

    /// The same parts, each as `map` makes it anew.
    #[must_use]
    pub fn map(self, map: impl Fn(Vec<(String, Tensor)>) -> Vec<(String, Tensor)>) -> Self {
        let Self { adapter, llm, vision, whole } = self;
        Self { adapter: map(adapter), llm: map(llm), vision: map(vision), whole: map(whole) }
    }

    /// Copies the values in `folder` into these tensors, in place.
    ///
    /// # Errors
    /// Where one is missing or has another shape, and where there is one of no use but the teacher's heads and the encoder's
    /// weights, which [`vision_tower`] reads.
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
                // A model that is not in training has no heads, and its encoder was opened with what was trained of it.
                saved.finish_allowing(|name| name.starts_with("aux_vision.") || name.starts_with("vision_tower."))?;
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

/// The weights of the encoder that were trained, by its own names; none where it stayed frozen.
///
/// # Errors
/// Where the folder has no vision weights that can be read.
pub fn vision_tower(folder: &Path) -> Result<Vec<(String, Tensor)>> {
    let vision = Weights::open(&folder.join(VISION), Device::Cpu, Kind::Float)?;
    vision.pp("vision_tower").stored()
}

/// Compares a folder's adapter, which it must have where `lora` is some, with `lora`.
///
/// # Errors
/// Where there is none, or it is of another configuration; see [`AdapterFolder::expect`].
pub fn expect(folder: &Path, lora: Option<&LoraConfig>) -> Result<()> {
    lora.map_or(Ok(()), |lora| AdapterFolder::open(folder)?.expect(lora))
}
