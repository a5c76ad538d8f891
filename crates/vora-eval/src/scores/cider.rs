//! CIDEr-D of a set of captions (Vedantam et al. 2015), as `pycocoevalcap` computes it.

use std::collections::{HashMap, HashSet};

use super::TokenizedCaption;
use super::ngrams::{Counts, Ngrams, count};

/// Standard deviation of the penalty on captions of another length.
const SIGMA: f64 = 6.0;

/// What everything is multiplied by.
const SCALE: f64 = 10.0;

/// Of a set, one score a caption; the set's is their mean.
///
/// `10/4 sum_n mean_refs exp(-(l_c - l_r)^2 / 2 sigma^2) sum min(g_c, g_r) g_r / (|g_c| |g_r|)`, where `g` are the counts
/// of n-grams times `ln(captions / captions with the n-gram in a reference)`. As there, a length is the number of
/// 2-grams, and an n-gram that is in no reference counts as in one. A set of one picture scores 0: every n-gram of its
/// references is in all of the set.
pub fn cider(captions: &[TokenizedCaption]) -> Vec<f64> {
    let references: Vec<Vec<Counts<'_>>> =
        captions.iter().map(|caption| caption.references.iter().map(|r| count(r)).collect()).collect();
    let mut document_frequency: HashMap<&[&str], f64> = HashMap::new();
    for references in &references {
        let ngrams: HashSet<&[&str]> = references.iter().flatten().flat_map(|c| c.keys().map(Vec::as_slice)).collect();
        for ngram in ngrams {
            *document_frequency.entry(ngram).or_default() += 1.0;
        }
    }
    let num_documents = captions.len() as f64;
    let idf = |ngram: &[&str]| num_documents.ln() - document_frequency.get(ngram).copied().unwrap_or(1.0).ln();
    let score = |(caption, references): (&TokenizedCaption, &Vec<Counts<'_>>)| {
        let candidate = count(&caption.candidate);
        let sum: f64 = references.iter().map(|reference| similarity(&candidate, reference, &idf)).sum();
        SCALE * sum / references.len().max(1) as f64
    };
    captions.iter().zip(&references).map(score).collect()
}

/// The mean over n of the cosines of two captions' weighted counts, the candidate's clipped to the reference's.
fn similarity(candidate: &Counts<'_>, reference: &Counts<'_>, idf: &impl Fn(&[&str]) -> f64) -> f64 {
    let length = |counts: &Counts<'_>| counts[1].values().sum::<u64>() as f64;
    let delta = length(candidate) - length(reference);
    let penalty = (-delta.powi(2) / (2.0 * SIGMA.powi(2))).exp();
    let cosine = |(candidate, reference): (&Ngrams<'_>, &Ngrams<'_>)| {
        let norm = |counts: &Ngrams<'_>| {
            counts.iter().map(|(ngram, &times)| (times as f64 * idf(ngram)).powi(2)).sum::<f64>().sqrt()
        };
        let common = |(ngram, &times): (&Vec<&str>, &u64)| {
            let in_reference = reference.get(ngram).map_or(0.0, |&times| times as f64 * idf(ngram));
            (times as f64 * idf(ngram)).min(in_reference) * in_reference
        };
        let norms = norm(candidate) * norm(reference);
        if norms == 0.0 { 0.0 } else { candidate.iter().map(common).sum::<f64>() / norms }
    };
    let cosines: f64 = candidate.iter().zip(reference).map(cosine).sum();
    penalty * cosines / candidate.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scores::golden::{assert_near, golden_captions};

    #[test]
    fn matches_pycocoevalcap() {
        for (captions, expected) in golden_captions() {
            for (found, expected) in cider(&captions).into_iter().zip(expected["cider"].as_array().unwrap()) {
                assert_near(found, expected);
            }
        }
    }

    #[test]
    fn one_picture_alone_tells_nothing() {
        assert_eq!(cider(&[TokenizedCaption::new("a dog", &["a dog".to_owned()])]), [0.0]);
        assert!(cider(&[]).is_empty());
    }
}
