//! The trainer: both losses, one backward pass, one AdamW step, and everything around them that makes a run.

mod files;
mod not_finite;
mod options;
mod resume;
mod save;
mod step;
mod teacher;
#[cfg(test)]
mod tests;
#[expect(clippy::module_inception, reason = "the trainer is what the room is for")]
mod trainer;

pub use not_finite::NotFinite;
pub use options::{Options, Outcome};
pub use trainer::Trainer;
