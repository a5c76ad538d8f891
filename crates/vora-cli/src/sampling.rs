//! How an answer's tokens are chosen, and how many there may be.

use anyhow::Result;
use vora_infer::{Request, SamplingParams};

/// The rules of an answer.
#[derive(Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most likely token each time
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Keep the k most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the most likely tokens that make up this share
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Above 1, tokens already said become less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens at most
    #[arg(long, default_value_t = Request::MAX_NEW_TOKENS)]
    pub(crate) max_new_tokens: usize,
}

impl SamplingArgs {
    /// The rules, within their ranges.
    pub(crate) fn params(&self) -> Result<SamplingParams> {
        let params = SamplingParams::default()
            .with_temperature(self.temperature)
            .with_top_k(self.top_k)
            .with_top_p(self.top_p)
            .with_repetition_penalty(self.repetition_penalty)
            .with_seed(self.seed);
        params.validate()?;
        Ok(params)
    }
}
