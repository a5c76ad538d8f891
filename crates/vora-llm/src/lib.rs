//! Llama-family, Gemma and Chameleon decoders over libtorch: attention over spans of text and images, sliding windows, a KV
//! cache, hidden states of chosen layers, logits where they are asked for. It knows no pixels: an image is a span of
//! embeddings that somebody else made. It trains nothing, and which token comes next is its caller's choice.
//!
//! What libtorch needs in a project of your own: [`vora_torch`].
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use vora_llm::{AttentionPlan, CausalLm, GenerationConfig, LlmConfig, VisionAttention, greedy};
//! use vora_text::{Span, Spans};
//! use vora_torch::weights::Weights;
//!
//! # fn main() -> anyhow::Result<()> {
//! let weights = Weights::random(42, Device::Cpu, Kind::Float);
//! let llm = CausalLm::load(&LlmConfig::tiny(64), &weights)?;
//! // Two words, an image of two by two patches, one word.
//! let spans = Spans::new(vec![vec![Span::text(2), Span::image(2, 2), Span::text(1)]]);
//! let plan = AttentionPlan::new(&spans, VisionAttention::Bidirectional, Device::Cpu, Kind::Float)?;
//! let inputs_embeds = llm.embed(&Tensor::from_slice(&[[5i64, 3, 0, 0, 0, 0, 9]].concat()).unsqueeze(0));
//! let output = llm.decoder().forward(&inputs_embeds, &plan, 1);
//! assert_eq!(output.hidden_states.len(), 2); // the embeddings, and what the first layer made of them
//! let last = output.last_hidden_state.select(1, -1); // [batch, hidden]
//! assert_eq!(llm.logits(&last).size(), [1, 64]);
//!
//! // Words go on without all that.
//! let texts = llm.generate(&[[5i64, 3]], &GenerationConfig::new(8), greedy)?; // ids before, ids after
//! assert_eq!(texts[0].len(), 8);
//! # Ok(())
//! # }
//! ```

mod architecture;
mod attention;
mod config;
mod decoder;
mod error;
mod head_norm;
mod kv_cache;
mod kv_pages;
mod mlp;
mod norm;
mod rope;
mod rotary;

pub use architecture::{MODEL_TYPES, QkNorm, absent_sizes, hf_class};
pub use attention::{Attention, AttentionPlan, KernelChoice, SharedKeys, VisionAttention, attend};
pub use config::{KeyValues, LayerOverrides, LayerSizes, LlmConfig, TokenIds};
pub use decoder::{
    CausalLm, Decoder, DecoderLayer, DropoutSeed, GenerationConfig, Output, PackedDecoder, PackedStep, Pass, greedy,
};
pub use error::{CacheError, ConfigError};
pub use head_norm::HeadNorm;
pub use kv_cache::KvCache;
pub use kv_pages::{KvPages, PagedRow};
pub use mlp::Mlp;
pub use rope::{RopeParameters, RopeScaling, Rotation};
pub use rotary::{CosSin, Rotary};
pub use tch;
pub use vora_torch::weights::Weights;
