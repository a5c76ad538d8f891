//! The RMS norm of an architecture: of the residual stream, and of heads.

use anyhow::Result;
use vora_torch::nn::RmsNorm;
use vora_torch::weights::Weights;

use crate::config::LlmConfig;

/// Takes `weight` of a norm over `size` numbers, which Gemma 3 counts from one.
///
/// # Errors
/// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
pub(crate) fn rms_norm(config: &LlmConfig, weights: &Weights, size: i64) -> Result<RmsNorm> {
    match config.architecture().norm_plus_one {
        true => RmsNorm::load_plus_one(weights, size, config.rms_norm_eps),
        false => RmsNorm::load(weights, size, config.rms_norm_eps),
    }
}
