//! What a model learns from one record: token ids with places for images, and which of them are learned.

use std::ops::Range;

use vora_image::Pixels;
use vora_text::Span;

/// Stands where nothing is learned.
pub const IGNORE_INDEX: i64 = -100;

/// What a model learns from one record.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The record's id.
    pub id: String,
    /// `[seq]`; a token that nothing follows is left out, it is only a target.
    pub input_ids: Vec<i64>,
    /// `[seq]`: at each token the one that is to follow it, where the assistant says that, else [`IGNORE_INDEX`].
    /// What follows in the text need not be the next in `input_ids`, as branches follow each other there.
    pub targets: Vec<i64>,
    /// Which tokens are text, which an image, and which branch they lie on.
    pub spans: Vec<Span>,
    /// The images, in the order of their places.
    pub images: Vec<Pixels>,
    /// What was asked, in the order of the answers' tokens.
    pub questions: Vec<QuestionSpan>,
    /// Answers at its end that were left out, with what was asked, as they would not fit.
    pub cut_answers: usize,
    /// What of its record was not taken as it stands, in words.
    pub notes: Vec<String>,
}

impl Sample {
    /// Takes off its first `len` tokens, which are text on the trunk.
    pub(crate) fn drop_start(&mut self, len: usize) {
        self.input_ids.drain(..len);
        self.targets.drain(..len);
        let mut left = len as i64;
        self.spans.retain_mut(|span| {
            let dropped = left.min(span.len());
            left -= dropped;
            if dropped > 0 && dropped < span.len() {
                *span = span.with_len(span.len() - dropped);
                return true;
            }
            dropped == 0
        });
        for question in &mut self.questions {
            question.tokens = question.tokens.start - len..question.tokens.end - len;
        }
    }
}

/// A question, and where its answer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuestionSpan {
    /// What it is about: a [question type of scenes](crate::scenes::QuestionKind), or `turn` in a conversation.
    pub kind: String,
    /// The question.
    pub question: String,
    /// The answer.
    pub answer: String,
    /// The tokens that predict the answer, the one that ends the turn included: `targets` has it in this range.
    pub tokens: Range<usize>,
    /// Whether the answer is the rejected one of a pair; the chosen one stands right before it.
    pub is_rejected: bool,
}
