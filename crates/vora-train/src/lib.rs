//! Combined loss, distillation heads, optimizer, schedule, trainer, checkpoints, evaluation.

pub mod checkpoint;
pub mod config;
pub mod distill;
pub mod eval;
pub mod loss;
pub mod metrics;
pub mod optim;
pub mod plot;
pub mod schedule;
