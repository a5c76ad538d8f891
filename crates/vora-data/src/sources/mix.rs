//! Several sources as one, each with its share of the walk.

use std::sync::Arc;

use anyhow::{Result, ensure};

use super::source::Source;
use crate::error::DataError;
use crate::sample::Sample;
use crate::shuffle::Shuffle;

/// Places that are shuffled among each other, so that the sources do not come in a rhythm.
const BLOCK: u64 = 256;

/// Sources that take turns by weight. Which source is where in the walk is computed, not drawn: after `n` places each
/// has come as often as its share of `n` says, to within one for every source, and each is walked in its own order.
pub struct Mix {
    parts: Vec<(u64, Arc<dyn Source>)>, // with its weight
    len: Option<u64>,
}

impl Mix {
    /// Sources with an end, in proportion to their lengths: one pass over all is one over each.
    ///
    /// # Errors
    /// Where how long a source is is not known.
    pub fn by_length(sources: Vec<Arc<dyn Source>>) -> Result<Self> {
        ensure!(
            sources.iter().all(|source| source.len().is_some()),
            "how many records a compressed shard has is not known before it was read: give every one of `data_paths` \
             a `weight`"
        );
        let parts: Vec<_> = sources.into_iter().map(|source| (source.len().unwrap_or_default(), source)).collect();
        Ok(Self { len: Some(parts.iter().map(|(len, _)| len).sum()), parts })
    }

    /// Sources by weight, without an end.
    ///
    /// # Errors
    /// Where a weight is not above 0, or a source has no records.
    pub fn by_weight(sources: Vec<(f64, Arc<dyn Source>)>) -> Result<Self> {
        let sum: f64 = sources.iter().map(|(weight, _)| weight).sum();
        let part = |(weight, source): (f64, Arc<dyn Source>)| {
            ensure!(weight > 0.0 && sum.is_finite(), "the weight of a source is {weight}, it must be above 0");
            ensure!(!source.is_empty(), DataError::no_records("a source"));
            Ok((((weight / sum * (1_u64 << 40) as f64).round() as u64).max(1), source))
        };
        Ok(Self { parts: sources.into_iter().map(part).collect::<Result<_>>()?, len: None })
    }

    /// How often each source came before a place. Each takes its share, rounded down, of what those before it left, so
    /// no count ever falls and they add up to the place.
    fn counts(&self, place: u64) -> Vec<u64> {
        let mut left = u128::from(place);
        let mut weights: u128 = self.parts.iter().map(|(weight, _)| u128::from(*weight)).sum();
        let count = |(weight, _): &(u64, Arc<dyn Source>)| {
            let count = left * u128::from(*weight) / weights.max(1);
            left -= count;
            weights -= u128::from(*weight);
            count as u64
        };
        self.parts.iter().map(count).collect()
    }

    /// The source whose turn it is, and how often it came before.
    fn turn(&self, place: u64, seed: Option<u64>) -> (usize, u64) {
        let place = seed.map_or(place, |seed| self.within_block(place, seed));
        let (before, after) = (self.counts(place), self.counts(place + 1));
        let part = before.iter().zip(&after).position(|(before, after)| after > before);
        let part = part.expect("counts add up to the place");
        (part, before[part])
    }

    fn within_block(&self, place: u64, seed: u64) -> u64 {
        let pass = self.len.map_or(0, |len| place / len * len);
        let start = pass + (place - pass) / BLOCK * BLOCK;
        let len = self.len.map_or(BLOCK, |len| BLOCK.min(pass + len - start));
        start + Shuffle::new(len, seed, start).get(place - start)
    }
}

impl Source for Mix {
    fn len(&self) -> Option<u64> {
        self.len
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        self.walk(index, None)
    }

    fn walk(&self, place: u64, seed: Option<u64>) -> Result<Sample> {
        let (part, place) = self.turn(place, seed);
        // Sources of one length would otherwise go through the same order side by side.
        self.parts[part].1.walk(place, seed.map(|seed| seed.wrapping_add(part as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources::Numbers;

    fn numbers(len: Option<u64>) -> Arc<dyn Source> {
        Arc::new(Numbers { len, bad: Vec::new() })
    }

    #[test]
    fn shares_are_exact_from_the_start_on() {
        let weights = [1.0, 2.5, 0.125, 6.375];
        let mix = Mix::by_weight(weights.map(|weight| (weight, numbers(Some(5)))).to_vec()).unwrap();
        for place in 0..3000_u64 {
            for (count, weight) in mix.counts(place).iter().zip(weights) {
                assert!((*count as f64 - place as f64 * weight / 10.0).abs() < 4.0, "{count} of {place} at {weight}");
            }
        }
        // Shuffled or not, each source is walked without a gap.
        for seed in [None, Some(3)] {
            let mut turns: Vec<_> = (0..10 * BLOCK).map(|place| mix.turn(place, seed)).collect();
            turns.sort_unstable();
            let expected = mix.counts(10 * BLOCK);
            let each = (0..4).flat_map(|part| (0..expected[part]).map(move |n| (part, n)));
            assert!(turns.into_iter().eq(each));
        }
    }

    #[test]
    fn a_pass_by_length_has_every_record_once() {
        let mix = Mix::by_length([300, 0, 7, 20].map(|len| numbers(Some(len))).to_vec()).unwrap();
        assert_eq!(mix.len(), Some(327));
        for (seed, pass) in [(None, 0), (Some(1), 0), (Some(1), 1), (Some(2), 5)] {
            let places = pass * 327..(pass + 1) * 327;
            let mut ids: Vec<i64> = places.map(|place| mix.walk(place, seed).unwrap().input_ids[0]).collect();
            ids.sort_unstable();
            let mut expected: Vec<i64> = [300, 7, 20].into_iter().flat_map(|len| 0..len).collect();
            expected.sort_unstable();
            assert_eq!(ids, expected, "{seed:?} {pass}");
        }
    }

    #[test]
    fn shuffled_turns_have_no_rhythm_but_a_seed() {
        let mix = Mix::by_weight(vec![(1.0, numbers(None)), (1.0, numbers(None))]).unwrap();
        let parts = |seed| (0..BLOCK).map(|place| mix.turn(place, Some(seed)).0).collect::<Vec<_>>();
        let of_rank_0: usize = parts(1).iter().step_by(2).sum();
        assert!((40..88).contains(&of_rank_0), "{of_rank_0} of 128");
        assert_eq!(parts(1), parts(1));
        assert_ne!(parts(1), parts(2));
    }

    #[test]
    fn what_cannot_be_mixed_says_so() {
        let error = Mix::by_length(vec![numbers(None)]).err().unwrap().to_string();
        assert!(error.contains("`weight`"), "{error}");
        let error = Mix::by_weight(vec![(1.0, numbers(None)), (0.0, numbers(None))]).err().unwrap().to_string();
        assert_eq!(error, "the weight of a source is 0, it must be above 0");
    }
}
