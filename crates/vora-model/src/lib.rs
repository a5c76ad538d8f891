//! The ways a language model gets to see, on one interface: [`Vora`], which splices the patches of a picture among the
//! word embeddings of a decoder that carries adapters, [`Llava`], which sees through an encoder and a projection,
//! [`Chameleon`], to which pictures are tokens as words are, and [`Gemma4Unified`], which was trained with patches from the
//! start; beside them [`PlainLlm`], which sees nothing. It reads and
//! writes their checkpoint folders; [`open`] takes any of them.
//!
//! It trains nothing and generates nothing: losses live in `vora-student`, decoding loops in `vora-infer`. It reads no
//! image file either; pixels come in as tensors.
//!
//! What libtorch needs in a project of your own: [`vora_torch`].
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use vora_llm::LlmConfig;
//! use vora_text::{Span, Spans};
//! use vora_model::{Input, VisionLanguageModel, Vora, VoraConfig};
//! use vora_torch::weights::Weights;
//!
//! # fn main() -> anyhow::Result<()> {
//! let config = VoraConfig::new(LlmConfig::tiny(64), 32, 14, 28); // 28 px: 2 x 2 patches of 14
//! let model = Vora::load(config, &Weights::random(0, Device::Cpu, Kind::Float))?;
//! let input = Input::new(
//!     Tensor::from_slice(&[5i64, 0, 0, 0, 0, 6, 7]).view([1, 7]), // ids at image places are not read
//!     vec![Tensor::zeros([3, 28, 28], (Kind::Float, Device::Cpu))],
//!     Spans::new(vec![vec![Span::text(1), Span::image(2, 2), Span::text(2)]]),
//! );
//! let output = tch::no_grad(|| model.forward(&input, 0))?;
//! assert_eq!(output.last_hidden_state.size()[..2], [1, 7]);
//! # Ok(())
//! # }
//! ```

mod adapted;
pub mod beside;
mod chameleon;
pub mod convert;
mod few_bits;
mod files;
mod folder;
mod gemma4;
mod llava;
mod model;
pub mod named;
mod plain;
pub mod trained;
mod vora;

pub use adapted::AdaptedLlm;
pub use chameleon::{Chameleon, VQMODEL, VocabularyMapping, image_token_name};
pub use files::{FolderError, Resolve};
pub use folder::{is_vision_language_model, llm_config, open, stored_kind};
pub use gemma4::{Gemma4Unified, Gemma4UnifiedConfig};
pub use llava::{ALL_LINEAR, Llava, LlavaConfig, MmProjectorType};
pub use model::{ImageWriter, Input, VisionLanguageModel};
pub use plain::PlainLlm;
pub use tch;
pub use vora::{HfFiles, VisionEmbedding, VisionEmbeddingType, Vora, VoraConfig};
pub use vora_image::RgbImage;
pub use vora_torch::weights::Weights;
