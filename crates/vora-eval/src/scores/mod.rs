//! Scores of answers against what was expected: pure functions on strings, each equal to the published scorer named at it.
//!
//! Exact match, VQA accuracy, yes/no as POPE reports it, for captions BLEU, ROUGE-L and CIDEr on the words that
//! [`ptb_tokenize`] makes; for descriptions of scenes, which have no published scorer, whether they tell the same; and for boxes
//! whether they cover the same at an IoU of 0.5. They know no model and read no file.

mod bleu;
mod caption;
mod cider;
mod description;
mod exact_match;
#[cfg(test)]
mod golden;
mod judged;
mod ngrams;
mod ptb;
mod rouge_l;
mod vqa;
mod yes_no;

pub use bleu::bleu;
pub use caption::TokenizedCaption;
pub use cider::cider;
pub use description::same_description;
pub use exact_match::exact_match;
pub(crate) use judged::has_many_right;
pub use judged::is_right;
pub use ngrams::MAX_ORDER;
pub use ptb::ptb_tokenize;
pub use rouge_l::rouge_l;
pub use vqa::{normalize_answer, vqa_accuracy};
pub use yes_no::{YesNo, says_yes};
