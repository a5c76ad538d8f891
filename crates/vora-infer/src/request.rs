//! What is asked of an assistant: pictures, a conversation about them, and how its answer is written.

use std::borrow::Cow;

use vora_image::RgbImage;
use vora_text::Message;

use crate::SamplingParams;

/// A conversation that waits for an answer.
///
/// ```
/// use vora_infer::{Request, SamplingParams};
///
/// let pictures = [vora_image::RgbImage::new(64, 64)];
/// let request = Request::question(&pictures, "What color is the circle?")
///     .with_sampling(SamplingParams::default().with_temperature(0.7))
///     .with_max_new_tokens(32);
/// ```
#[derive(Debug, Clone)]
pub struct Request<'a> {
    pub(crate) images: &'a [RgbImage],
    pub(crate) messages: Cow<'a, [Message]>,
    pub(crate) sampling: SamplingParams,
    pub(crate) max_new_tokens: usize,
}

impl<'a> Request<'a> {
    /// As many tokens an answer may have unless it is told otherwise.
    pub const MAX_NEW_TOKENS: usize = 256;

    /// The answer to the last of `messages`, a conversation that has a place for each of `images`: the likeliest token each
    /// time, up to [`Request::MAX_NEW_TOKENS`].
    pub fn new(images: &'a [RgbImage], messages: impl Into<Cow<'a, [Message]>>) -> Self {
        let (sampling, max_new_tokens) = (SamplingParams::default(), Self::MAX_NEW_TOKENS);
        Self { images, messages: messages.into(), sampling, max_new_tokens }
    }

    /// The answer to one question about `images`, which stand before it.
    pub fn question(images: &'a [RgbImage], question: &str) -> Self {
        Self::new(images, vec![Message::question_about(images.len(), question)])
    }

    /// The same with other rules for choosing tokens.
    #[must_use]
    pub fn with_sampling(self, sampling: SamplingParams) -> Self {
        Self { sampling, ..self }
    }

    /// The same with another length.
    #[must_use]
    pub fn with_max_new_tokens(self, max_new_tokens: usize) -> Self {
        Self { max_new_tokens, ..self }
    }
}
