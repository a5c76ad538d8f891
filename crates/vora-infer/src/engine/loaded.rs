//! What the engine's thread has open.

use vora_model::VisionLanguageModel;

use super::prefix::Keys;
use crate::Constraint;
use crate::prompter::Prompter;

/// What answers are made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded<'a> {
    pub(super) model: &'a dyn VisionLanguageModel,
    pub(super) prompter: &'a Prompter,
    /// Of a model that writes pictures: what an answer may be made of.
    pub(super) constraints: Option<&'a [Constraint<'a>]>,
    pub(super) keys: &'a Keys,
}
