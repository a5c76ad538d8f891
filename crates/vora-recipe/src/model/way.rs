//! The way that a run file's model sees.

use anyhow::{Context, Result, bail};

use super::config::ModelConfig;
use super::model_type::ModelType;
use super::vq::VqTraining;

/// The way a model sees, with the keys that it cannot do without.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Way<'a> {
    /// By adapters in the LLM.
    Vora {
        /// Side of a patch, in pixels.
        patch_size: i64,
    },
    /// Through an encoder.
    Llava {
        /// The encoder, a folder or a name on the hub.
        vision_tower: &'a str,
    },
    /// By tokens.
    Chameleon {
        /// The image tokenizer and its training.
        vqmodel: &'a VqTraining,
    },
    /// By the matrix that it was pretrained with.
    Gemma4Unified,
}

impl ModelConfig {
    /// The way the model sees. Keys are set one by one, by the file and by overrides, so what is missing shows only here.
    ///
    /// # Errors
    /// Names the key that is missing; a model of a program's own sees in a way that only the program knows.
    pub fn way(&self) -> Result<Way<'_>> {
        Ok(match self.model_type {
            ModelType::Vora => Way::Vora {
                patch_size: self
                    .patch_size
                    .context("model.patch_size is missing, a VoRA cuts pictures into patches")?,
            },
            ModelType::Llava => Way::Llava {
                vision_tower: self
                    .vision_tower
                    .as_deref()
                    .context("model.vision_tower is missing, a LLaVA sees through an encoder")?,
            },
            ModelType::Chameleon => Way::Chameleon {
                vqmodel: self
                    .vqmodel
                    .as_ref()
                    .context("model.vqmodel is missing, a Chameleon reads pictures as its codes")?,
            },
            ModelType::Gemma4Unified => Way::Gemma4Unified,
            ModelType::Own => bail!(
                "model.type is `own`: a program makes such a model itself and hands it to the trainer, by \
                 Student::from_parts of vora-train"
            ),
        })
    }
}
