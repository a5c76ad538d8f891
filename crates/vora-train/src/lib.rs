//! Combined loss, distillation heads, optimizer, schedule, trainer, checkpoints, evaluation.

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod distill;
pub mod eval;
pub mod loss;
pub mod metrics;
pub mod optim;
pub mod plot;
pub mod samples;
pub mod saved;
pub mod schedule;
pub mod student;
pub mod trainer;

pub use config::TrainConfig;
pub use trainer::{NotFinite, Options, Outcome, Trainer};
