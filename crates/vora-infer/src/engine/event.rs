//! What an engine tells of a request, in this order.

use crate::{FinishReason, RgbImage};

/// Something that became of a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// It has a place among those that are answered.
    Started {
        /// Tokens of the prompt, image patches among them.
        prompt_tokens: usize,
        /// Of these, the ones that an earlier prompt began with as well, and that were not computed again.
        cached_tokens: usize,
        /// Of the prompt's, those that its pictures became.
        image_tokens: usize,
    },
    /// The answer goes on.
    Text {
        /// The new text, without special tokens; empty where a character is not complete yet, or a stop string may begin.
        text: String,
        /// The tokens since the last such event, where their log-probabilities were asked for.
        tokens: Vec<TokenLogprob>,
    },
    /// A picture of an answer that may have some.
    Image(RgbImage),
    /// The answer is complete.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// Tokens that were generated, the one that ended it not among them.
        completion_tokens: usize,
    },
    /// There is no answer, or no more of it.
    Failed(anyhow::Error),
}

/// A generated token and how likely it was: natural logarithms of the model's own softmax, before biases, penalties,
/// temperature and whatever else changes what is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub id: i64,
    /// Its own bytes, which need not be whole characters.
    pub bytes: Vec<u8>,
    /// The logarithm of its probability.
    pub logprob: f32,
    /// As many of the likeliest tokens in its place as were asked for, the likeliest first: id, bytes, logarithm.
    pub top: Vec<(i64, Vec<u8>, f32)>,
}
