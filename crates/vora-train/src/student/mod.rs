//! What learns and what it learns from: a model that sees in one of the ways known here and, for a VoRA, its
//! distillation heads and their frozen teacher. Either may be a program's own: [`Student::from_parts`], [`Teacher`].

mod batch;
mod chameleon;
mod distill;
mod few_bits;
pub mod heads;
mod llava;
mod logits;
mod open;
pub mod parts;
mod preference;
#[expect(clippy::module_inception, reason = "the student is what the room is for")]
mod student;
mod teacher;
mod teacher_cache;
mod vora;

pub use batch::DeviceBatch;
pub use distill::Distill;
pub(crate) use logits::logits_rows;
pub use preference::Rewards;
pub use student::{Losses, Student, StudentParts};
pub use teacher::Teacher;
