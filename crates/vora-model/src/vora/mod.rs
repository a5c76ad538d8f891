//! Vision as LoRA: the patches of a picture stand among the word embeddings of a decoder that carries adapters.

mod config;
mod hf;
mod model;
mod vision_embedding;
mod vision_embedding_type;

pub(crate) use config::MERGED;
pub use config::VoraConfig;
pub use hf::HfFiles;
pub(crate) use hf::generation;
pub use model::Vora;
pub use vision_embedding::VisionEmbedding;
pub use vision_embedding_type::VisionEmbeddingType;
