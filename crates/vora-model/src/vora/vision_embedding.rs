//! What a VoRA's pictures go through on their way among the words.

use anyhow::Result;
use tch::Tensor;
use tch::nn::Module;
use vora_torch::weights::Weights;
use vora_vision::{Gemma4VisionConfig, Gemma4VisionEmbedder, PatchEmbed};

use super::{VisionEmbeddingType, VoraConfig};

/// What its [`VisionEmbeddingType`] says. All of it is trained, in f32; what comes out has the dtype of the weights' source.
#[derive(Debug)]
pub enum VisionEmbedding {
    /// The published VoRA's.
    Aimv2(PatchEmbed),
    /// Gemma 4 Unified's.
    Gemma4Unified(Gemma4VisionEmbedder),
}

impl VisionEmbedding {
    pub(super) fn load(config: &VoraConfig, weights: &Weights) -> Result<Self> {
        match config.vision_embedding {
            VisionEmbeddingType::Aimv2 => Ok(Self::Aimv2(
                PatchEmbed::load(&config.patch_embed(), weights)?
                    .with_rms_norm_eps(config.llm.rms_norm_eps)
                    .with_position_table(config.pos_embed),
            )),
            VisionEmbeddingType::Gemma4Unified => {
                let mut gemma = Gemma4VisionConfig::default();
                (gemma.patch_size, gemma.pooling_kernel_size) = (config.patch_size, 1);
                gemma.mm_embed_dim = config.vision_embedding_intermediate_size;
                gemma.output_proj_dims = gemma.mm_embed_dim;
                Ok(Self::Gemma4Unified(Gemma4VisionEmbedder::load(&gemma, config.llm.hidden_size, &weights.trained())?))
            }
        }
    }

    /// Rows and columns of patches in a picture.
    ///
    /// # Errors
    /// Where a side is not a positive multiple of `patch_size`, or has no position.
    pub fn grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        match self {
            Self::Aimv2(embedding) => embedding.grid(height, width),
            Self::Gemma4Unified(embedder) => embedder.grid(height, width),
        }
    }

    /// `[batch, 3, height, width]` -> `[batch, patches, hidden]`, patches row by row
    pub(super) fn forward(&self, pixel_values: &Tensor) -> Tensor {
        match self {
            Self::Aimv2(embedding) => embedding.forward(pixel_values),
            Self::Gemma4Unified(embedder) => embedder.forward(pixel_values),
        }
    }

    /// Its tensors by their names on disk.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        match self {
            Self::Aimv2(embedding) => embedding.tensors(),
            Self::Gemma4Unified(embedder) => embedder.tensors(),
        }
    }
}
