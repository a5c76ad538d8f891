//! What the configs of all vision transformers say about sizes, and how it is checked.

use anyhow::{Result, ensure};
use serde::{Deserialize, Deserializer};

/// Both sides of a square: `14` or `[14, 14]`.
pub(crate) fn square<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a size: a whole number, or two alike")]
    enum Side {
        One(i64),
        Two([i64; 2]),
    }
    match Side::deserialize(deserializer)? {
        Side::One(side) => Ok(side),
        Side::Two([height, width]) if height == width => Ok(height),
        Side::Two(sides) => Err(serde::de::Error::custom(format!("{sides:?} is not a square"))),
    }
}

/// The keys that every config has.
pub(crate) struct Sizes {
    pub(crate) hidden_size: i64,
    pub(crate) num_attention_heads: i64,
    pub(crate) num_channels: i64,
    pub(crate) image_size: i64,
    pub(crate) patch_size: i64,
}

impl Sizes {
    /// # Errors
    /// Names the keys that contradict each other.
    pub(crate) fn validate(&self) -> Result<()> {
        let Self { hidden_size, num_attention_heads, num_channels, image_size, patch_size } = *self;
        ensure!(
            num_attention_heads > 0 && hidden_size > 0 && hidden_size % num_attention_heads == 0,
            "hidden_size {hidden_size} does not divide among num_attention_heads {num_attention_heads}"
        );
        ensure!(
            patch_size > 0 && image_size >= patch_size,
            "image_size {image_size} holds no patch of patch_size {patch_size}"
        );
        ensure!(num_channels == 3, "num_channels is {num_channels}, pictures have 3");
        Ok(())
    }

    /// Patches along a side of `image_size`.
    pub(crate) fn side(&self) -> i64 {
        self.image_size / self.patch_size
    }
}
