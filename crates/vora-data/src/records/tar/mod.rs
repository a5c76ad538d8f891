//! WebDataset's shards: tar files whose members of one name, up to the first dot of their base name, are one record.
//!
//! `a.json` is a conversation or holds a caption, `a.txt` is a caption; what begins like a picture is one, whatever its
//! name ends in, and several (`a.0.jpg`, `a.1.jpg`) stand in the order of their numbers. A plain tar file is indexed by
//! its headers, a compressed one read as it comes. Names are split, and members left out, as webdataset 1.0.2 does it.

mod archive;
mod group;
mod member;

pub(crate) use archive::{GzipTar, TarIndex};
