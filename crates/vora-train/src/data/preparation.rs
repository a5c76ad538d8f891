//! What becomes of records before a model sees them, known from the models' configs without their weights: training,
//! a run's `samples/` and `vora data show` all ask here.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, chameleon_processor};
use vora_llm::LlmConfig;
use vora_model::Chameleon;
use vora_vision::EncoderConfig;

use super::pictures;
use crate::config::model::{ModelType, Way};
use crate::config::run::TrainConfig;
use vora_model::Resolve;
use vora_model::trained::{self, VISION};

/// What makes a model's input out of words and pictures.
#[derive(Debug, Clone)]
pub struct Preparation {
    /// Where tokenizer and chat template lie.
    pub llm_folder: PathBuf,
    /// Rows of the embedding that tokens are looked up in.
    pub vocab_size: i64,
    /// What pictures go through.
    pub processor: ImageProcessor,
    /// Side of what becomes one token of a picture, in pixels.
    pub patch_size: i64,
    /// The tokens before and behind every picture.
    pub image_marks: Option<(i64, i64)>,
    /// Whether conversations get the tokens of the tokenizer's post-processor around them.
    pub has_processor: bool,
}

impl Preparation {
    /// That of a run; its models are not opened for it.
    ///
    /// # Errors
    /// Names the key, and the file, that does not fit.
    pub fn open(config: &TrainConfig, resolve: &Resolve<'_>) -> Result<Self> {
        let section = &config.model;
        let side = u32::try_from(section.image_size)?;
        let llm_folder = resolve(&section.llm).context("model.llm")?;
        let llm = LlmConfig::open(&llm_folder).context("model.llm")?;
        let encoder = |name: &str| {
            let folder = resolve(name)?;
            let config = EncoderConfig::open(&folder)?;
            anyhow::Ok((config.processor(&folder)?, config.patch_size()))
        };
        let (own, patch_size, image_marks) = match section.way()? {
            Way::Vora { patch_size } => {
                let processor = match &section.aux_vision {
                    Some(teacher) => encoder(teacher).context("model.aux_vision")?.0,
                    None => ImageProcessor::square(side, IMAGENET_DEFAULT.0, IMAGENET_DEFAULT.1, Resample::Bicubic),
                };
                (processor, patch_size, None)
            }
            Way::Llava { vision_tower } => {
                let (processor, patch_size) = encoder(vision_tower).context("model.vision_tower")?;
                (processor, patch_size, None)
            }
            Way::Chameleon { vqmodel } => {
                let vq = vqmodel.config(section.image_size);
                let chameleon = Chameleon::config_over(&llm, &vq).context("model.llm")?;
                (chameleon_processor(side)?, vq.stride(), Some(Chameleon::image_marks_of(&chameleon)?))
            }
        };
        let pretrained = section.pretrained.as_deref().map(resolve).transpose().context("model.pretrained")?;
        if let Some(folder) = &pretrained {
            if section.model_type == ModelType::Llava {
                ensure!(
                    trained::is_part(folder),
                    "model.pretrained: {} has no {VISION}; it takes a run's final/",
                    folder.display()
                );
            } else {
                let file = folder.join("config.json");
                ensure!(file.is_file(), "model.pretrained: there is no {}", file.display());
            }
        }
        let processor = pictures::processor(config, &own, pretrained.as_deref(), resolve)?;
        let has_processor = section.model_type != ModelType::Vora;
        Ok(Self { llm_folder, vocab_size: llm.vocab_size, processor, patch_size, image_marks, has_processor })
    }
}
