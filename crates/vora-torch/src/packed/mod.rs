//! Matrices as decoding reads them, in one of several widths: a weight that is stored in few bits is one, too.

mod linear;
mod width;

pub use linear::PackedLinear;
pub use width::Width;
