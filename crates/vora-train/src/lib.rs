//! Training a model that sees, a VoRA, a LLaVA or a Chameleon: the language loss at supervised positions, for a VoRA
//! block-wise distillation from a vision transformer, for a Chameleon its image tokenizer and z-loss, AdamW over f32
//! masters, and what makes steps a run: schedule, metrics, checkpoints that survive a crash, resuming bit for bit,
//! evaluation beside a blind control. [`Trainer`] is the file to read first.
//!
//! It draws no progress bar and catches no signal (its caller does, through [`metrics::Progress`] and
//! [`Options::stop`]), downloads nothing, generates no text, and merges nothing.
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

pub mod best;
pub mod block_maps;
pub mod board;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod data_config;
pub mod distill;
pub mod ema;
pub mod eval;
pub mod loss;
pub mod loss_scale;
pub mod metrics;
pub mod model_config;
pub mod optim;
pub mod perplexity;
mod pictures;
pub mod plan;
pub mod plot;
pub mod preparation;
pub mod report;
pub mod results;
pub mod samples;
pub mod saved;
pub mod schedule;
pub mod scores;
pub mod student;
pub mod teacher_cache;
pub mod tensorboard;
pub mod trainer;
pub mod tree;
mod vq;

pub use config::TrainConfig;
pub use trainer::{NotFinite, Options, Outcome, Trainer};
