//! What a student is opened with, whichever way it sees.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind};
use vora_files::tell_once;
use vora_model::Resolve;
use vora_recipe::TrainConfig;
use vora_torch::dist::{ProcessGroup, Shards};
use vora_torch::weights::{Quantization, Weights};
use vora_vision::Encoder;

use crate::pictures::Pictures;

/// A run file with what is known before a model is opened.
pub(crate) struct Opening<'a> {
    pub(crate) config: &'a TrainConfig,
    pub(crate) llm_folder: PathBuf,
    pub(crate) pictures: Pictures,
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) resolve: &'a Resolve<'a>,
    /// Whether folders may lack their weights, as the model is only counted.
    pub(crate) may_lack_weights: bool,
    /// The processes that share the LLM's frozen weights.
    pub(crate) group: Option<&'a Arc<ProcessGroup>>,
}

impl Opening<'_> {
    /// Whether the model is one of shapes alone: where one of its folders lacks the weights, and may.
    pub(crate) fn is_outline<'p>(&'p self, others: impl IntoIterator<Item = &'p PathBuf>) -> bool {
        self.may_lack_weights && others.into_iter().chain([&self.llm_folder]).any(|folder| lacks_weights(folder))
    }

    /// The LLM's weights as they are on disk.
    pub(crate) fn llm(&self, is_outline: bool) -> Result<Weights> {
        if is_outline {
            Ok(Weights::shapes(self.kind))
        } else {
            Weights::open(&self.llm_folder, self.device, self.kind)
        }
    }

    /// What the run makes anew.
    pub(crate) fn new_weights(&self, is_outline: bool) -> Weights {
        if is_outline {
            return Weights::shapes(self.kind);
        }
        Weights::random(self.config.seed, self.device, self.kind)
    }

    /// The teacher in `folder`, which may lack its weights where the student is an outline.
    pub(crate) fn teacher(&self, folder: &Path, is_outline: bool) -> Result<Encoder> {
        let opened = match is_outline && lacks_weights(folder) {
            true => Encoder::outline(folder, self.kind),
            false => Encoder::open(folder, self.device, self.kind),
        };
        opened.context("model.aux_vision")
    }

    /// The same source of an LLM that stays frozen: in few bits where the run file says so, in shares where processes share
    /// it.
    ///
    /// # Errors
    /// Where it has few bits already; names the key.
    pub(crate) fn frozen(&self, weights: &Weights) -> Result<Weights> {
        let section = &self.config.model;
        if let Some(key) = section.few_bits_key() {
            let quantization = if section.load_in_4bit { Quantization::Nf4 } else { Quantization::Int8 };
            if weights.device() == Device::Cpu {
                tell_once(format!(
                    "{key}: there is no kernel for few bits on the CPU: weights are made whole again for each product, which \
                     saves memory and makes steps slower"
                ));
            }
            ensure!(self.group.is_none(), "zero_stage 3 shares out plain weights, and {key} keeps them in few bits");
            return weights.quantized(quantization).context(key);
        }
        Ok(self.group.map_or_else(|| weights.clone(), |group| weights.sharded(&Shards::new(group))))
    }
}

/// Whether a model's folder has its config and no weights yet.
fn lacks_weights(folder: &Path) -> bool {
    let is_weights = |name: &Path| name.extension().is_some_and(|end| end == "safetensors" || end == "gguf");
    let mut files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    folder.join("config.json").exists() && !files.any(|file| is_weights(&file.path()))
}
