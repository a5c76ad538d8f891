//! ROUGE-L of captions (Lin 2004), as `pycocoevalcap` computes it.

use super::TokenizedCaption;

/// How much more recall counts than precision.
const BETA: f64 = 1.2;

/// Of one caption: the F-measure of the longest common subsequence of words, `(1 + b^2) p r / (r + b^2 p)` with b = 1.2.
///
/// Precision and recall are each the best over the references. An empty sentence counts as one empty word, as it does
/// there.
pub fn rouge_l(caption: &TokenizedCaption) -> f64 {
    let candidate: Vec<&str> = caption.candidate.split(' ').collect();
    let (mut precision, mut recall) = (0.0_f64, 0.0_f64);
    for reference in &caption.references {
        let reference: Vec<&str> = reference.split(' ').collect();
        let common = longest_common_subsequence(&candidate, &reference) as f64;
        precision = precision.max(common / candidate.len() as f64);
        recall = recall.max(common / reference.len() as f64);
    }
    if precision == 0.0 || recall == 0.0 {
        return 0.0;
    }
    (1.0 + BETA.powi(2)) * precision * recall / (recall + BETA.powi(2) * precision)
}

/// How many words two sentences have in common in the same order.
fn longest_common_subsequence(a: &[&str], b: &[&str]) -> usize {
    let mut lens = vec![0; b.len() + 1]; // with what was seen of a, by how much was seen of b
    for word in a {
        let mut diagonal = 0;
        for (i, other) in b.iter().enumerate() {
            let above = lens[i + 1];
            lens[i + 1] = if word == other { diagonal + 1 } else { above.max(lens[i]) };
            diagonal = above;
        }
    }
    lens[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::golden::{assert_near, golden_captions};

    #[test]
    fn matches_pycocoevalcap() {
        for (captions, expected) in golden_captions() {
            for (caption, expected) in captions.iter().zip(expected["rouge_l"].as_array().unwrap()) {
                assert_near(rouge_l(caption), expected);
            }
        }
    }
}
