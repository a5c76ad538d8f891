//! Counts of the n-grams of a sentence.

use std::collections::HashMap;

/// The longest n-grams that are counted.
pub const MAX_ORDER: usize = 4;

/// How often each run of words of one length comes.
pub(super) type Ngrams<'a> = HashMap<Vec<&'a str>, u64>;

/// The n-grams of 1 to [`MAX_ORDER`] words, by their length less one.
pub(super) type Counts<'a> = [Ngrams<'a>; MAX_ORDER];

/// Counts the n-grams of words with white space between them.
pub(super) fn count(sentence: &str) -> Counts<'_> {
    let words: Vec<&str> = sentence.split_whitespace().collect();
    let mut counts = Counts::default();
    for (n, counts) in (1..).zip(&mut counts) {
        for ngram in words.windows(n) {
            *counts.entry(ngram.to_vec()).or_default() += 1;
        }
    }
    counts
}
