//! What the comparisons with other systems share: processes that take turns on one thread, and the processor's time.

mod answers;
mod process;

pub use answers::answer_seconds;
pub use process::{Process, cpu_seconds};
