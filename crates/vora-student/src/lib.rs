//! What learns and what it learns from: a model that sees in one of the ways known here with its losses (cross-entropy, for
//! preferences DPO's, a Chameleon's z-loss) and, for a VoRA, its distillation heads and their frozen teacher. [`Student`] is
//! the file to read first. Model and teacher may each be a program's own: [`Student::from_parts`], [`Teacher`].
//!
//! It takes no step and writes no file: gradients, optimizer, checkpoints and everything that makes steps a run live in
//! `vora-train`.
//!
//! What libtorch needs in a project of your own: [`vora_torch`].
//!
//! ```no_run
//! use std::path::{Path, PathBuf};
//!
//! use tch::{Device, Kind};
//! use vora_recipe::TrainConfig;
//! use vora_student::Student;
//!
//! # fn main() -> anyhow::Result<()> {
//! let config = TrainConfig::open(Path::new("run.yaml"), &[])?;
//! let student = Student::new(&config, Device::Cpu, Kind::Float, &|name| Ok(PathBuf::from(name)))?;
//! println!("{} tensors are trained", student.parameters().len());
//! # Ok(())
//! # }
//! ```

mod batch;
mod chameleon;
mod distill;
mod fitted;
mod gemma4;
pub mod heads;
mod llava;
mod logits;
mod open;
mod opening;
pub mod parts;
mod pictures;
mod preference;
mod preparation;
mod student;
mod teacher;
mod teacher_cache;
mod vora;

pub use batch::DeviceBatch;
pub use distill::Distill;
pub use logits::logits_rows;
pub use pictures::Pictures;
pub use preference::Rewards;
pub use preparation::{llm_folder, preparation};
pub use student::{Losses, Student, StudentParts};
pub use tch;
pub use teacher::Teacher;
