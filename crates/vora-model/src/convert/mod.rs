//! One checkpoint layout into another, by names alone: no model is built, and no more than one tensor is in memory.
//!
//! A [`Conversion`] is planned from the headers of the files; its [`Report`] says what becomes of every tensor before
//! anything is written. What is kept or renamed keeps its bytes unless another dtype is asked for.

mod conversion;
mod gguf;
mod head;
mod layout;
mod mmproj;
mod options;
mod plan;
mod published;
mod report;
mod side_files;
mod source;
mod step;

pub use conversion::Conversion;
pub use layout::Layout;
pub use options::Options;
pub use report::{Change, FileReport, Report, ShardReport, TensorReport};
