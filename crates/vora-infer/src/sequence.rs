//! What a prompt becomes, token by token, whoever runs the decoder.

use anyhow::{Result, ensure};
use vora_model::Input;
use vora_text::{Modality, Span};

use crate::constraint::Progress;
use crate::error::InferError;
use crate::grammar::Grammar;
use crate::{Constraint, FinishReason, Generated, Sampler, SamplingParams};

/// One prompt while an answer to it is generated.
#[derive(Debug)]
pub(crate) struct Sequence<'a> {
    sampler: Sampler,
    progress: Option<Progress<'a>>,
    grammar: Option<Grammar>,
    ids: Vec<i64>,
    max_new_tokens: usize,
    prompt_tokens: i64,
    finish_reason: Option<FinishReason>,
}

impl<'a> Sequence<'a> {
    /// What is to come after each row of `input`, by the rules and up to the length that `wanted` has for it; nowhere more
    /// than the model's `context` leaves.
    ///
    /// # Errors
    /// [`InferError::PromptTooLong`], [`InferError::NoRoomForPicture`], and rules out of their ranges.
    pub(crate) fn of_rows(
        input: &Input,
        context: i64,
        constraint: Option<&'a Constraint<'_>>,
        wanted: &[(&SamplingParams, usize)],
    ) -> Result<Vec<Self>> {
        let row = |((prompt_tokens, words), (params, max_new_tokens)): ((i64, Vec<i64>), &(&SamplingParams, usize))| {
            ensure!(prompt_tokens < context, InferError::PromptTooLong { tokens: prompt_tokens, context });
            let max_new_tokens = (*max_new_tokens).min(usize::try_from(context - prompt_tokens)?);
            Ok(Self {
                sampler: Sampler::new((*params).clone(), &words)?,
                progress: constraint.map(|constraint| constraint.start(input, max_new_tokens)).transpose()?,
                grammar: None,
                ids: Vec::new(),
                max_new_tokens,
                prompt_tokens,
                finish_reason: (max_new_tokens == 0).then_some(FinishReason::Length),
            })
        };
        input.spans.row_lens().zip(words(input)?).zip(wanted).map(row).collect()
    }

    /// The same with an answer of a given form.
    pub(crate) fn with_grammar(self, grammar: Option<Grammar>) -> Self {
        Self { grammar, ..self }
    }

    /// Takes the next token by the logits of all tokens; none where that is one of `stop`, which ends it.
    ///
    /// # Errors
    /// [`InferError::NotFinite`]; where a grammar is too large to go on with.
    pub(crate) fn step(&mut self, logits: &mut [f32], stop: &[i64]) -> Result<Option<i64>> {
        let is_number = |logit: &f32| !logit.is_nan() && *logit < f32::INFINITY;
        ensure!(logits.iter().all(is_number), InferError::NotFinite);
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(logits)?;
        }
        let token = match &mut self.progress {
            None => self.sampler.choose(logits),
            Some(progress) => progress.choose(logits, self.max_new_tokens - self.ids.len(), &mut self.sampler),
        };
        if stop.contains(&token) {
            self.finish_reason = Some(FinishReason::Stop);
            return Ok(None);
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.took(token)?;
        }
        self.ids.push(token);
        if self.progress.as_ref().is_some_and(Progress::is_finished) {
            self.finish_reason = Some(FinishReason::Stop);
        } else if self.ids.len() == self.max_new_tokens {
            self.finish_reason = Some(FinishReason::Length);
        }
        Ok(Some(token))
    }

    /// Ends it for a reason of somebody else's.
    pub(crate) fn end(&mut self, reason: FinishReason) {
        self.finish_reason = Some(reason);
    }

    /// Why it has ended; none while it goes on.
    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// The tokens so far.
    pub(crate) fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// The token that the decoder goes on from; a row that ended before its first one goes on with some token, of which
    /// nothing is read.
    pub(crate) fn last(&self) -> i64 {
        self.ids.last().copied().unwrap_or(0)
    }

    /// Tokens at most.
    pub(crate) fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    /// What it became.
    pub(crate) fn into_generated(self) -> Generated {
        Generated {
            ids: self.ids,
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            prompt_tokens: self.prompt_tokens,
        }
    }
}

/// The ids of each row's prompt, without what stands at image places and after its end.
fn words(input: &Input) -> Result<Vec<Vec<i64>>> {
    let (ids, seq) = (Vec::<i64>::try_from(input.input_ids.view([-1]))?, usize::try_from(input.spans.seq())?);
    let row = |(spans, ids): (&Vec<Span>, &[i64])| {
        let mut words = Vec::new();
        let mut start = 0;
        for span in spans {
            let end = start + span.len() as usize;
            if span.modality() == Modality::Text {
                words.extend_from_slice(&ids[start..end]);
            }
            start = end;
        }
        words
    };
    Ok(input.spans.rows().iter().zip(ids.chunks(seq.max(1))).map(row).collect())
}
