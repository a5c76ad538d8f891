//! The decoding loop: prefill once, then one token at a time from the cache.

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_model::{Input, Vora};

use crate::{Sampler, SamplingParams};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// `max_new_tokens` were made.
    Length,
    /// The callback asked for it.
    Cancelled,
}

/// What a generation made.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The new tokens, the stop token not among them.
    pub ids: Vec<i64>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt, image patches among them.
    pub prompt_tokens: i64,
}

/// Generates after the prompt in `input` (one row) until a token of `stop` or `max_new_tokens`; `on_token` sees each
/// new token and may answer false to end it.
///
/// # Errors
/// Where the prompt does not fit the model's context, or pictures and places do not match.
pub fn generate(
    model: &Vora,
    input: &Input,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
    mut on_token: impl FnMut(i64) -> bool,
) -> Result<Generated> {
    ensure!(input.spans.rows.len() == 1, "one prompt at a time, not {}", input.spans.rows.len());
    let prompt_tokens = input.spans.num_tokens();
    let context = model.config().llm.max_position_embeddings;
    ensure!(
        prompt_tokens < context,
        "the prompt has {prompt_tokens} tokens, the model's context is {context}: shorten the text or use fewer pictures"
    );
    let room = usize::try_from(context - prompt_tokens)?;
    let max_new_tokens = max_new_tokens.min(room);
    let device = input.input_ids.device();

    tch::no_grad(|| {
        let mut sampler = Sampler::new(params.clone(), &words(input)?)?;
        let mut cache = model.llm().new_cache(1, prompt_tokens + max_new_tokens as i64)?;
        let plan = model.plan(&input.spans)?;
        let mut logits = model.llm().prefill(&model.embed(input)?, &plan, &mut cache)?; // [1, vocab]
        let mut ids = Vec::new();
        let finish_reason = loop {
            if ids.len() == max_new_tokens {
                break FinishReason::Length;
            }
            let token = sampler.next_token(&logits.get(0))?;
            if stop.contains(&token) {
                break FinishReason::Stop;
            }
            ids.push(token);
            if !on_token(token) {
                break FinishReason::Cancelled;
            }
            if ids.len() < max_new_tokens {
                let token = Tensor::from_slice(&[token]).view([1, 1]).to_device(device);
                logits = model.llm().decode_step(&token, &mut cache)?;
            }
        };
        Ok(Generated { ids, finish_reason, prompt_tokens })
    })
}

/// The ids of the prompt, without what stands at image places.
fn words(input: &Input) -> Result<Vec<i64>> {
    let mut ids = Vec::<i64>::try_from(input.input_ids.view([-1]))?;
    for place in input.spans.image_positions().into_iter().rev() {
        ids.remove(usize::try_from(place)?);
    }
    Ok(ids)
}
