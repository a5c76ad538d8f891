//! A language model that sees nothing, on the interface of those that do.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use vora_llm::{CausalLm, LlmConfig, VisionAttention};
use vora_torch::weights::Weights;

use crate::adapted::AdaptedLlm;
use crate::few_bits::describe;
use crate::model::VisionLanguageModel;

/// A plain language model, as its folder on the hub has it: it is asked, evaluated and adapted as the others are, and
/// takes no picture.
#[derive(Debug)]
pub struct PlainLlm {
    llm: AdaptedLlm,
}

impl PlainLlm {
    /// Around a decoder.
    pub fn new(llm: CausalLm) -> Self {
        Self { llm: AdaptedLlm::new(llm) }
    }

    /// Opens a folder with `config.json` and safetensors, or a GGUF file: see [`Weights::keeping_blocks`].
    ///
    /// # Errors
    /// Names the file, and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let weights = Weights::open(folder, device, kind)?.keeping_blocks();
        let llm = CausalLm::load(&LlmConfig::open(folder)?, &weights)?;
        weights.finish()?;
        Ok(Self::new(llm))
    }
}

impl VisionLanguageModel for PlainLlm {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    fn vision_attention(&self) -> VisionAttention {
        VisionAttention::Causal
    }

    fn sees(&self) -> bool {
        false
    }

    /// # Errors
    /// Always: it sees nothing.
    fn image_grid(&self, _: i64, _: i64) -> Result<(i64, i64)> {
        bail!("a {} is a language model alone, which takes no picture", self.llm().config().model_type)
    }

    /// # Panics
    /// Always, as [`image_grid`](Self::image_grid) refuses every size.
    fn image_features(&self, _: &Tensor) -> Tensor {
        unreachable!("no picture passes image_grid")
    }

    fn llm_prefix(&self) -> &'static str {
        ""
    }

    fn config_json(&self) -> Result<Value> {
        let mut json = serde_json::to_value(self.llm().config())?;
        describe(&self.llm, &mut json);
        Ok(json)
    }

    /// The decoder's own, adapters beside their weights.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = self.llm().stored()?;
        tensors.extend(self.llm.adapter_tensors()?);
        Ok(tensors)
    }
}
