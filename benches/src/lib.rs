//! What the comparisons with other systems share: processes that take turns on one thread, and the processor's time.

mod process;

pub use process::{Process, cpu_seconds};
