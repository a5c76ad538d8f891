//! What is asked of an assistant: pictures, a conversation about them, and how its answer is written.

use std::borrow::Cow;

use serde_json::Value;
use vora_image::RgbImage;
use vora_text::Message;

use crate::{OutputModality, SamplingParams};

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
    pub(crate) images: Cow<'a, [RgbImage]>,
    pub(crate) messages: Cow<'a, [Message]>,
    pub(crate) sampling: SamplingParams,
    pub(crate) max_new_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) top_logprobs: Option<usize>,
    pub(crate) format: ResponseFormat,
    pub(crate) modality: OutputModality,
    pub(crate) adapter: AdapterChoice,
    pub(crate) max_image_tokens: Option<u32>,
}

/// Which adapters act on a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AdapterChoice {
    /// The model's own, where it has some.
    Own,
    /// None.
    None,
    /// One that was added, by its name.
    Named(String),
}

/// What an answer has to be.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub enum ResponseFormat {
    /// Anything.
    #[default]
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON of this schema.
    JsonSchema(Value),
}

impl<'a> Request<'a> {
    /// As many tokens an answer may have unless it is told otherwise.
    pub const MAX_NEW_TOKENS: usize = 256;

    /// The answer to the last of `messages`, a conversation that has a place for each of `images`: the likeliest token each
    /// time, up to [`Request::MAX_NEW_TOKENS`].
    pub fn new(images: impl Into<Cow<'a, [RgbImage]>>, messages: impl Into<Cow<'a, [Message]>>) -> Self {
        Self {
            images: images.into(),
            messages: messages.into(),
            sampling: SamplingParams::default(),
            max_new_tokens: Self::MAX_NEW_TOKENS,
            stop: Vec::new(),
            top_logprobs: None,
            format: ResponseFormat::Text,
            modality: OutputModality::Text,
            adapter: AdapterChoice::Own,
            max_image_tokens: None,
        }
    }

    /// The answer to one question about `images`, which stand before it.
    pub fn question(images: impl Into<Cow<'a, [RgbImage]>>, question: &str) -> Self {
        let images = images.into();
        let messages = vec![Message::question_about(images.len(), question)];
        Self::new(images, messages)
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

    /// The same, ended before the first of these texts; they stay out of the answer.
    #[must_use]
    pub fn with_stop(self, stop: Vec<String>) -> Self {
        Self { stop, ..self }
    }

    /// The same with the log-probability of each token, and those of the `top` likeliest in its place. An engine gives them.
    #[must_use]
    pub fn with_logprobs(self, top: usize) -> Self {
        Self { top_logprobs: Some(top), ..self }
    }

    /// The same with an answer that has to be of this form. An engine sees to it.
    #[must_use]
    pub fn with_format(self, format: ResponseFormat) -> Self {
        Self { format, ..self }
    }

    /// The same with an answer of pictures, or of words and pictures, for a model that writes them. An engine gives it;
    /// [`Assistant::write`](crate::Assistant::write) is told itself.
    #[must_use]
    pub fn with_modality(self, modality: OutputModality) -> Self {
        Self { modality, ..self }
    }

    /// The same with another budget of tokens for each picture, of a model whose pictures keep their shape.
    #[must_use]
    pub fn with_max_image_tokens(self, max_image_tokens: u32) -> Self {
        Self { max_image_tokens: Some(max_image_tokens), ..self }
    }

    /// The same without the model's adapters, where they are apart from its weights: the language model as it was. An engine
    /// sees to it.
    #[must_use]
    pub fn without_adapters(self) -> Self {
        Self { adapter: AdapterChoice::None, ..self }
    }

    /// The same with the adapter of this name in place of the model's own; see
    /// [`Assistant::add_adapter`](crate::Assistant::add_adapter). An engine sees to it.
    #[must_use]
    pub fn with_adapter(self, name: impl Into<String>) -> Self {
        Self { adapter: AdapterChoice::Named(name.into()), ..self }
    }
}
