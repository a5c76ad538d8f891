//! How large records may be.

/// No record's text is longer: 16 MiB.
pub(crate) const MAX_LINE: u64 = 16 << 20;

/// No record of a shard is larger, with its images: 64 MiB.
pub(crate) const MAX_RECORD: u64 = 64 << 20;
