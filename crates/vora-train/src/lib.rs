//! Training a model that sees, a VoRA, a LLaVA or a Chameleon, whose losses are those of [`vora_student`]: AdamW over f32
//! masters, the text anchor, for a Chameleon its image tokenizer, and what makes steps a run: metrics, checkpoints that
//! survive a crash, resuming bit for bit, evaluation beside a blind control. [`Trainer`] is the file to read first.
//!
//! It draws no progress bar and catches no signal (its caller does, through [`Progress`] and
//! [`Options::stop`]), downloads nothing, answers no question (the LLM writes the texts of its own anchor), and merges nothing.
//!
//! Data, teacher and model may each be a program's own: [`Trainer::with_data`], [`Teacher`](vora_student::Teacher),
//! [`Student::from_parts`](vora_student::Student::from_parts); `examples/` at the top of the repository has a program for each.
//!
//! What libtorch needs in a project of your own: [`vora_torch`].
//!
//! ```
//! use vora_recipe::OptimConfig;
//! use vora_train::step::optim::optimizer;
//!
//! # fn main() -> anyhow::Result<()> {
//! let start = tch::Tensor::from_slice(&[1f32, -1.0]).set_requires_grad(true);
//! let config = OptimConfig { learning_rate: 0.1, ..OptimConfig::default() };
//! let mut optimizer = optimizer(vec![("w".to_owned(), start.shallow_clone())], &config)?;
//! start.square().sum(tch::Kind::Float).backward();
//! let norm = optimizer.grad_norm()?.double_value(&[]);
//! optimizer.step(1.0, norm)?; // both go the rate's way, towards 0
//! assert!((start.double_value(&[0]) - 0.9).abs() < 1e-4 && (start.double_value(&[1]) + 0.9).abs() < 1e-4);
//! # Ok(())
//! # }
//! ```

mod anchor;
pub mod data;
pub mod observe;
pub mod run;
pub mod step;
pub use run::batch_shape::BatchShape;
pub use run::blocks::Blocks;
pub use run::parameters::{Adapted, Parameters};
pub use run::plan::{Measured, Plan, Threads};
pub use run::progress::{Progress, Silent};
pub use run::scale::{Scale, Scaled};
pub use run::size::{Memory, Size, TeacherCacheSize};
pub use run::state::TrainerState;
pub use run::trainer::{NotFinite, Options, Outcome, Trainer};
pub use tch;
