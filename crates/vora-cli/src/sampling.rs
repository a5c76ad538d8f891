//! How an answer's tokens are chosen, and how many there may be.

use anyhow::Result;
use vora_infer::{Request, SamplingParams};

/// The rules of an answer; each that is left out is the caller's.
#[derive(Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most likely token each time [default: 0; in a chat as the model's generation_config.json has it, and so the
    /// next three]
    #[arg(long)]
    temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 keeps all [default: 0]
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the most likely tokens that make up this share [default: 1]
    #[arg(long)]
    top_p: Option<f64>,
    /// Above 1, tokens already said become less likely [default: 1]
    #[arg(long)]
    repetition_penalty: Option<f64>,
    /// Of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens at most
    #[arg(long, default_value_t = Request::MAX_NEW_TOKENS)]
    pub(crate) max_new_tokens: usize,
}

impl SamplingArgs {
    /// The rules, within their ranges; `own` has those that were not given.
    pub(crate) fn params(&self, own: SamplingParams) -> Result<SamplingParams> {
        let params = own
            .clone()
            .with_temperature(self.temperature.unwrap_or(own.temperature))
            .with_top_k(self.top_k.unwrap_or(own.top_k))
            .with_top_p(self.top_p.unwrap_or(own.top_p))
            .with_repetition_penalty(self.repetition_penalty.unwrap_or(own.repetition_penalty))
            .with_seed(self.seed);
        params.validate()?;
        Ok(params)
    }
}
