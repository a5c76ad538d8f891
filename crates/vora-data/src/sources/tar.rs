//! Samples of plain tar files.

use std::sync::Arc;

use anyhow::Result;

use super::source::Source;
use crate::maker::SampleMaker;
use crate::records::TarIndex;
use crate::sample::Sample;

/// Records of a plain tar file, by number.
pub(crate) struct TarSource {
    records: TarIndex,
    maker: Arc<SampleMaker>,
}

impl TarSource {
    /// All records of one file.
    pub(crate) fn new(records: TarIndex, maker: Arc<SampleMaker>) -> Self {
        Self { records, maker }
    }
}

impl Source for TarSource {
    fn len(&self) -> Option<u64> {
        Some(self.records.len())
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        self.maker.entry(&self.records.entry(index)?)
    }
}
