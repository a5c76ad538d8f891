//! Records as they lie in files: JSON with images beside it, parquet files, WebDataset's tar shards.

mod conversations;
mod entry;
mod frames;
mod image_folder;
mod keys;
mod limits;
mod parquet;
mod preference;
mod record;
mod tar;
mod turns;

pub use conversations::Conversations;
#[cfg(test)]
pub(crate) use entry::Take;
pub(crate) use entry::{Entry, Shard};
pub use frames::short_name;
pub use keys::RecordKeys;
pub(crate) use parquet::row_groups;
pub use record::Record;
pub(crate) use tar::{GzipTar, TarIndex};
pub(crate) use turns::shown;
pub use turns::{IMAGE_PLACE, NO_MARK};
