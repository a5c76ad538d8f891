//! The sizes of a VQGAN, under the keys of Hugging Face's `ChameleonVQVAEConfig`.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// `vq_config` of Chameleon's `config.json`; other keys pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VqConfig {
    /// Channels of a codebook entry.
    pub embed_dim: i64,
    /// Entries of the codebook: how many image codes there are.
    pub num_embeddings: i64,
    /// Mean and variance in place of one latent; never so in a VQGAN, and refused.
    pub double_latent: bool,
    /// Channels between the encoder and `quant_conv`.
    pub latent_channels: i64,
    /// Side of the pictures it was trained on, in pixels. It only says which levels `attn_resolutions` means: any sides
    /// that are multiples of [`VqConfig::stride`] can be encoded.
    pub resolution: i64,
    /// Channels of a picture.
    pub in_channels: i64,
    /// Channels after the first convolution.
    pub base_channels: i64,
    /// Channels of each level over `base_channels`; from one level to the next both sides are halved.
    pub channel_multiplier: Vec<i64>,
    /// Residual blocks of a level of the encoder; the decoder has one more.
    pub num_res_blocks: usize,
    /// Groups of channels that a norm takes together. Chameleon's checkpoints do not say it, all code that reads them has 32;
    /// diffusers has the key. With as many groups as channels a picture's brightness gets lost.
    pub norm_num_groups: i64,
    /// Sides of the levels that have attention after each residual block.
    pub attn_resolutions: Option<Vec<i64>>,
    /// Between the convolutions of a residual block while it is trained. Published models have 0; not applied here.
    pub dropout: f64,
    /// `vanilla`; with `none` or nothing, no level and no middle has attention.
    pub attn_type: Option<String>,
}

impl Default for VqConfig {
    /// Chameleon's own: 512 pixels, 8192 codes.
    fn default() -> Self {
        Self {
            embed_dim: 256,
            num_embeddings: 8192,
            double_latent: false,
            latent_channels: 256,
            resolution: 512,
            in_channels: 3,
            base_channels: 128,
            channel_multiplier: vec![1, 1, 2, 2, 4],
            num_res_blocks: 2,
            norm_num_groups: 32,
            attn_resolutions: None,
            dropout: 0.0,
            attn_type: Some("vanilla".to_owned()),
        }
    }
}

impl VqConfig {
    /// Three levels of 32 channels and 32 codes, one code for 4 x 4 pixels: trains on a CPU.
    pub fn tiny() -> Self {
        Self {
            embed_dim: 8,
            num_embeddings: 32,
            latent_channels: 32,
            resolution: 16,
            base_channels: 32,
            channel_multiplier: vec![1, 1, 1],
            num_res_blocks: 1,
            ..Self::default()
        }
    }

    /// Side of the square of pixels that one code stands for: 16 in Chameleon.
    pub fn stride(&self) -> i64 {
        1 << (self.channel_multiplier.len() - 1)
    }

    /// What would otherwise fail inside libtorch, by its key.
    pub(super) fn validate(&self) -> Result<()> {
        let sizes = [
            ("embed_dim", self.embed_dim),
            ("num_embeddings", self.num_embeddings),
            ("latent_channels", self.latent_channels),
            ("in_channels", self.in_channels),
            ("base_channels", self.base_channels),
            ("num_res_blocks", self.num_res_blocks as i64),
            ("norm_num_groups", self.norm_num_groups),
        ];
        for (key, size) in sizes {
            ensure!(size > 0, "{key} is {size}, it must be at least 1");
        }
        let levels = self.channel_multiplier.len();
        ensure!((1..=16).contains(&levels), "channel_multiplier has {levels} levels, it must have 1 to 16");
        for multiplier in [1].iter().chain(&self.channel_multiplier) {
            let channels = self.base_channels.saturating_mul(*multiplier);
            ensure!(
                channels > 0 && channels % self.norm_num_groups == 0,
                "base_channels {} times channel_multiplier {multiplier} does not divide into {} groups \
                 (norm_num_groups)",
                self.base_channels,
                self.norm_num_groups
            );
        }
        ensure!(
            self.resolution > 0 && self.resolution % self.stride() == 0,
            "resolution {} is not a multiple of {}, as the {levels} levels of channel_multiplier need it",
            self.resolution,
            self.stride()
        );
        ensure!(!self.double_latent, "double_latent is true, which no quantiser takes");
        let attn_type = self.attn_type.as_deref().unwrap_or("none");
        ensure!(["vanilla", "none"].contains(&attn_type), "attn_type is `{attn_type}`, known are `vanilla` and `none`");
        Ok(())
    }

    /// Channels of a level; 0 is that of the picture's size.
    pub(super) fn channels(&self, level: usize) -> i64 {
        self.base_channels * self.channel_multiplier[level]
    }

    pub(super) fn has_attention(&self) -> bool {
        self.attn_type.as_deref() == Some("vanilla")
    }

    pub(super) fn has_attention_at(&self, level: usize) -> bool {
        let resolutions = self.attn_resolutions.as_deref().unwrap_or_default();
        self.has_attention() && resolutions.contains(&(self.resolution >> level))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_the_keys_of_a_checkpoint() {
        let json = json!({"attn_resolutions": null, "attn_type": "vanilla", "model_type": "chameleon_vqgan"});
        assert_eq!(serde_json::from_value::<VqConfig>(json).unwrap(), VqConfig::default());
        let config: VqConfig =
            serde_json::from_value(json!({"channel_multiplier": [1, 2], "attn_type": null})).unwrap();
        assert_eq!((config.stride(), config.has_attention()), (2, false));
        config.validate().unwrap();
        assert_eq!(VqConfig::default().stride(), 16);
    }

    #[test]
    fn a_config_that_cannot_be_built_is_refused_by_key() {
        let refuse = |change: fn(&mut VqConfig)| {
            let mut config = VqConfig::tiny();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(refuse(|c| c.embed_dim = 0), "embed_dim is 0, it must be at least 1");
        assert_eq!(refuse(|c| c.channel_multiplier.clear()), "channel_multiplier has 0 levels, it must have 1 to 16");
        assert!(refuse(|c| c.base_channels = 48).contains("does not divide into 32 groups"));
        assert!(refuse(|c| c.channel_multiplier[1] = 0).contains("channel_multiplier 0"));
        assert!(refuse(|c| c.resolution = 18).contains("resolution 18 is not a multiple of 4"));
        assert!(refuse(|c| c.double_latent = true).contains("double_latent"));
        assert!(refuse(|c| c.attn_type = Some("linear".into())).contains("attn_type is `linear`"));
    }
}
