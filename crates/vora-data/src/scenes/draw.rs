//! Random draws that are the same on every machine: ChaCha8 words, integer arithmetic and single IEEE operations,
//! nothing that a math library or a newer release of a crate could round or spend otherwise.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a stream of draws is for: changing how many draws one purpose takes leaves the others as they were.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    Scene,
    Noise,
    Questions,
    Wording,
    Rejected,
    Size,
    Box,
}

/// The draws of one picture for one purpose.
#[derive(Debug)]
pub(super) struct Draw(ChaCha8Rng);

impl Draw {
    /// The key is the three numbers themselves, so no two pictures share a stream.
    pub(super) fn new(seed: u64, split: u64, index: u64, purpose: Purpose) -> Self {
        let mut key = [0; 32];
        for (bytes, number) in key.chunks_exact_mut(8).zip([seed, split, index, purpose as u64]) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    pub(super) fn word(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// An integer in `0..n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.word()) * n as u64) >> 32) as usize
    }

    /// An integer from `low` to `high`, both included.
    pub(super) fn integer(&mut self, low: i32, high: i32) -> i32 {
        low + self.below((high - low + 1) as usize) as i32
    }

    /// A number in `0.0..1.0`, one of 2^24.
    pub(super) fn unit(&mut self) -> f32 {
        (self.word() >> 8) as f32 / (1 << 24) as f32
    }

    pub(super) fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    pub(super) fn chance(&mut self, probability: f64) -> bool {
        f64::from(self.unit()) < probability
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// An index, each with a probability in proportion to its weight; the weights' sum is above zero.
    pub(super) fn weighted(&mut self, weights: impl IntoIterator<Item = f64> + Clone) -> usize {
        let total: f64 = weights.clone().into_iter().sum();
        let mut left = f64::from(self.unit()) * total;
        let mut last = 0;
        for (idx, weight) in weights.into_iter().enumerate() {
            if weight <= 0.0 {
                continue;
            }
            last = idx;
            if left < weight {
                break;
            }
            left -= weight;
        }
        last
    }

    /// The numbers `0..n` in random order.
    pub(super) fn permutation<const N: usize>(&mut self) -> [usize; N] {
        let mut order = std::array::from_fn(|i| i);
        for i in (1..N).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_shares_and_zero_is_never() {
        let mut draw = Draw::new(1, 2, 3, Purpose::Scene);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[draw.weighted([1.0, 0.0, 3.0, 0.0])] += 1;
        }
        assert_eq!((counts[1], counts[3]), (0, 0));
        assert!((900..1100).contains(&counts[0]), "{counts:?}");
    }

    #[test]
    fn purposes_and_indices_have_streams_of_their_own() {
        let first = |index, purpose| Draw::new(7, 0, index, purpose).word();
        assert_ne!(first(0, Purpose::Scene), first(0, Purpose::Noise));
        assert_ne!(first(0, Purpose::Scene), first(1, Purpose::Scene));
        assert_eq!(first(5, Purpose::Questions), first(5, Purpose::Questions));
    }

    #[test]
    fn a_permutation_holds_each_number_once() {
        let mut order = Draw::new(0, 0, 0, Purpose::Scene).permutation::<4>();
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3]);
    }
}
