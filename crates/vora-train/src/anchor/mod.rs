//! The text anchor: texts on which the adapted LLM is held to what it was, and the loss that holds it.

#[expect(clippy::module_inception, reason = "the anchor is what the room is for")]
mod anchor;
mod held;
mod prompts;
mod texts;
mod write;

pub(crate) use anchor::Anchor;
#[cfg(test)]
pub(crate) use held::Held;
pub(crate) use texts::Texts;
