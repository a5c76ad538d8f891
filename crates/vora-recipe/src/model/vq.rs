//! A Chameleon's image tokenizer, and its training.

use serde::{Deserialize, Serialize};
use vora_vision::VqConfig;

/// An image tokenizer and its training; the keys of its sizes are those of HF's `ChameleonVQVAEConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VqTraining {
    /// Entries of the codebook.
    pub num_embeddings: i64,
    /// Channels of an entry.
    pub embed_dim: i64,
    /// Channels after the first convolution, and before the codebook.
    pub base_channels: i64,
    /// Channels of each level over `base_channels`; each level after the first halves the sides.
    pub channel_multiplier: Vec<i64>,
    /// Residual blocks of a level.
    pub num_res_blocks: usize,
    /// Groups of channels that a norm takes together; 32 in Meta's.
    pub norm_num_groups: i64,
    /// Steps of AdamW.
    pub steps: u64,
    /// Pictures a step.
    pub batch_size: u64,
    /// The learning rate.
    pub learning_rate: f64,
}

impl Default for VqTraining {
    /// One code of 256 for 8 x 8 pixels: trains on a CPU.
    fn default() -> Self {
        Self {
            num_embeddings: 256,
            embed_dim: 16,
            base_channels: 32,
            channel_multiplier: vec![1, 1, 1, 1],
            num_res_blocks: 1,
            norm_num_groups: 8,
            steps: 300,
            batch_size: 16,
            learning_rate: 2e-3,
        }
    }
}

impl VqTraining {
    /// The tokenizer of pictures of `image_size` pixels a side.
    pub fn config(&self, image_size: i64) -> VqConfig {
        VqConfig {
            embed_dim: self.embed_dim,
            num_embeddings: self.num_embeddings,
            latent_channels: self.base_channels,
            resolution: image_size,
            base_channels: self.base_channels,
            channel_multiplier: self.channel_multiplier.clone(),
            num_res_blocks: self.num_res_blocks,
            norm_num_groups: self.norm_num_groups,
            attn_type: Some("none".to_owned()),
            ..VqConfig::default()
        }
    }
}
