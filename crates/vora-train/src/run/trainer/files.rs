//! The files of a checkpoint beside the model's own.

pub(super) const CONFIG: &str = "config.yaml";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
pub(super) const EMA: &str = "ema.safetensors";
pub(super) const TEACHER_MEAN: &str = "teacher_mean.safetensors";
