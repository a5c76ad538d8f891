//! The adapters that a request may ask for by name.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vora_lora::{ActsOn, AdapterFolder};
use vora_model::{Resolve, VisionLanguageModel};
use vora_torch::nn::decode::LoraId;

use crate::prompter::Prompter;

/// An adapter over the model's LLM, whose matrices lie beside the LLM's own.
#[derive(Debug)]
pub(crate) struct NamedAdapter {
    pub(crate) name: String,
    pub(crate) id: LoraId,
    pub(crate) acts_on: ActsOn,
    pub(crate) eyes: Option<Eyes>,
}

/// What a VoRA or a LLaVA sees through that was trained with its adapters.
#[derive(Debug)]
pub(crate) struct Eyes {
    /// Without the layers of its LLM, which are the shared one's.
    pub(crate) model: Box<dyn VisionLanguageModel>,
    pub(crate) prompter: Arc<Prompter>,
}

impl NamedAdapter {
    /// Attaches what lies in `folder` to `model` as `id`: PEFT's adapter, or what a run trained.
    ///
    /// # Errors
    /// What in the folder does not fit the model, or cannot act on some rows of a batch.
    pub(crate) fn attach(
        model: &mut dyn VisionLanguageModel,
        name: &str,
        id: LoraId,
        folder: &Path,
        resolve: &Resolve<'_>,
    ) -> Result<Self> {
        let name = name.to_owned();
        if !folder.join("config.json").exists() {
            model.llm_mut().add_named(id, &AdapterFolder::open(folder)?)?;
            return Ok(Self { name, id, acts_on: ActsOn::All, eyes: None });
        }
        let (device, kind) = (model.llm().device(), model.llm().kind());
        let mut own = vora_model::open(folder, device, kind, resolve)?;
        ensure!(
            own.lora().is_some(),
            "{} has no adapters apart from its weights: serve it by itself",
            folder.display()
        );
        ensure!(
            own.vision_lora().is_none(),
            "{} has adapters on its vision encoder too, which is not shared: serve it by itself",
            folder.display()
        );
        let of_other = || format!("{} was trained over another LLM than the one that is served", folder.display());
        ensure!(own.llm().has_words_of(model.llm()), of_other());
        let prompter = Arc::new(Prompter::open(&*own, folder)?);
        let acts_on = own.adapted().acts_on();
        model.llm_mut().take_named(id, own.llm_mut()).with_context(|| format!("in {}", folder.display()))?;
        own.llm_mut().share_words_of(model.llm());
        Ok(Self { name, id, acts_on, eyes: Some(Eyes { model: own, prompter }) })
    }
}
