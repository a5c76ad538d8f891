//! What dropout drops: libtorch's generator decides, seeded anew for every layer, so that it is decided by a run's seed
//! and the same again where a layer is computed a second time.

/// Where the random numbers of one training forward begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutSeed(u64);

impl DropoutSeed {
    /// A run's seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another one for every number: a step, a batch of it, a layer.
    #[must_use]
    pub fn at(self, number: u64) -> Self {
        // SplitMix64: libtorch's generator on CPU takes 32 bits of a seed, and all of these have to count in them.
        let mut z = self.0.wrapping_add(number).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(z ^ (z >> 31))
    }

    /// Sets libtorch's generator, the process's one.
    #[expect(clippy::disallowed_methods, reason = "libtorch's dropout takes no other generator")]
    pub(super) fn begin(self) {
        tch::manual_seed(self.0 as i64);
    }
}

/// Held by tests that drop something: they share libtorch's generator.
#[cfg(test)]
pub(super) static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());
