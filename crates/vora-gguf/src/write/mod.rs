//! A language model, or the eyes of one that sees, written as llama.cpp's converter writes it: names, order of rows, metadata, tokenizer.

mod clip;
mod file;
mod gemma4;
mod llm;
mod mmproj;
mod model;
mod quantise;
mod tokenizer;

pub use file::{MetadataValue, Writer};
pub use gemma4::{Gemma4EyesMetadata, gemma4_eyes};
pub use llm::{LlmMetadata, LlmWriter, RopeScaling};
pub use mmproj::{MmprojMetadata, mmproj};
pub use model::ModelWriter;
pub use quantise::FileKind;
