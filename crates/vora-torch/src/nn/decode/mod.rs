//! Decoding on the CPU: some tokens, one of each text or many, through all layers in one call, over weights in one of several
//! widths and keys and values in pages. It knows no model: [`Decoder`] is put together from matrices, norms and sizes.
//!
//! A row's result is the same, bit for bit, whatever other rows a step has, and however many threads there are: every number
//! is summed in one order. Between products everything is f32; a product's input is rounded once, to bf16 for [`Width::Bf16`],
//! to 8 bits with a scale for every 32 numbers for [`Width::Int8`] and [`Width::Int4`].

mod decoder;
mod layer;
mod pages;
mod shape;
mod step;

#[cfg(test)]
mod tests;

pub use crate::packed::{LoraId, PackedLinear, Width};
pub use decoder::Decoder;
pub use layer::{HeadNorm, Layer};
pub use pages::Pages;
pub use shape::DecoderShape;
pub use step::Step;
