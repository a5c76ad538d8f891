//! From the run file to what a model is fed: how words and pictures are prepared, and the sources of samples.

mod pictures;
mod preparation;
mod sources;

pub use pictures::Pictures;
pub use preparation::preparation;
pub(crate) use preparation::{llm_folder, preparation_over};
pub(crate) use sources::of_fetch;
pub use sources::{HeldOut, Sources, held_out, training};
