//! The decoding loop: prefill once, then one token at a time from the cache.

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_model::{Input, VisionLanguageModel};

use crate::constraint::Progress;
use crate::{Constraint, OutputModality, Sampler, SamplingParams};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came, or the picture that was asked for is complete.
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

/// Generates words after the prompt in `input` (one row) until a token of `stop` or `max_new_tokens`; `on_token` sees
/// each new token and may answer false to end it. Tokens that pictures are written with are left out, as in HF's
/// Chameleon; [`generate_within`] takes them.
///
/// # Errors
/// Where the prompt does not fit the model's context, or pictures and places do not match.
pub fn generate(
    model: &dyn VisionLanguageModel,
    input: &Input,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
    on_token: impl FnMut(i64) -> bool,
) -> Result<Generated> {
    let words = model.as_chameleon().map(|chameleon| Constraint::new(OutputModality::Text, chameleon));
    run(model, input, words.as_ref(), params, stop, max_new_tokens, on_token)
}

/// As [`generate`] with the constraint's model, of nothing but what the constraint allows.
///
/// # Errors
/// As [`generate`], and where a picture that has to be made has no room.
pub fn generate_within(
    constraint: &Constraint<'_>,
    input: &Input,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
    on_token: impl FnMut(i64) -> bool,
) -> Result<Generated> {
    run(constraint.model(), input, Some(constraint), params, stop, max_new_tokens, on_token)
}

fn run(
    model: &dyn VisionLanguageModel,
    input: &Input,
    constraint: Option<&Constraint<'_>>,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
    mut on_token: impl FnMut(i64) -> bool,
) -> Result<Generated> {
    ensure!(input.spans.rows.len() == 1, "one prompt at a time, not {}", input.spans.rows.len());
    let prompt_tokens = input.spans.num_tokens();
    let context = model.llm().config().max_position_embeddings;
    ensure!(
        prompt_tokens < context,
        "the prompt has {prompt_tokens} tokens, the model's context is {context}: shorten the text or use fewer pictures"
    );
    let room = usize::try_from(context - prompt_tokens)?;
    let max_new_tokens = max_new_tokens.min(room);
    let device = input.input_ids.device();

    tch::no_grad(|| {
        let mut sampler = Sampler::new(params.clone(), &words(input)?)?;
        let mut progress = constraint.map(|constraint| constraint.start(input, max_new_tokens)).transpose()?;
        let mut cache = model.llm().new_cache(1, prompt_tokens + max_new_tokens as i64)?;
        let plan = model.plan(&input.spans)?;
        let mut logits = model.llm().prefill(&model.embed(input)?, &plan, &mut cache)?; // [1, vocab]
        let mut ids = Vec::new();
        let finish_reason = loop {
            if ids.len() == max_new_tokens {
                break FinishReason::Length;
            }
            let token = match &mut progress {
                None => sampler.next_token(&logits.get(0))?,
                Some(progress) => progress.next_token(&logits.get(0), max_new_tokens - ids.len(), &mut sampler)?,
            };
            if stop.contains(&token) {
                break FinishReason::Stop;
            }
            ids.push(token);
            if !on_token(token) {
                break FinishReason::Cancelled;
            }
            if progress.as_ref().is_some_and(Progress::is_finished) {
                break FinishReason::Stop;
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};
    use vora_llm::{LlmConfig, Span, Spans};
    use vora_model::{Vora, VoraConfig};
    use vora_torch::Weights;

    fn model() -> Vora {
        let config = VoraConfig::new(LlmConfig { max_position_embeddings: 24, ..LlmConfig::tiny(64) }, 12, 4, 8);
        Vora::load(config, &Weights::random(9, Device::Cpu, Kind::Float)).unwrap()
    }

    /// Words, a picture, words, and what was generated so far.
    fn input(new: &[i64]) -> Input {
        let ids = [&[5, 6, 0, 0, 0, 0, 7, 8, 9], new].concat();
        tch::manual_seed(1);
        Input {
            input_ids: Tensor::from_slice(&ids).unsqueeze(0),
            pixel_values: vec![Tensor::randn([3, 8, 8], (Kind::Float, Device::Cpu))],
            spans: Spans { rows: vec![vec![Span::text(2), Span::image(2, 2), Span::text(3 + new.len() as i64)]] },
        }
    }

    fn run(params: &SamplingParams, stop: &[i64], max: usize) -> Generated {
        generate(&model(), &input(&[]), params, stop, max, |_| true).unwrap()
    }

    #[test]
    fn the_cache_changes_no_token() {
        for params in [
            SamplingParams::default(),
            SamplingParams { temperature: 1.0, top_k: 20, seed: 3, ..SamplingParams::default() },
            SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() },
        ] {
            let model = model();
            let mut sampler = Sampler::new(params.clone(), &[5, 6, 7, 8, 9]).unwrap();
            let mut ids = Vec::new();
            for _ in 0..10 {
                let output = tch::no_grad(|| model.forward(&input(&ids), 0)).unwrap();
                let last = output.last_hidden_state.select(1, -1); // [1, hidden]
                ids.push(sampler.next_token(&model.llm().logits(&last).get(0)).unwrap());
            }
            assert_eq!(run(&params, &[], 10).ids, ids, "{params:?}");
        }
    }

    #[test]
    fn it_ends_where_it_is_told_to() {
        let free = run(&SamplingParams::default(), &[], 6);
        assert_eq!((free.ids.len(), free.finish_reason, free.prompt_tokens), (6, FinishReason::Length, 9));
        let end = free.ids[3];
        let first = free.ids.iter().position(|&id| id == end).unwrap();
        let stopped = run(&SamplingParams::default(), &[end], 6);
        assert_eq!((stopped.ids.as_slice(), stopped.finish_reason), (&free.ids[..first], FinishReason::Stop));
        let mut seen = 0;
        let cancelled = generate(&model(), &input(&[]), &SamplingParams::default(), &[], 6, |_| {
            seen += 1;
            seen < 2
        });
        assert_eq!(cancelled.unwrap().finish_reason, FinishReason::Cancelled);
        assert_eq!(seen, 2);
        assert_eq!(run(&SamplingParams::default(), &[], 100).ids.len(), 24 - 9, "up to the context's end");
    }

    #[test]
    fn a_prompt_over_the_context_is_an_error() {
        let long = generate(&model(), &input(&[1; 20]), &SamplingParams::default(), &[], 1, |_| true);
        assert!(long.unwrap_err().to_string().contains("29 tokens, the model's context is 24"));
    }
}
