//! Sources one after the other.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::source::Source;
use crate::sample::Sample;

/// Several sources with an end, one after the other; shuffled, they mix.
pub struct Chain {
    sources: Vec<(u64, Arc<dyn Source>)>, // with the number of samples up to its end
}

impl Chain {
    /// # Panics
    /// Where a source never ends: nothing after it would be reached.
    pub fn new(sources: impl IntoIterator<Item = Arc<dyn Source>>) -> Self {
        let mut end = 0;
        let with_end = |source: Arc<dyn Source>| {
            end += source.len().expect("a source with an end");
            (end, source)
        };
        Self { sources: sources.into_iter().map(with_end).collect() }
    }
}

impl Source for Chain {
    fn len(&self) -> Option<u64> {
        Some(self.sources.last().map_or(0, |(end, _)| *end))
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let place = self.sources.partition_point(|(end, _)| *end <= index);
        let (_, source) = self.sources.get(place).context("there is no such sample")?;
        let start = if place == 0 { 0 } else { self.sources[place - 1].0 };
        source.sample(index - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources::Numbers;

    #[test]
    fn a_chain_counts_through_its_sources() {
        let numbers = |len| Arc::new(Numbers { len: Some(len), bad: Vec::new() }) as Arc<dyn Source>;
        let chain = Chain::new([numbers(2), numbers(0), numbers(3)]);
        let ids: Vec<_> = (0..5).map(|index| chain.sample(index).unwrap().id).collect();
        assert_eq!((chain.len(), ids.join(" ").as_str()), (Some(5), "0 1 0 1 2"));
        assert!(chain.sample(5).unwrap_err().to_string().contains("no such sample"));
    }
}
