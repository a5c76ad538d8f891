//! Counts of right answers by question type.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vora_run::eval::Score;

/// Counts answers of one split.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    seeing: BTreeMap<String, [u64; 2]>, // asked, right
    blind: BTreeMap<String, [u64; 2]>,
}

impl Tally {
    /// Counts one answer.
    pub fn add(&mut self, kind: &str, right: bool) {
        Self::count(&mut self.seeing, kind, right);
    }

    /// Counts one answer that was given about another picture.
    pub fn add_blind(&mut self, kind: &str, right: bool) {
        Self::count(&mut self.blind, kind, right);
    }

    fn count(counts: &mut BTreeMap<String, [u64; 2]>, kind: &str, right: bool) {
        for kind in [kind, "all"] {
            let count = counts.entry(kind.to_owned()).or_default();
            count[0] += 1;
            count[1] += u64::from(right);
        }
    }

    /// Adds what another process counted of the same split.
    pub fn merge(&mut self, other: Self) {
        for (mine, theirs) in [(&mut self.seeing, other.seeing), (&mut self.blind, other.blind)] {
            for (kind, [asked, right]) in theirs {
                let count = mine.entry(kind).or_default();
                *count = [count[0] + asked, count[1] + right];
            }
        }
    }

    /// The scores by question type.
    pub fn scores(&self) -> BTreeMap<String, Score> {
        let share = |[n, right]: [u64; 2]| right as f64 / n as f64;
        let score = |(kind, &count): (&String, &[u64; 2])| {
            let blind_exact_match = self.blind.get(kind).copied().map(share);
            (kind.clone(), Score { n: count[0], exact_match: share(count), blind_exact_match })
        };
        self.seeing.iter().map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_kind_and_over_all() {
        let mut tally = Tally::default();
        for (kind, right) in [("colour", true), ("colour", false)] {
            tally.add(kind, right);
        }
        tally.add_blind("colour", false);
        let mut parts = Tally::default();
        parts.add("shape", true);
        parts.merge(std::mem::take(&mut tally));
        parts.add("shape", true);
        let tally = parts;
        let scores = tally.scores();
        assert_eq!(scores["colour"], Score { n: 2, exact_match: 0.5, blind_exact_match: Some(0.0) });
        assert_eq!(scores["shape"], Score { n: 2, exact_match: 1.0, blind_exact_match: None });
        assert_eq!(scores["all"], Score { n: 4, exact_match: 0.75, blind_exact_match: Some(0.0) });
    }
}
