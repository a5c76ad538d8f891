//! How long a run is.

use anyhow::{Context, Result};
use vora_data::Source;
use vora_recipe::TrainConfig;

/// Steps of the run, by number or by passes over the data, of so many processes.
///
/// # Errors
/// Where neither says when it ends.
pub(super) fn max_steps(config: &TrainConfig, training: &dyn Source, world_size: usize) -> Result<u64> {
    if let Ok(steps) = u64::try_from(config.max_steps) {
        return Ok(steps);
    }
    let samples = training.len().context("max_steps is -1, but the data never ends")?;
    let per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size;
    Ok((samples as f64 * config.num_train_epochs / per_step as f64).ceil().max(1.0) as u64)
}
