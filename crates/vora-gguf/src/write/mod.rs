//! A language model written as llama.cpp's converter writes it: names, order of rows, metadata, tokenizer.

mod file;
mod llm;
mod quantise;
mod tokenizer;

pub use file::{MetadataValue, Writer};
pub use llm::{LlmMetadata, LlmWriter, RopeScaling};
pub use quantise::FileKind;
