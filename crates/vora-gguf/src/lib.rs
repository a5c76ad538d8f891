//! GGUF, llama.cpp's one-file format: metadata and tensors, and the language model in it under the names and with the
//! `config.json` that HF has for it. Pure Rust over bytes that the caller read or mapped, or over a
//! [`folder`]; and such a file [written](mod@write). It computes with no tensor but to quantise it, and links no libtorch.
//!
//! ```
//! use vora_gguf::{Gguf, TensorKind};
//!
//! # fn main() -> anyhow::Result<()> {
//! // Version 3, one tensor, no metadata; then the tensor's name, dimensions (2, 1), kind F32 and place.
//! let mut bytes = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
//! bytes.extend(b"\x01\0\0\0\0\0\0\0w\x02\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
//! bytes.resize(bytes.len().next_multiple_of(32), 0);
//! bytes.extend([1f32, -2.0].iter().flat_map(|x| x.to_le_bytes()));
//!
//! let file = Gguf::parse(bytes)?;
//! let info = file.info("w").expect("it is listed");
//! assert_eq!((info.shape(), info.kind()), (&[1, 2][..], TensorKind::F32));
//! assert_eq!(file.tensor("w")?, [1.0, -2.0]);
//! # Ok(())
//! # }
//! ```

mod config;
mod file;
pub mod folder;
mod kind;
mod llm;
mod sentencepiece;
mod tokenizer;
pub mod write;

pub use file::{Gguf, TensorInfo};
pub use kind::TensorKind;
pub use llm::Llm;
