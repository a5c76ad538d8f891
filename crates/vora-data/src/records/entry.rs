//! Records with their images, and files that are read from their start on.

use anyhow::Result;

use super::record::Record;
use super::turns::num_bytes;

/// A record with its images, undecoded.
#[derive(Debug)]
pub(crate) struct Entry {
    /// File, and where in it.
    pub(crate) place: String,
    pub(crate) record: Record,
    pub(crate) images: Vec<Vec<u8>>,
}

impl Entry {
    /// How much it holds.
    pub(crate) fn size(&self) -> u64 {
        let words = self.record.messages.iter().chain(&self.record.rejected).map(num_bytes).sum::<usize>();
        (words + self.images.iter().map(Vec::len).sum::<usize>()) as u64
    }
}

/// Takes an entry; false where no more are wanted.
pub(crate) type Take<'a> = dyn FnMut(Result<Entry>) -> bool + 'a;

/// A file, or a part of one, that is read from its start on.
pub(crate) trait Shard: Send + Sync {
    /// How many records it has, where that is known without reading it.
    fn len(&self) -> Option<u64>;

    /// Hands over its records after the first `skip`, bad ones as errors. An error of its own ends it and counts as
    /// one more record.
    fn read(&self, skip: u64, take: &mut Take<'_>) -> Result<()>;
}
