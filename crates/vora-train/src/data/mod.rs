//! From the run file to the sources of samples.

mod sources;

pub(crate) use sources::of_fetch;
pub use sources::{HeldOut, Sources, held_out, training};
