//! The files of a checkpoint beside the model's own.

pub(super) const CONFIG: &str = "config.yaml";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";

/// What the names of shares of it begin with.
pub(super) const OPTIMIZER_SHARES: &str = "optimizer-";

/// The share of one of several processes.
pub(super) fn optimizer_share(rank: usize, world_size: usize) -> String {
    format!("{OPTIMIZER_SHARES}{rank}-of-{world_size}.safetensors")
}

pub(super) const EMA: &str = "ema.safetensors";
pub(super) const TEACHER_MEAN: &str = "teacher_mean.safetensors";
