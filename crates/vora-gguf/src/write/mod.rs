//! A language model, or the eyes of a LLaVA, written as llama.cpp's converter writes it: names, order of rows, metadata, tokenizer.

mod file;
mod llm;
mod mmproj;
mod model;
mod quantise;
mod tokenizer;

pub use file::{MetadataValue, Writer};
pub use llm::{LlmMetadata, LlmWriter, RopeScaling};
pub use mmproj::{MmprojMetadata, mmproj};
pub use model::ModelWriter;
pub use quantise::FileKind;
