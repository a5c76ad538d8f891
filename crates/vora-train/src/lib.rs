//! Training a model that sees, a VoRA, a LLaVA or a Chameleon: the language loss at supervised positions, for a VoRA
//! block-wise distillation from a vision transformer, for a Chameleon its image tokenizer and z-loss, AdamW over f32
//! masters, and what makes steps a run: schedule, metrics, checkpoints that survive a crash, resuming bit for bit,
//! evaluation beside a blind control. [`Trainer`] is the file to read first.
//!
//! It draws no progress bar and catches no signal (its caller does, through [`Progress`] and
//! [`Options::stop`]), downloads nothing, answers no question (the LLM writes the texts of its own anchor), and merges nothing.
//!
//! ```
//! use vora_train::TrainConfig;
//!
//! # fn main() -> anyhow::Result<()> {
//! let yaml = "
//! output_dir: runs/example
//! max_steps: 100
//! warmup_steps: 10
//! lr_scheduler_type: cosine
//! model:
//!   llm: HuggingFaceTB/SmolLM2-135M-Instruct
//!   patch_size: 14
//!   image_size: 56
//!   lora: { layers: 12, r: 32 }
//! data:
//!   train: { scenes: {} }
//! ";
//! let config = TrainConfig::parse(yaml, &["model.lora.r=64".to_owned()])?;
//! assert_eq!(config.model.lora.as_ref().map(|lora| lora.r), Some(64));
//! assert_eq!(config.schedule(100).factor(5), 0.5); // halfway through the warm-up
//!
//! let error = TrainConfig::parse(&yaml.replace("r: 32", "rank: 32"), &[]).unwrap_err();
//! assert!(error.to_string().contains("unknown field `rank`"));
//! # Ok(())
//! # }
//! ```

mod anchor;
pub mod config;
pub mod data;
pub mod observe;
pub mod run;
pub mod step;
pub mod student;

pub use config::run::TrainConfig;
pub use run::plan::{Measured, Plan};
pub use run::progress::{Progress, Silent};
pub use run::size::{BatchShape, Memory, Parameters, Size, TeacherCacheSize};
pub use run::state::TrainerState;
pub use run::trainer::{NotFinite, Options, Outcome, Trainer};
