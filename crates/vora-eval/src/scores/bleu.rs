//! BLEU of a set of captions (Papineni et al. 2002), as `pycocoevalcap` computes it.

use super::TokenizedCaption;
use super::ngrams::{Counts, MAX_ORDER, count};

/// Of a set: BLEU-1, BLEU-2, BLEU-3 and BLEU-4; zeros of an empty one.
///
/// `(prod_k correct_k / guessed_k)^(1/n)` over the n-grams of all captions together, times `exp(1 - 1/ratio)` where the
/// captions are shorter than their references: `ratio` is their words over those of the references nearest in length,
/// of which the shorter where two are as near.
pub fn bleu(captions: &[TokenizedCaption]) -> [f64; MAX_ORDER] {
    let [mut guessed, mut correct] = [[0.0; MAX_ORDER]; 2];
    let (mut words, mut reference_words) = (0, 0);
    for caption in captions {
        let len = caption.candidate.split_whitespace().count();
        let candidate = count(&caption.candidate);
        let references: Vec<Counts<'_>> = caption.references.iter().map(|reference| count(reference)).collect();
        for (order, counts) in candidate.iter().enumerate() {
            guessed[order] += len.saturating_sub(order) as f64;
            for (ngram, &times) in counts {
                let most = references.iter().filter_map(|reference| reference[order].get(ngram)).max();
                correct[order] += times.min(most.copied().unwrap_or(0)) as f64;
            }
        }
        let lens = caption.references.iter().map(|reference| reference.split_whitespace().count());
        words += len;
        reference_words += lens.min_by_key(|&other| (other.abs_diff(len), other)).unwrap_or(0);
    }
    // Both as there: nothing guessed is 0, not 0/0.
    let (small, tiny) = (1e-9, 1e-15);
    let ratio = (words as f64 + tiny) / (reference_words as f64 + small);
    let brevity_penalty = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    std::array::from_fn(|order| {
        product *= (correct[order] + tiny) / (guessed[order] + small);
        product.powf(1.0 / (order as f64 + 1.0)) * brevity_penalty
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::golden::{assert_near, golden_captions};

    #[test]
    fn matches_pycocoevalcap() {
        for (captions, expected) in golden_captions() {
            for (order, found) in bleu(&captions).into_iter().enumerate() {
                assert_near(found, &expected["bleu"][order]);
            }
        }
    }

    #[test]
    fn nothing_scores_nothing() {
        assert_eq!(bleu(&[]), [0.0; 4]);
    }
}
