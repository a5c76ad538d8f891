//! The decoding loop: prefill once, then one token at a time from the cache.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};
use vora_model::{Input, VisionLanguageModel};

use crate::finite::blamed;
use crate::sequence::Sequence;
use crate::{Constraint, FinishReason, Generated, OutputModality, SamplingParams};

/// Generates words after the prompt in `input` (one row) until a token of `stop` or `max_new_tokens`; `on_token` sees
/// each new token and may answer false to end it. Tokens that pictures are written with are left out, as in HF's
/// Chameleon; [`generate_within`] takes them.
///
/// # Errors
/// [`InferError::PromptTooLong`](crate::InferError::PromptTooLong), and where pictures and places do not match.
pub fn generate(
    model: &dyn VisionLanguageModel,
    input: &Input,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
    mut on_token: impl FnMut(i64) -> bool,
) -> Result<Generated> {
    let words = model.image_writer().map(|writer| Constraint::new(OutputModality::Text, writer));
    one(input, || run(model, input, words.as_ref(), &[(params, max_new_tokens)], stop, |_, token| on_token(token)))
}

/// As [`generate`], after each row of `input`, which go through the decoder together. Rows may differ in length; each
/// has a sampler of its own with the same `params`, so that a row gets the tokens that it gets alone, as far as sums in
/// another order allow.
///
/// # Errors
/// As [`generate`], of any row.
pub fn generate_batch(
    model: &dyn VisionLanguageModel,
    input: &Input,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
) -> Result<Vec<Generated>> {
    let words = model.image_writer().map(|writer| Constraint::new(OutputModality::Text, writer));
    let wanted = vec![(params, max_new_tokens); input.spans.rows().len()];
    run(model, input, words.as_ref(), &wanted, stop, |_, _| true)
}

/// As [`generate`] with the constraint's model, of nothing but what the constraint allows.
///
/// # Errors
/// As [`generate`], and [`InferError::NoRoomForPicture`](crate::InferError::NoRoomForPicture) of a picture that has to be made.
pub fn generate_within(
    constraint: &Constraint<'_>,
    input: &Input,
    params: &SamplingParams,
    stop: &[i64],
    max_new_tokens: usize,
    mut on_token: impl FnMut(i64) -> bool,
) -> Result<Generated> {
    let model = constraint.model();
    one(input, || run(model, input, Some(constraint), &[(params, max_new_tokens)], stop, |_, token| on_token(token)))
}

/// What the only row of `input` becomes.
fn one(input: &Input, run: impl FnOnce() -> Result<Vec<Generated>>) -> Result<Generated> {
    let rows = input.spans.rows().len();
    ensure!(rows == 1, "one prompt at a time, not {rows}");
    run()?.pop().context("a row became nothing")
}

/// Goes on from each row of `input` by the rules and up to the length that `wanted` has for it.
fn run(
    model: &dyn VisionLanguageModel,
    input: &Input,
    constraint: Option<&Constraint<'_>>,
    wanted: &[(&SamplingParams, usize)],
    stop: &[i64],
    mut on_token: impl FnMut(usize, i64) -> bool,
) -> Result<Vec<Generated>> {
    let context = model.llm().config().max_position_embeddings;
    let mut rows = Sequence::of_rows(input, context, constraint, wanted)?;
    let device = input.input_ids.device();
    tch::no_grad(|| {
        let room = rows.iter().map(Sequence::max_new_tokens).max().unwrap_or(0);
        let mut cache = model.llm().new_cache(input.spans.batch(), input.spans.seq() + room as i64)?;
        let plan = model.plan(&input.spans)?;
        let mut logits = model.llm().prefill(&model.embed(input)?, &plan, &mut cache)?; // [rows, vocab]
        loop {
            let vocab = usize::try_from(logits.size()[1])?;
            let mut of_rows = Vec::<f32>::try_from(logits.to_kind(Kind::Float).contiguous().view([-1]))?;
            let going = rows.iter_mut().zip(of_rows.chunks_mut(vocab)).enumerate();
            for (i, (row, logits)) in going.filter(|(_, (row, _))| row.finish_reason().is_none()) {
                let token = row.step(logits, stop).map_err(|error| blamed(error, model))?;
                if token.is_some_and(|token| !on_token(i, token)) {
                    row.end(FinishReason::Cancelled);
                }
            }
            if rows.iter().all(|row| row.finish_reason().is_some()) {
                break;
            }
            let tokens: Vec<i64> = rows.iter().map(Sequence::last).collect();
            let tokens = Tensor::from_slice(&tokens).unsqueeze(1).to_device(device); // [rows, 1]
            logits = model.llm().decode_step(&tokens, &mut cache)?;
        }
        anyhow::Ok(())
    })?;
    Ok(rows.into_iter().map(Sequence::into_generated).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;
    use vora_llm::LlmConfig;
    use vora_lora::{ActsOn, LoraConfig};
    use vora_model::{Vora, VoraConfig};
    use vora_text::{Span, Spans};
    use vora_torch::weights::Weights;

    use crate::{InferError, Sampler};

    fn model() -> Vora {
        let config = VoraConfig::new(LlmConfig { max_position_embeddings: 24, ..LlmConfig::tiny(64) }, 12, 4, 8);
        Vora::load(config, &Weights::random(9, Device::Cpu, Kind::Float)).unwrap()
    }

    /// Words, a picture, words, and what was generated so far.
    fn input(new: &[i64]) -> Input {
        let ids = [&[5, 6, 0, 0, 0, 0, 7, 8, 9], new].concat();
        Input::new(
            Tensor::from_slice(&ids).unsqueeze(0),
            vec![fixtures::Random::new(1).normal([3, 8, 8])],
            Spans::new(vec![vec![Span::text(2), Span::image(2, 2), Span::text(3 + new.len() as i64)]]),
        )
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
    fn a_row_of_a_batch_gets_what_it_gets_alone() {
        let text = |ids: &[i64]| {
            Input::new(Tensor::from_slice(ids).unsqueeze(0), Vec::new(), Spans::text(&[ids.len() as i64]))
        };
        let prompts = || vec![input(&[]), text(&[3, 1, 4, 1, 5]), input(&[2, 2, 6]), text(&[60; 20])];
        let free = SamplingParams::default();
        for params in [free.clone(), SamplingParams { repetition_penalty: 1.5, ..free }] {
            let model = model();
            // The last has room for four, and another ends at a token that it makes.
            let stop = [generate(&model, &prompts()[1], &params, &[], 4, |_| true).unwrap().ids[3]];
            let alone = |input: &Input| generate(&model, input, &params, &stop, 9, |_| true).unwrap();
            let expected: Vec<Generated> = prompts().iter().map(alone).collect();
            let batch = Input::concat(prompts()).unwrap();
            assert_eq!(generate_batch(&model, &batch, &params, &stop, 9).unwrap(), expected, "{params:?}");
            assert!(expected.iter().any(|row| row.finish_reason == FinishReason::Stop), "{expected:?}");
            assert!(expected[3].ids.len() <= 4, "{expected:?}");
        }
        let two = Input::concat(vec![text(&[1]), text(&[2, 3])]).unwrap();
        let error = generate(&model(), &two, &SamplingParams::default(), &[], 1, |_| true).unwrap_err();
        assert_eq!(error.to_string(), "one prompt at a time, not 2");
    }

    /// Adapters that a picture switches on: a prompt without one is answered as by the model before it had any, alone and
    /// beside one with a picture; a picture that comes late switches them on for the words before it too.
    #[test]
    fn a_picture_switches_adapters_on_for_its_own_row() {
        let adapted = |acts_on| {
            let lora = LoraConfig { acts_on, ..LoraConfig::new(3, 2) };
            let config = VoraConfig { lora: Some(lora), ..model().config() };
            let weights = Weights::random(9, Device::Cpu, Kind::Float);
            let model = Vora::load(config, &weights).unwrap();
            for (name, tensor) in weights.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
                let values = fixtures::Random::new(name.len() as u64).normal(tensor.size()) * 0.3;
                tch::no_grad(|| tensor.shallow_clone().copy_(&values));
            }
            model
        };
        let text = |ids: &[i64]| {
            Input::new(Tensor::from_slice(ids).unsqueeze(0), Vec::new(), Spans::text(&[ids.len() as i64]))
        };
        let say = |model: &Vora, input: &Input| {
            generate(model, input, &SamplingParams::default(), &[], 5, |_| true).unwrap().ids
        };
        let (plain, everywhere, with_image) = (model(), adapted(ActsOn::All), adapted(ActsOn::WithImage));
        let words = text(&[3, 1, 4, 1, 5]);
        assert_eq!(say(&with_image, &words), say(&plain, &words));
        assert_ne!(say(&everywhere, &words), say(&plain, &words));
        assert_eq!(say(&with_image, &input(&[])), say(&everywhere, &input(&[])));
        let batch = Input::concat(vec![words, input(&[])]).unwrap();
        let rows = generate_batch(&with_image, &batch, &SamplingParams::default(), &[], 5).unwrap();
        assert_eq!(rows[0].ids, say(&plain, &text(&[3, 1, 4, 1, 5])));
        assert_eq!(rows[1].ids, say(&everywhere, &input(&[])));
    }

    #[test]
    fn a_prompt_over_the_context_is_an_error() {
        let long = generate(&model(), &input(&[1; 20]), &SamplingParams::default(), &[], 1, |_| true);
        let error = long.unwrap_err();
        assert!(error.to_string().contains("29 tokens, the model's context is 24"));
        assert_eq!(error.downcast_ref(), Some(&InferError::PromptTooLong { tokens: 29, context: 24 }));
    }
}
