//! Matrices as decoding reads them, in one of several widths: a weight that is stored in few bits is one, too.

mod linear;
mod lora_id;
mod width;

pub use linear::PackedLinear;
pub use lora_id::LoraId;
pub use width::Width;
