//! What the engine's thread has open.

use anyhow::{Context, Result};
use vora_lora::ActsOn;
use vora_model::VisionLanguageModel;
use vora_torch::nn::decode::LoraId;

use super::prefix::Keys;
use crate::Constraint;
use crate::adapters::{Eyes, NamedAdapter};
use crate::prompter::Prompter;
use crate::request::AdapterChoice;

/// What answers are made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded<'a> {
    pub(super) model: &'a dyn VisionLanguageModel,
    pub(super) prompter: &'a Prompter,
    /// Of a model that writes pictures: what an answer may be made of.
    pub(super) constraints: Option<&'a [Constraint<'a>]>,
    pub(super) keys: &'a Keys,
    pub(super) named: &'a [NamedAdapter],
}

/// What one request is answered by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chosen<'a> {
    /// The model, or one with eyes of its own and the model's decoder.
    pub(super) model: &'a dyn VisionLanguageModel,
    pub(super) prompter: &'a Prompter,
    pub(super) id: LoraId,
    /// The tokens that the adapter acts on.
    pub(super) acts_on: ActsOn,
}

impl<'a> Loaded<'a> {
    /// What a request of this choice is answered by.
    ///
    /// # Errors
    /// A name that there is not, which nobody should have let in.
    pub(super) fn chosen(&self, choice: &AdapterChoice) -> Result<Chosen<'a>> {
        let own = |id| {
            let acts_on = self.model.adapted().acts_on();
            Chosen { model: self.model, prompter: self.prompter, id, acts_on }
        };
        let name = match choice {
            AdapterChoice::Own => return Ok(own(LoraId::OWN)),
            AdapterChoice::None => return Ok(own(LoraId::NONE)),
            AdapterChoice::Named(name) => name,
        };
        let named = self.named.iter().find(|named| named.name == *name).context("an adapter that was there is gone")?;
        let chosen = Chosen { acts_on: named.acts_on, ..own(named.id) };
        Ok(match &named.eyes {
            Some(Eyes { model, prompter }) => Chosen { model: &**model, prompter, ..chosen },
            None => chosen,
        })
    }
}
