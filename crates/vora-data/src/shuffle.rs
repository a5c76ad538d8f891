//! A random order of any length without a list of it: where number `i` goes is computed.

/// One order of the numbers below `len`, of as many as there are keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shuffle {
    len: u64,
    half_bits: u32, // of a number, which is cut into two halves
    keys: [u64; 6],
}

impl Shuffle {
    pub(crate) fn new(len: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let mut state = mix(seed ^ mix(epoch));
        let keys = std::array::from_fn(|_| {
            state = mix(state);
            state
        });
        Self { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Where `i` goes: a Feistel network maps the numbers of `2 * half_bits` bits onto themselves, at most four times
    /// as many as there are; one that falls outside of `len` is mapped again until it falls inside.
    pub(crate) fn get(&self, i: u64) -> u64 {
        debug_assert!(i < self.len);
        let mask = (1 << self.half_bits) - 1;
        let mut number = i;
        loop {
            let (mut left, mut right) = (number >> self.half_bits, number & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            number = left << self.half_bits | right;
            if number < self.len {
                return number;
            }
        }
    }
}

/// SplitMix64's step: every bit of the input reaches every bit of the output.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once() {
        for len in [1, 2, 3, 5, 64, 65, 1000, 4097] {
            let shuffle = Shuffle::new(len, 7, 0);
            let mut numbers: Vec<_> = (0..len).map(|i| shuffle.get(i)).collect();
            numbers.sort_unstable();
            assert!(numbers.into_iter().eq(0..len), "{len}");
        }
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own() {
        let order = |seed, epoch| (0..100).map(|i| Shuffle::new(100, seed, epoch).get(i)).collect::<Vec<_>>();
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_eq!(order(1, 0), order(1, 0));
    }

    #[test]
    fn places_are_even() {
        // Over many keys each number is as often first as any other.
        let mut first = [0; 10];
        for seed in 0..10_000 {
            first[Shuffle::new(10, seed, 3).get(0) as usize] += 1;
        }
        assert!(first.iter().all(|count| (880..1120).contains(count)), "{first:?}");
    }

    #[test]
    fn large_lengths_work() {
        let shuffle = Shuffle::new(u64::MAX, 1, 1);
        assert_ne!(shuffle.get(0), shuffle.get(1));
    }
}
