//! The dtype that a run computes in.

use anyhow::{Context, Result};
use tch::{Device, Kind};
use vora_recipe::TrainConfig;
use vora_torch::runtime;

/// That of activations and of weights that are not trained.
///
/// # Errors
/// Where the device does not compute in it.
pub(crate) fn kind(config: &TrainConfig, device: Device) -> Result<Kind> {
    match (config.fp16, config.bf16) {
        (true, _) => runtime::kind("f16", device).context("fp16"),
        (false, bf16) => runtime::kind(bf16.map_or("auto", |bf16| if bf16 { "bf16" } else { "f32" }), device),
    }
}
